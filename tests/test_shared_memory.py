"""Which of several tensors that share memory stands for the others: as vLLM's sharded_state decides it."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from streamload.shared_memory import without_shared_memory


def test_tied_overlapping_and_empty_tensors() -> None:
    base = torch.arange(24.0).reshape(4, 6)
    other = torch.arange(24.0).reshape(4, 6)
    tensors = {
        "z.whole": base,
        "a.whole": base,
        "part": base[1:3],
        "transposed": base.t(),
        "columns": base[:, :2],
        "other.columns": other[:, :2],
        "left": other.view(-1)[:10],
        "right": other.view(-1)[8:20],
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(1.0),
    }
    found = without_shared_memory(tensors)
    assert list(found) == ["a.whole", "other.columns", "left", "right", "scalar"]
    assert found["a.whole"] is base


@given(st.lists(st.tuples(st.integers(0, 11), st.integers(1, 12), st.integers(1, 3), st.integers(0, 1)), max_size=7))
def test_as_comparing_every_pair_would(drawn: list[tuple[int, int, int, int]]) -> None:
    storages = [torch.arange(50), torch.arange(50)]
    tensors = {
        f"t{number}": storages[which].as_strided((length,), (step,), start)
        for number, (start, length, step, which) in enumerate(drawn)
    }
    assert set(without_shared_memory(tensors)) == _pairwise(tensors)


def _pairwise(tensors: dict[str, torch.Tensor]) -> set[str]:
    """The rule, written down as it is told."""

    def span(tensor: torch.Tensor) -> tuple[int, int]:
        return tensor.data_ptr(), tensor[-1].data_ptr() + tensor.element_size()

    kept = set()
    for name, tensor in tensors.items():
        start, end = span(tensor)
        for other_name, other in tensors.items():
            same = tensor.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
            first, last = span(other)
            if not same or not other.is_contiguous() or start < first or last < end:
                continue
            if first < start or end < last or not tensor.is_contiguous() or other_name < name:
                break
        else:
            kept.add(name)
    return kept
