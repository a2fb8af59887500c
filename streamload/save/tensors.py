"""A tensor's bytes in order, piece by piece, wherever it lies and however it is laid out."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from streamload.checkpoint import Entry
from streamload.errors import OptionError, UnsupportedDtypeError
from streamload.sinks.dtypes import torch_dtypes

if TYPE_CHECKING:
    import torch

__all__ = ["describe", "local_tensor", "pieces"]


def local_tensor(name: str, value: Any) -> torch.Tensor:
    """The tensor that this rank has: without a graph, and of a distributed one, the local part.

    Raises:
        OptionError: It is no tensor, or one without bytes of its own.
    """
    import torch

    if not isinstance(value, torch.Tensor):
        raise OptionError(f"{name!r} is not a tensor but {type(value).__name__}")
    value = value.detach()
    to_local = getattr(value, "to_local", None)
    tensor: torch.Tensor = to_local() if callable(to_local) else value
    if tensor.layout != torch.strided or tensor.is_quantized:
        raise OptionError(f"tensor {name!r} is not dense: the format has only dense ones")
    if tensor.is_meta:
        raise OptionError(f"tensor {name!r} lies on the meta device: it has a shape and no content")
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


def pieces(tensor: torch.Tensor, piece_bytes: int) -> Iterator[memoryview]:
    """The bytes of a tensor in row-major order.

    A tensor that is contiguous and lies on the host is shown as it is; of any other one, a piece at a time is copied.

    Args:
        tensor: As `local_tensor` returns it.
        piece_bytes: No piece is longer, except for a single element.

    Yields:
        Views. Each is good for as long as it is referred to, and the tensor does not change.
    """
    if not tensor.numel():
        return
    # As plain integers of the same size: not every dtype can be copied on every device.
    integers = tensor.view(_integers(tensor.element_size()))
    yield from _pieces(integers.view(-1) if integers.is_contiguous() else integers, piece_bytes)


def _pieces(tensor: torch.Tensor, piece_bytes: int) -> Iterator[memoryview]:
    nbytes = tensor.numel() * tensor.element_size()
    if nbytes <= piece_bytes or not tensor.dim():
        yield _view(tensor.contiguous().cpu(), nbytes)
        return
    row_bytes = nbytes // tensor.shape[0]
    if row_bytes > piece_bytes:
        for row in tensor:
            yield from _pieces(row, piece_bytes)
        return
    rows = piece_bytes // row_bytes
    for first in range(0, tensor.shape[0], rows):
        part = tensor[first : first + rows]
        yield _view(part.contiguous().cpu(), part.numel() * part.element_size())


def _view(tensor: torch.Tensor, nbytes: int) -> memoryview:
    memory = (ctypes.c_char * nbytes).from_address(tensor.data_ptr())
    memory.tensor = tensor  # type: ignore[attr-defined]  # what the view refers to keeps the memory
    return memoryview(memory).cast("B")


def _integers(size: int) -> torch.dtype:
    import torch

    return {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
