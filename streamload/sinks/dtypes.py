"""Which torch dtype holds which dtype of the format."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING

from streamload.checkpoint import Catalog, TensorInfo
from streamload.errors import MissingDependencyError, UnsupportedDtypeError

if TYPE_CHECKING:
    import torch

__all__ = ["check_dtypes", "require_torch", "torch_dtypes", "torch_shape"]

# The format's name and torch's. F6_E2M3 and F6_E3M2 are missing because torch has no such dtype.
_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F4": "float4_e2m1fn_x2",
}


def require_torch() -> None:
    """Make sure that torch can be imported.

    Raises:
        MissingDependencyError: It cannot.
    """
    try:
        importlib.import_module("torch")
    except Exception as error:  # a torch whose libraries are missing raises OSError, and others do worse
        raise MissingDependencyError(
            f"loading tensors needs torch, which cannot be imported ({error}): pip install 'streamload[torch]'"
        ) from error


@functools.cache
def torch_dtypes() -> Mapping[str, torch.dtype]:
    """The dtypes of the format that the installed torch has, by the format's names."""
    import torch

    return {name: getattr(torch, theirs) for name, theirs in _NAMES.items() if hasattr(torch, theirs)}


def torch_shape(tensor: TensorInfo) -> tuple[int, ...]:
    """The shape that torch gives the tensor: two ``F4`` elements share one element of torch's dtype."""
    if tensor.dtype != "F4":
        return tensor.shape
    return (*tensor.shape[:-1], tensor.shape[-1] // 2)


def check_dtypes(catalog: Catalog) -> None:
    """Refuse tensors that the installed torch cannot hold.

    Raises:
        MissingDependencyError: There is no torch.
        UnsupportedDtypeError: It names the first such tensor.
    """
    require_torch()
    dtypes = torch_dtypes()
    for file in catalog.files:
        for tensor in file.tensors:
            if tensor.dtype not in dtypes:
                _refuse(tensor, file.key)
            if tensor.dtype == "F4" and tensor.shape and tensor.shape[-1] % 2:
                raise UnsupportedDtypeError(
                    f"tensor {tensor.name!r} is F4 of shape {list(tensor.shape)}: torch packs two elements into one "
                    "along the last dimension, which must be even",
                    object=file.key,
                    start=tensor.start,
                    end=tensor.end,
                )


def _refuse(tensor: TensorInfo, key: str) -> None:
    import torch

    raise UnsupportedDtypeError(
        f"tensor {tensor.name!r} has dtype {tensor.dtype}, which torch {torch.__version__} does not have; "
        "leave it out by name, or read it with a torch that has it",
        object=key,
        start=tensor.start,
        end=tensor.end,
    )
