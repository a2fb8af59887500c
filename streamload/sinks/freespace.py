"""Which ranges of an arena are unused, neighbours joined, and how much of them still holds pages."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator

__all__ = ["FreeSpace"]


class FreeSpace:
    """The unused ranges of ``[0, size)``.

    A range is *dirty* as far as it was used before: its pages are still resident. What is known is an upper bound for
    each range, since taking a part of a range does not tell which of its pages were the resident ones.

    Args:
        size: The arena's size in bytes. All of it is unused and clean.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._starts: list[int] = []
        self._ranges: dict[int, tuple[int, int]] = {}  # start -> (size, dirty bytes at most)
        self._ends: dict[int, int] = {}  # end -> start
        self.nbytes = 0
        self.dirty_bytes = 0
        self._add(0, size, 0)

    def take(self, nbytes: int) -> int | None:
        """Take from the smallest range that is large enough; its start, or None where none is."""
        start = min(
            (start for start in self._starts if self._ranges[start][0] >= nbytes),
            key=lambda start: self._ranges[start][0],
            default=None,
        )
        if start is not None:
            size, dirty = self._remove(start)
            if size > nbytes:
                self._add(start + nbytes, size - nbytes, min(dirty, size - nbytes))
        return start

    def take_from_end(self, nbytes: int) -> int | None:
        """Take the end of the highest range that is large enough; its start, or None where none is."""
        for start in reversed(self._starts):
            size, dirty = self._ranges[start]
            if size >= nbytes:
                self._remove(start)
                if size > nbytes:
                    self._add(start, size - nbytes, min(dirty, size - nbytes))
                return start + size - nbytes
        return None

    def give(self, start: int, nbytes: int) -> None:
        """Take a used range back; all of it is dirty."""
        dirty = nbytes
        before = self._ends.get(start)
        if before is not None:
            size, more = self._remove(before)
            start, nbytes, dirty = before, nbytes + size, dirty + more
        if start + nbytes in self._ranges:
            size, more = self._remove(start + nbytes)
            nbytes, dirty = nbytes + size, dirty + more
        self._add(start, nbytes, dirty)

    def dirty(self) -> Iterator[tuple[int, int, int]]:
        """The ranges that may hold pages, as start, size and dirty bytes, the highest first."""
        for start in reversed(self._starts.copy()):
            size, dirty = self._ranges[start]
            if dirty:
                yield start, size, dirty

    def cleaned(self, start: int, nbytes: int) -> None:
        """Note that the last `nbytes` bytes of the range that begins at `start` hold no pages any more."""
        size, dirty = self._ranges[start]
        left = min(dirty, size - nbytes)
        self._ranges[start] = (size, left)
        self.dirty_bytes -= dirty - left

    def _add(self, start: int, size: int, dirty: int) -> None:
        insort(self._starts, start)
        self._ranges[start] = (size, dirty)
        self._ends[start + size] = start
        self.nbytes += size
        self.dirty_bytes += dirty

    def _remove(self, start: int) -> tuple[int, int]:
        size, dirty = self._ranges.pop(start)
        del self._starts[bisect_left(self._starts, start)]
        del self._ends[start + size]
        self.nbytes -= size
        self.dirty_bytes -= dirty
        return size, dirty
