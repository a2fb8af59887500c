"""Where tensors lie on the device, and how the staging memory of a read mirrors it. Pure: nothing here allocates.

A batch's tensors go into *blocks*, one device allocation each: a large tensor has a block of its own, small ones share
a slab. What one read brings of a block lies in staging memory in the same arrangement, so that it takes one copy,
however many tensors are in it::

    file      |gap| a |b|    C ...                |d|
    slab      | a .. |b ...|d ...|       own block |    C ...                |
    staging   | a .. |b ...|d ...|    C ...                |gap|

A read with slices is received in that arrangement too, or, where it is `scatter`'s choice, as a whole behind it, and
then put into the arrangement by the processor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from streamload.checkpoint import TensorInfo
from streamload.plan import Piece, Read
from streamload.sinks.scatter import SCRATCH_BYTES, is_bounced, is_sliced

__all__ = [
    "ALIGNMENT_BYTES",
    "MIN_ALIGNMENT_BYTES",
    "SLAB_BYTES",
    "SMALL_BYTES",
    "Place",
    "Placement",
    "Segment",
    "Staged",
    "place",
    "stage",
]

# What cudaMalloc guarantees and what cuBLASLt's heuristics take for granted unless they are told otherwise.
ALIGNMENT_BYTES = 256

# For tensors smaller than ALIGNMENT_BYTES: the widest load that a GPU thread makes. Padding two million scalars to 256
# bytes each would turn a read of 8 MB into half a gigabyte.
MIN_ALIGNMENT_BYTES = 16

# Starting a copy takes some 5 to 10 microseconds of the caller's time, in which PCIe 4 or 5 moves about so much: a
# larger tensor's own copy costs less than its bytes do, a smaller one's costs more.
SMALL_BYTES = 256 << 10

# How much a kept tensor may hold alive beyond itself: what torch's allocator takes from the driver for small tensors.
SLAB_BYTES = 2 << 20


class Place(NamedTuple):
    """Where a tensor lies.

    Attributes:
        block: The place of its block in the placement.
        start: Its first byte, counted from the block's first.
    """

    block: int
    start: int


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a batch's tensors lie on the device.

    Attributes:
        block_bytes: The blocks' sizes.
        places: Where each tensor lies, in the batch's order; None for an empty tensor.
        sizes: How many bytes each tensor has.
    """

    block_bytes: tuple[int, ...]
    places: tuple[Place | None, ...]
    sizes: tuple[int, ...] = ()

    @property
    def nbytes(self) -> int:
        """The blocks' bytes together."""
        return sum(self.block_bytes)


class Segment(NamedTuple):
    """One copy: the part of a block that a read brings.

    Attributes:
        block: The block's place in the placement.
        block_start: The segment's first byte, counted from the block's first.
        staging_start: The same byte, counted from the first byte of the read's staging memory.
        nbytes: How many bytes.
    """

    block: int
    block_start: int
    staging_start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Staged:
    """How one read lies in staging memory.

    Attributes:
        nbytes: How much staging memory it needs, padding and gaps included.
        views: The parts of that memory, as start and end, which take the read's bytes in the file's order; none of a
            read with slices.
        segments: The copies that bring it to the device.
        behind: Where the segments end in that memory, and the gaps, or the read as it is received, begin.
    """

    nbytes: int
    views: tuple[tuple[int, int], ...]
    segments: tuple[Segment, ...]
    behind: int = 0

    def place(self, placement: Placement) -> Callable[[Piece], int]:
        """Where in that memory a piece of a read with slices belongs."""
        by_block: dict[int, list[Segment]] = {}
        for segment in self.segments:
            by_block.setdefault(segment.block, []).append(segment)

        def found(piece: Piece) -> int:
            block, start, _ = _where(placement, piece.tensor, piece.tensor_start, piece.nbytes)
            for segment in by_block[block]:
                if segment.block_start <= start < segment.block_start + segment.nbytes:
                    return segment.staging_start + start - segment.block_start
            raise AssertionError("a piece that no copy brings")

        return found


