"""Which tensors share memory: against a rule written out over every pair, and the cases that models have."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from streamload.shared_memory import Memory, covering, extent


@st.composite
def overlapping(draw: st.DrawFn) -> dict[str, torch.Tensor]:
    """Views of two storages, contiguous or not, under names in any order."""
    storages = [torch.zeros(24), torch.zeros(24)]
    tensors = {}
    for name in draw(st.permutations("abcdefgh"))[: draw(st.integers(1, 8))]:
        start = draw(st.integers(0, 23))
        step = draw(st.sampled_from([1, 1, 1, 2, 3]))
        tensors[name] = draw(st.sampled_from(storages))[start : draw(st.integers(start, 24)) : step]
    return tensors


def by_pairs(tensors: dict[str, torch.Tensor]) -> set[str]:
    """The rule as vLLM's ShardedStateLoader states it."""
    kept = set()
    for name, tensor in tensors.items():
        _, start, end = extent(tensor)
        for other_name, other in tensors.items():
            _, other_start, other_end = extent(other)
            if not other.numel() or not other.is_contiguous() or start < other_start or other_end < end:
                continue
            if other_start < start or end < other_end or not tensor.is_contiguous() or other_name < name:
                break
        else:
            if tensor.numel():
                kept.add(name)
    return kept


@given(overlapping())
def test_what_covers_others_is_what_stays(tensors: dict[str, torch.Tensor]) -> None:
    kept = covering(tensors)
    assert set(kept) == by_pairs(tensors)
    assert list(kept) == [name for name in tensors if name in kept]


@given(overlapping(), st.data())
def test_memory_is_held_where_every_element_is_filled(tensors: dict[str, torch.Tensor], data: st.DataObject) -> None:
    filled = {name: tensor for name, tensor in tensors.items() if data.draw(st.booleans())}
    memory = Memory(filled.values())
    for tensor in (*tensors.values(), torch.zeros(24), torch.zeros(0)):
        tensor.fill_(0)
        for each in filled.values():
            each.fill_(1)
        # Two that each have holes may fill a third between them; such are not counted.
        if memory.holds(tensor):
            assert bool((tensor == 1).all())
        elif all(each.is_contiguous() for each in (*filled.values(), tensor)):
            assert not bool((tensor == 1).all())


def test_tied_fused_and_transposed() -> None:
    weight, fused = torch.zeros(4, 6), torch.zeros(9, 2)
    tensors = {
        "lm_head": weight,
        "embed": weight,
        "transposed": weight.T,
        "q": fused[:3],
        "kv": fused[3:],
        "qkv": fused,
        "none": torch.zeros(0, 3),
    }
    assert list(covering(tensors)) == ["embed", "qkv"]
    parts = Memory([fused[:3], fused[3:]])
    assert parts.holds(fused)
    assert not Memory([fused[:3]]).holds(fused)
    assert Memory([weight.T]).holds(weight)
    assert not Memory([fused[:, 0]]).holds(fused)
    assert Memory([fused[:, 0]]).holds(fused[:, 0])
