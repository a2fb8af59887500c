"""Where a read's bytes go when slices are cut out of it: what both sinks have in common.

A read in which gaps alternate with pieces is received in one of two ways. Where pieces are large, or gaps are not read
at all, the bytes go straight to their places, and the gaps into a little scratch memory that all of them share. Where
both are small and all of it is read, one system call for each of them would take longer than the bytes do: it is
received as a whole, and the pieces are copied out.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from streamload.loan import Loan, Rows
from streamload.plan import Batch, Piece, Pieces, Read

__all__ = ["SCRATCH_BYTES", "Bounces", "copy_out", "is_bounced", "is_sliced", "scattered"]

# What a gap lands in: small enough to stay in the processor's cache, large enough for one call on a socket.
SCRATCH_BYTES = 64 << 10

# Receiving into a view of its own costs some 5 microseconds of the event loop's time, in which 32 KiB are copied.
_BOUNCED_BYTES = 32 << 10

# The regions for whole reads take no more than this part of the load's memory limit, but for the first.
_BOUNCE_SHARE = 8


class Bounces:
    """A batch's regions for reads that are received as a whole: few of them, for all of its reads in turn.

    Args:
        take: Gives memory.
        sizes: How many regions, and how large; what `sizes` says.
    """

    __slots__ = ("_free", "_lent", "_regions")

    def __init__(self, take: Callable[[int], memoryview], sizes: tuple[int, int]) -> None:
        count, nbytes = sizes
        self._regions = [take(nbytes) for _ in range(count)]
        self._free = asyncio.Semaphore(count)
        self._lent: dict[Loan, memoryview] = {}

    @staticmethod
    def sizes(batch: Batch, memory_bytes: int) -> tuple[int, int]:
        """How many regions a batch needs, and how large they are, in bytes.

        Args:
            batch: What will be read.
            memory_bytes: The load's memory limit.
        """
        sizes = [read.nbytes for read in batch.reads if is_bounced(read)] if batch.sliced else []
        if not sizes:
            return 0, 0
        return min(len(sizes), max(1, memory_bytes // _BOUNCE_SHARE // max(sizes))), max(sizes)

    async def lend(self, read: Read) -> Loan:
        """Lend a region for a read that is bounced, waiting for one that is free."""
        await self._free.acquire()
        region = self._regions.pop()
        loan = Loan([region[: read.nbytes]])
        self._lent[loan] = region
        return loan

    def landed(self, loan: Loan, read: Read, place: Callable[[Piece], tuple[memoryview, int]]) -> None:
        """Where the loan is one of these, copy the read's pieces to their places, and take the region back."""
        region = self._lent.pop(loan, None)
        if region is not None:
            copy_out(read.pieces, place, region)
            self._give_back(region)

    def failed(self, loan: Loan) -> memoryview | None:
        """Take a region back whose content is worthless.

        Returns:
            The region, where the loan is one of these and something may still write into it.
        """
        region = self._lent.pop(loan, None)
        if region is None or loan.quarantined:
            return region
        self._give_back(region)
        return None

    def clear(self) -> None:
        """Let go of everything."""
        self._regions.clear()

    def _give_back(self, region: memoryview) -> None:
        self._regions.append(region)
        self._free.release()


def is_sliced(read: Read) -> bool:
    """Whether pieces of slices are in the read."""
    return isinstance(read.pieces, Pieces)


def is_bounced(read: Read) -> bool:
    """Whether the read is received as a whole, and its pieces copied out."""
    return (
        isinstance(read.pieces, Pieces)
        and not read.skipped_bytes
        and read.nbytes < 2 * len(read.pieces) * _BOUNCED_BYTES
        and read.gap_bytes > 0
    )


def scattered(read: Read, place: Callable[[Piece], tuple[memoryview, int]], scratch: memoryview) -> Loan:
    """Lend the pieces' places, and the scratch memory for each of the gaps.

    Args:
        read: One with slices.
        place: The memory that a piece belongs in, and its first byte's place there.
        scratch: At least a byte of it.
    """
    rows = _rows(read, place, scratch)
    if rows is not None:
        return Loan.of_rows(rows)
    views: list[memoryview] = []
    gaps: list[bool] = []
    position = 0
    memory: memoryview | None = None
    start = end = 0  # what of that memory is not in `views` yet: pieces that follow each other there
    for piece in read.pieces:
        found, first = place(piece)
        gap = piece.read_start - position
        if gap or found is not memory or first != end:
            if memory is not None and end > start:
                views.append(memory[start:end])
                gaps.append(False)
            while gap > 0:
                views.append(scratch[:gap])
                gaps.append(True)
                gap -= scratch.nbytes
            memory, start, end = found, first, first
        end += piece.nbytes
        position = piece.read_start + piece.nbytes
    if memory is not None and end > start:
        views.append(memory[start:end])
        gaps.append(False)
    return Loan(views, gaps=gaps if any(gaps) else None)


def _rows(read: Read, place: Callable[[Piece], tuple[memoryview, int]], scratch: memoryview) -> Rows | None:
    """The read in few words, where its pieces belong one behind the other."""
    found = read.pieces.rows if isinstance(read.pieces, Pieces) else None
    if found is None:
        return None
    first, gap_bytes, count = found
    nbytes = first.nbytes
    last = Piece(first.tensor, first.tensor_start + (count - 1) * nbytes, 0, nbytes)
    (memory, start), (behind, end) = place(first), place(last)
    if memory is not behind or end - start != (count - 1) * nbytes:
        return None
    return Rows(memory[start : end + nbytes], nbytes, gap_bytes, scratch)


def copy_out(pieces: Sequence[Piece], place: Callable[[Piece], tuple[memoryview, int]], received: memoryview) -> None:
    """Copy the pieces of a read that was received as a whole to their places."""
    for piece in pieces:
        _, _, read_start, nbytes = piece
        memory, first = place(piece)
        memory[first : first + nbytes] = received[read_start : read_start + nbytes]
