"""Whether what was read is what a manifest says, block by block, before its tensors are handed out."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence

from streamload.checkpoint import BlockMap, BlockPiece, ManifestFile
from streamload.checkpoint.ranges import Range, merged, overlap
from streamload.checksums import Checksum, PartialChecksum
from streamload.errors import ChecksumError
from streamload.plan import Batch

__all__ = ["BlockVerifier"]

_VALUE_BYTES = 8


class BlockVerifier:
    """One file's blocks. Those that a read, or several of one batch, cover whole are verified; the others are not.

    A batch's tensors are handed out when all of its reads have landed, so nothing is handed out before its blocks were
    compared. What was read through as a gap is compared as well: it is a part of the same block.

    Args:
        file: What the manifest says.
        batches: What will be read of the file.

    Attributes:
        verifiable_bytes: How many of the bytes that are needed lie in blocks that will be verified.
        partial_bytes: How many do not.
    """

    def __init__(self, file: ManifestFile, batches: Iterable[Batch]) -> None:
        self._file = file
        self._map = BlockMap(((tensor.start, tensor.end) for tensor in file.tensors), file.block_bytes)
        needed: list[Range] = []
        spans: list[Range] = []
        for batch in batches:
            for start, end in merged((read.start, read.end) for read in batch.reads):
                spans.append(self._map.whole(start, end))
            for read in batch.reads:
                for piece in read.pieces:
                    start = read.start + piece.read_start
                    needed.append((start, start + piece.nbytes))
        self._needed: Sequence[Range] = merged(needed)
        # Of each batch by itself: a block that only two batches together cover would be compared too late.
        self._spans: Sequence[Range] = sorted(span for span in spans if span[0] < span[1])
        self.verifiable_bytes = sum(overlap(self._needed, start, end) for start, end in merged(spans))
        self.partial_bytes = sum(end - start for start, end in self._needed) - self.verifiable_bytes
        # Blocks of which something has come and not all, by their first byte.
        self._begun: dict[int, PartialChecksum] = {}

    def cuts(self, start: int) -> Iterator[int]:
        """How far from `start` blocks end."""
        return (piece.end - start for piece in self._map.pieces(start, self._file.size_bytes))

    def add(self, start: int, sums: Iterable[tuple[int, int]]) -> int:
        """Take the sums of a read's bytes, cut where `cuts` said.

        Args:
            start: The read's first byte in the file.
            sums: Lengths and checksums.

        Returns:
            How many of the needed bytes are verified now.

        Raises:
            ChecksumError: A block is not what the manifest says; located but for the URI.
        """
        verified = 0
        pieces = self._map.pieces(start, self._file.size_bytes)
        for (nbytes, value), piece in zip(sums, pieces, strict=False):
            if piece.end - piece.start != nbytes:
                # The read's last bytes: they end inside a block.
                piece = piece._replace(end=piece.start + nbytes)
            if piece.whole:
                found = value
            else:
                completed = self._complete(piece, value)
                if completed is None:
                    continue
                found = completed
            self._compare(piece, found)
            verified += overlap(self._needed, piece.block_start, piece.block_end)
        return verified

    def _complete(self, piece: BlockPiece, value: int) -> int | None:
        """Put a part of a block to the others; the block's sum, once it is complete."""
        at = bisect_right(self._spans, (piece.block_start, self._file.size_bytes + 1)) - 1
        if at < 0 or self._spans[at][1] < piece.block_end:
            return None  # the rest of it will not come
        block = self._begun.get(piece.block_start)
        if block is None:
            nbytes = piece.block_end - piece.block_start
            block = self._begun[piece.block_start] = PartialChecksum("CRC64NVME", nbytes)
        block.add_sum(piece.start - piece.block_start, piece.end - piece.start, value)
        if not block.complete:
            return None
        del self._begun[piece.block_start]
        return block.result().value

    def _compare(self, piece: BlockPiece, value: int) -> None:
        tensor = self._file.tensors[piece.tensor]
        at = piece.block * _VALUE_BYTES
        expected = int.from_bytes(tensor.checksums[at : at + _VALUE_BYTES], "big")
        if value != expected:
            count = len(tensor.checksums) // _VALUE_BYTES
            raise ChecksumError(
                f"block {piece.block + 1} of {count} of tensor {tensor.name!r} sums up to "
                f"{Checksum('CRC64NVME', value)}, but the manifest {self._file.manifest!r} says "
                f"{Checksum('CRC64NVME', expected)}",
                object=self._file.key,
                start=piece.block_start,
                end=piece.block_end,
            )
