"""The planner's promises where only slices of tensors are wanted."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamload.checkpoint import Catalog, ShardFile, TensorInfo
from streamload.plan import Experts, PackedShard, Placement, Plan, Ranks, Replicate, Shard, plan_reads, slice_tensor

PLACEMENTS: list[Placement] = [
    Replicate(),
    Shard(0),
    Shard(-1),
    PackedShard(0, 2),
    PackedShard(-1, 2),
    PackedShard(-1, 3),
    Experts((0, 2, 3), Shard(-1)),
    Experts((1,)),
]
READ_BYTES = st.sampled_from([4096, 5000, 10_000, 100_000])
GAP_BYTES = st.sampled_from([0, 10, 700, 5000])
SKIP_BYTES = st.sampled_from([None, 0, 50, 1000])


@st.composite
def catalogs(draw: st.DrawFn) -> Catalog:
    """A file whose tensors are sliced in every way, for a rank of some size."""
    size = draw(st.integers(1, 5))
    ranks = Ranks(tp_rank=draw(st.integers(0, size - 1)), tp_size=size)
    position = 100
    sliced = []
    for place in range(draw(st.integers(0, 8))):
        shape = tuple(draw(st.lists(st.integers(0, 40), min_size=1, max_size=2)))
        tensor = TensorInfo(str(place), "U8", (4, *shape), position, position + 4 * math.prod(shape))
        position = tensor.end
        part = slice_tensor(tensor, draw(st.sampled_from(PLACEMENTS)), ranks, uneven="ceil")
        if part is not None and draw(st.integers(0, 4)):
            sliced.append(part)
    return Catalog((ShardFile("x.safetensors", position, 100, tuple(sliced)),))


def planned(catalog: Catalog, read_bytes: int, gap_bytes: int, skip_bytes: int | None) -> Plan:
    return plan_reads(catalog, read_bytes=read_bytes, gap_bytes=gap_bytes, skip_bytes=skip_bytes)


@given(catalogs(), READ_BYTES, GAP_BYTES, SKIP_BYTES)
def test_every_wanted_byte_is_in_exactly_one_piece(
    catalog: Catalog, read_bytes: int, gap_bytes: int, skip_bytes: int | None
) -> None:
    plan = planned(catalog, read_bytes, gap_bytes, skip_bytes)
    found: dict[str, dict[int, int]] = {}
    for batch in plan.batches:
        for read in batch.reads:
            assert len(read.pieces) == len(list(read.pieces))
            for piece in read.pieces:
                tensor = batch.tensors[piece.tensor]
                places = found.setdefault(tensor.name, {})
                for offset in range(piece.nbytes):
                    assert piece.tensor_start + offset not in places
                    places[piece.tensor_start + offset] = read.start + piece.read_start + offset
    for tensor in catalog.files[0].tensors:
        wanted = {
            place + offset: byte + offset
            for byte, place, nbytes in tensor.runs(tensor.start, tensor.end)
            for offset in range(nbytes)
        }
        assert found.get(tensor.name, {}) == wanted


@given(catalogs(), READ_BYTES, GAP_BYTES, SKIP_BYTES)
def test_reads_are_bounded_ordered_and_their_gaps_small(
    catalog: Catalog, read_bytes: int, gap_bytes: int, skip_bytes: int | None
) -> None:
    plan = planned(catalog, read_bytes, gap_bytes, skip_bytes)
    position = 0
    for batch in plan.batches:
        for read in batch.reads:
            # No byte is read twice: reads do not overlap, and each piece begins where the one before ended, or later.
            assert position <= read.start < read.end <= read.start + read_bytes
            position = read.end
            inside = skipped = 0
            for piece in read.pieces:
                gap = piece.read_start - inside
                assert 0 <= gap <= gap_bytes
                skipped += gap if skip_bytes is not None and gap > skip_bytes else 0
                inside = piece.read_start + piece.nbytes
            assert inside == read.nbytes
            if batch.sliced:
                assert read.skipped_bytes == skipped
            assert read.piece_bytes == sum(piece.nbytes for piece in read.pieces)
            assert read.fetched_bytes == read.nbytes - read.skipped_bytes == read.piece_bytes + read.gap_bytes
        if len(batch.reads) > 1:
            assert sum(1 for tensor in batch.tensors if tensor.nbytes) == 1


@given(catalogs(), READ_BYTES, GAP_BYTES, SKIP_BYTES)
def test_totals_add_up(catalog: Catalog, read_bytes: int, gap_bytes: int, skip_bytes: int | None) -> None:
    plan = planned(catalog, read_bytes, gap_bytes, skip_bytes)
    reads = [read for batch in plan.batches for read in batch.reads]
    assert plan.reads == len(reads)
    assert plan.tensor_bytes == catalog.nbytes
    assert plan.tensor_bytes + plan.gap_bytes == sum(read.fetched_bytes for read in reads)
    names = [tensor.name for batch in plan.batches for tensor in batch.tensors]
    assert sorted(names) == sorted(tensor.name for tensor in catalog.files[0].tensors)


@pytest.mark.parametrize(
    ("gap_bytes", "skip_bytes", "reads", "fetched"),
    [
        (1 << 20, None, 4, 4096 * 8192 - 6144 * 4),  # an object store: the gaps are read, but for the last of a read
        (64 << 10, 4096, 4, 4096 * 2048),  # a file: they are passed over
        (64 << 10, 8192, 4, 4096 * 8192 - 6144 * 4),  # a file, and it is not worth that
        (4096, None, 4096, 4096 * 2048),  # each row for itself
    ],
)
def test_a_row_parallel_matrix(gap_bytes: int, skip_bytes: int | None, reads: int, fetched: int) -> None:
    tensor = TensorInfo("o_proj", "BF16", (4096, 4096), 104, 104 + (32 << 20))
    part = slice_tensor(tensor, Shard(-1), Ranks(tp_rank=1, tp_size=4))
    assert part is not None
    catalog = Catalog((ShardFile("x.safetensors", tensor.end, 104, (part,)),))
    plan = planned(catalog, 8 << 20, gap_bytes, skip_bytes)
    every = [read for batch in plan.batches for read in batch.reads]
    assert (plan.reads, sum(read.fetched_bytes for read in every)) == (reads, fetched)
    sizes = [read.nbytes for read in every]
    assert max(sizes) - min(sizes) < 8192, "one of them is a crumb"
    for read, other in itertools.pairwise(every):
        assert read.end <= other.start
