"""The host sink: the conformance suite, and what only it promises."""

from __future__ import annotations

import weakref
from typing import Any, ClassVar

import pytest

from streamload.checkpoint import Catalog, ShardFile, TensorInfo
from streamload.plan import plan_reads
from streamload.sinks import Sink, sink_for
from streamload.sinks.host import HostDelivery, HostSink
from streamload.sinks.pool import HostPool
from streamload.testing.sinks import SinkConformance

pytestmark = pytest.mark.torch

KIB = 1 << 10
MIB = 1 << 20


class WatchedPool(HostPool):
    """Remembers its regions without keeping them alive."""

    def __init__(self, arena_bytes: int) -> None:
        super().__init__(arena_bytes)
        self.regions: list[weakref.ref[memoryview]] = []

    def take(self, nbytes: int) -> memoryview:
        region = super().take(nbytes)
        self.regions.append(weakref.ref(region))
        return region


class TestHostSink(SinkConformance):
    """Over a pool that is large enough for everything."""

    arena_bytes: ClassVar[int] = 64 * MIB

    def make_sink(self, *, read_bytes: int, concurrency: int) -> Sink[Any]:
        sink = HostSink(self.arena_bytes)
        sink._pool = self.pool = WatchedPool(self.arena_bytes)
        return sink

    def check_given_back(self, sink: Sink[Any]) -> None:
        assert [region for region in self.pool.regions if region() is not None] == []


class TestSmallHostSink(TestHostSink):
    """Over arenas that are smaller than most of what is asked for."""

    arena_bytes: ClassVar[int] = 100 * KIB


def catalog(*sizes: int, start: int = 100) -> Catalog:
    tensors = []
    position = start
    for number, size in enumerate(sizes):
        tensors.append(TensorInfo(str(number), "U8", (size,), position, position + size))
        position += size
    return Catalog((ShardFile("x.safetensors", position, start, tuple(tensors)),))


def test_large_tensors_are_read_into_their_own_memory_and_not_copied() -> None:
    sink = HostSink(MIB)
    (batch,) = plan_reads(catalog(100_000, 200_000), read_bytes=MIB, gap_bytes=0).batches
    lease = sink.begin(batch, 0)
    views = lease.views(batch.reads[0])
    assert [view.nbytes for view in views if view.nbytes] == [100_000, 200_000]
    for number, view in enumerate(views[1::2]):
        view[:3] = bytes([number, 7, 9])
    for number, (_, tensor) in enumerate(HostDelivery(lease).tensors()):
        assert tensor[:3].tolist() == [number, 7, 9]
        assert tensor.untyped_storage().nbytes() == tensor.nbytes


def test_a_run_of_small_tensors_is_one_view() -> None:
    sink = HostSink(MIB)
    (batch,) = plan_reads(catalog(*[4096] * 200), read_bytes=MIB, gap_bytes=0).batches
    views = sink.begin(batch, 0).views(batch.reads[0])
    assert [view.nbytes for view in views] == [200 * 4096]


def test_what_a_kept_small_tensor_keeps_alive_is_itself() -> None:
    sink = HostSink(MIB)
    (batch,) = plan_reads(catalog(*[4096] * 200), read_bytes=MIB, gap_bytes=0).batches
    lease = sink.begin(batch, 0)
    lease.views(batch.reads[0])
    kept = next(HostDelivery(lease).tensors())
    del lease
    assert kept[1].untyped_storage().nbytes() == 4096
    sink._pool.trim(0)
    assert sink._pool.resident_bytes == 0


@pytest.mark.parametrize("sizes", [(10,), (65_536,), (65_537, 3, 70_000), (5_000_000,), (0, 0)])
@pytest.mark.parametrize("congruence_bytes", [1, 64])
def test_credit_is_what_the_pool_gives_out(sizes: tuple[int, ...], congruence_bytes: int) -> None:
    sink = HostSink(16 * MIB, congruence_bytes=congruence_bytes)
    leases = []
    for batch in plan_reads(catalog(*sizes, start=104), read_bytes=MIB, gap_bytes=0).batches:
        before = sink._pool.resident_bytes
        leases.append(sink.begin(batch, 16 * MIB))
        assert sink._pool.resident_bytes - before == sink.credit_bytes(batch)


class TestCongruentHostSink(TestHostSink):
    """Addresses that follow the places in the file."""

    def make_sink(self, *, read_bytes: int, concurrency: int) -> Sink[Any]:
        sink = HostSink(self.arena_bytes, congruence_bytes=64)
        sink._pool = self.pool = WatchedPool(self.arena_bytes)
        return sink


@pytest.mark.parametrize("header_bytes", [104, 128, 136, 100, 101])
def test_addresses_are_congruent_to_places_unless_that_would_misalign(header_bytes: int) -> None:
    sink = HostSink(16 * MIB, congruence_bytes=64)
    sizes = (70_000, 70_024, 100, 300, 80_000)
    plan = plan_reads(catalog(*sizes, start=header_bytes), read_bytes=64 * MIB, gap_bytes=0)
    (batch,) = plan.batches
    lease = sink.begin(batch, 0)
    (read,) = batch.reads
    views = [view for view in lease.views(read) if view.nbytes]
    assert [view.nbytes for view in views] == [70_000, 70_024, 400, 80_000]
    for place, view in enumerate(views):
        view[:] = bytes([place + 1]) * view.nbytes
    for (_, tensor), info in zip(HostDelivery(lease).tensors(), batch.tensors, strict=True):
        assert tensor.data_ptr() % 8 == 0
        if tensor.nbytes > MIB // 16:
            assert tensor.data_ptr() % 64 == (info.start % 64 if info.start % 8 == 0 else 0)
            assert tensor.untyped_storage().nbytes() == tensor.nbytes
        assert int(tensor[0]) == int(tensor[-1]) == (1, 2, 3, 3, 4)[int(info.name)]


def test_what_just_fits_the_limit_still_does() -> None:
    sink = HostSink(MIB, congruence_bytes=64)
    (batch,) = plan_reads(catalog(MIB, start=104), read_bytes=MIB, gap_bytes=0).batches
    assert sink.credit_bytes(batch) == MIB
    (view,) = (view for view in sink.begin(batch, 0).views(batch.reads[0]) if view.nbytes)
    assert view.nbytes == MIB


def test_the_cpu_is_served_by_the_host_sink() -> None:
    made = sink_for("cpu", lambda *_: None)(memory_bytes=MIB, read_bytes=MIB, concurrency=1)
    assert isinstance(made, HostSink)
