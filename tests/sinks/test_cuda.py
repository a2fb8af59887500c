"""The CUDA sink, over the late device and, marked ``gpu``, over a real one."""

from __future__ import annotations

import asyncio
import gc
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
import torch

from streamload.checkpoint import Catalog, ShardFile, TensorInfo
from streamload.errors import ClosedError, DeviceError
from streamload.loan import Loan
from streamload.plan import Batch, Read, plan_reads
from streamload.sinks.base import Sink
from streamload.sinks.cuda import CudaLease, CudaSink
from streamload.sinks.device import open_device
from streamload.sinks.layout import SLAB_BYTES, SMALL_BYTES
from streamload.testing.devices import LateDevice
from streamload.testing.sinks import SinkConformance

KIB = 1 << 10
LARGE = SMALL_BYTES + 1000

cuda: Any = torch.cuda  # half of it is untyped


def copy_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "streamload-copies"]


class TestOverLateDevice(SinkConformance):
    """Copies are made when they are waited for, and staging memory is plentiful."""

    def make_sink(self, *, read_bytes: int, concurrency: int) -> Sink[Any]:
        self.device = LateDevice()
        return CudaSink(self.device, read_bytes=read_bytes, concurrency=concurrency, staging_bytes=1 << 30)

    def check_given_back(self, sink: Sink[Any]) -> None:
        assert self.device.allocated_bytes == 0
        assert self.device.pending_copies == 0
        assert not self.device.registered
        assert self.device.closed == 1
        assert not copy_threads()


class TestOverHeldDevice(TestOverLateDevice):
    """Copies are made when nothing else is left to do, and staging memory is scarce."""

    def make_sink(self, *, read_bytes: int, concurrency: int) -> Sink[Any]:
        self.device = LateDevice(held=True)
        return CudaSink(
            self.device, read_bytes=read_bytes, concurrency=concurrency, staging_bytes=(concurrency + 1) * read_bytes
        )

    def idle(self, sink: Sink[Any]) -> None:
        self.device.advance()


class TestWithoutPageLocking(TestOverLateDevice):
    """The system does not allow memory to be page-locked."""

    def make_sink(self, *, read_bytes: int, concurrency: int) -> Sink[Any]:
        self.device = LateDevice(page_lock=False)
        return CudaSink(self.device, read_bytes=read_bytes, concurrency=concurrency, staging_bytes=1 << 30)


@pytest.mark.gpu
class TestOverCuda(SinkConformance):
    """The real thing."""

    def make_sink(self, *, read_bytes: int, concurrency: int) -> Sink[Any]:
        return CudaSink(
            open_device("cuda"),
            read_bytes=read_bytes,
            concurrency=concurrency,
            staging_bytes=2 * concurrency * read_bytes,
        )

    def check_given_back(self, sink: Sink[Any]) -> None:
        assert not copy_threads()


@pytest.mark.gpu
class TestOverCudaOnAnotherStream(TestOverCuda):
    """The consumer's current stream is one of its own."""

    def make_sink(self, *, read_bytes: int, concurrency: int) -> Sink[Any]:
        with cuda.stream(cuda.Stream()):
            return super().make_sink(read_bytes=read_bytes, concurrency=concurrency)


# One by one.


def batches_of(sizes: list[int], *, read_bytes: int) -> tuple[Batch, ...]:
    tensors = []
    end = 9
    for number, size in enumerate(sizes):
        tensors.append(TensorInfo(f"t{number}", "U8", (size,), end, end + size))
        end += size
    return plan_reads(Catalog((ShardFile("f", end, 9, tuple(tensors)),)), read_bytes=read_bytes, gap_bytes=0).batches


def value_at(position: int) -> int:
    """The byte at a position of the file, which no poison of the late device is."""
    return position % 101


def content_of(start: int, end: int) -> bytes:
    return bytes(value_at(position) for position in range(start, end))


def fill(loan: Loan, read: Read) -> None:
    position = read.start
    for view in loan.views:
        view[:] = content_of(position, position + view.nbytes)
        position += view.nbytes


async def quiet() -> None:
    """Let everything happen that happens by itself, threads apart."""
    for _ in range(10):
        await asyncio.sleep(0)


async def land(sink: CudaSink, lease: CudaLease, read: Read) -> None:
    loan = await sink.lend(lease, read)
    fill(loan, read)
    sink.landed(lease, read, loan)


