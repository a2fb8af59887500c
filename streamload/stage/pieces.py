"""Which pieces of the files are still to be brought, and in which order; what has landed. No I/O."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from streamload.stage.journal import Landed

__all__ = ["Piece", "Ranges", "pieces_of"]


class Piece(NamedTuple):
    """A range of a file that one read brings.

    Attributes:
        start: Its first byte.
        end: One past its last.
        noted: What a journal says of it; it has landed where that is true.
    """

    start: int
    end: int
    noted: Landed | None = None


class Ranges:
    """Ranges that do not overlap, joined where they touch."""

    def __init__(self) -> None:
        self._ranges: list[tuple[int, int]] = []

    def add(self, start: int, end: int) -> None:
        """Add a range that overlaps none."""
        at = bisect_right(self._ranges, (start, start))
        if at < len(self._ranges) and self._ranges[at][0] == end:
            end = self._ranges.pop(at)[1]
        if at and self._ranges[at - 1][1] == start:
            start = self._ranges.pop(at - 1)[0]
        insort(self._ranges, (start, end))

    def cover(self, start: int, end: int) -> bool:
        """Whether all of a range was added."""
        return self.around(start, end) is not None

    def around(self, start: int, end: int) -> tuple[int, int] | None:
        """The longest range that was added and has all of this one; None where there is none."""
        at = bisect_right(self._ranges, (start, float("inf"))) - 1
        if at >= 0 and self._ranges[at][0] <= start and end <= self._ranges[at][1]:
            return self._ranges[at]
        return (start, start) if start >= end else None


def pieces_of(size_bytes: int, noted: Sequence[Landed], *, piece_bytes: int) -> Iterator[Piece]:
    """Cut a file into pieces, in order: those that a journal notes, and the rest between them.

    Args:
        size_bytes: The file's length.
        noted: What the journal says; of pieces that overlap, one counts.
        piece_bytes: How large a piece is.
    """
    position = 0
    for piece in sorted(noted, key=lambda piece: piece.start):
        if piece.start < position or piece.end > size_bytes:
            continue
        yield from _cut(position, piece.start, piece_bytes)
        yield Piece(piece.start, piece.end, piece)
        position = piece.end
    yield from _cut(position, size_bytes, piece_bytes)


def _cut(start: int, end: int, piece_bytes: int) -> Iterator[Piece]:
    """Cut a range at multiples of a size."""
    while start < end:
        stop = min(end, start - start % piece_bytes + piece_bytes)
        yield Piece(start, stop)
        start = stop
