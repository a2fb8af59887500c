"""Tensors in the memory of a CUDA device, by way of page-locked staging memory.

::

    source ──► staging slot ──copy stream──► block on the device ──► tensors
                  ▲                │
                  └── given back ──┴── when the waiting thread has seen the copy end
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING

from streamload.checkpoint import Catalog, TensorInfo
from streamload.errors import ClosedError, DeviceError, StreamloadError
from streamload.loan import Loan
from streamload.plan import Batch, Piece, Read
from streamload.sinks.base import Delivery, Lease, NamedTensor, Sink
from streamload.sinks.device import Completion, Device
from streamload.sinks.dtypes import check_dtypes, torch_dtypes, torch_shape
from streamload.sinks.layout import Placement, Staged, place, stage
from streamload.sinks.pool import round_to_pages
from streamload.sinks.scatter import copy_out, is_bounced, is_sliced, scattered
from streamload.sinks.staging import Slot, Staging, keep
from streamload.sinks.waiter import Waiter

if TYPE_CHECKING:
    import torch

__all__ = ["CudaDelivery", "CudaLease", "CudaSink"]

# How long to wait, at the end, for copies that are under way. All of the staging memory takes a fraction of a second;
# more time than that is what the consumer's own kernels take, which the copies may have to wait for. It is less than
# what the engine grants a load at the interpreter's end.
_CLOSE_TIMEOUT_S = 5.0


class _Layout:
    """Where everything of a batch lies: on the device, and each read on its way there."""

    __slots__ = ("batch", "placement", "staged")

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.placement: Placement = place(batch.tensors)
        self.staged: dict[int, Staged] = {read.start: stage(self.placement, read) for read in batch.reads}


class CudaLease(Lease):
    """A batch's device memory, and how many copies into it are under way."""

    __slots__ = ("blocks", "changed", "copies", "layout")

    def __init__(self, layout: _Layout, blocks: list[torch.Tensor]) -> None:
        super().__init__(layout.batch)
        self.layout = layout
        self.blocks = dict(enumerate(blocks))
        self.copies = 0
        self.changed = asyncio.Event()


class _Copy:
    """What one read brought, on its way to the device. It keeps both ends of the way alive."""

    __slots__ = ("blocks", "completion", "ended", "lease", "loan", "queued", "read", "slot")

    def __init__(self, lease: CudaLease, read: Read, loan: Loan, slot: Slot, completion: Completion) -> None:
        self.lease = lease
        self.blocks = lease.blocks  # which the lease, once abandoned, has no more
        self.read = read
        self.loan = loan
        self.slot = slot
        self.completion = completion
        self.queued = self.ended = 0.0


class CudaDelivery(Delivery):
    """A batch whose bytes are on the device."""

    __slots__ = ("_device", "_lease")

    def __init__(self, lease: CudaLease, device: torch.device) -> None:
        self._lease = lease
        self._device = device

    def tensors(self) -> Iterator[NamedTensor]:
        tensors, blocks, places = self._lease.batch.tensors, self._lease.blocks, self._lease.layout.placement.places
        last = {found.block: number for number, found in enumerate(places) if found is not None}
        for number, (tensor, found) in enumerate(zip(tensors, places, strict=True)):
            if found is None:
                yield tensor.name, _empty(tensor, self._device)
            elif last[found.block] == number:
                # From here on the tensors alone keep their block.
                yield tensor.name, _tensor(tensor, blocks.pop(found.block), found.start)
            else:
                yield tensor.name, _tensor(tensor, blocks[found.block], found.start)


