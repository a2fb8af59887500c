"""The plain types of a checkpoint's catalog: which tensors there are, and where their bytes lie."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

__all__ = ["Catalog", "ShardFile", "TensorInfo"]


class TensorInfo(NamedTuple):
    """One tensor of a shard file.

    Attributes:
        name: Its name in the checkpoint.
        dtype: The format's name of its dtype, such as ``BF16``.
        shape: Its shape, counted in elements (for ``F4`` two elements share a byte).
        start: Its first byte, counted from the file's first byte.
        end: One past its last byte.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.start


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
