"""Checkpoints for tests, written by safetensors itself or byte by byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from streamload.checkpoint import DTYPE_BITS
from streamload.sinks.dtypes import torch_dtypes

__all__ = [
    "dtypes_in_torch",
    "freed",
    "raw_checkpoint",
    "read_with_safetensors",
    "same_tensor",
    "varied_tensors",
    "wrapped",
    "write_sharded",
]


class _Wrapper(torch.Tensor):
    """A tensor whose elements are another one's, as those of libraries for quantization are."""

    elements: torch.Tensor

    @staticmethod
    def __new__(cls, inner: torch.Tensor) -> _Wrapper:
        made: _Wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.elements = inner
        return made

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, call: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        found = call(*(getattr(each, "elements", each) for each in args), **(kwargs or {}))
        return cls(found) if isinstance(found, torch.Tensor) else found


def wrapped() -> torch.Tensor:
    """A tensor without memory of its own: three ones that are another's."""
    return _Wrapper(torch.ones(3))


def freed() -> torch.Tensor:
    """A tensor of three elements whose memory was given back, as FSDP does between uses."""
    tensor = torch.ones(4)[1:]
    tensor.untyped_storage().resize_(0)
    return tensor


def varied_tensors(seed: int = 0, *, large_bytes: int = 3 << 20) -> dict[str, torch.Tensor]:
    """Tensors of many sizes and dtypes: large ones, small ones, scalars and empty ones."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {
        "model.embed_tokens.weight": torch.randn(large_bytes // 256, 64, generator=generator),
        "model.norm.weight": torch.randn(33, generator=generator).to(torch.bfloat16),
        "model.scalar": torch.tensor(3.25, dtype=torch.float64),
        "model.empty": torch.empty(0, 7),
        "model.mask": torch.rand(1001, generator=generator) > 0.5,
        "model.phase": torch.randn(129, 2, generator=generator).to(torch.complex64),
    }
    for layer in range(6):
        name = f"model.layers.{layer}"
        tensors[f"{name}.mlp.up_proj.weight"] = torch.randn(257, 301, generator=generator).to(torch.float16)
        tensors[f"{name}.mlp.scale"] = torch.randint(0, 255, (13,), generator=generator, dtype=torch.uint8)
        tensors[f"{name}.attn.weight"] = torch.randn(64, 64, generator=generator).to(torch.float8_e4m3fn)
    for number in range(300):
        tensors[f"model.small.{number}"] = torch.randint(-9, 9, (number % 37,), generator=generator)
    return tensors


def write_sharded(folder: Path, tensors: Mapping[str, torch.Tensor], files: int = 3) -> Path:
    """Spread tensors over shard files with an index, as the Hub does it; the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    weight_map: dict[str, str] = {}
    for number in range(files):
        shard = f"model-{number + 1:05d}-of-{files:05d}.safetensors"
        part = {name: tensors[name].contiguous() for name in names[number::files]}
        save_file(part, folder / shard, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, shard)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def read_with_safetensors(folder: Path) -> dict[str, torch.Tensor]:
    """What safetensors reads from all files of a folder."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(file)
    return tensors


def same_tensor(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are equal in dtype, shape and every bit."""
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(left.reshape(-1).view(torch.uint8), right.reshape(-1).view(torch.uint8))


def raw_checkpoint(shapes: Mapping[str, tuple[str, tuple[int, ...]]], *, padding: int = 0) -> bytes:
    """A file written byte by byte, for dtypes that writers lack and offsets that they avoid.

    Args:
        shapes: Each tensor's dtype and shape.
        padding: So many spaces behind the header, which shift all tensors to other addresses.
    """
    header: dict[str, object] = {}
    position = 0
    for name, (dtype, shape) in shapes.items():
        elements = 1
        for size in shape:
            elements *= size
        nbytes = elements * DTYPE_BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, position + nbytes]}
        position += nbytes
    text = json.dumps(header).encode() + b" " * padding
    # Zeros and ones where a tensor is boolean: other bytes are no booleans.
    highest = 2 if any(dtype == "BOOL" for dtype, _ in shapes.values()) else 251
    pattern = bytes(number * 31 % highest for number in range(highest * 4))
    body = (pattern * (position // len(pattern) + 1))[:position]
    return len(text).to_bytes(8, "little") + text + body


def dtypes_in_torch() -> list[str]:
    """The dtypes of the format that torch has."""
    return sorted(torch_dtypes())