async def carry(sink: CudaSink, batch: Batch) -> dict[str, torch.Tensor]:
    lease = sink.begin(batch, 0)
    for read in batch.reads:
        await land(sink, lease, read)
    return dict((await sink.finish(lease)).tensors())


def check(batch: Batch, tensors: dict[str, torch.Tensor]) -> None:
    assert list(tensors) == [tensor.name for tensor in batch.tensors]
    for tensor in batch.tensors:
        assert bytes(tensors[tensor.name].tolist()) == content_of(tensor.start, tensor.end), tensor.name


def run(
    device: LateDevice,
    main: Callable[[CudaSink], Awaitable[None]],
    *,
    read_bytes: int = 4 * KIB,
    staging_bytes: int = 8 * KIB,
    close_timeout_s: float = 60.0,
    on_copy: Callable[[float, float, int, str], None] | None = None,
) -> CudaSink:
    """Run a test with a sink that has room for two reads of 4 KiB, unless it says otherwise."""

    @asynccontextmanager
    async def opened() -> AsyncIterator[CudaSink]:
        sink = CudaSink(
            device,
            read_bytes=read_bytes,
            concurrency=4,
            staging_bytes=staging_bytes,
            on_copy=on_copy,
            close_timeout_s=close_timeout_s,
        )
        try:
            yield sink
        finally:
            await sink.aclose()

    async def body() -> CudaSink:
        async with asyncio.timeout(60), opened() as sink:
            await main(sink)
        return sink

    return asyncio.run(body())


def test_staging_memory_is_lent_again_when_its_copy_has_been_made() -> None:
    device = LateDevice(held=True)
    batches = batches_of([4 * KIB] * 3, read_bytes=4 * KIB)

    async def main(sink: CudaSink) -> None:
        leases = [sink.begin(batch, 0) for batch in batches]
        for lease, batch in zip(leases[:2], batches, strict=False):
            await land(sink, lease, batch.reads[0])
        third = asyncio.create_task(land(sink, leases[2], batches[2].reads[0]))
        await quiet()
        assert not third.done()
        device.advance()
        await third
        device.release()
        for lease, batch in zip(leases, batches, strict=True):
            check(batch, dict((await sink.finish(lease)).tensors()))

    run(device, main)


def test_a_batch_is_finished_when_all_its_copies_have_been_made() -> None:
    device = LateDevice(held=True)
    (batch,) = batches_of([7 * KIB], read_bytes=4 * KIB)

    async def main(sink: CudaSink) -> None:
        lease = sink.begin(batch, 0)
        for read in batch.reads:
            await land(sink, lease, read)
        finishing = asyncio.create_task(sink.finish(lease))
        await quiet()
        assert not finishing.done()
        device.advance()
        await quiet()
        assert not finishing.done()
        device.advance()
        check(batch, dict((await finishing).tensors()))

    run(device, main)


def test_a_lease_that_is_dropped_keeps_its_memory_until_the_copies_have_been_made() -> None:
    device = LateDevice(held=True)
    first, second = batches_of([4 * KIB] * 2, read_bytes=4 * KIB)

    async def main(sink: CudaSink) -> None:
        lease = sink.begin(first, 0)
        await land(sink, lease, first.reads[0])
        del lease
        gc.collect()
        assert device.allocated_bytes == 4 * KIB
        # Had it been given back, this would get it, and the copy would hit it.
        device.release()
        check(second, await carry(sink, second))

    run(device, main)
    gc.collect()
    assert device.allocated_bytes == 0


def test_an_abandoned_lease_keeps_its_memory_until_the_copies_have_been_made() -> None:
    device = LateDevice(held=True)
    first, second = batches_of([4 * KIB] * 2, read_bytes=4 * KIB)
    leases: list[CudaLease] = []

    async def main(sink: CudaSink) -> None:
        leases.extend(sink.begin(batch, 0) for batch in (first, second))
        await land(sink, leases[0], first.reads[0])
        for lease in leases:
            sink.abandon(lease)
        assert device.allocated_bytes == 4 * KIB, "the one without a copy"
        device.release()
        check(second, await carry(sink, second))

    run(device, main)
    # The leases are still there, in an error's traceback perhaps; what they had is not.
    gc.collect()
    assert device.allocated_bytes == 0


