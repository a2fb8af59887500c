"""The header of a file that is to be written, and where its tensors will lie. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from streamload.checkpoint.dtypes import DTYPE_BITS
from streamload.checkpoint.header import MAX_HEADER_BYTES
from streamload.checkpoint.tensors import ShardFile, TensorInfo
from streamload.checkpoint.text import brief
from streamload.errors import OptionError

__all__ = ["Entry", "encode_header", "lay_out", "tensor_bytes"]

Entry = tuple[str, str, tuple[int, ...]]
"""A tensor's name, the format's name of its dtype, and its shape in elements."""

# With it, tensors of the widest dtype, which come first, are aligned in the file.
_ALIGNMENT_BYTES = 8
_RESERVED = "__metadata__"


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    """How many bytes a tensor takes."""
    elements = 1
    for size in shape:
        elements *= size
    return elements * DTYPE_BITS[dtype] // 8


def lay_out(
    key: str, entries: Iterable[Entry], *, metadata: Mapping[str, str] | None = None
) -> tuple[bytes, ShardFile]:
    """Lay tensors out in a file, as safetensors itself does: wide dtypes first, then by name, without a hole.

    Args:
        key: The file's key.
        entries: The tensors.
        metadata: For the header.

    Returns:
        The header with the eight bytes of its length, and the file as `parse_header` would describe it.

    Raises:
        OptionError: A name that the format reserves, or a header that no reader takes.
    """
    ordered = sorted(entries, key=lambda entry: (-DTYPE_BITS[entry[1]], entry[0]))
    raw = encode_header(ordered, metadata=metadata)
    at = len(raw)
    tensors = []
    for name, dtype, shape in ordered:
        end = at + tensor_bytes(dtype, shape)
        tensors.append(TensorInfo(name, dtype, shape, at, end))
        at = end
    return raw, ShardFile(key, at, len(raw), tuple(tensors), dict(metadata or {}))


def encode_header(entries: Iterable[Entry], *, metadata: Mapping[str, str] | None = None) -> bytes:
    """The header of a file in which tensors follow one another in the given order, without a hole.

    Wide dtypes must come first: readers take tensors whose place is no multiple of their elements' size for broken.

    Args:
        entries: The tensors.
        metadata: For the header.

    Returns:
        The eight bytes of the header's length, and the header.

    Raises:
        OptionError: A name that the format reserves, or a header that no reader takes.
    """
    # Written entry by entry: as one object, the headers of large checkpoints take many times their length.
    fields = [f"{_json(_RESERVED)}:{_json(dict(metadata))}"] if metadata else []
    position = 0
    for name, dtype, shape in entries:
        if name == _RESERVED:
            raise OptionError(f"a tensor cannot be called {_RESERVED!r}: the format means something else by it")
        if not _is_text(name):
            raise OptionError(f"the tensor's name {brief(name)} is no Unicode text")
        end = position + tensor_bytes(dtype, shape)
        info = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        fields.append(f"{_json(name)}:{_json(info)}")
        position = end
    text = f"{{{','.join(fields)}}}".encode()
    text += b" " * (-len(text) % _ALIGNMENT_BYTES)
    if len(text) > MAX_HEADER_BYTES:
        count = len(fields) - bool(metadata)
        raise OptionError(f"{count} tensors need a header of {len(text)} bytes; {MAX_HEADER_BYTES} are allowed")
    return len(text).to_bytes(8, "little") + text


def _json(value: object) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


def _is_text(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True
