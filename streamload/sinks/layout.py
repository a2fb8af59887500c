"""Where tensors lie on the device, and how the staging memory of a read mirrors it. Pure: nothing here allocates.

A batch's tensors go into *blocks*, one device allocation each: a large tensor has a block of its own, small ones share
a slab. What one read brings of a block lies in staging memory in the same arrangement, so that it takes one copy,
however many tensors are in it::

    file      |gap| a |b|    C ...                |d|
    slab      | a .. |b ...|d ...|       own block |    C ...                |
    staging   | a .. |b ...|d ...|    C ...                |gap|
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from streamload.checkpoint import TensorInfo
from streamload.plan import Read

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
    """

    block_bytes: tuple[int, ...]
    places: tuple[Place | None, ...]

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
        views: The parts of that memory, as start and end, which take the read's bytes in the file's order.
        segments: The copies that bring it to the device.
    """

    nbytes: int
    views: tuple[tuple[int, int], ...]
    segments: tuple[Segment, ...]


def place(tensors: Sequence[TensorInfo]) -> Placement:
    """Decide where tensors lie on the device.

    Every tensor of at least `ALIGNMENT_BYTES` starts at a multiple of it, every smaller one at a multiple of
    `MIN_ALIGNMENT_BYTES`, given blocks that start at a multiple of `ALIGNMENT_BYTES`.
    """
    blocks: list[int] = []
    places: list[Place | None] = []
    slab: int | None = None
    for tensor in tensors:
        nbytes = tensor.end - tensor.start
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
    return Placement(tuple(blocks), tuple(places))


def stage(placement: Placement, read: Read) -> Staged:
    """Decide how a read lies in staging memory: the blocks' segments first, then the gaps.

    Gaps do not share their memory with each other: what a source computes over the views, a checksum say, holds for the
    whole range.
    """
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


def _where(placement: Placement, tensor: int, tensor_start: int, nbytes: int) -> tuple[int, int, int]:
    found = placement.places[tensor]
    if found is None:
        raise ValueError(f"the read has a piece of tensor {tensor}, which is empty")
    start = found.start + tensor_start
    return found.block, start, start + nbytes


def _round_up(nbytes: int, alignment: int) -> int:
    return -(-nbytes // alignment) * alignment
