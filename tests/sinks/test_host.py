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


def catalog(*sizes: int) -> Catalog:
    tensors = []
    position = 100
    for number, size in enumerate(sizes):
        tensors.append(TensorInfo(str(number), "U8", (size,), position, position + size))
        position += size
    return Catalog((ShardFile("x.safetensors", position, 100, tuple(tensors)),))


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
def test_credit_is_what_the_pool_gives_out(sizes: tuple[int, ...]) -> None:
    sink = HostSink(16 * MIB)
    leases = []
    for batch in plan_reads(catalog(*sizes), read_bytes=MIB, gap_bytes=0).batches:
        before = sink._pool.resident_bytes
        leases.append(sink.begin(batch, 16 * MIB))
        assert sink._pool.resident_bytes - before == sink.credit_bytes(batch)


def test_the_cpu_is_served_by_the_host_sink() -> None:
    made = sink_for("cpu", lambda *_: None)(memory_bytes=MIB, read_bytes=MIB, concurrency=1)
    assert isinstance(made, HostSink)
