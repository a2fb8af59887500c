"""The journal of a conversion: what is written is read back, and nothing else is taken for one."""

from __future__ import annotations

import json

import pytest

from streamload.errors import CheckpointError
from streamload.save.journal import Journal, KeptFile, Made

MADE = Made((2, 1, "model-rank-{rank}-part-{part}.safetensors"), "digest", {"model.safetensors": (100, "version")})
JOURNAL = Journal(
    MADE,
    group=1,
    tensor=7,
    files={"a.safetensors": KeptFile(100, 8, 2**64 - 1, "00" * 16, {"bytes": 50, "inode": 3})},
    sums={"model.safetensors": {"0": [[0, 10, 2**64 - 1], [20, 5, 3]]}},
    older=["b.safetensors"],
    done={"c.json": (3, "tag")},
)


def test_what_is_written_is_read_back() -> None:
    assert Journal.parse(JOURNAL.encode()) == JOURNAL
    assert Journal.parse(Journal(MADE).encode()) == Journal(MADE)


def test_anything_else_is_refused() -> None:
    said = json.loads(JOURNAL.encode())
    broken = [b"", b"[]", b"{}", b"\xff", json.dumps(said | {"version": 2}).encode()]
    broken += [
        json.dumps({key: said[key] for key in said if key != left_out}).encode() for left_out in ("made", "files")
    ]
    broken += [json.dumps(said | {"files": {"a": {}}}).encode(), json.dumps(said | {"unknown": 1}).encode()]
    for raw in broken:
        with pytest.raises(CheckpointError, match="no journal of a conversion"):
            Journal.parse(raw)
