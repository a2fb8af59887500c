"""The planner's promises, over generated catalogs."""

from __future__ import annotations

from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamload.checkpoint import Catalog, ShardFile, TensorInfo
from streamload.plan import Plan, plan_reads

READ_BYTES = st.integers(4096, 40_000)
GAP_BYTES = st.integers(0, 5000)


@st.composite
def catalogs(draw: st.DrawFn) -> Catalog:
    """Files of tensors of all sizes, some of them left out, so that there are gaps."""
    files = []
    for number in range(draw(st.integers(1, 3))):
        position = header_bytes = draw(st.integers(10, 300))
        tensors = []
        sizes = st.one_of(st.integers(0, 20), st.integers(0, 6000), st.integers(0, 100_000))
        for place, size in enumerate(draw(st.lists(sizes, max_size=15))):
            if draw(st.booleans()) or draw(st.booleans()):
                tensors.append(TensorInfo(f"{number}.{place}", "U8", (size,), position, position + size))
            position += size
        files.append(ShardFile(f"{number}.safetensors", position, header_bytes, tuple(tensors)))
    return Catalog(tuple(files))


def covered(plan: Plan) -> dict[str, list[tuple[int, int]]]:
    """For each tensor, which of its bytes the plan's pieces bring, checked to lie where the piece says."""
    found: dict[str, list[tuple[int, int]]] = {}
    for batch in plan.batches:
        for read in batch.reads:
            for piece in read.pieces:
                tensor = batch.tensors[piece.tensor]
                assert read.start + piece.read_start == tensor.start + piece.tensor_start
                assert piece.read_start + piece.nbytes <= read.nbytes
                found.setdefault(tensor.name, []).append((piece.tensor_start, piece.tensor_start + piece.nbytes))
    return found


@given(catalogs(), READ_BYTES, GAP_BYTES)
def test_every_needed_byte_is_planned_in_exactly_one_read(catalog: Catalog, read_bytes: int, gap_bytes: int) -> None:
    plan = plan_reads(catalog, read_bytes=read_bytes, gap_bytes=gap_bytes)
    pieces = covered(plan)
    for file in catalog.files:
        for tensor in file.tensors:
            position = 0
            for start, end in sorted(pieces.get(tensor.name, [])):
                assert start == position
                assert end > start
                position = end
            assert position == tensor.nbytes


@given(catalogs(), READ_BYTES, GAP_BYTES)
def test_every_tensor_is_in_exactly_one_batch(catalog: Catalog, read_bytes: int, gap_bytes: int) -> None:
    plan = plan_reads(catalog, read_bytes=read_bytes, gap_bytes=gap_bytes)
    planned = [tensor.name for batch in plan.batches for tensor in batch.tensors]
    assert planned == [tensor.name for file in catalog.files for tensor in file.tensors]
    assert [batch.index for batch in plan.batches] == list(range(len(plan.batches)))
    assert all(batch.tensors for batch in plan.batches)


@given(catalogs(), READ_BYTES, GAP_BYTES)
def test_reads_are_bounded_and_gaps_are_small(catalog: Catalog, read_bytes: int, gap_bytes: int) -> None:
    plan = plan_reads(catalog, read_bytes=read_bytes, gap_bytes=gap_bytes)
    for batch in plan.batches:
        for read in batch.reads:
            assert 0 < read.nbytes <= read_bytes
            position = 0
            for piece in read.pieces:
                assert 0 <= piece.read_start - position <= gap_bytes
                position = piece.read_start + piece.nbytes
            assert position == read.nbytes
        if len(batch.reads) > 1:
            assert sum(1 for tensor in batch.tensors if tensor.nbytes) == 1


@given(catalogs(), READ_BYTES, GAP_BYTES)
def test_totals_add_up(catalog: Catalog, read_bytes: int, gap_bytes: int) -> None:
    plan = plan_reads(catalog, read_bytes=read_bytes, gap_bytes=gap_bytes)
    reads = [read for batch in plan.batches for read in batch.reads]
    assert plan.reads == len(reads)
    assert plan.tensor_bytes == catalog.nbytes == sum(batch.nbytes for batch in plan.batches)
    assert plan.tensor_bytes + plan.gap_bytes == sum(read.nbytes for read in reads)


def test_neighbours_share_a_read_and_big_tensors_are_split() -> None:
    tensors = (
        TensorInfo("a", "U8", (1000,), 100, 1100),
        TensorInfo("b", "U8", (2000,), 1100, 3100),
        TensorInfo("c", "U8", (20_000,), 3100, 23_100),
        TensorInfo("d", "U8", (0,), 23_100, 23_100),
    )
    catalog = Catalog((ShardFile("x.safetensors", 23_100, 100, tensors),))
    plan = plan_reads(catalog, read_bytes=8192, gap_bytes=0)
    shape = [([tensor.name for tensor in batch.tensors], len(batch.reads)) for batch in plan.batches]
    assert shape == [(["a", "b"], 1), (["c", "d"], 3)]


def test_a_read_is_at_least_a_page() -> None:
    with pytest.raises(ValueError, match="4096"):
        plan_reads(Catalog(()), read_bytes=4095, gap_bytes=0)


@given(catalogs(), READ_BYTES, GAP_BYTES, st.randoms(use_true_random=False))
def test_batches_come_in_the_order_of_asking(catalog: Catalog, read_bytes: int, gap_bytes: int, random: Random) -> None:
    names = [tensor.name for file in catalog.files for tensor in file.tensors]
    random.shuffle(names)
    asked = {name: place for place, name in enumerate(names)}
    plan = plan_reads(catalog, read_bytes=read_bytes, gap_bytes=gap_bytes, asked=asked)
    firsts = [min(asked[tensor.name] for tensor in batch.tensors) for batch in plan.batches]
    assert firsts == sorted(firsts)
    assert [batch.index for batch in plan.batches] == list(range(len(plan.batches)))
    assert sorted(tensor.name for batch in plan.batches for tensor in batch.tensors) == sorted(names)
    assert sum(end - start for runs in covered(plan).values() for start, end in runs) == catalog.nbytes


def test_neighbours_that_are_asked_for_far_apart_do_not_share_a_read() -> None:
    """Layer 10 lies behind layer 1 in a file that is sorted by its letters."""
    tensors = [
        TensorInfo(f"layers.{number}.norm", "U8", (10,), 8 + 10 * number, 18 + 10 * number) for number in range(4)
    ]
    catalog = Catalog((ShardFile("model.safetensors", 48, 8, tuple(tensors)),))
    asked = {"layers.0.norm": 0, "layers.1.norm": 1, "layers.2.norm": 500, "layers.3.norm": 499}
    plan = plan_reads(catalog, read_bytes=4096, gap_bytes=0, asked=asked)
    assert [[tensor.name[7] for tensor in batch.tensors] for batch in plan.batches] == [["0", "1"], ["2", "3"]]
