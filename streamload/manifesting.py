"""The manifest for a checkpoint that has none."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Unpack, cast

from streamload.checkpoint import (
    BLOCK_BYTES,
    MANIFEST_ALGORITHM,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    BlockMap,
    ManifestFile,
    ManifestTensor,
    ShardFile,
    encode_manifest,
    is_manifest,
    manifest_name,
    manifest_names,
)
from streamload.checksums import Checksum, PartChecksums, combined
from streamload.errors import AccessError, ChecksumError, ManifestError, OptionError, StreamloadError
from streamload.options import Options
from streamload.pipeline.discover import ask_checksums, find_shards
from streamload.pipeline.manifests import is_one_file
from streamload.pipeline.scan import Scan
from streamload.saving import destination_for
from streamload.sources import SourceObject
from streamload.uris import scheme_of
from streamload.whole import WholeRead

__all__ = ["WrittenManifest", "write_manifest"]

_ELSEWHERE = "say with output (--output) where else the manifest should go"


@dataclass(frozen=True, slots=True)
class WrittenManifest:
    """A manifest that was written.

    Attributes:
        uri: The checkpoint.
        manifest: The manifest's name.
        files: How many files it tells of.
        tensors: How many tensors.
        blocks: How many blocks, headers left out.
        nbytes: The files' bytes, all of which were read.
        size_bytes: The manifest's own length.
    """

    uri: str
    manifest: str
    files: int
    tensors: int
    blocks: int
    nbytes: int
    size_bytes: int


def write_manifest(
    uri: str | os.PathLike[str], *, output: str | os.PathLike[str] | None = None, **options: Unpack[Options]
) -> WrittenManifest:
    """Read a whole checkpoint and write its manifest beside it, or elsewhere.

    It tells of all shard files of the folder, or of the one file that the URI names. What lies beside the weights and
    told of some of them before is replaced, one rank's manifest included. Memory is bounded as for a load; needs no
    torch.

    Args:
        uri: As for `streamload.open`.
        output: A file on this machine to write to, where the checkpoint's place is read-only. None: beside the weights.
        **options: The fields of `LoadOptions`; those that choose tensors or say where they go have no effect.

    Raises:
        ChecksumError: The content is not what the store keeps: no manifest is written for it.
        StreamloadError: Bad options, no valid checkpoint there, or it cannot be written.
    """
    task = WholeRead(os.fspath(uri), options)
    if output is None:
        folder, name = _folder_of(task), None
    else:
        folder, name = os.path.split(os.path.abspath(output))
    return task.run(lambda: _write_manifest(task, folder, name))


async def _write_manifest(task: WholeRead, folder: str, name: str | None) -> WrittenManifest:
    shards = await find_shards(task.fetcher, task.recorder, task.concurrency, all_ranks=True)
    listed, objects = shards.listed, shards.objects
    headers = await task.headers(objects.values())
    scans: list[tuple[ShardFile, Scan]] = []
    for key, header in headers.items():
        if isinstance(header, StreamloadError):
            raise header
        blocks = BlockMap((tensor.start, tensor.end) for tensor in header.tensors)
        ends = [header.header_bytes, *(block.end for block in blocks.pieces(header.header_bytes, header.size_bytes))]
        scans.append((header, Scan(objects[key], MANIFEST_ALGORITHM, ends)))
    checksums = await ask_checksums(task.fetcher, objects.values(), task.concurrency)
    await task.scan([each for _, each in scans])
    said = [_said_of(header, each, checksums[header.key]) for header, each in scans]
    content = encode_manifest(said)
    if len(content) > MAX_MANIFEST_BYTES:
        raise ManifestError(f"it would have {len(content)} bytes; no more than {MAX_MANIFEST_BYTES} are read")
    older: list[str] = []
    if name is None:
        one = is_one_file(task.source.uri, listed)
        name = manifest_name(next(iter(objects))) if one else MANIFEST_NAME
        older = [] if one else _superseded(listed, objects)
    await _put(folder, name, content, older)
    return WrittenManifest(
        uri=task.recorder.uri,
        manifest=name,
        files=len(said),
        tensors=sum(len(file.tensors) for file in said),
        blocks=sum(len(each.ends) - 1 for _, each in scans),
        nbytes=sum(file.size_bytes for file in said),
        size_bytes=len(content),
    )


def _said_of(header: ShardFile, found: Scan, kept: Checksum | PartChecksums | str) -> ManifestFile:
    """What the manifest says of one file, once it is known to be what the store keeps."""
    if found.error is not None:
        raise found.error
    values = iter(cast("list[int]", found.values))
    of_header = next(values)
    tensors = []
    for tensor in header.tensors:
        blocks = -(-tensor.nbytes // BLOCK_BYTES)
        sums = b"".join(next(values).to_bytes(8, "big") for _ in range(blocks))
        tensors.append(ManifestTensor(tensor.name, tensor.start, tensor.end, sums))
    said = ManifestFile(header.key, header.size_bytes, header.header_bytes, of_header, BLOCK_BYTES, tuple(tensors))
    if isinstance(kept, Checksum) and kept.algorithm == MANIFEST_ALGORITHM:
        whole = combined(MANIFEST_ALGORITHM, said.sums())
        if whole != kept:
            raise ChecksumError(
                f"what was read sums up to {whole}, but the object's checksum is {kept}: no manifest is written for it",
                object=header.key,
                start=0,
                end=header.size_bytes,
            )
    return said


def _superseded(listed: Mapping[str, SourceObject], objects: Mapping[str, SourceObject]) -> list[str]:
    """Other manifests, which tell of some of these files and would count more than the new one."""
    names = [name for name in listed if is_manifest(name) and name != MANIFEST_NAME]
    wanted = {name for key in objects for name in manifest_names(key)}
    return sorted(name for name in names if name in wanted)


async def _put(folder: str, name: str, content: bytes, older: Iterable[str]) -> None:
    async with destination_for(folder, len(content) + (16 << 20)) as destination:
        await destination.prepare(lambda other: other == name)
        file = await destination.create(name, len(content))
        try:
            await file.write(memoryview(content))
            await file.finish()
            await file.publish()
        except BaseException:
            await file.discard()
            raise
        for other in older:
            await destination.remove(other)


def _folder_of(task: WholeRead) -> str:
    """The URI of the folder that the manifest belongs into.

    Raises:
        OptionError: Nothing can be written to such a URI.
        AccessError: The folder is read-only.
    """
    uri, scheme = task.name, scheme_of(task.name)
    if scheme not in ("file", "s3"):
        raise OptionError(f"nothing can be written to {scheme}://: {_ELSEWHERE}")
    if not task.source.companions:
        raise OptionError(f"this names one version of an object: {_ELSEWHERE}")
    bare, mark, options = uri.partition("?") if scheme == "s3" else (uri, "", "")
    is_file = bare.endswith(".safetensors") and (scheme == "s3" or not os.path.isdir(bare))
    folder = uri
    if is_file:
        folder = (bare.rpartition("/")[0] or ("/" if bare.startswith("/") else ".")) + mark + options
    # Not after hours of reading; what S3 allows is only known when it is asked.
    if scheme == "file" and "://" not in folder and os.path.isdir(folder) and not os.access(folder, os.W_OK):
        raise AccessError(f"this folder cannot be written to: {_ELSEWHERE}")
    return folder