def test_a_cancelled_finish_leaves_the_lease_as_it_was() -> None:
    device = LateDevice(held=True)
    (batch,) = batches_of([4 * KIB], read_bytes=4 * KIB)

    async def main(sink: CudaSink) -> None:
        lease = sink.begin(batch, 0)
        await land(sink, lease, batch.reads[0])
        finishing = asyncio.create_task(sink.finish(lease))
        await quiet()
        finishing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await finishing
        device.release()
        check(batch, dict((await sink.finish(lease)).tensors()))

    run(device, main)


def test_a_cancelled_lend_has_lent_nothing() -> None:
    gate = threading.Event()

    class Slow(LateDevice):
        def register(self, memory: torch.Tensor) -> bool:
            gate.wait()
            return super().register(memory)

    device = Slow()
    batches = batches_of([4 * KIB] * 4, read_bytes=4 * KIB)

    async def main(sink: CudaSink) -> None:
        leases = [sink.begin(batch, 0) for batch in batches]
        # While the staging memory is being registered, while all of it is lent, and when it has just come back.
        registering = asyncio.create_task(sink.lend(leases[0], batches[0].reads[0]))
        await asyncio.sleep(0)
        registering.cancel()
        gate.set()
        loans = [await sink.lend(lease, batch.reads[0]) for lease, batch in zip(leases[:2], batches, strict=False)]
        waiting = asyncio.create_task(sink.lend(leases[2], batches[2].reads[0]))
        await quiet()
        waiting.cancel()
        late = asyncio.create_task(sink.lend(leases[2], batches[2].reads[0]))
        await quiet()
        sink.failed(leases[0], batches[0].reads[0], loans[0])
        late.cancel()
        sink.failed(leases[1], batches[1].reads[0], loans[1])
        await asyncio.wait([registering, waiting, late])
        assert registering.cancelled()
        assert waiting.cancelled()
        assert late.cancelled()
        # Both slots are there.
        for lease, batch in zip(leases[2:], batches[2:], strict=True):
            await land(sink, lease, batch.reads[0])

    assert run(device, main).quarantined_bytes == 0


def test_small_tensors_take_one_copy_and_large_ones_one_each() -> None:
    device = LateDevice()
    (batch,) = batches_of([512, LARGE, 100, LARGE, 3000] + [64] * 500, read_bytes=1 << 20)

    async def main(sink: CudaSink) -> None:
        check(batch, await carry(sink, batch))

    run(device, main, read_bytes=1 << 20, staging_bytes=1 << 20)
    assert device.copies == 3


def test_a_kept_tensor_keeps_little_more_than_itself() -> None:
    device = LateDevice()
    (batch,) = batches_of([SMALL_BYTES] * 20 + [4 * LARGE] * 2, read_bytes=16 << 20)

    async def main(sink: CudaSink) -> None:
        delivery = await deliver(sink, batch)
        names = []
        for name, tensor in delivery.tensors():
            names.append(name)
            if name == "t20":
                # The slabs are gone; what is left are the two large ones.
                assert device.allocated_bytes == 2 * (1 << 21)
                kept = tensor
        assert len(names) == 22
        del tensor, delivery
        gc.collect()
        assert device.allocated_bytes == 1 << 21
        assert kept.untyped_storage().nbytes() == 4 * LARGE

    async def deliver(sink: CudaSink, batch: Batch) -> Any:
        lease = sink.begin(batch, 0)
        for read in batch.reads:
            await land(sink, lease, read)
        return await sink.finish(lease)

    run(device, main, read_bytes=16 << 20, staging_bytes=16 << 20)
    assert SLAB_BYTES == 1 << 21


def test_credit_is_the_padded_device_memory() -> None:
    async def main(sink: CudaSink) -> None:
        (batch,) = batches_of([300, 4, 1, 256], read_bytes=4 * KIB)
        assert sink.credit_bytes(batch) == 512 + 256

    run(LateDevice(), main)


def test_a_read_larger_than_the_staging_memory_gets_memory_of_its_own_and_counts() -> None:
    device = LateDevice()
    (batch,) = batches_of([1] * 4000, read_bytes=4 * KIB)

    async def main(sink: CudaSink) -> None:
        padded = 3999 * 16 + 1
        assert sink.credit_bytes(batch) == padded + 64_000 + (-64_000 % 4096)
        # In the staging memory's place, and not as well.
        lease = sink.begin(batch, 0)
        loan = await sink.lend(lease, batch.reads[0])
        fill(loan, batch.reads[0])
        others = batches_of([4 * KIB] * 2, read_bytes=4 * KIB)
        for other in others:
            check(other, await carry(sink, other))
        sink.landed(lease, batch.reads[0], loan)
        check(batch, dict((await sink.finish(lease)).tensors()))

    run(device, main)
    assert device.copies == 3


