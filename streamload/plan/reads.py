"""The plain types of a plan: what will be read, in which order, and where its bytes belong."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

from streamload.checkpoint import Catalog, TensorInfo

__all__ = ["Batch", "Piece", "Pieces", "Plan", "Read"]


class Piece(NamedTuple):
    """The part of one tensor, or of the slice of it that is wanted, that lies inside one read.

    Attributes:
        tensor: The tensor's place in its batch's ``tensors``.
        tensor_start: The piece's first byte, counted from the first byte of what is handed out: the tensor's, or the
            slice's.
        read_start: The same byte, counted from the read's first.
        nbytes: How many bytes.
    """

    tensor: int
    tensor_start: int
    read_start: int
    nbytes: int


class Pieces(Sequence[Piece]):
    """The pieces of a read in which there are slices, worked out whenever they are looked at.

    A slice of a tensor's second dimension has a piece for each row: of a large model, millions.

    Args:
        tensors: The tensors in the read, with their places in the batch.
        start: The read's first byte in the file.
        end: One past its last.
        nbytes: How many bytes the pieces have together.
        count: How many pieces there are.
    """

    __slots__ = ("_count", "_end", "_start", "_tensors", "nbytes")

    def __init__(
        self, tensors: Sequence[tuple[int, TensorInfo]], start: int, end: int, *, nbytes: int, count: int
    ) -> None:
        self._tensors = tuple(tensors)
        self._start = start
        self._end = end
        self._count = count
        self.nbytes = nbytes

    @property
    def rows(self) -> tuple[Piece, int, int] | None:
        """The first piece, how many bytes lie between two of them in the file, and how many pieces there are.

        Where they all are of one tensor and of one length, at equal distances in the file and one behind the other in
        what is handed out: a share of a matrix's rows. None for all else.
        """
        if len(self._tensors) != 1 or len(self._tensors[0][1].stripes) != 1 or self._count < 2:
            return None
        place, (stripe,) = self._tensors[0][0], self._tensors[0][1].stripes
        row, rest = divmod(self._start - stripe.file_start, stripe.file_step)
        whole = (self._count - 1) * stripe.file_step + stripe.nbytes
        if rest or self._end - self._start != whole or stripe.tensor_step != stripe.nbytes:
            return None
        first = Piece(place, stripe.tensor_start + row * stripe.tensor_step, 0, stripe.nbytes)
        return first, stripe.file_step - stripe.nbytes, self._count

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Piece]:
        for place, tensor in self._tensors:
            for file_start, tensor_start, nbytes in tensor.runs(self._start, self._end):
                yield Piece(place, tensor_start, file_start - self._start, nbytes)

    @overload
    def __getitem__(self, index: int) -> Piece: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Piece]: ...
    def __getitem__(self, index: int | slice) -> Piece | Sequence[Piece]:
        return tuple(self)[index]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and tuple(self) == tuple(other)

    def __hash__(self) -> int:
        return hash((self._start, self._end, self._count))

    def __repr__(self) -> str:
        return f"<{self._count} pieces of {self.nbytes} bytes>"


@dataclass(frozen=True, slots=True)
class Read:
    """One ranged request.

    Attributes:
        start: The first byte in the file.
        end: One past the last.
        pieces: The tensors' parts in it, in file order. What lies between them is a gap: needed by nobody.
        skipped_bytes: Of the gaps, how much the source passes over without reading it.
    """

    start: int
    end: int
    pieces: Sequence[Piece]
    skipped_bytes: int = 0

    @property
    def nbytes(self) -> int:
        """Its extent, everything between the first byte and the last."""
        return self.end - self.start

    @property
    def fetched_bytes(self) -> int:
        """How many bytes the source is asked for."""
        return self.nbytes - self.skipped_bytes

    @property
    def piece_bytes(self) -> int:
        """How many of its bytes are needed."""
        return self.pieces.nbytes if isinstance(self.pieces, Pieces) else sum(piece.nbytes for piece in self.pieces)

    @property
    def gap_bytes(self) -> int:
        """How many bytes are read and needed by nobody."""
        return self.fetched_bytes - self.piece_bytes


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
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def sliced(self) -> bool:
        """Whether what is handed out of some tensor is not one range of the file."""
        return any(tensor.stripes for tensor in self.tensors)


@dataclass(frozen=True, slots=True)
class Plan:
    """What a load will read, decided before anything is read.

    Attributes:
        catalog: What was planned for.
        batches: In the order in which credit is taken.
        tensor_bytes: The tensors' bytes together; of slices, the slices' bytes.
        gap_bytes: What is read beyond them, because asking around it would cost more.
        reads: How many reads there are.
    """

    catalog: Catalog
    batches: tuple[Batch, ...]
    tensor_bytes: int
    gap_bytes: int
    reads: int