def place(tensors: Sequence[TensorInfo]) -> Placement:
    """Decide where tensors lie on the device.

    Every tensor of at least `ALIGNMENT_BYTES` starts at a multiple of it, every smaller one at a multiple of
    `MIN_ALIGNMENT_BYTES`, given blocks that start at a multiple of `ALIGNMENT_BYTES`.
    """
    blocks: list[int] = []
    places: list[Place | None] = []
    slab: int | None = None
    for tensor in tensors:
        nbytes = tensor.nbytes
        if nbytes == 0:
            places.append(None)
        elif nbytes > SMALL_BYTES:
            places.append(Place(len(blocks), 0))
            blocks.append(nbytes)
        else:
            alignment = ALIGNMENT_BYTES if nbytes >= ALIGNMENT_BYTES else MIN_ALIGNMENT_BYTES
            start = 0 if slab is None else _round_up(blocks[slab], alignment)
            if slab is None or start + nbytes > SLAB_BYTES:
                slab, start = len(blocks), 0
                blocks.append(0)
            blocks[slab] = start + nbytes
            places.append(Place(slab, start))
    return Placement(tuple(blocks), tuple(places), tuple(tensor.nbytes for tensor in tensors))


def stage(placement: Placement, read: Read) -> Staged:
    """Decide how a read lies in staging memory: the blocks' segments first, then the gaps.

    Gaps do not share their memory with each other: what a source computes over the views, a checksum say, holds for the
    whole range. (Those between slices do: of them nothing is computed.)
    """
    if is_sliced(read):
        return _stage_sliced(placement, read)
    extents: dict[int, tuple[int, int]] = {}
    for piece in read.pieces:
        block, start, end = _where(placement, piece.tensor, piece.tensor_start, piece.nbytes)
        low, high = extents.get(block, (start, end))
        extents[block] = (min(low, start), max(high, end))

    segments: list[Segment] = []
    shifts: dict[int, int] = {}  # block -> what to add to a position in it to get the one in staging memory
    used = 0
    for block, (start, end) in extents.items():
        # Aligned here too: a copy engine moves whole lines, at either end.
        used = _round_up(used, ALIGNMENT_BYTES)
        segments.append(Segment(block, start, used, end - start))
        shifts[block] = used - start
        used += end - start

    views: list[tuple[int, int]] = []

    def append(start: int, end: int) -> None:
        if views and views[-1][1] == start:
            start = views.pop()[0]
        views.append((start, end))

    position = 0
    for piece in read.pieces:
        if piece.read_start > position:
            gap = piece.read_start - position
            append(used, used + gap)
            used += gap
        block, start, end = _where(placement, piece.tensor, piece.tensor_start, piece.nbytes)
        append(start + shifts[block], end + shifts[block])
        position = piece.read_start + piece.nbytes
    if read.nbytes > position:
        append(used, used + read.nbytes - position)
        used += read.nbytes - position
    return Staged(used, tuple(views), tuple(segments))


def _stage_sliced(placement: Placement, read: Read) -> Staged:
    """A segment for each run of pieces that follow each other on the device.

    Not one for each block: pieces of another read may lie between two of this one's.
    """
    runs: list[tuple[int, int, int]] = []  # block, from, to
    finished: int | None = None  # the tensor whose last byte the last run ends with
    for piece in read.pieces:
        block, start, end = _where(placement, piece.tensor, piece.tensor_start, piece.nbytes)
        if runs and runs[-1][0] == block:
            padding = start - runs[-1][2]
            follows = padding == 0 or (finished is not None and piece.tensor_start == 0 and finished < piece.tensor)
            if follows and 0 <= padding < ALIGNMENT_BYTES:
                runs[-1] = (block, runs[-1][1], end)
            else:
                runs.append((block, start, end))
        else:
            runs.append((block, start, end))
        finished = piece.tensor if end == _end_of(placement, piece.tensor) else None
    used = 0
    segments: list[Segment] = []
    for block, start, end in runs:
        used = _round_up(used, ALIGNMENT_BYTES)
        segments.append(Segment(block, start, used, end - start))
        used += end - start
    unneeded = read.nbytes if is_bounced(read) else min(SCRATCH_BYTES, read.nbytes - read.piece_bytes)
    return Staged(used + unneeded, (), tuple(segments), behind=used)


def _where(placement: Placement, tensor: int, tensor_start: int, nbytes: int) -> tuple[int, int, int]:
    found = placement.places[tensor]
    if found is None:
        raise ValueError(f"the read has a piece of tensor {tensor}, which is empty")
    start = found.start + tensor_start
    return found.block, start, start + nbytes


def _end_of(placement: Placement, tensor: int) -> int:
    found = placement.places[tensor]
    assert found is not None
    return found.start + placement.sizes[tensor]


def _round_up(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment
