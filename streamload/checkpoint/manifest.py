"""The manifest: checksums of a checkpoint in small blocks, so that a part of a file can be verified. No I/O.

The format is described in docs/manifest.md.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple, cast

from streamload.checkpoint.index import SHARD_SUFFIX
from streamload.checkpoint.strict_json import InvalidJson, RepeatingObject, decode_object
from streamload.checkpoint.tensors import ShardFile
from streamload.checkpoint.text import brief
from streamload.errors import ManifestError

__all__ = [
    "BLOCK_BYTES",
    "MANIFEST_ALGORITHM",
    "MANIFEST_NAME",
    "MAX_MANIFEST_BYTES",
    "BlockMap",
    "BlockPiece",
    "ManifestFile",
    "ManifestTensor",
    "check_manifest",
    "encode_manifest",
    "is_manifest",
    "manifest_name",
    "manifest_names",
    "manifested_key",
    "parse_manifest",
]

MANIFEST_NAME = "streamload-manifest.json"
"""What the manifest of a whole checkpoint is called."""

MANIFEST_ALGORITHM: Final = "CRC64NVME"
"""How blocks are summed up: what S3 keeps of whole objects, so that the blocks' sums can be combined to it."""

BLOCK_BYTES = 1 << 20
"""How large a block is; the last one of each tensor is what is left."""

MAX_MANIFEST_BYTES = 64 << 20
"""The longest manifest that is read: some 120 bytes for each tensor and 11 for each MiB, so enough for the largest
checkpoints several times over."""

_FORMAT = "streamload-manifest"
_VERSION = 1
_LEAST_BLOCK_BYTES = 4096
_LENGTH_BYTES = 8
_CHECKSUM_BYTES = 8
_MAX_SIZE = 2**63 - 1

_PREFIX = "streamload-manifest"
_SUFFIX = ".json"
_ALL = "all"
# ASCII digits only, as everywhere in names.
_DIGITS = re.compile(r"[0-9]+")


class ManifestTensor(NamedTuple):
    """What a manifest says of one tensor.

    Attributes:
        name: Its name.
        start: Its first byte in the file.
        end: One past its last.
        checksums: Of its blocks, eight bytes each, the highest first; nothing for a tensor without bytes.
    """

    name: str
    start: int
    end: int
    checksums: bytes


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """What a manifest says of one file.

    Attributes:
        key: The file's key.
        size_bytes: Its length.
        header_bytes: Where its tensors' bytes begin.
        header_checksum: Of all that comes before.
        block_bytes: How large a block is.
        tensors: In the order of their bytes; they fill the file.
        manifest: The key of the manifest that says it.
    """

    key: str
    size_bytes: int
    header_bytes: int
    header_checksum: int
    block_bytes: int
    tensors: tuple[ManifestTensor, ...]
    manifest: str = MANIFEST_NAME

    def sums(self) -> Iterator[tuple[int, int]]:
        """Length and checksum of the header and of each block: the whole file, in order."""
        yield self.header_bytes, self.header_checksum
        for tensor in self.tensors:
            nbytes = tensor.end - tensor.start
            for at in range(0, len(tensor.checksums), _CHECKSUM_BYTES):
                value = int.from_bytes(tensor.checksums[at : at + _CHECKSUM_BYTES], "big")
                yield min(self.block_bytes, nbytes), value
                nbytes -= self.block_bytes


class BlockPiece(NamedTuple):
    """The part of one block that lies inside a range.

    Attributes:
        start: Its first byte in the file.
        end: One past its last.
        tensor: The place of the block's tensor in ``tensors``.
        block: The block's number within its tensor.
        block_start: The block's first byte.
        block_end: One past the block's last.
    """

    start: int
    end: int
    tensor: int
    block: int
    block_start: int
    block_end: int

    @property
    def whole(self) -> bool:
        """Whether it is all of the block."""
        return self.start == self.block_start and self.end == self.block_end


class BlockMap:
    """Where the blocks of one file lie. They follow one another without a gap, from the header's end to the file's.

    Args:
        tensors: Each tensor's first byte and one past its last, in the order of their bytes.
        block_bytes: How large a block is.
    """

    def __init__(self, tensors: Iterable[tuple[int, int]], block_bytes: int = BLOCK_BYTES) -> None:
        filled = [(start, end, place) for place, (start, end) in enumerate(tensors) if end > start]
        self._starts = [start for start, _, _ in filled]
        self._ends = [end for _, end, _ in filled]
        self._places = [place for _, _, place in filled]
        self._block_bytes = block_bytes

    def pieces(self, start: int, end: int) -> Iterator[BlockPiece]:
        """Cut a range at the borders of blocks; what of it is no tensor's is left out."""
        size = self._block_bytes
        at = bisect_right(self._ends, start)
        while at < len(self._starts) and self._starts[at] < end:
            first, last, place = self._starts[at], self._ends[at], self._places[at]
            position = max(start, first)
            stop = min(end, last)
            number = (position - first) // size
            while position < stop:
                block_start = first + number * size
                block_end = min(block_start + size, last)
                piece_end = min(block_end, stop)
                yield BlockPiece(position, piece_end, place, number, block_start, block_end)
                position = piece_end
                number += 1
            at += 1

    def whole(self, start: int, end: int) -> tuple[int, int]:
        """The part of a range that is made of whole blocks; an empty range where there is none."""
        if start >= end or not self._starts:
            return start, start
        begin, stop = self._border(start, up=True), self._border(end, up=False)
        return (begin, stop) if begin < stop else (start, start)

    def _border(self, position: int, *, up: bool) -> int:
        """The nearest border of a block at or beyond a position, upwards or downwards."""
        at = bisect_right(self._starts, position) - 1
        if at < 0:
            return self._starts[0] if up else position
        first, last = self._starts[at], self._ends[at]
        if position >= last:
            return last if not up or at + 1 == len(self._starts) else self._starts[at + 1]
        inside = (position - first) % self._block_bytes
        if not inside:
            return position
        return min(position - inside + self._block_bytes, last) if up else position - inside


