"""One rank's tensors, into as many files as it takes, all of them there or none."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamload.checkpoint import (
    BLOCK_BYTES,
    MANIFEST_NAME,
    BlockMap,
    Entry,
    ManifestFile,
    ManifestTensor,
    RankFiles,
    ShardFile,
    encode_manifest,
    lay_out,
    tensor_bytes,
)
from streamload.checksums import RunningChecksum
from streamload.errors import StreamloadError
from streamload.save.base import Destination, NewFile
from streamload.save.tensors import Pieces, describe
from streamload.sources.threads import DaemonExecutor, ThreadCall

if TYPE_CHECKING:
    import torch

__all__ = ["METADATA", "Written", "split", "write_sharded"]

_log = logging.getLogger("streamload.save")

# How much of a tensor is at hand at once: what a destination writes in one call.
_PIECE_BYTES = 8 << 20

# How long a cancelled save waits for a copy from a device.
_GRACE_S = 10.0

# As vLLM's own files, and what transformers asks for.
METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class Written:
    """What was written.

    Attributes:
        files: The shard files, with their layout.
        manifest: The manifest's name; None where none was asked for.
    """

    files: tuple[ShardFile, ...]
    manifest: str | None


def split(entries: list[Entry], max_file_bytes: int | None) -> list[list[Entry]]:
    """Share tensors out over files: in order, each file as long as the limit allows.

    Args:
        entries: The tensors.
        max_file_bytes: How many bytes of tensors a file may hold; a larger tensor has a file of its own. None: no
            limit.

    Returns:
        At least one file; none of them is empty, unless there is no tensor.
    """
    files: list[list[Entry]] = [[]]
    held = 0
    for entry in entries:
        nbytes = tensor_bytes(entry[1], entry[2])
        if max_file_bytes is not None and files[-1] and held + nbytes > max_file_bytes:
            files.append([])
            held = 0
        files[-1].append(entry)
        held += nbytes
    return files


async def write_sharded(
    destination: Destination,
    names: RankFiles,
    tensors: Mapping[str, torch.Tensor],
    *,
    max_file_bytes: int | None,
    manifest: bool,
    memory_bytes: int,
) -> Written:
    """Write one rank's files, and their manifest last.

    Every file is complete before the first one is put under its name. Manifests that tell of an earlier save are
    removed then, and its files, unless one file takes the place of another. Whatever fails or is cancelled leaves no
    file of this save.

    Who is killed in the middle must not leave what could be taken for a checkpoint: files of two saves, or not all of
    one. So old and new ones are never there together, and part 0, without which there is none, goes first and comes
    last.

    Args:
        destination: Where to, entered already.
        names: What the files are called.
        tensors: What to write; as `local_tensor` returns them, without shared memory.
        max_file_bytes: See `split`.
        manifest: Whether to write one.
        memory_bytes: The limit on pieces of tensors that are copied; each file that is being written has one.

    Raises:
        StreamloadError: It failed.
    """
    layouts = [
        lay_out(names.name(part), entries, metadata=METADATA)
        for part, entries in enumerate(split([describe(name, t) for name, t in tensors.items()], max_file_bytes))
    ]
    there = await destination.prepare(lambda name: names.is_mine(name) or names.is_manifest_of_mine(name))
    at_once = _files_at_once(destination, memory_bytes)
    begun: list[NewFile] = []
    threads = DaemonExecutor(at_once, name="streamload-save")
    try:
        said = await _write_all(destination, layouts, tensors, begun, threads, at_once)
        await _remove_older(destination, names, there, {file.name for file in begun}, manifest=manifest)
        for file in begun:
            await file.publish()
        if manifest:
            await _write_manifest(destination, names.manifest, said, begun)
    except BaseException:
        await _discard(begun)
        raise
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        ended = asyncio.wrap_future(threads.ended)
        await asyncio.wait({ended}, timeout=_GRACE_S)
        if threads.join(0.0 if not threads.ended.done() else 1.0):
            ended.cancel()
    return Written(tuple(file for _, file in layouts), names.manifest if manifest else None)


async def _remove_older(
    destination: Destination, names: RankFiles, there: list[str], written: set[str], *, manifest: bool
) -> None:
    """Make room for files that are ready: remove those of an earlier save, but for a single one that is replaced."""
    older = names.in_order(name for name in there if names.is_mine(name))
    manifests = [name for name in there if not names.is_mine(name)]
    if older and not manifest:
        # The whole folder's tells of them, too, and nothing will count more.
        manifests.append(MANIFEST_NAME)
    for name in manifests:
        await destination.remove(name)
    if len(written) > 1 or written != set(older):
        for name in older:
            await destination.remove(name)


def _files_at_once(destination: Destination, memory_bytes: int) -> int:
    return max(1, min(destination.concurrency, memory_bytes // _PIECE_BYTES))


async def _write_all(
    destination: Destination,
    layouts: list[tuple[bytes, ShardFile]],
    tensors: Mapping[str, torch.Tensor],
    begun: list[NewFile],
    threads: DaemonExecutor,
    at_once: int,
) -> list[ManifestFile]:
    """Write and finish all files, several at a time, and have the last part first in `begun`.

    Returns:
        What each one's content sums up to, in order of the parts.
    """
    slots = asyncio.Semaphore(at_once)

    async def write(header: bytes, layout: ShardFile) -> ManifestFile:
        async with slots:
            file = await destination.create(layout.key, layout.size_bytes)
            begun.append(file)
            said = await _write_file(file, header, layout, tensors, threads)
            await file.finish()
            return said

    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(write(header, layout)) for header, layout in layouts]
    order = {layout.key: place for place, (_, layout) in enumerate(layouts)}
    begun.sort(key=lambda file: order[file.name], reverse=True)
    return [task.result() for task in tasks]


async def _write_file(
    file: NewFile,
    header: bytes,
    layout: ShardFile,
    tensors: Mapping[str, torch.Tensor],
    threads: DaemonExecutor,
) -> ManifestFile:
    of_header = RunningChecksum("CRC64NVME")
    of_header.add(memoryview(header))
    await file.write(memoryview(header))
    pieces = Pieces(_PIECE_BYTES)
    said: list[ManifestTensor] = []
    for tensor in layout.tensors:
        blocks = BlockMap([(0, tensor.nbytes)]).pieces(0, tensor.nbytes)
        running = RunningChecksum("CRC64NVME", (block.end for block in blocks))
        coming = pieces.of(tensors[tensor.name])
        while (piece := await _next(threads, coming, running)) is not None:
            await file.write(piece)
        sums = b"".join(value.to_bytes(8, "big") for _, value in running.sums()) if tensor.nbytes else b""
        said.append(ManifestTensor(tensor.name, tensor.start, tensor.end, sums))
    return ManifestFile(layout.key, layout.size_bytes, layout.header_bytes, of_header.value, BLOCK_BYTES, tuple(said))


async def _next(threads: DaemonExecutor, coming: Iterator[memoryview], running: RunningChecksum) -> memoryview | None:
    """The next piece of a tensor, copied and summed up on a thread."""

    def take() -> memoryview | None:
        piece = next(coming, None)
        if piece is not None:
            running.add(piece)
        return piece

    call = ThreadCall(threads, take)
    try:
        return await call.result()
    except asyncio.CancelledError:
        if not call.take_back():
            await call.left(_GRACE_S)
        raise


async def _write_manifest(destination: Destination, name: str, said: list[ManifestFile], begun: list[NewFile]) -> None:
    content = encode_manifest(said)
    file = await destination.create(name, len(content))
    begun.append(file)
    await file.write(memoryview(content))
    await file.finish()
    await file.publish()


async def _discard(begun: list[NewFile]) -> None:
    """Leave nothing of a save that has failed; the newest first, which is the manifest, and then part 0."""
    for file in reversed(begun):
        try:
            await file.discard()
        except StreamloadError as error:
            # What the save failed of matters more. Storage whose own rules clear up will do the rest.
            _log.warning("something is left of a save that failed: %s", error)
        except Exception:
            _log.exception("something may be left of a save that failed: %s", file.name)