class CudaSink(Sink[CudaLease]):
    """Tensors on a CUDA device.

    A tensor is yielded when the copies into it have been made, so any stream may use it at once. It was allocated on
    the stream that was the consumer's current one at open: who uses it on another one and drops it before that use is
    over says so with ``record_stream``, as for any tensor.

    Args:
        device: Opened on the consumer's thread; this closes it.
        read_bytes: The plan's read size.
        concurrency: How many reads are in flight at most.
        staging_bytes: How much staging memory there may be. Less is taken where less is of use, and room for one read
            is always taken.
        on_copy: Told of each copy to the device, on the event loop: began and ended (seconds of `time.perf_counter`),
            bytes, and what it was. Copies are made one after another, and the spans do not overlap.
        close_timeout_s: How long `aclose` waits for copies that are under way.

    Attributes:
        page_locked: Whether the staging memory is page-locked; None before the first batch. Where it is not, copies go
            through the driver's own small buffers, and the event loop waits for them.
    """

    def __init__(
        self,
        device: Device,
        *,
        read_bytes: int,
        concurrency: int,
        staging_bytes: int,
        on_copy: Callable[[float, float, int, str], None] | None = None,
        close_timeout_s: float = _CLOSE_TIMEOUT_S,
    ) -> None:
        if min(read_bytes, concurrency, staging_bytes) <= 0:
            raise ValueError(
                f"read_bytes={read_bytes}, concurrency={concurrency} and staging_bytes={staging_bytes} must be positive"
            )
        self.page_locked: bool | None = None
        self._device = device
        self._on_copy = on_copy
        self._close_timeout_s = close_timeout_s
        # As many reads that fill memory as the load has in flight, and as many whose copies have not been made yet.
        useful_bytes = 2 * concurrency * read_bytes
        self._staging_bytes = max(min(staging_bytes, useful_bytes), read_bytes)
        self._staging: Staging | None = None
        self._waiter: Waiter | None = None
        self._registered = asyncio.Event()
        self._lent: dict[Loan, Slot] = {}
        self._finishing: set[CudaLease] = set()
        self._layout: _Layout | None = None
        self._last_copy_ended = 0.0
        self._copy_failed = False  # written on the waiting thread
        self._stuck_bytes = 0
        self._error: StreamloadError | None = None
        self._closed = False

    def check(self, catalog: Catalog) -> None:
        check_dtypes(catalog)

    def credit_bytes(self, batch: Batch) -> int:
        layout = self._lay_out(batch)
        # A read that does not fit the staging memory (a million scalars, each padded) gets memory of its own.
        own = sum(round_to_pages(staged.nbytes) for staged in layout.staged.values() if self._is_oversize(staged))
        return layout.placement.nbytes + own

    def begin(self, batch: Batch, spare_bytes: int) -> CudaLease:
        # What could be kept for reuse is in the hands of torch's own allocator.
        self._check()
        self._start()
        layout = self._lay_out(batch)
        self._layout = None
        return CudaLease(layout, self._device.allocate(layout.placement.block_bytes))

    async def lend(self, lease: CudaLease, read: Read) -> Loan:
        await self._registered.wait()
        self._check()
        assert self._staging is not None
        staged = lease.layout.staged[read.start]
        slot = await self._staging.take(staged.nbytes)
        loan = self._lend(lease, read, staged, slot)
        self._lent[loan] = slot
        return loan

    def _lend(self, lease: CudaLease, read: Read, staged: Staged, slot: Slot) -> Loan:
        if not is_sliced(read):
            return Loan([slot.view[start:end] for start, end in staged.views])
        behind = slot.view[staged.behind : staged.nbytes]
        if is_bounced(read):
            return Loan([behind])
        return scattered(read, _into(slot.view, staged.place(lease.layout.placement)), behind)

    def landed(self, lease: CudaLease, read: Read, loan: Loan) -> None:
        assert self._waiter is not None
        if self._error is not None:
            self.failed(lease, read, loan)
            self._check()
        slot = self._lent.pop(loan)
        queued = time.perf_counter()
        staged = lease.layout.staged[read.start]
        if is_bounced(read):
            received = slot.view[staged.behind : staged.nbytes]
            copy_out(read.pieces, _into(slot.view, staged.place(lease.layout.placement)), received)
        try:
            for block, block_start, staging_start, nbytes in staged.segments:
                self._device.copy(
                    lease.blocks[block][block_start : block_start + nbytes],
                    slot.memory[staging_start : staging_start + nbytes],
                )
            completion = self._device.record()
        except BaseException as error:
            # Part of the copies may be under way, and nothing will tell when they end.
            self._quarantine(slot)
            keep(lease.blocks)
            self._copy_failed = True
            self._fail(error)
            raise
        copy = _Copy(lease, read, loan, slot, completion)
        copy.queued = queued
        lease.copies += 1
        self._waiter.submit(partial(self._wait, copy), partial(self._copied, copy))

    def failed(self, lease: CudaLease, read: Read, loan: Loan) -> None:
        self._take_back(loan, self._lent.pop(loan))

    def abandon(self, lease: CudaLease) -> None:
        # Not cleared: copies that are under way go by the same dict.
        lease.blocks = {}

    async def finish(self, lease: CudaLease) -> CudaDelivery:
        self._finishing.add(lease)
        try:
            while lease.copies and self._error is None:
                lease.changed.clear()
                await lease.changed.wait()
        finally:
            self._finishing.discard(lease)
        self._check()
        return CudaDelivery(lease, self._device.torch_device)

    @property
    def quarantined_bytes(self) -> int:
        return self._stuck_bytes + (self._staging.quarantined_bytes if self._staging else 0)

    async def aclose(self) -> None:
        if self._closed:
            return
        self._closed = True
        self._fail(ClosedError("the sink is closed"))
        for slot in self._lent.values():
            # Nobody said that the reads have ended.
            self._quarantine(slot)
        self._lent.clear()
        if self._waiter is None or self._staging is None:
            self._device.close()
            return
        # On the thread, behind the last copy, and whether or not somebody still waits for it here.
        refused: list[BaseException] = []
        self._waiter.submit(self._release, lambda error: refused.append(error) if error else None)
        if not await self._waiter.aclose(self._close_timeout_s):
            # The thread keeps what the copies need, and gives it back should they ever end.
            self._stuck_bytes = self._staging.used_bytes
        if refused:
            raise refused[0]

    def _start(self) -> None:
        if self._waiter is None:
            self._staging = Staging(self._staging_bytes)
            self._waiter = Waiter("streamload-copies")
            self._waiter.submit(self._register, self._on_registered)

    def _lay_out(self, batch: Batch) -> _Layout:
        # Credit is asked for and the batch begun right after each other, as a rule.
        if self._layout is None or self._layout.batch is not batch:
            self._layout = _Layout(batch)
        return self._layout

    def _is_oversize(self, staged: Staged) -> bool:
        return round_to_pages(staged.nbytes) > round_to_pages(self._staging_bytes)

    def _take_back(self, loan: Loan, slot: Slot) -> None:
        assert self._staging is not None
        if loan.quarantined:
            self._quarantine(slot)
        else:
            self._staging.give_back(slot)

    def _quarantine(self, slot: Slot) -> None:
        assert self._staging is not None
        self._staging.quarantine(slot)

    def _copied(self, copy: _Copy, error: BaseException | None) -> None:
        """A copy has ended, or failed."""
        copy.lease.copies -= 1
        copy.lease.changed.set()
        if error is not None:
            self._quarantine(copy.slot)
            self._fail(error)
        else:
            self._take_back(copy.loan, copy.slot)
            began = max(copy.queued, self._last_copy_ended)
            self._last_copy_ended = copy.ended
            if self._on_copy is not None:
                nbytes = sum(segment.nbytes for segment in copy.lease.layout.staged[copy.read.start].segments)
                self._on_copy(began, copy.ended, nbytes, _describe(copy.lease.batch))

    def _fail(self, error: BaseException) -> None:
        """Refuse everything from here on, and wake up who waits. The first error is the one that is told."""
        if self._error is None:
            if not isinstance(error, StreamloadError):
                translated = DeviceError(f"copying to {self._device.name} failed: {error!r}")
                translated.__cause__ = error
                error = translated
            self._error = error
            if self._staging is not None:
                self._staging.fail(error)
        for lease in self._finishing:
            lease.changed.set()

    def _check(self) -> None:
        if self._error is not None:
            # A new one for each who asks: one exception raised in several tasks would collect all their tracebacks.
            raise type(self._error)(self._error.cause) from self._error

    # What follows runs on the waiting thread.

    def _register(self) -> None:
        # Here, and not on the event loop: every page is found, cleared and pinned before it returns.
        assert self._staging is not None
        self.page_locked = self._device.register(self._staging.memory)

    def _wait(self, copy: _Copy) -> None:
        try:
            copy.completion.wait()
        except BaseException:
            # The device may still do anything with either end.
            keep(copy.slot.memory, copy.blocks)
            self._copy_failed = True
            raise
        copy.ended = time.perf_counter()

    def _release(self) -> None:
        assert self._staging is not None
        try:
            # Memory that something may still use stays as it is, page-locked.
            if self.page_locked and not self._copy_failed and not self._staging.quarantined_bytes:
                self._device.unregister(self._staging.memory)
        except BaseException:
            keep(self._staging.memory)
            raise
        finally:
            self._device.close()

    def _on_registered(self, error: BaseException | None) -> None:
        if error is not None:
            self._fail(error)
        self._registered.set()


def _into(view: memoryview, place: Callable[[Piece], int]) -> Callable[[Piece], tuple[memoryview, int]]:
    return lambda piece: (view, place(piece))


def _describe(batch: Batch) -> str:
    first, others = batch.tensors[0].name, len(batch.tensors) - 1
    return f"{first} and {others} more" if others else first


def _tensor(tensor: TensorInfo, block: torch.Tensor, start: int) -> torch.Tensor:
    flat = block[start : start + tensor.nbytes]
    return flat.view(torch_dtypes()[tensor.dtype]).view(torch_shape(tensor))


def _empty(tensor: TensorInfo, device: torch.device) -> torch.Tensor:
    import torch

    return torch.empty(torch_shape(tensor), dtype=torch_dtypes()[tensor.dtype], device=device)