def manifest_name(key: str) -> str:
    """What the manifest of a file is called, or of several, that have ``all`` where they differ in a number."""
    return f"{_PREFIX}-{key.rpartition('/')[2].removesuffix(SHARD_SUFFIX)}{_SUFFIX}"


def manifested_key(name: str) -> str:
    """The file that a manifest is called after; the other way round than `manifest_name`."""
    return name.removeprefix(f"{_PREFIX}-").removesuffix(_SUFFIX) + SHARD_SUFFIX


def manifest_names(key: str) -> tuple[str, ...]:
    """What manifests that tell of a file may be called; an earlier one counts more than a later one.

    First its own, then those of a rank's files: of ``model-rank-1-part-0.safetensors``, the name with one of its
    numbers replaced by ``all``. Last that of the whole checkpoint. A file in a deeper folder has that one only.
    """
    if "/" in key:
        return (MANIFEST_NAME,)
    stem = key.removesuffix(SHARD_SUFFIX)
    stems = [stem, *(stem[: match.start()] + _ALL + stem[match.end() :] for match in _DIGITS.finditer(stem))]
    return (*(f"{_PREFIX}-{stem}{_SUFFIX}" for stem in stems), MANIFEST_NAME)


def is_manifest(key: str) -> bool:
    """Whether a key is called as manifests are."""
    return key == MANIFEST_NAME or (key.startswith(f"{_PREFIX}-") and key.endswith(_SUFFIX) and "/" not in key)


def encode_manifest(files: Sequence[ManifestFile]) -> bytes:
    """Write a manifest: one line for each tensor.

    Args:
        files: What it tells of; all with blocks of the same size, at least one.
    """
    (block_bytes,) = {file.block_bytes for file in files}
    head = {"format": _FORMAT, "version": _VERSION, "algorithm": MANIFEST_ALGORITHM, "block_bytes": block_bytes}
    lines = ["{", *(f" {json.dumps(name)}: {json.dumps(value)}," for name, value in head.items()), ' "files": {']
    for place, file in enumerate(files):
        lines.append(f"  {json.dumps(file.key)}: {{")
        lines.append(f'   "size_bytes": {file.size_bytes}, "header_bytes": {file.header_bytes},')
        header = base64.b64encode(file.header_checksum.to_bytes(_CHECKSUM_BYTES, "big")).decode()
        lines.append(f'   "header": "{header}", "tensors": {{')
        entries = [
            f'    {json.dumps(name)}: {{"start": {start}, "end": {end}, "blocks": "{base64.b64encode(sums).decode()}"}}'
            for name, start, end, sums in file.tensors
        ]
        lines += [f"{entry}," for entry in entries[:-1]] + entries[-1:]
        lines.append("   }" + ("}" if place == len(files) - 1 else "},"))
    lines += [" }", "}", ""]
    return "\n".join(lines).encode()


def parse_manifest(raw: bytes | bytearray, *, key: str) -> dict[str, ManifestFile]:
    """Read a manifest.

    Fields that it does not know are ignored.

    Args:
        raw: The whole file.
        key: Its key.

    Returns:
        What it says, by the files' keys.

    Raises:
        ManifestError: It is longer than `MAX_MANIFEST_BYTES`, not strict JSON, of another version, or makes no sense: a
            field is missing or no such thing, a name stands twice, tensors do not fill their file, or there are not as
            many checksums as blocks.
    """
    try:
        return _parse(raw, key)
    except ManifestError as error:
        error.locate(object=key)
        raise


def check_manifest(entry: ManifestFile, file: ShardFile) -> None:
    """See that a manifest tells of this very file.

    Raises:
        ManifestError: Size or layout differ: the manifest was written for another file.
    """
    if entry.size_bytes != file.size_bytes:
        problem = f"the file has {file.size_bytes} bytes, in the manifest {entry.size_bytes}"
    elif entry.header_bytes != file.header_bytes:
        problem = f"the header has {file.header_bytes} bytes, in the manifest {entry.header_bytes}"
    else:
        there = {tensor.name: (tensor.start, tensor.end) for tensor in file.tensors}
        said = {tensor.name: (tensor.start, tensor.end) for tensor in entry.tensors}
        if there == said:
            return
        name = min(name for name in there.keys() | said.keys() if there.get(name) != said.get(name))
        if name not in said:
            problem = f"tensor {brief(name)} is not in the manifest"
        elif name not in there:
            problem = f"tensor {brief(name)} is in the manifest and not in the file"
        else:
            problem = f"tensor {brief(name)} lies elsewhere than the manifest says"
    raise ManifestError(
        f"the manifest {brief(entry.manifest)} was written for another file: {problem}; write it anew with "
        "`streamload manifest`, or remove it",
        object=file.key,
    )