@pytest.mark.parametrize("fail_late", [False, True])
def test_a_failed_copy_ends_everything_with_an_error(fail_late: bool) -> None:
    device = LateDevice(held=True, fail_copy=1, fail_late=fail_late)
    batches = batches_of([4 * KIB] * 4, read_bytes=4 * KIB)

    async def main(sink: CudaSink) -> None:
        leases = [sink.begin(batch, 0) for batch in batches]
        await land(sink, leases[0], batches[0].reads[0])
        first = asyncio.create_task(sink.finish(leases[0]))
        second = await sink.lend(leases[1], batches[1].reads[0])
        waiting = asyncio.create_task(sink.lend(leases[2], batches[2].reads[0]))
        await quiet()
        if fail_late:
            sink.landed(leases[1], batches[1].reads[0], second)
            device.advance()
            await first
            # The slot that this one freed goes to the one that waits; so it fails when it lands.
            loan = await waiting
            device.advance()
            with pytest.raises(DeviceError, match="copying to late failed"):
                await sink.finish(leases[1])
            with pytest.raises(DeviceError, match="copying to late failed"):
                sink.landed(leases[2], batches[2].reads[0], loan)
        else:
            with pytest.raises(DeviceError, match="copy 1 to late was refused"):
                sink.landed(leases[1], batches[1].reads[0], second)
            for task in (first, waiting):
                with pytest.raises(DeviceError, match="copy 1 to late was refused"):
                    await task
        for step in (sink.lend(leases[3], batches[3].reads[0]), sink.finish(leases[3])):
            with pytest.raises(DeviceError):
                await step
        with pytest.raises(DeviceError):
            sink.begin(batches[3], 0)
        device.release()

    sink = run(device, main)
    assert sink.quarantined_bytes == 4 * KIB
    # The device may still read from it.
    assert device.registered
    assert not copy_threads()


def test_a_device_without_memory_is_told_where_it_is_asked() -> None:
    device = LateDevice(fail_allocation=1)
    batches = batches_of([4 * KIB] * 3, read_bytes=4 * KIB)

    async def main(sink: CudaSink) -> None:
        check(batches[0], await carry(sink, batches[0]))
        with pytest.raises(DeviceError, match="out of memory"):
            sink.begin(batches[1], 0)
        check(batches[2], await carry(sink, batches[2]))

    run(device, main)


def test_memory_that_cannot_be_registered_at_all_ends_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    device = LateDevice()

    def refuse(memory: torch.Tensor) -> bool:
        raise DeviceError("the driver is gone")

    monkeypatch.setattr(device, "register", refuse)
    (batch,) = batches_of([4 * KIB], read_bytes=4 * KIB)

    async def main(sink: CudaSink) -> None:
        lease = sink.begin(batch, 0)
        with pytest.raises(DeviceError, match="the driver is gone"):
            await sink.lend(lease, batch.reads[0])

    run(device, main)


def test_an_error_at_release_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    device = LateDevice()

    def refuse(memory: torch.Tensor) -> None:
        raise DeviceError("cannot be unlocked")

    monkeypatch.setattr(device, "unregister", refuse)
    (batch,) = batches_of([4 * KIB], read_bytes=4 * KIB)

    async def main(sink: CudaSink) -> None:
        check(batch, await carry(sink, batch))

    with pytest.raises(DeviceError, match="cannot be unlocked"):
        run(device, main)
    assert device.closed == 1
    assert not copy_threads()


