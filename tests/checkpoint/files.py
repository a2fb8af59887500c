"""Safetensors files made byte by byte, and the two verdicts on them: the reference implementation's and ours."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import safetensors
from safetensors import SafetensorError

from streamload.checkpoint import HeaderReader, ShardFile, parse_header
from streamload.errors import HeaderError

__all__ = [
    "EIGHT",
    "KEY",
    "agree",
    "deserialize",
    "entry",
    "file_of",
    "header_of",
    "judge",
    "reasons_to_be_stricter",
    "reference",
]

# What the package calls it, given the types that it does not declare.
deserialize: Callable[[bytes], list[tuple[str, dict[str, Any]]]] = safetensors.deserialize

KEY = "model.safetensors"
EIGHT = b"\x01\x02\x03\x04\x05\x06\x07\x08"


def file_of(header: str | bytes, body: bytes = b"", *, length: int | None = None) -> bytes:
    """A file of this header and these bytes; `length` is what it claims where that is not the truth."""
    raw = header.encode() if isinstance(header, str) else header
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + body


def header_of(content: bytes) -> bytes:
    """The header of a file whose length is true."""
    return content[8 : 8 + int.from_bytes(content[:8], "little")]


def entry(dtype: str, shape: Sequence[int], start: int, end: int) -> dict[str, object]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def judge(content: bytes) -> ShardFile | HeaderError:
    """Our verdict on a whole file: what it holds, or why it is refused."""
    try:
        reader = HeaderReader(len(content), key=KEY)
        while (end := reader.needed) is not None:
            reader.feed(content[reader.received : end])
        assert reader.header is not None
        return parse_header(reader.header, key=KEY, size_bytes=len(content))
    except HeaderError as error:
        return error


def reference(content: bytes) -> dict[str, tuple[str, list[int], bytes]] | None:
    """What safetensors itself makes of a file: dtype, shape and bytes by name; None if it refuses it."""
    try:
        found = deserialize(content)
    except SafetensorError:
        return None
    return {name: (tensor["dtype"], tensor["shape"], bytes(tensor["data"])) for name, tensor in found}


class _Pairs(list[tuple[str, object]]):
    """A JSON object with its names as often as they stand there."""

    def repeats(self) -> bool:
        return len({name for name, _ in self}) < len(self)


def reasons_to_be_stricter(content: bytes) -> list[str]:
    """Why a file that the reference accepts is refused nevertheless; only these four reasons are good ones."""
    document = json.loads(header_of(content).decode(), object_pairs_hook=_Pairs)
    reasons = ["a tensor twice"] if document.repeats() else []
    for name, value in document:
        if name == "__metadata__":
            reasons += ["a metadata name twice"] if value is not None and value.repeats() else []
        elif not isinstance(value, _Pairs):
            reasons += ["an entry that is an array"]
        else:
            reasons += ["a dtype that is an object"] if isinstance(dict(value)["dtype"], _Pairs) else []
    return reasons


def agree(content: bytes) -> bool:
    """Assert that both verdicts are the same, but for the reasons above; return ours.

    Where both accept, the tensors are the same too, and their bytes lie where we say.
    """
    ours, theirs = judge(content), reference(content)
    if theirs is None or reasons_to_be_stricter(content):
        assert isinstance(ours, HeaderError), content
        assert ours.object == KEY
        assert ours.start == 0
        return False
    assert isinstance(ours, ShardFile), (content, ours)
    assert ours.size_bytes == len(content)
    assert {t.name: (t.dtype, list(t.shape), content[t.start : t.end]) for t in ours.tensors} == theirs
    assert len(ours.tensors) == len(theirs)
    assert all(left.end == right.start for left, right in zip(ours.tensors, ours.tensors[1:], strict=False))
    return True