def _parse(raw: bytes | bytearray, key: str) -> dict[str, ManifestFile]:
    if len(raw) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"the manifest has {len(raw)} bytes; the limit is {MAX_MANIFEST_BYTES}")
    try:
        document = decode_object(raw)
    except InvalidJson as error:
        raise ManifestError(f"the manifest cannot be read: {error}") from None
    top = _object(document, "the manifest")
    if top.get("format") != _FORMAT:
        raise ManifestError(f"this is no manifest: its format is {brief(top.get('format'))}, not {_FORMAT!r}")
    version = _integer(top, "version", "the manifest", 1)
    if version != _VERSION:
        raise ManifestError(f"the manifest is of version {version}; this streamload reads version {_VERSION}")
    if top.get("algorithm") != MANIFEST_ALGORITHM:
        raise ManifestError(f"the algorithm is {brief(top.get('algorithm'))}; there is {MANIFEST_ALGORITHM} only")
    block_bytes = _integer(top, "block_bytes", "the manifest", _LEAST_BLOCK_BYTES, BLOCK_BYTES)
    files = _object(top.get("files"), "the files")
    if not files:
        raise ManifestError("the manifest names no file")
    return {name: _file(name, entry, block_bytes, key) for name, entry in files.items()}


def _file(key: str, entry: object, block_bytes: int, manifest: str) -> ManifestFile:
    what = f"file {brief(key)}"
    fields = _object(entry, what)
    size_bytes = _integer(fields, "size_bytes", what, 0)
    header_bytes = _integer(fields, "header_bytes", what, _LENGTH_BYTES, size_bytes)
    header = _checksums(fields.get("header"), 1, f"the header's checksum of {what}")
    tensors = [
        _tensor(name, tensor, block_bytes, what)
        for name, tensor in _object(fields.get("tensors"), f"the tensors of {what}").items()
    ]
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    position = header_bytes
    for tensor in tensors:
        if tensor.start != position:
            raise ManifestError(
                f"tensor {brief(tensor.name)} of {what} begins at {tensor.start}, what is before it ends at {position}"
            )
        position = tensor.end
    if position != size_bytes:
        raise ManifestError(f"the tensors of {what} end at {position}, the file at {size_bytes}")
    return ManifestFile(
        key, size_bytes, header_bytes, int.from_bytes(header, "big"), block_bytes, tuple(tensors), manifest
    )


def _tensor(name: str, entry: object, block_bytes: int, file: str) -> ManifestTensor:
    # A checkpoint can have 100,000 of them: what is as it should be is seen at once, the rest is looked at for what to
    # say of it.
    if type(entry) is dict:
        first, last, text = entry.get("start"), entry.get("end"), entry.get("blocks")
        if type(first) is int and type(last) is int and type(text) is str and 0 <= first <= last <= _MAX_SIZE:
            try:
                found = binascii.a2b_base64(text, strict_mode=True)
            except ValueError:
                found = b"?"
            if len(found) == -(-(last - first) // block_bytes) * _CHECKSUM_BYTES:
                return ManifestTensor(name, first, last, found)
    what = f"tensor {brief(name)} of {file}"
    fields = _object(entry, what)
    start = _integer(fields, "start", what, 0)
    end = _integer(fields, "end", what, start)
    blocks = -(-(end - start) // block_bytes)
    return ManifestTensor(name, start, end, _checksums(fields.get("blocks"), blocks, f"the blocks of {what}"))


def _object(value: object, what: str) -> dict[str, object]:
    if not isinstance(value, dict):
        raise ManifestError(f"{what}: this is not an object but {brief(value)}")
    if isinstance(value, RepeatingObject):
        raise ManifestError(f"{what}: {brief(value.repeated[0])} stands there more than once")
    return cast("dict[str, object]", value)


def _integer(fields: dict[str, object], name: str, what: str, least: int, most: int = _MAX_SIZE) -> int:
    value = fields.get(name)
    if type(value) is not int or not least <= value <= most:
        raise ManifestError(f"{what}: {name} is {brief(value)}, not a whole number from {least} to {most}")
    return value


def _checksums(value: object, count: int, what: str) -> bytes:
    try:
        found = base64.b64decode(value, validate=True) if isinstance(value, str) else None
    except (binascii.Error, ValueError):
        found = None
    if found is None:
        raise ManifestError(f"{what}: this is no base64 text but {brief(value)}")
    if len(found) != count * _CHECKSUM_BYTES:
        raise ManifestError(f"{what}: {len(found)} bytes of checksums are not {_CHECKSUM_BYTES} for each of {count}")
    return found
