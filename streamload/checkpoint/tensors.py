"""The plain types of a checkpoint's catalog: which tensors there are, and where their bytes lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Catalog", "ShardFile", "Stripe", "TensorInfo"]


@dataclass(frozen=True, slots=True)
class Stripe:
    """Byte ranges of equal length at equal distances: ``count`` of them, each ``nbytes`` long.

    Attributes:
        file_start: The first range's first byte, counted from the file's first.
        tensor_start: Where that byte belongs, counted from the first byte of the slice.
        nbytes: Each range's length.
        file_step: From one range's first byte to the next one's, in the file.
        tensor_step: The same in the slice.
        count: How many ranges.
    """

    file_start: int
    tensor_start: int
    nbytes: int
    file_step: int
    tensor_step: int
    count: int


class TensorInfo(NamedTuple):
    """One tensor of a shard file, or the slice of it that is wanted.

    Attributes:
        name: Its name in the checkpoint.
        dtype: The format's name of its dtype, such as ``BF16``.
        shape: Its shape, counted in elements (for ``F4`` two elements share a byte); of a slice, the slice's.
        start: Its first byte, counted from the file's first byte.
        end: One past its last byte.
        stripes: Which bytes between ``start`` and ``end`` are wanted, where it is not all of them.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int
    stripes: tuple[Stripe, ...] = ()

    @property
    def nbytes(self) -> int:
        """How many bytes are wanted."""
        if not self.stripes:
            return self.end - self.start
        return sum(stripe.nbytes * stripe.count for stripe in self.stripes)

    def runs(self, start: int, end: int) -> list[tuple[int, int, int]]:
        """The wanted byte ranges between two places in the file, in the file's order.

        Returns:
            For each range its first byte in the file, the same byte counted from the tensor's (or slice's) first, and
            its length; cut off at `start` and `end`.
        """
        if not self.stripes:
            first, last = max(start, self.start), min(end, self.end)
            return [(first, first - self.start, last - first)] if last > first else []
        found: list[tuple[int, int, int]] = []
        for stripe in self.stripes:
            _append_runs(found, stripe, start, end)
        if len(self.stripes) > 1:
            found.sort()
        return found


def _append_runs(found: list[tuple[int, int, int]], stripe: Stripe, start: int, end: int) -> None:
    """Add a stripe's ranges between two places, cut off there."""
    nbytes, low, high = stripe.nbytes, 0, 1
    if stripe.count > 1:
        low = max(0, (start - stripe.file_start - nbytes) // stripe.file_step + 1)
        high = min(stripe.count, -((stripe.file_start - end) // stripe.file_step))
    for number in range(low, high):
        first = stripe.file_start + number * stripe.file_step
        place = stripe.tensor_start + number * stripe.tensor_step
        if start <= first and first + nbytes <= end:
            found.append((first, place, nbytes))
            continue
        cut_first, cut_last = max(first, start), min(first + nbytes, end)
        if cut_last > cut_first:
            found.append((cut_first, place + cut_first - first, cut_last - cut_first))


@dataclass(frozen=True, slots=True)
class ShardFile:
    """One ``.safetensors`` file whose header stands.

    Attributes:
        key: The object's key.
        size_bytes: The object's length.
        header_bytes: Where the tensors' bytes begin: eight bytes of length and the header.
        tensors: Its tensors, in the order of their bytes.
        metadata: The header's ``__metadata__``.
    """

    key: str
    size_bytes: int
    header_bytes: int
    tensors: tuple[TensorInfo, ...]
    metadata: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Catalog:
    """All tensors of a checkpoint; every name occurs once.

    Attributes:
        files: The shard files, in the order in which they are read.
    """

    files: tuple[ShardFile, ...]

    @property
    def tensors(self) -> int:
        """How many tensors there are."""
        return sum(len(file.tensors) for file in self.files)

    @property
    def nbytes(self) -> int:
        """How many bytes the tensors have together; in a selection, only the chosen ones."""
        return sum(tensor.nbytes for file in self.files for tensor in file.tensors)
