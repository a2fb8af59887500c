"""Page-locked memory through which bytes pass on their way to a device, lent out and taken back."""

from __future__ import annotations

import asyncio
import mmap
from collections import deque
from typing import TYPE_CHECKING

from streamload.errors import DeviceError, StreamloadError
from streamload.sinks.freespace import FreeSpace
from streamload.sinks.pool import round_to_pages

if TYPE_CHECKING:
    import torch

__all__ = ["Slot", "Staging", "keep"]

# What something may still write into or read from. It outlives every sink: nothing else can be done with it.
_KEPT: list[object] = []


def keep(*memory: object) -> None:
    """Keep memory until the process ends. From any thread."""
    _KEPT.extend(memory)


class Slot:
    """A part of the staging memory, for one read.

    Attributes:
        start: Its first byte in the shared mapping; None where it is a mapping of its own.
        nbytes: Its size.
        view: The memory, for the source.
        memory: The same, one-dimensional and of bytes, for the device.
    """

    __slots__ = ("memory", "nbytes", "start", "view")

    def __init__(self, view: memoryview, memory: torch.Tensor, start: int | None) -> None:
        self.view = view
        self.memory = memory
        self.start = start
        self.nbytes = view.nbytes


class Staging:
    """One mapping, out of which slots are lent first come, first served. Used on one event loop.

    A slot larger than the whole mapping is a mapping of its own, which nobody page-locks and which goes back to the
    system when the slot is garbage; who asks for one accounts for it.

    Args:
        nbytes: The mapping's size, rounded up to pages.

    Attributes:
        nbytes: The mapping's size.
        memory: All of it, one-dimensional and of bytes.
        quarantined_bytes: How much was quarantined, slots with mappings of their own included.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = round_to_pages(nbytes)
        self.quarantined_bytes = 0
        self._view, self.memory = _map(self.nbytes)
        self._free = FreeSpace(self.nbytes)
        self._lost: list[tuple[int, int]] = []  # quarantined ranges of the mapping, as start and end
        self._waiting: deque[tuple[int, asyncio.Future[Slot | None]]] = deque()
        self._error: StreamloadError | None = None

    @property
    def used_bytes(self) -> int:
        """How much of the mapping is lent."""
        return self.nbytes - self._free.nbytes - sum(end - start for start, end in self._lost)

    async def take(self, nbytes: int) -> Slot:
        """Wait for a slot of at least so many bytes. Cancelled, it has taken nothing.

        Raises:
            DeviceError: So much is not to be had any more, since too much is quarantined.
            StreamloadError: What `fail` was told.
        """
        size = round_to_pages(nbytes)
        self._check(size)
        if size > self.nbytes:
            return Slot(*_map(size), None)
        if not self._waiting:
            slot = self._cut(size)
            if slot is not None:
                return slot
        granted: asyncio.Future[Slot | None] = asyncio.get_running_loop().create_future()
        self._waiting.append((size, granted))
        try:
            slot = await granted
        except asyncio.CancelledError:
            # Where the slot came first and the cancellation right after it, the slot would be lost.
            slot = None if granted.cancelled() else granted.result()
            if slot is not None:
                self.give_back(slot)
            # Those behind this one may fit where it did not.
            self._serve()
            raise
        if slot is None:
            self._check(size)
            raise AssertionError("woken without a slot and without a reason")
        return slot

    def give_back(self, slot: Slot) -> None:
        """Take a slot back, to be lent again."""
        if slot.start is not None:
            self._free.give(slot.start, slot.nbytes)
            self._serve()

    def quarantine(self, slot: Slot) -> None:
        """Never lend the slot again, and keep its memory, mapping and all, until the process ends."""
        keep(slot.memory)
        self.quarantined_bytes += slot.nbytes
        if slot.start is not None:
            self._lost.append((slot.start, slot.start + slot.nbytes))
            self._serve()

    def fail(self, error: StreamloadError) -> None:
        """Lend nothing any more: who waits, or comes later, gets this error."""
        self._error = error
        self._serve()

    def _serve(self) -> None:
        """Grant what can be granted, in order: one that is too large for now holds up those behind it, not for ever."""
        while self._waiting:
            size, granted = self._waiting[0]
            if granted.done():
                self._waiting.popleft()
                continue
            slot = None
            if self._error is None and size <= self._reach():
                slot = self._cut(size)
                if slot is None:
                    return
            self._waiting.popleft()
            granted.set_result(slot)

    def _cut(self, size: int) -> Slot | None:
        start = self._free.find(size)
        if start is None:
            return None
        self._free.take(start, size)
        return Slot(self._view[start : start + size], self.memory[start : start + size], start)

    def _check(self, size: int) -> None:
        if self._error is not None:
            # A new one for each who asks: one exception raised in several tasks would collect all their tracebacks.
            raise type(self._error)(self._error.cause) from self._error
        if self._reach() < size <= self.nbytes:
            raise DeviceError(
                f"no staging memory is left for a read of {size} bytes: reads that hang may still write into "
                f"{self.quarantined_bytes} bytes"
            )

    def _reach(self) -> int:
        """The largest slot that there could be if everything was given back that is not quarantined."""
        reach = start = 0
        for lost_start, lost_end in sorted(self._lost):
            reach = max(reach, lost_start - start)
            start = lost_end
        return max(reach, self.nbytes - start)


def _map(nbytes: int) -> tuple[memoryview, torch.Tensor]:
    import torch

    mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    # Not for forked children: after a fork the first write to a page moves the writer to a copy of it, and a device
    # that still reads the original would get stale bytes. (Kernels from 5.12 on see to that for page-locked memory.)
    mapping.madvise(mmap.MADV_DONTFORK)
    # Both refer to the mapping, and nobody closes it: it is unmapped when the last of their slices is gone.
    return memoryview(mapping), torch.frombuffer(mapping, dtype=torch.uint8)
