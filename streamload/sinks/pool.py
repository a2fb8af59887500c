"""Host memory that tensors own while they live, and that is used again when they are gone.

Reading into memory that was used before is several times faster than reading into fresh memory, whose pages the kernel
has to find and clear one by one. So tensors are built over regions of large private mappings (arenas), and a region
comes back when the tensor's storage is garbage.

Regions of many sizes, freed in another order than they were taken, leave gaps that are too small for the next one. Its
address is then found elsewhere, and the gaps' pages are moved there: address space is plenty, resident memory is not.
"""

from __future__ import annotations

import mmap
import weakref
from collections import deque

from streamload.sinks.freespace import FreeSpace
from streamload.sinks.pages import address_of, move_pages

__all__ = ["PAGE_BYTES", "HostPool", "round_to_pages"]

PAGE_BYTES = mmap.PAGESIZE

# Fewer pages are not worth moving: each move leaves the kernel with one more mapping to keep, of which a process may
# have some ten thousands.
_LEAST_MOVE_BYTES = 256 << 10

# Larger arenas are of no use: what does not fit one gets another.
_MAX_ARENA_BYTES = 1 << 30


def round_to_pages(nbytes: int) -> int:
    """The least multiple of the page size that holds `nbytes`."""
    return -(-nbytes // PAGE_BYTES) * PAGE_BYTES


class _Arena:
    """One mapping and what of it is unused.

    The mapping is private, so that a forked child's writes do not show in the parent's tensors. It is dropped, never
    closed: the kernel takes it back when the last region over it is garbage.

    It asks for no huge pages. They halve a first pass where the kernel has them at hand; on a virtual machine it mostly
    does not, and zeroing memory that the host has yet to find took half of a load's processor time. A huge page would
    also stay whole while one small tensor in it is kept.
    """

    __slots__ = ("address", "free", "mapping", "view")

    def __init__(self, nbytes: int) -> None:
        self.mapping = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self.mapping)
        self.address = address_of(self.mapping)
        self.free = FreeSpace(nbytes)

    def clean(self, start: int, nbytes: int) -> None:
        """Give the pages of an unused range back to the system; the addresses stay."""
        self.mapping.madvise(mmap.MADV_DONTNEED, start, nbytes)
        self.free.cleaned(start, nbytes)


class HostPool:
    """Page-aligned regions of host memory, each back in the pool when nothing refers to it any more.

    Used on one thread, except that regions may become garbage on any.

    Args:
        arena_bytes: How much address space is set aside at a time. A region larger than that gets an arena of its own.
    """

    def __init__(self, arena_bytes: int) -> None:
        self._arena_bytes = round_to_pages(min(arena_bytes, _MAX_ARENA_BYTES))
        self._arenas: list[_Arena] = []
        self._returned = _Returned()

    @property
    def cached_bytes(self) -> int:
        """How much unused memory may be resident."""
        self._reclaim()
        return sum(arena.free.dirty_bytes for arena in self._arenas)

    @property
    def resident_bytes(self) -> int:
        """How much memory may be resident, regions in use included."""
        self._reclaim()
        return sum(arena.free.size - arena.free.nbytes + arena.free.dirty_bytes for arena in self._arenas)

    def take(self, nbytes: int) -> memoryview:
        """Memory of exactly `nbytes` bytes, at a page's start.

        The region is the returned object's: keep the object (not a slice of it, which does not keep it alive) for as
        long as the memory is in use.
        """
        if nbytes <= 0:
            raise ValueError(f"a region has at least one byte, not {nbytes}")
        self._reclaim()
        size = round_to_pages(nbytes)
        arena, start = self._find(size)
        for low, high in arena.free.take(start, size):
            self._fill(arena, low, high)
        region = arena.view[start : start + nbytes]
        # No exit hook: at the interpreter's end there is nothing to give back to.
        weakref.finalize(region, self._returned.add, arena, start, size).atexit = False
        return region

    def trim(self, keep_bytes: int) -> None:
        """Give unused memory back to the system until at most `keep_bytes` of it are resident."""
        excess = self.cached_bytes - keep_bytes
        if excess <= 0:
            return
        # The latest arenas first: regions are taken from the earliest, so what is resident there is used again soonest.
        for arena in reversed(self._arenas.copy()):
            if arena.free.nbytes == arena.free.size and (arena is not self._arenas[0] or self._is_special(arena)):
                self._arenas.remove(arena)
                excess -= arena.free.dirty_bytes
                continue
            for low, high in arena.free.dirty():
                if excess <= 0:
                    return
                cut = min(high - low, round_to_pages(excess))
                arena.clean(high - cut, cut)
                excess -= cut

    def close(self) -> None:
        """Give all unused memory back. Regions still in use stay valid, and go back to the system one by one."""
        self._returned.close()
        self.trim(0)
        self._arenas.clear()

    def _find(self, size: int) -> tuple[_Arena, int]:
        for arena in self._arenas:
            # What is larger than an arena does not share: its own would be cut up, and its pages never be let go.
            if self._is_special(arena) == (size > self._arena_bytes):
                start = arena.free.find(size)
                if start is not None:
                    return arena, start
        arena = _Arena(max(size, self._arena_bytes))
        self._arenas.append(arena)
        return arena, 0

    def _fill(self, arena: _Arena, low: int, high: int) -> None:
        """Move unused resident pages into a part of an arena that was taken and has none.

        What cannot be had so is found and cleared by the kernel when it is touched.
        """
        for donor in reversed(self._arenas):
            for start, end in donor.free.dirty():
                nbytes = min(end - start, high - low)
                if nbytes < _LEAST_MOVE_BYTES:
                    continue
                if not move_pages(donor.address + end - nbytes, arena.address + low, nbytes):
                    return
                donor.free.cleaned(end - nbytes, nbytes)
                low += nbytes

    def _is_special(self, arena: _Arena) -> bool:
        """Whether the arena was made for one region that is larger than arenas usually are."""
        return arena.free.size > self._arena_bytes

    def _reclaim(self) -> None:
        for arena, start, size in self._returned.drain():
            arena.free.give(start, size)


class _Returned:
    """Regions that became garbage and were not noticed yet.

    `add` runs inside the garbage collector, on any thread, at any moment, inside the pool's own code too: it takes no
    lock and touches no list of the pool's. A deque's append and popleft are atomic.
    """

    def __init__(self) -> None:
        self._regions: deque[tuple[_Arena, int, int]] = deque()
        self._closed = False

    def add(self, arena: _Arena, start: int, size: int) -> None:
        self._regions.append((arena, start, size))
        if self._closed:
            # The pool is gone, and with it the one that would have drained: the pages go straight to the system.
            for past, past_start, past_size in self.drain():
                past.clean(past_start, past_size)

    def drain(self) -> list[tuple[_Arena, int, int]]:
        regions = []
        while self._regions:
            try:
                regions.append(self._regions.popleft())
            except IndexError:  # another thread took the last one in between
                break
        return regions

    def close(self) -> None:
        self._closed = True
