"""Which ranges of an arena are unused, and which of their pages are resident."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator

__all__ = ["FreeSpace", "Ranges"]


class Ranges:
    """A set of bytes as ranges, in order, neighbours joined."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._ends: list[int] = []
        self.nbytes = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Each range's start and end, the lowest first."""
        return iter(list(zip(self._starts, self._ends, strict=True)))

    def add(self, start: int, end: int) -> None:
        """Add a range of which nothing is in the set."""
        self.nbytes += end - start
        place = bisect_left(self._starts, start)
        if place < len(self._starts) and self._starts[place] == end:
            end = self._ends[place]
            del self._starts[place], self._ends[place]
        if place and self._ends[place - 1] == start:
            self._ends[place - 1] = end
        else:
            self._starts.insert(place, start)
            self._ends.insert(place, end)

    def overlap(self, start: int, end: int) -> int:
        """How many bytes of a range are in the set."""
        first, last = bisect_right(self._ends, start), bisect_left(self._starts, end)
        return sum(
            min(end, high) - max(start, low)
            for low, high in zip(self._starts[first:last], self._ends[first:last], strict=True)
        )

    def cut(self, start: int, end: int) -> list[tuple[int, int]]:
        """Take a range out; what of it was in the set, as starts and ends."""
        first, last = bisect_right(self._ends, start), bisect_left(self._starts, end)
        if first >= last:
            return []
        whole = list(zip(self._starts[first:last], self._ends[first:last], strict=True))
        pieces = [(max(start, low), min(end, high)) for low, high in whole]
        below, above = (self._starts[first], start), (end, self._ends[last - 1])
        left = [(low, high) for low, high in (below, above) if low < high]
        self._starts[first:last] = [low for low, _ in left]
        self._ends[first:last] = [high for _, high in left]
        self.nbytes -= sum(high - low for low, high in pieces)
        return pieces


class FreeSpace:
    """The unused ranges of ``[0, size)``.

    Unused bytes are *dirty* where they were used before and their pages are still resident.

    Args:
        size: The arena's size in bytes. All of it is unused and clean.
    """

    def __init__(self, size: int) -> None:
        self.size = size
        self._unused = Ranges()
        self._unused.add(0, size)
        self._dirty = Ranges()

    @property
    def nbytes(self) -> int:
        """How much is unused."""
        return self._unused.nbytes

    @property
    def dirty_bytes(self) -> int:
        """How much of that is resident."""
        return self._dirty.nbytes

    def find(self, nbytes: int) -> int | None:
        """Where to take so many bytes, or None where no unused range is large enough.

        Either end of each range counts: first by how much of it is resident, then by how little the range is larger.
        """
        places = (
            (-self._dirty.overlap(place, place + nbytes), end - start, place)
            for start, end in self._unused
            if end - start >= nbytes
            for place in (start, end - nbytes)
        )
        return min(places, default=(0, 0, None))[2]

    def take(self, start: int, nbytes: int) -> list[tuple[int, int]]:
        """Use what is unused; the starts and ends of those parts of it that are not resident."""
        end = start + nbytes
        self._unused.cut(start, end)
        clean = Ranges()
        clean.add(start, end)
        for low, high in self._dirty.cut(start, end):
            clean.cut(low, high)
        return list(clean)

    def give(self, start: int, nbytes: int) -> None:
        """Take a used range back; all of it is dirty."""
        self._unused.add(start, start + nbytes)
        self._dirty.add(start, start + nbytes)

    def dirty(self) -> list[tuple[int, int]]:
        """The starts and ends of the dirty ranges, the highest first."""
        return list(self._dirty)[::-1]

    def cleaned(self, start: int, nbytes: int) -> None:
        """Note that a dirty range holds no pages any more."""
        self._dirty.cut(start, start + nbytes)
