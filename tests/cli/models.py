"""Small checkpoints, written byte by byte: the command line's tests need no torch for that."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from streamload.checkpoint import DTYPE_BITS
from tests.checkpoint.files import entry, file_of

__all__ = ["FIRST", "INDEX", "SECOND", "shard", "write_index", "write_model"]

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def shard(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> bytes:
    """A file of these tensors, each with its dtype and shape; every byte is one."""
    header: dict[str, object] = {}
    position = 0
    for name, (dtype, shape) in tensors.items():
        bits = DTYPE_BITS[dtype]
        for size in shape:
            bits *= size
        header[name] = entry(dtype, shape, position, position + bits // 8)
        position += bits // 8
    return file_of(json.dumps(header), b"\x01" * position)


def write_index(folder: Path, weight_map: Mapping[str, str]) -> None:
    """An index that says which tensor lies in which file."""
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def write_model(folder: Path) -> Path:
    """A model in two files with an index: five tensors, 41,020 bytes."""
    folder.mkdir()
    first = {"model.embed.weight": ("BF16", (100, 100)), "model.norm.weight": ("F32", (5,))}
    second = {
        "model.up.weight": ("BF16", (100, 50)),
        "model.down.weight": ("BF16", (50, 100)),
        "model.mask": ("U8", (1000,)),
    }
    (folder / FIRST).write_bytes(shard(first))
    (folder / SECOND).write_bytes(shard(second))
    write_index(folder, dict.fromkeys(first, FIRST) | dict.fromkeys(second, SECOND))
    return folder