def test_quarantined_memory_stays_registered_and_is_not_lent() -> None:
    device = LateDevice()
    batches = batches_of([4 * KIB] * 3, read_bytes=4 * KIB)

    async def main(sink: CudaSink) -> None:
        leases = [sink.begin(batch, 0) for batch in batches]
        loans = [await sink.lend(lease, batch.reads[0]) for lease, batch in zip(leases[:2], batches, strict=False)]
        waiting = asyncio.create_task(sink.lend(leases[2], batches[2].reads[0]))
        for loan, lease, batch in zip(loans, leases, batches, strict=False):
            await quiet()
            loan.quarantine()
            sink.failed(lease, batch.reads[0], loan)
        # Nothing will ever come back: waiting would be for ever.
        with pytest.raises(DeviceError, match="no staging memory is left"):
            await waiting
        with pytest.raises(DeviceError, match="no staging memory is left"):
            await sink.lend(leases[2], batches[2].reads[0])

    sink = run(device, main)
    assert sink.quarantined_bytes == 8 * KIB
    assert device.registered
    assert not copy_threads()


def test_a_loan_that_was_never_returned_is_quarantined() -> None:
    device = LateDevice()
    (batch,) = batches_of([4 * KIB], read_bytes=4 * KIB)
    loans = []

    async def main(sink: CudaSink) -> None:
        lease = sink.begin(batch, 0)
        loans.append(await sink.lend(lease, batch.reads[0]))

    sink = run(device, main)
    assert sink.quarantined_bytes == 4 * KIB
    assert device.registered
    fill(loans[0], batch.reads[0])


def test_closing_waits_for_copies_under_way() -> None:
    device = LateDevice()
    (batch,) = batches_of([4 * KIB], read_bytes=4 * KIB)

    async def main(sink: CudaSink) -> None:
        lease = sink.begin(batch, 0)
        await land(sink, lease, batch.reads[0])

    run(device, main)
    gc.collect()
    assert (device.pending_copies, device.allocated_bytes, device.registered) == (0, 0, False)


def test_closing_does_not_wait_for_ever() -> None:
    device = LateDevice(held=True)
    (batch,) = batches_of([4 * KIB], read_bytes=4 * KIB)

    async def main(sink: CudaSink) -> None:
        lease = sink.begin(batch, 0)
        await land(sink, lease, batch.reads[0])

    sink = run(device, main, close_timeout_s=0)
    assert sink.quarantined_bytes == 4 * KIB
    assert device.registered
    (thread,) = copy_threads()
    # Should the copies end after all, the thread gives back what they needed.
    device.release()
    thread.join()
    assert not device.registered
    assert device.closed == 1


def test_a_copy_that_fails_while_closing_keeps_its_memory() -> None:
    device = LateDevice(held=True, fail_copy=0, fail_late=True)
    (batch,) = batches_of([4 * KIB], read_bytes=4 * KIB)

    async def main(sink: CudaSink) -> None:
        lease = sink.begin(batch, 0)
        await land(sink, lease, batch.reads[0])
        closing = asyncio.create_task(sink.aclose())
        await quiet()
        # The thread comes to the end of its work before the event loop hears of the failure.
        device.release()
        (thread,) = copy_threads()
        thread.join()
        await closing

    sink = run(device, main)
    assert device.registered
    assert device.allocated_bytes == 4 * KIB
    assert sink.quarantined_bytes == 4 * KIB


def test_closing_may_be_cancelled() -> None:
    device = LateDevice(held=True)
    (batch,) = batches_of([4 * KIB], read_bytes=4 * KIB)

    async def main(sink: CudaSink) -> None:
        lease = sink.begin(batch, 0)
        await land(sink, lease, batch.reads[0])
        closing = asyncio.create_task(sink.aclose())
        await quiet()
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing

    run(device, main)
    (thread,) = copy_threads()
    device.release()
    thread.join()
    assert not device.registered
    assert device.closed == 1


def test_a_closed_sink_lends_nothing() -> None:
    device = LateDevice()
    first, second = batches_of([4 * KIB] * 2, read_bytes=4 * KIB)

    async def main(sink: CudaSink) -> None:
        lease = sink.begin(first, 0)
        await sink.aclose()
        with pytest.raises(ClosedError):
            await sink.lend(lease, first.reads[0])
        with pytest.raises(ClosedError):
            await sink.finish(lease)
        with pytest.raises(ClosedError):
            sink.begin(second, 0)

    run(device, main)


@pytest.mark.parametrize("page_lock", [True, False])
def test_whether_staging_memory_is_page_locked_can_be_asked(page_lock: bool) -> None:
    device = LateDevice(page_lock=page_lock)
    (batch,) = batches_of([4 * KIB], read_bytes=4 * KIB)

    async def main(sink: CudaSink) -> None:
        assert sink.page_locked is None
        check(batch, await carry(sink, batch))
        assert sink.page_locked is page_lock
        assert device.registered is page_lock

    run(device, main)


