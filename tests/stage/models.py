"""Checkpoints to stage, and what is looked at afterwards."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

from streamload.stage.names import READY_NAME
from tests.checkpoint.files import entry, file_of

__all__ = ["FIRST", "INDEX", "PIECE", "SECOND", "STAGED", "names", "same", "shard_of", "source_of", "total_bytes"]

FIRST = "model-00001-of-00002.safetensors"
SECOND = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
# A read's length: small, so that a small file has many.
PIECE = 64 << 10


def shard_of(name: str, nbytes: int, seed: int) -> bytes:
    """A file with one tensor of random bytes."""
    header = json.dumps({name: entry("U8", (nbytes,), 0, nbytes)})
    return file_of(header, random.Random(seed).randbytes(nbytes))


def source_of(folder: Path, *, seed: int = 0, pieces: int = 20) -> Path:
    """Two shards with an index, config and tokenizer, and what nobody needs beside them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FIRST).write_bytes(shard_of("first", pieces * PIECE // 2, seed))
    (folder / SECOND).write_bytes(shard_of("second", pieces * PIECE // 2, seed + 1))
    (folder / INDEX).write_text(json.dumps({"weight_map": {"first": FIRST, "second": SECOND}}))
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.model").write_bytes(b"tokens" * 100)
    (folder / "empty.txt").write_bytes(b"")
    (folder / "pytorch_model.bin").write_bytes(b"the same once more")
    (folder / "consolidated.safetensors").write_bytes(b"and once more")
    (folder / ".gitattributes").write_bytes(b"hidden")
    return folder


def names(folder: Path) -> set[str]:
    """The files that one sees in a folder."""
    return {name for name in os.listdir(folder) if not name.startswith(".")}


STAGED = {FIRST, SECOND, INDEX, "config.json", "tokenizer.model", "empty.txt"}


def total_bytes(folder: Path) -> int:
    """What of `source_of` is staged."""
    return sum((folder / name).stat().st_size for name in STAGED)


def same(source: Path, folder: Path) -> bool:
    """Whether a folder holds what is to be staged, bit for bit, and the marker, and nothing unfinished."""
    assert names(folder) == {*STAGED, READY_NAME}
    assert [name for name in os.listdir(folder) if name.endswith((".streamload-staging", ".journal"))] == []
    return all((folder / name).read_bytes() == (source / name).read_bytes() for name in STAGED)
