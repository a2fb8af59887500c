from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamload.checkpoint import Catalog, ShardFile, TensorInfo
from streamload.plan import Batch, Piece, Read, plan_reads
from streamload.sinks.layout import (
    ALIGNMENT_BYTES,
    MIN_ALIGNMENT_BYTES,
    SLAB_BYTES,
    SMALL_BYTES,
    Placement,
    place,
    stage,
)

sizes = st.one_of(
    st.integers(0, 40),
    st.integers(0, 1000),
    st.sampled_from([256, 512, 4096]),
    st.integers(SMALL_BYTES - 2, SMALL_BYTES + 2),
)
# A tensor's size, and whether it is wanted: one that is not leaves a gap.
files = st.lists(st.tuples(sizes, st.integers(0, 4).map(bool)), min_size=1, max_size=40)


def batches_of(file: list[tuple[int, bool]], read_bytes: int, gap_bytes: int) -> tuple[Batch, ...]:
    tensors = []
    end = 13
    for number, (size, wanted) in enumerate(file):
        if wanted:
            tensors.append(TensorInfo(f"t{number}", "U8", (size,), end, end + size))
        end += size
    catalog = Catalog((ShardFile("f", end, 13, tuple(tensors)),))
    return plan_reads(catalog, read_bytes=read_bytes, gap_bytes=gap_bytes).batches


def tensor(start: int, nbytes: int) -> TensorInfo:
    return TensorInfo(f"at {start}", "U8", (nbytes,), start, start + nbytes)


def check_placement(batch: Batch, placement: Placement) -> None:
    ends = [0] * len(placement.block_bytes)
    for info, found in zip(batch.tensors, placement.places, strict=True):
        if found is None:
            assert info.nbytes == 0
            continue
        assert found.start >= ends[found.block], "tensors overlap"
        ends[found.block] = found.start + info.nbytes
        alignment = ALIGNMENT_BYTES if info.nbytes >= ALIGNMENT_BYTES else MIN_ALIGNMENT_BYTES
        assert found.start % alignment == 0
        if info.nbytes > SMALL_BYTES:
            assert placement.block_bytes[found.block] == info.nbytes, "a large tensor shares its block"
        else:
            assert placement.block_bytes[found.block] <= SLAB_BYTES
    assert tuple(ends) == placement.block_bytes, "a block ends with its last tensor"


@given(files, st.sampled_from([4096, 10_000, 1 << 20]), st.sampled_from([0, 100, 1 << 19]), st.integers())
def test_what_is_read_ends_up_where_it_belongs(
    file: list[tuple[int, bool]], read_bytes: int, gap_bytes: int, seed: int
) -> None:
    content = random.Random(seed).randbytes(13 + sum(size for size, _ in file))
    for batch in batches_of(file, read_bytes, gap_bytes):
        placement = place(batch.tensors)
        check_placement(batch, placement)
        blocks = [bytearray(size) for size in placement.block_bytes]
        written: set[tuple[int, int]] = set()
        for read in batch.reads:
            staged = stage(placement, read)
            memory = bytearray(staged.nbytes)
            position = read.start
            used = 0
            for start, end in staged.views:
                assert 0 <= start < end <= staged.nbytes
                memory[start:end] = content[position : position + end - start]
                position += end - start
                used += end - start
            assert position == read.end, "the views are as long as the read"
            ordered = sorted(staged.views)
            assert all(before[1] <= after[0] for before, after in pairwise(ordered))
            assert all(before[1] != after[0] for before, after in pairwise(staged.views)), (
                "neighbouring views are one view"
            )
            for block, block_start, staging_start, nbytes in staged.segments:
                assert (block, block_start) not in written
                written.add((block, block_start))
                blocks[block][block_start : block_start + nbytes] = memory[staging_start : staging_start + nbytes]
                assert len(blocks[block]) == placement.block_bytes[block], "a copy ends beyond its block"
        for info, found in zip(batch.tensors, placement.places, strict=True):
            if found is not None:
                assert blocks[found.block][found.start : found.start + info.nbytes] == content[info.start : info.end]


def test_small_tensors_share_one_copy_and_one_view() -> None:
    (batch,) = batches_of([(4096, True)] * 50, 1 << 20, 0)
    placement = place(batch.tensors)
    staged = stage(placement, batch.reads[0])
    assert placement.block_bytes == (50 * 4096,)
    assert staged.views == ((0, 50 * 4096),)
    assert staged.segments == ((0, 0, 0, 50 * 4096),)
    assert staged.nbytes == 50 * 4096


def test_small_tensors_around_large_ones_share_a_slab() -> None:
    large = SMALL_BYTES + 256
    (batch,) = batches_of([(512, True), (large, True), (512, True), (large, True)], 1 << 20, 0)
    placement = place(batch.tensors)
    staged = stage(placement, batch.reads[0])
    assert placement.block_bytes == (1024, large, large)
    assert [segment.nbytes for segment in staged.segments] == [1024, large, large]
    assert len(staged.views) == 4


def test_no_slab_grows_beyond_its_limit() -> None:
    (batch,) = batches_of([(SMALL_BYTES, True)] * 20, 20 * SMALL_BYTES, 0)
    assert place(batch.tensors).block_bytes == (SLAB_BYTES, SLAB_BYTES, 4 * SMALL_BYTES)


def test_scalars_are_not_padded_to_a_whole_line() -> None:
    (batch,) = batches_of([(4, True)] * 1000, 4096, 0)
    assert place(batch.tensors).nbytes <= 1000 * MIN_ALIGNMENT_BYTES


def test_gaps_at_either_end_and_between_do_not_share_memory() -> None:
    placement = place([tensor(100, 300), tensor(450, 300)])
    read = Read(90, 800, (Piece(0, 0, 10, 300), Piece(1, 0, 360, 300)))
    staged = stage(placement, read)
    assert staged.segments == ((0, 0, 0, 812),)
    assert staged.views == ((812, 822), (0, 300), (822, 872), (512, 812), (872, 922))
    assert staged.nbytes == 922


def test_a_part_of_a_tensor_lands_at_its_place_in_the_tensor() -> None:
    size = 3 * SMALL_BYTES
    (batch,) = batches_of([(size, True)], SMALL_BYTES, 0)
    placement = place(batch.tensors)
    assert placement.block_bytes == (size,)
    assert [stage(placement, read).segments for read in batch.reads] == [
        ((0, start, 0, SMALL_BYTES),) for start in range(0, size, SMALL_BYTES)
    ]


def test_a_piece_of_an_empty_tensor_is_refused() -> None:
    placement = place([tensor(100, 0)])
    with pytest.raises(ValueError, match="empty"):
        stage(placement, Read(100, 101, (Piece(0, 0, 0, 1),)))
