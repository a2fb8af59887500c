"""The plain types of a plan: what will be read, in which order, and where its bytes belong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from streamload.checkpoint import Catalog, TensorInfo

__all__ = ["Batch", "Piece", "Plan", "Read"]


class Piece(NamedTuple):
    """The part of one tensor that lies inside one read.

    Attributes:
        tensor: The tensor's place in its batch's ``tensors``.
        tensor_start: The piece's first byte, counted from the tensor's first.
        read_start: The same byte, counted from the read's first.
        nbytes: How many bytes.
    """

    tensor: int
    tensor_start: int
    read_start: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Read:
    """One ranged request.

    Attributes:
        start: The first byte in the file.
        end: One past the last.
        pieces: The tensors' parts in it, in file order. What lies between them is a gap: read, but needed by nobody.
    """

    start: int
    end: int
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        return self.end - self.start

    @property
    def gap_bytes(self) -> int:
        return self.nbytes - sum(piece.nbytes for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class Batch:
    """Neighbouring tensors that are credited, lent memory, read and handed over together.

    Either one tensor and the reads that it is split into, or tensors that one read brings, or empty tensors and no
    read at all.

    Attributes:
        index: Its place in the plan.
        file: The shard file's place in the catalog.
        tensors: In file order.
        reads: In file order.
    """

    index: int
    file: int
    tensors: tuple[TensorInfo, ...]
    reads: tuple[Read, ...]

    @property
    def nbytes(self) -> int:
        """The tensors' bytes, gaps left out."""
        return sum(tensor.end - tensor.start for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a load will read, decided before anything is read.

    Attributes:
        catalog: What was planned for.
        batches: In the order in which credit is taken.
        tensor_bytes: The tensors' bytes together.
        gap_bytes: What is read beyond them, because asking around it would cost more.
        reads: How many reads there are.
    """

    catalog: Catalog
    batches: tuple[Batch, ...]
    tensor_bytes: int
    gap_bytes: int
    reads: int
