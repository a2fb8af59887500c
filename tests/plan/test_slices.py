"""Slices, over generated shapes, placements and ranks: all of them together are the tensor."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamload.checkpoint import DTYPE_BITS, TensorInfo
from streamload.errors import OptionError
from streamload.plan import (
    Absent,
    Box,
    Experts,
    PackedShard,
    Placement,
    Ranks,
    Replicate,
    Shard,
    slice_boxes,
    slice_tensor,
)

SHAPES = st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple)


def whole(shape: Sequence[int], dtype: str = "U16", start: int = 100) -> TensorInfo:
    return TensorInfo("t", dtype, tuple(shape), start, start + math.prod(shape) * DTYPE_BITS[dtype] // 8)


def tp_ranks(size: int) -> Iterator[Ranks]:
    return (Ranks(tp_rank=rank, tp_size=size) for rank in range(size))


def chunk(size: int, shares: int, number: int) -> range:
    """`torch.chunk`'s rule."""
    share = -(-size // shares)
    return range(size)[number * share : (number + 1) * share]


def content(sliced: TensorInfo) -> list[int]:
    """Which bytes of the file a slice has, in the slice's order, checked for overlaps and order."""
    runs = sliced.runs(0, 1 << 60)
    assert [run[0] for run in runs] == sorted(run[0] for run in runs)
    assert all(before[0] + before[2] <= after[0] for before, after in itertools.pairwise(runs))
    found = [-1] * sliced.nbytes
    for file_start, tensor_start, nbytes in runs:
        assert nbytes > 0
        assert found[tensor_start : tensor_start + nbytes] == [-1] * nbytes
        found[tensor_start : tensor_start + nbytes] = range(file_start, file_start + nbytes)
    assert -1 not in found
    if found:
        assert (min(found), max(found) + 1) == (sliced.start, sliced.end)
    return found


def selected(tensor: TensorInfo, indices: Sequence[Sequence[int]]) -> list[int]:
    """Which bytes the elements with these indices have, by the definition of a row-major tensor."""
    itemsize = DTYPE_BITS[tensor.dtype] // 8
    strides = [math.prod(tensor.shape[dim + 1 :]) for dim in range(len(tensor.shape))]
    found: list[int] = []
    for index in itertools.product(*indices):
        element = tensor.start + itemsize * sum(map(math.prod, zip(index, strides, strict=True)))
        found += range(element, element + itemsize)
    return found


def check(tensor: TensorInfo, sliced: TensorInfo | None, indices: Sequence[Sequence[int]]) -> None:
    assert sliced is not None
    assert sliced.shape == tuple(map(len, indices))
    assert content(sliced) == selected(tensor, indices)


@st.composite
def shapes_and_dims(draw: st.DrawFn) -> tuple[tuple[int, ...], int]:
    shape = draw(SHAPES)
    return shape, draw(st.integers(-len(shape), len(shape) - 1))


@given(shapes_and_dims(), st.integers(1, 6), st.sampled_from(["U8", "U16", "F32"]))
def test_a_shard_is_what_torch_chunk_gives(case: tuple[tuple[int, ...], int], size: int, dtype: str) -> None:
    shape, dim = case
    tensor = whole(shape, dtype)
    for ranks in tp_ranks(size):
        indices = [range(length) for length in shape]
        indices[dim] = chunk(shape[dim], size, ranks.tp_rank)
        check(tensor, slice_tensor(tensor, Shard(dim), ranks, uneven="ceil"), indices)


@given(shapes_and_dims(), st.integers(1, 6))
def test_shards_of_all_ranks_are_the_tensor(case: tuple[tuple[int, ...], int], size: int) -> None:
    shape, dim = case
    tensor = whole(shape)
    parts = [slice_tensor(tensor, Shard(dim), ranks, uneven="ceil") for ranks in tp_ranks(size)]
    covered = sorted(byte for part in parts if part is not None for byte in content(part))
    assert covered == list(range(tensor.start, tensor.end))


@given(SHAPES, st.data())
def test_packed_parts_are_shared_out_one_by_one(shape: tuple[int, ...], data: st.DataObject) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    size = data.draw(st.integers(1, 4))
    parts = tuple(data.draw(st.lists(st.integers(0, 5), min_size=1, max_size=4)))
    replicas = tuple(data.draw(st.sampled_from([n for n in range(1, size + 1) if size % n == 0])) for _ in parts)
    shape = (*shape[:dim], sum(parts), *shape[dim + 1 :])
    tensor = whole(shape)
    for ranks in tp_ranks(size):
        indices: list[Sequence[int]] = [range(length) for length in shape]
        owned: list[int] = []
        start = 0
        for part, copies in zip(parts, replicas, strict=True):
            owned += [start + place for place in chunk(part, size // copies, ranks.tp_rank // copies)]
            start += part
        indices[dim] = owned
        check(tensor, slice_tensor(tensor, PackedShard(dim, parts, replicas), ranks, uneven="ceil"), indices)


@given(st.integers(0, 6), st.integers(0, 6), st.integers(0, 6), st.data())
def test_owned_experts_whole_or_in_part(experts: int, rows: int, columns: int, data: st.DataObject) -> None:
    tensor = whole((experts, rows, columns))
    owned = tuple(data.draw(st.lists(st.sampled_from(range(experts)), unique=True))) if experts else ()
    size = data.draw(st.integers(1, 3))
    dim = data.draw(st.sampled_from([1, 2, -1, -2]))
    choices: list[Replicate | Shard | PackedShard] = [Replicate(), Shard(dim), PackedShard(dim, 2)]
    within = data.draw(st.sampled_from(choices))
    for ranks in tp_ranks(size):
        indices: list[Sequence[int]] = [owned, range(rows), range(columns)]
        cut = tensor.shape[dim]
        if isinstance(within, Shard):
            indices[dim] = chunk(cut, size, ranks.tp_rank)
        elif isinstance(within, PackedShard):
            halves = [range(cut)[: -(-cut // 2)], range(cut)[-(-cut // 2) :]]
            indices[dim] = [half[place] for half in halves for place in chunk(len(half), size, ranks.tp_rank)]
        sliced = slice_tensor(tensor, Experts(owned, within), ranks, uneven="ceil")
        if list(owned) == sorted(owned):
            check(tensor, sliced, indices)
        else:
            assert sliced is not None
            found = [-1] * sliced.nbytes
            for file_start, tensor_start, nbytes in sliced.runs(0, 1 << 60):
                found[tensor_start : tensor_start + nbytes] = range(file_start, file_start + nbytes)
            assert found == selected(tensor, indices)


@given(SHAPES, st.data())
def test_runs_cut_off_are_the_same_bytes(shape: tuple[int, ...], data: st.DataObject) -> None:
    tensor = whole((*shape, 12))
    choices: list[Placement] = [Shard(-1), PackedShard(-1, 2), PackedShard(-1, 3), Replicate()]
    placement = data.draw(st.sampled_from(choices))
    sliced = slice_tensor(tensor, placement, Ranks(tp_rank=1, tp_size=2))
    assert sliced is not None
    cuts = sorted(data.draw(st.lists(st.integers(90, tensor.end + 10), max_size=4)))
    pieces = [
        (byte + offset, place + offset)
        for start, end in itertools.pairwise([0, *cuts, 1 << 60])
        for byte, place, nbytes in sliced.runs(start, end)
        for offset in range(nbytes)
        if start <= byte and byte + nbytes <= end
    ]
    everything = [
        (byte + offset, place + offset) for byte, place, nbytes in sliced.runs(0, 1 << 60) for offset in range(nbytes)
    ]
    assert pieces == everything


def test_what_is_one_range_has_no_stripes() -> None:
    tensor = whole((8, 4))
    sliced = slice_tensor(tensor, Shard(0), Ranks(tp_rank=1, tp_size=4))
    assert sliced == TensorInfo("t", "U16", (2, 4), 116, 132)
    assert slice_tensor(tensor, Shard(0), Ranks()) == tensor
    assert slice_tensor(tensor, PackedShard(0, 2), Ranks()) == tensor
    assert slice_tensor(tensor, Replicate(), Ranks(tp_rank=1, tp_size=4)) == tensor
    assert slice_tensor(tensor, Absent(), Ranks()) is None


def test_experts_are_shared_out_by_default() -> None:
    tensor = whole((8, 4))
    sliced = slice_tensor(tensor, Experts(), Ranks(tp_rank=1, tp_size=2, ep_rank=3, ep_size=4))
    assert sliced == TensorInfo("t", "U16", (2, 4), 148, 164)


def test_key_value_heads_are_replicated() -> None:
    tensor = whole((4, 3))
    starts = [
        sliced.start
        for ranks in tp_ranks(8)
        if (sliced := slice_tensor(tensor, Shard(0, replicas=2), ranks)) is not None
    ]
    assert starts == [100, 100, 106, 106, 112, 112, 118, 118]


@pytest.mark.parametrize(
    ("placement", "shape", "size", "message"),
    [
        (Shard(0), (7, 2), 2, "7 cannot be shared out equally to 2 ranks"),
        (Shard(2), (4, 2), 2, "dimension 2 cannot be shared out: there are 2 dimensions"),
        (Shard(-2), (4,), 2, "dimension -2 cannot be shared out: there are 1 dimensions"),
        (Shard(0), (), 2, "there are 0 dimensions"),
        (Shard(0, replicas=2), (4,), 3, "3 ranks cannot have 2 replicas"),
        (PackedShard(0, 2), (7, 2), 2, "a dimension of 7 does not hold 2 parts"),
        (PackedShard(0, (4, 2)), (7, 2), 2, r"parts of 4 \+ 2 do not make a dimension of 7"),
        (PackedShard(0, (4, 3)), (7, 2), 2, "3 cannot be shared out equally to 2 ranks"),
        (Experts((1, 9)), (8, 2), 2, "there is no expert 9: there are 8"),
        (Experts(None), (), 2, "no dimension that could count experts"),
        (Experts((0,), Shard(0)), (8, 2), 2, "the first of which counts experts"),
    ],
)
def test_what_cannot_be_shared_out_is_an_error_naming_the_tensor(
    placement: Placement, shape: tuple[int, ...], size: int, message: str
) -> None:
    with pytest.raises(OptionError, match=message) as raised:
        slice_tensor(whole(shape), placement, Ranks(tp_size=size, ep_size=1))
    assert "tensor 't'" in str(raised.value)


def test_parts_of_bytes() -> None:
    halves = TensorInfo("t", "F4", (4, 6), 0, 12)
    assert slice_tensor(halves, Shard(0), Ranks(tp_rank=1, tp_size=2)) == TensorInfo("t", "F4", (2, 6), 6, 12)
    with pytest.raises(OptionError, match="begin and end with a byte: F4 has 4 bits"):
        slice_tensor(halves, Shard(1), Ranks(tp_rank=1, tp_size=2))
    sixths = TensorInfo("t", "F6_E2M3", (4, 8), 0, 24)
    assert slice_tensor(sixths, Shard(1), Ranks(tp_rank=1, tp_size=2)) is not None
    with pytest.raises(OptionError, match="F6_E2M3 has 6 bits"):
        slice_tensor(sixths, Shard(1), Ranks(tp_rank=1, tp_size=4))


@pytest.mark.parametrize(
    "make",
    [
        lambda: Shard(0, replicas=0),
        lambda: PackedShard(0, 0),
        lambda: PackedShard(0, ()),
        lambda: PackedShard(0, 2, (1,)),
        lambda: Experts((1, 1)),
        lambda: Ranks(tp_rank=2, tp_size=2),
        lambda: Ranks(pp_rank=-1),
        lambda: Ranks(ep_size=0),
        lambda: Ranks(tp_rank=True, tp_size=2),
    ],
)
def test_what_has_no_meaning_is_refused(make: object) -> None:
    with pytest.raises(OptionError):
        make()  # type: ignore[operator]


@st.composite
def tensors_with_boxes(draw: st.DrawFn) -> tuple[tuple[int, ...], list[Box]]:
    shape = tuple(draw(st.lists(st.integers(1, 4), max_size=4)))
    boxes = []
    for _ in range(draw(st.integers(1, 3))):
        limits = []
        for size in shape:
            start = draw(st.integers(0, size))
            limits.append(draw(st.sampled_from([(0, size), (start, draw(st.integers(start, size)))])))
        boxes.append(tuple(limits))
    return shape, boxes


@given(tensors_with_boxes())
def test_boxes_come_one_behind_the_other(case: tuple[tuple[int, ...], list[Box]]) -> None:
    shape, boxes = case
    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))]
    expected = [
        100 + sum(at * stride for at, stride in zip(place, strides, strict=True))
        for box in boxes
        for place in itertools.product(*(range(*limits) for limits in box))
    ]
    part = slice_boxes(whole(shape, "U8"), boxes)
    found = [-1] * part.nbytes
    for file_start, tensor_start, nbytes in part.runs(0, 1 << 60):
        found[tensor_start : tensor_start + nbytes] = range(file_start, file_start + nbytes)
    assert found == expected
    assert math.prod(part.shape) == len(expected)


def test_a_box_ends_with_a_byte() -> None:
    tensor = whole((4, 6), "F4")
    assert slice_boxes(tensor, [((0, 4), (2, 4))]).nbytes == 4
    with pytest.raises(OptionError, match=r"'t' of shape \[4, 6\]"):
        slice_boxes(tensor, [((0, 4), (1, 4))])
