"""The index file of a checkpoint in several shard files: which tensor lies in which file. No I/O."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from streamload.checkpoint.strict_json import InvalidJson, RepeatingObject, decode_object
from streamload.checkpoint.text import brief, natural_key
from streamload.errors import IndexFileError

__all__ = ["INDEX_SUFFIX", "MAX_INDEX_BYTES", "PREFERRED_INDEX", "SHARD_SUFFIX", "Index", "choose_index", "parse_index"]

SHARD_SUFFIX = ".safetensors"
INDEX_SUFFIX = ".safetensors.index.json"
PREFERRED_INDEX = "model.safetensors.index.json"
"""The name that the Hub's tools give an index; it counts even where others lie beside it."""

MAX_INDEX_BYTES = 64 << 20
"""The longest index file that is read. A line of one takes about 100 bytes and the largest checkpoints have about
100,000 tensors: this is six times what they need, and decoded it still takes some hundred MB at most."""


_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Index:
    """What an index file says.

    Attributes:
        key: The index file's key.
        weight_map: The shard file of each tensor, by the tensor's name; never empty.
        shards: The keys of the shard files, each once, in natural order.
    """

    key: str
    weight_map: Mapping[str, str]
    shards: tuple[str, ...]


def choose_index(listed_keys: Iterable[str]) -> str | None:
    """Choose the index file that says which shard files count.

    Args:
        listed_keys: What lies in the checkpoint's folder.

    Returns:
        ``model.safetensors.index.json`` where there is one, else the only key that ends in
        ``.safetensors.index.json``; None where there is none at all.

    Raises:
        IndexFileError: There are several, and none has the name that would be preferred.
    """
    found = sorted(key for key in listed_keys if key.endswith(INDEX_SUFFIX))
    if PREFERRED_INDEX in found:
        return PREFERRED_INDEX
    if len(found) > 1:
        raise IndexFileError(f"several index files and none is {PREFERRED_INDEX}: {brief(found)}")
    return found[0] if found else None


def parse_index(raw: bytes | bytearray, *, key: str) -> Index:
    """Read an index file.

    Only ``weight_map`` is read. The ``metadata.total_size`` beside it is not compared with anything: tools that edit
    checkpoints leave it stale, and the shard files' own headers are exact.

    Args:
        raw: The whole file.
        key: Its key.

    Raises:
        IndexFileError: It is longer than `MAX_INDEX_BYTES`, not strict JSON, has no ``weight_map`` of at least one
            tensor, names a tensor twice, or names a shard file by anything but a plain path below the index's folder
            that ends in ``.safetensors``.
    """
    try:
        weight_map = _weight_map(raw)
        shards = sorted(set(weight_map.values()), key=natural_key)
        for shard in shards:
            _check_shard(shard)
    except IndexFileError as error:
        error.locate(object=key)
        raise
    return Index(key, weight_map, tuple(shards))


def _weight_map(raw: bytes | bytearray) -> dict[str, str]:
    if len(raw) > MAX_INDEX_BYTES:
        raise IndexFileError(f"the index has {len(raw)} bytes; the limit is {MAX_INDEX_BYTES}")
    document = _decode(raw)
    if not isinstance(document, dict):
        raise IndexFileError(f"the index is not an object but {brief(document)}")
    if "weight_map" not in document:
        raise IndexFileError("the index has no weight_map")
    if isinstance(document, RepeatingObject) and "weight_map" in document.repeated:
        raise IndexFileError("the index has more than one weight_map")
    weight_map = document["weight_map"]
    if isinstance(weight_map, RepeatingObject):
        raise IndexFileError(f"the name {brief(weight_map.repeated[0])} stands more than once in the weight_map")
    if not isinstance(weight_map, dict):
        raise IndexFileError(f"the weight_map is not an object but {brief(weight_map)}")
    if not weight_map:
        raise IndexFileError("the weight_map is empty")
    for name, shard in weight_map.items():
        if not isinstance(shard, str):
            raise IndexFileError(f"the weight_map names no file for tensor {brief(name)} but {brief(shard)}")
    return weight_map


def _decode(raw: bytes | bytearray) -> object:
    try:
        return decode_object(raw)
    except InvalidJson as error:
        problem = str(error)
    raise IndexFileError(f"the index cannot be read: {problem}")


def _check_shard(shard: str) -> None:
    """Refuse every path that could mean another place than the index's folder, to any source that will see it."""
    if not shard:
        problem = "is empty"
    elif shard.startswith("/"):
        problem = "is absolute"
    elif "\\" in shard:
        problem = "holds a backslash"
    elif _CONTROL.search(shard):
        problem = "holds a control character"
    elif any(part in ("", ".", "..") for part in shard.split("/")):
        problem = "has a part that is empty, '.' or '..'"
    elif not shard.endswith(SHARD_SUFFIX):
        problem = f"does not end in {SHARD_SUFFIX}"
    else:
        return
    raise IndexFileError(f"the weight_map names the file {brief(shard)}, which {problem}")
