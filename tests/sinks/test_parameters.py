"""The sink into tensors that are there already: the conformance suite, and what only it promises."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import pytest
import torch

from streamload.checkpoint import Catalog, ShardFile, TensorInfo
from streamload.loan import Loan
from streamload.plan import Batch, Piece, Read, plan_reads
from streamload.sinks import Sink
from streamload.sinks.dtypes import torch_dtypes, torch_shape
from streamload.sinks.parameters import ParametersLease, ParametersSink
from streamload.sinks.pool import HostPool
from streamload.sinks.targets import Target, WholeTarget
from streamload.testing.sinks import SinkConformance

MIB = 1 << 20


class WatchedPool(HostPool):
    """Remembers its regions without keeping them alive."""

    def __init__(self, arena_bytes: int) -> None:
        super().__init__(arena_bytes)
        self.regions: list[weakref.ref[Any]] = []

    def take(self, nbytes: int) -> memoryview:
        region = super().take(nbytes)
        self.regions.append(weakref.ref(region))
        return region


def fresh(tensor: TensorInfo) -> torch.Tensor:
    """A target as the checkpoint has it, poisoned."""
    target = torch.empty(torch_shape(tensor), dtype=torch_dtypes()[tensor.dtype])
    if target.numel():
        target.view(-1).view(torch.uint8).fill_(0xA5)
    return target


def scattered(tensor: TensorInfo) -> torch.Tensor:
    """The same, with other elements between its own."""
    shape, dtype = torch_shape(tensor), torch_dtypes()[tensor.dtype]
    return torch.empty((*shape, 2), dtype=dtype)[..., 1]


class TestDirect(SinkConformance):
    """Every tensor has a new target, which the source reads into."""

    counts_tensors: ClassVar[bool] = False

    def make_target(self, tensor: TensorInfo) -> WholeTarget:
        return direct(fresh(tensor))

    def find(self, tensor: TensorInfo) -> Target:
        target = self.make_target(tensor)
        self.targets.append(weakref.ref(target.tensor))
        return target

    def make_sink(self, *, read_bytes: int, concurrency: int) -> Sink[Any]:
        self.targets: list[weakref.ref[torch.Tensor]] = []
        sink = ParametersSink(self.find, 64 * MIB)
        sink._pool = self.pool = WatchedPool(64 * MIB)
        return sink

    def check_given_back(self, sink: Sink[Any]) -> None:
        assert [region for region in self.pool.regions if region() is not None] == []
        assert [target for target in self.targets if target() is not None] == []


class TestStaged(TestDirect):
    """No target can be read into: all of them are scattered."""

    counts_tensors: ClassVar[bool] = True

    def make_target(self, tensor: TensorInfo) -> WholeTarget:
        return staged(scattered(tensor))


class TestMixed(TestDirect):
    """Every other target can be read into."""

    def make_target(self, tensor: TensorInfo) -> WholeTarget:
        return staged(scattered(tensor)) if len(tensor.name) % 2 else direct(fresh(tensor))


def batch_of(*tensors: TensorInfo, gap_bytes: int = 0) -> Batch:
    file = ShardFile("x.safetensors", tensors[-1].end, tensors[0].start, tensors)
    (batch,) = plan_reads(Catalog((file,)), read_bytes=MIB, gap_bytes=gap_bytes).batches
    return batch


def sink_into(targets: Mapping[str, Target]) -> ParametersSink:
    return ParametersSink(lambda tensor: targets[tensor.name], MIB)


def lend(sink: ParametersSink, lease: ParametersLease, read: Read) -> Loan:
    return asyncio.run(sink.lend(lease, read))


def deliver(sink: ParametersSink, lease: ParametersLease) -> dict[str, torch.Tensor]:
    return dict(asyncio.run(sink.finish(lease)).tensors())


def staged(tensor: torch.Tensor) -> WholeTarget:
    target = WholeTarget(tensor, tensor.dtype)
    target.direct = False
    return target


def direct(tensor: torch.Tensor) -> WholeTarget:
    target = WholeTarget(tensor, tensor.dtype)
    assert target.direct
    return target


def address(view: memoryview) -> int:
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


def test_what_is_read_lands_in_the_target_itself_and_takes_no_credit() -> None:
    one, other = torch.zeros(1000), torch.zeros(3, dtype=torch.int64)
    batch = batch_of(TensorInfo("one", "F32", (1000,), 100, 4100), TensorInfo("other", "I64", (3,), 4100, 4124))
    sink = sink_into({"one": direct(one), "other": direct(other)})
    assert sink.credit_bytes(batch) == 0
    lease = sink.begin(batch, 0)
    assert not sink.touched
    loan = lend(sink, lease, batch.reads[0])
    assert sink.touched
    assert [address(view) for view in loan.views] == [one.data_ptr(), other.data_ptr()]
    loan.views[1][:8] = (7).to_bytes(8, "little")
    sink.landed(lease, batch.reads[0], loan)
    assert other.tolist() == [7, 0, 0]
    assert deliver(sink, lease)["other"].data_ptr() == other.data_ptr()


@pytest.mark.parametrize("make", [scattered, lambda tensor: fresh(tensor).to(torch.float64)])
def test_a_target_that_cannot_be_read_into_is_filled_when_its_tensor_is_taken(
    make: Callable[[TensorInfo], torch.Tensor],
) -> None:
    info = TensorInfo("one", "F32", (1000,), 100, 4100)
    target, values = make(info), torch.arange(1000.0)
    target.fill_(-1)
    batch = batch_of(info)
    sink = sink_into({"one": WholeTarget(target, torch.float32)})
    assert sink.credit_bytes(batch) == 4096
    lease = sink.begin(batch, 0)
    loan = lend(sink, lease, batch.reads[0])
    loan.views[0][:] = values.numpy().tobytes()
    sink.landed(lease, batch.reads[0], loan)
    delivery = asyncio.run(sink.finish(lease))
    assert not sink.touched
    assert bool((target == -1).all())
    assert [name for name, _ in delivery.tensors()] == ["one"]
    assert sink.touched
    assert torch.equal(target.to(torch.float32), values)


class Slice(TensorInfo):
    """A tensor of which only a part is wanted."""

    @property
    def nbytes(self) -> int:
        return 12


@pytest.mark.parametrize("make", [fresh, scattered])
def test_pieces_may_be_anywhere_in_reads_and_in_tensors(make: Callable[[TensorInfo], torch.Tensor]) -> None:
    """Two columns of a matrix of bytes, three rows by read, six in all: most of a read is gaps."""
    wanted = Slice("columns", "U8", (6, 2), 0, 6 * 5)
    reads = tuple(
        Read(start, start + 15, tuple(Piece(0, start // 5 * 2 + 2 * row, 5 * row + 1, 2) for row in range(3)))
        for start in (0, 15)
    )
    target = make(wanted)
    sink = sink_into({"columns": WholeTarget(target, torch.uint8)})
    batch = Batch(0, 0, (wanted,), reads)
    # A page for each read's gaps, and one for what is staged.
    assert sink.credit_bytes(batch) == 4096 * (2 if make is fresh else 3)
    lease = sink.begin(batch, 0)
    for read in reversed(reads):
        loan = lend(sink, lease, read)
        assert loan.nbytes == 15
        at = read.start
        for view in loan.views:
            view[:] = bytes(range(at, at + view.nbytes))
            at += view.nbytes
        sink.landed(lease, read, loan)
    assert not lease.scratch
    deliver(sink, lease)
    assert torch.equal(target, torch.arange(30, dtype=torch.uint8).view(6, 5)[:, 1:3])


def test_gaps_of_one_read_do_not_share_their_memory() -> None:
    tensors = [TensorInfo(str(at), "U8", (10,), 100 * at, 100 * at + 10) for at in range(5)]
    batch = batch_of(*tensors, gap_bytes=1000)
    sink = sink_into({tensor.name: direct(fresh(tensor)) for tensor in tensors})
    loan = lend(sink, sink.begin(batch, 0), batch.reads[0])
    spans = sorted((address(view), view.nbytes) for view in loan.views)
    assert len(spans) == 9
    assert all(start + nbytes <= spans[at + 1][0] for at, (start, nbytes) in enumerate(spans[:-1]))


def test_memory_that_a_hung_read_may_write_into_outlives_its_tensor() -> None:
    info = TensorInfo("one", "U8", (MIB // 2,), 0, MIB // 2)
    tensor = fresh(info)
    kept = weakref.ref(tensor)
    targets = {"one": direct(tensor)}
    sink = sink_into(targets)
    batch = batch_of(info)
    lease = sink.begin(batch, 0)
    loan = lend(sink, lease, batch.reads[0])
    loan.quarantine()
    sink.failed(lease, batch.reads[0], loan)
    assert sink.quarantined_bytes == info.nbytes
    sink.abandon(lease)
    asyncio.run(sink.aclose())
    targets.clear()
    del tensor, lease
    gc.collect()
    assert kept() is not None
    loan.views[0][:] = bytes(info.nbytes)


@pytest.mark.parametrize("inference", [False, True])
def test_inference_tensors_and_others_are_filled_alike(inference: bool) -> None:
    info = TensorInfo("one", "F32", (4,), 0, 16)
    for make in (fresh, scattered):
        with torch.inference_mode(inference):
            target = make(info)
        sink = sink_into({"one": WholeTarget(target.detach(), torch.float32)})
        batch = batch_of(info)
        lease = sink.begin(batch, 0)
        loan = lend(sink, lease, batch.reads[0])
        loan.views[0][:] = torch.arange(4.0).numpy().tobytes()
        sink.landed(lease, batch.reads[0], loan)
        with torch.inference_mode(not inference):
            deliver(sink, lease)
        assert target.tolist() == [0, 1, 2, 3]


def test_conjugated_and_negated_views_are_not_read_into() -> None:
    numbers = torch.zeros(4, dtype=torch.complex64)
    assert not WholeTarget(numbers.conj(), torch.complex64).direct
    assert not WholeTarget(numbers.conj().imag, torch.float32).direct
    assert WholeTarget(numbers, torch.complex64).direct