def test_copies_are_told_one_after_another() -> None:
    told: list[tuple[float, float, int, str]] = []
    batches = batches_of([4 * KIB, 5 * KIB, 1, 2, 3], read_bytes=4 * KIB)

    async def main(sink: CudaSink) -> None:
        leases = [sink.begin(batch, 0) for batch in batches]
        for lease in leases:
            for read in lease.batch.reads:
                await land(sink, lease, read)
        for lease in leases:
            await sink.finish(lease)

    run(LateDevice(), main, on_copy=lambda *span: told.append(span), staging_bytes=1 << 20)
    assert [nbytes for _, _, nbytes, _ in told] == [4096, 4096, 1024, 35]
    assert [detail for *_, detail in told] == ["t0", "t1", "t1", "t2 and 2 more"]
    times = [time for began, ended, _, _ in told for time in (began, ended)]
    assert times == sorted(times)


def test_staging_memory_is_no_larger_than_is_of_use() -> None:
    registered: list[int] = []

    class Watching(LateDevice):
        def register(self, memory: torch.Tensor) -> bool:
            registered.append(memory.nbytes)
            return super().register(memory)

    (batch,) = batches_of([4 * KIB], read_bytes=4 * KIB)

    async def main(sink: CudaSink) -> None:
        check(batch, await carry(sink, batch))

    run(Watching(), main, staging_bytes=1 << 40)
    run(Watching(), main, staging_bytes=1)
    assert registered == [2 * 4 * 4 * KIB, 4 * KIB]


@pytest.mark.parametrize("bad", ["read_bytes", "concurrency", "staging_bytes"])
def test_sizes_must_be_positive(bad: str) -> None:
    sizes: dict[str, Any] = {"read_bytes": 1, "concurrency": 1, "staging_bytes": 1} | {bad: 0}
    with pytest.raises(ValueError, match="must be positive"):
        CudaSink(LateDevice(), **sizes)


# On a real device.


def load_one(size: int) -> torch.Tensor:
    (batch,) = batches_of([size], read_bytes=size)

    async def main() -> torch.Tensor:
        sink = CudaSink(open_device("cuda"), read_bytes=size, concurrency=1, staging_bytes=size)
        try:
            return (await carry(sink, batch))["t0"]
        finally:
            await sink.aclose()

    return asyncio.run(main())


@pytest.mark.gpu
def test_tensors_lie_on_the_device() -> None:
    (batch,) = batches_of([300, 0, LARGE], read_bytes=1 << 20)

    async def main() -> None:
        sink = CudaSink(open_device("cuda:0"), read_bytes=1 << 20, concurrency=1, staging_bytes=1 << 20)
        try:
            tensors = await carry(sink, batch)
            assert sink.page_locked
        finally:
            await sink.aclose()
        check(batch, tensors)
        assert {tensor.device for tensor in tensors.values()} == {torch.device("cuda", 0)}
        assert all(tensor.data_ptr() % 256 == 0 for tensor in tensors.values())

    asyncio.run(main())


@pytest.mark.gpu
@pytest.mark.parametrize("own_stream", [False, True])
def test_memory_that_queued_kernels_still_read_is_not_overwritten(own_stream: bool) -> None:
    size = 4 << 20
    # So that the memory which is free next is the one that is given back here.
    cuda.empty_cache()
    with cuda.stream(cuda.Stream() if own_stream else cuda.default_stream()):
        read = torch.empty(size, dtype=torch.uint8, device="cuda")
        old = torch.full((size,), 200, dtype=torch.uint8, device="cuda")
        address = old.data_ptr()
        # Long enough for a copy that does not wait to come first.
        cuda._sleep(500_000_000)
        read.copy_(old)
        del old
        loaded = load_one(size)
    assert loaded.data_ptr() == address, "the test means to have the same memory"
    cuda.synchronize()
    assert bool((read == 200).all())
    assert bool((loaded[:101].cpu() == torch.tensor([value_at(9 + i) for i in range(101)], dtype=torch.uint8)).all())


@pytest.mark.gpu
def test_a_gpu_that_is_not_there_is_told() -> None:
    with pytest.raises(DeviceError, match=r"no device 'cuda:99': there is cuda:0 \("):
        open_device("cuda:99")
