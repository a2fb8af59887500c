"""A tensor's bytes in order, piece by piece, wherever it lies and however it is laid out."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from streamload.checkpoint import Entry
from streamload.errors import OptionError, UnsupportedDtypeError
from streamload.shared_memory import has_memory
from streamload.sinks.dtypes import torch_dtypes

if TYPE_CHECKING:
    import torch

__all__ = ["Pieces", "describe", "local_tensor"]


def local_tensor(name: str, value: Any) -> torch.Tensor:
    """The tensor that this rank has: without a graph, and of a distributed one, the local part.

    Raises:
        OptionError: It is no tensor, or one without bytes of its own.
    """
    import torch
    from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

    if not isinstance(value, torch.Tensor):
        raise OptionError(f"{name!r} is not a tensor but {type(value).__name__}")
    if isinstance(value, UninitializedBuffer | UninitializedParameter):
        raise OptionError(f"tensor {name!r} has no shape before its module was first called")
    value = value.detach()
    to_local = getattr(value, "to_local", None)
    tensor: torch.Tensor = to_local() if callable(to_local) else value
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        raise OptionError(f"tensor {name!r} is not dense: the format has only dense ones")
    if tensor.is_meta:
        raise OptionError(f"tensor {name!r} lies on the meta device: it has a shape and no content")
    if not has_memory(tensor):
        raise OptionError(f"tensor {name!r} has no memory of its own: it wraps others, or its storage was given back")
    return tensor.resolve_conj().resolve_neg()


def describe(name: str, tensor: torch.Tensor) -> Entry:
    """The tensor as the header has it.

    Raises:
        UnsupportedDtypeError: The format has no such dtype.
    """
    for dtype, theirs in torch_dtypes().items():
        if tensor.dtype == theirs:
            shape = tuple(tensor.shape)
            if dtype != "F4":
                return name, dtype, shape
            if not shape:
                raise UnsupportedDtypeError(f"tensor {name!r}: two F4 elements share a byte, so it needs a dimension")
            return name, dtype, (*shape[:-1], shape[-1] * 2)
    raise UnsupportedDtypeError(f"tensor {name!r} has dtype {tensor.dtype}, which the safetensors format does not have")


class Pieces:
    """Shows the bytes of tensors in row-major order, a piece at a time.

    A tensor that is contiguous and lies on the host is shown as it is; of any other one, a piece at a time is copied
    into memory that is used again for the next.

    Args:
        piece_bytes: No piece is longer; at least an element's size.
    """

    def __init__(self, piece_bytes: int) -> None:
        self._piece_bytes = piece_bytes
        self._memory: torch.Tensor | None = None

    def of(self, tensor: torch.Tensor) -> Iterator[memoryview]:
        """A tensor's pieces.

        Args:
            tensor: As `local_tensor` returns it.

        Yields:
            Views. Each is good until the next one is asked for, and while the tensor lives and does not change.
        """
        if not tensor.numel():
            return
        # As plain integers of the same size: not every dtype can be copied on every device.
        integers = tensor.view(_integers(tensor.element_size()))
        if not integers.is_contiguous() or integers.device.type != "cpu":
            yield from map(self._copied, self._rows(integers))
            return
        for start in range(0, tensor.nbytes, self._piece_bytes):
            yield _view(tensor.data_ptr() + start, min(self._piece_bytes, tensor.nbytes - start))

    def _rows(self, tensor: torch.Tensor) -> Iterator[torch.Tensor]:
        """Cut a tensor along its first dimensions into parts that are no longer than a piece."""
        if tensor.nbytes <= self._piece_bytes:
            yield tensor
            return
        row_bytes = tensor.nbytes // tensor.shape[0]
        if row_bytes > self._piece_bytes:
            for row in tensor:
                yield from self._rows(row)
            return
        rows = self._piece_bytes // row_bytes
        for first in range(0, tensor.shape[0], rows):
            yield tensor[first : first + rows]

    def _copied(self, tensor: torch.Tensor) -> memoryview:
        import torch

        if self._memory is None:
            self._memory = torch.empty(self._piece_bytes, dtype=torch.uint8)
        self._memory[: tensor.nbytes].view(tensor.dtype).view(tensor.shape).copy_(tensor)
        return _view(self._memory.data_ptr(), tensor.nbytes)


def _view(address: int, nbytes: int) -> memoryview:
    """Memory that a tensor keeps: torch has no buffers of Python's, and numpy need not be there."""
    return memoryview((ctypes.c_char * nbytes).from_address(address)).cast("B")


def _integers(size: int) -> torch.dtype:
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
