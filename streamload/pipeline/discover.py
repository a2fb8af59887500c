"""From a source to a catalog: list, index, headers; a few requests, in parallel."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from typing import TypeVar

from streamload.checkpoint import (
    MAX_INDEX_BYTES,
    Catalog,
    HeaderReader,
    Index,
    ManifestFile,
    ShardFile,
    build_catalog,
    check_manifest,
    choose_index,
    parse_header,
    parse_index,
    shard_keys,
)
from streamload.checkpoint.rank_files import RankFiles, without_rank_files
from streamload.checksums import Checksum, PartChecksums, Sha256
from streamload.errors import (
    CheckpointError,
    IndexFileError,
    NotFoundError,
    ObjectChangedError,
    SourceError,
    StreamloadError,
    TransientError,
)
from streamload.loan import Loan
from streamload.pipeline.fetch import Fetcher
from streamload.pipeline.manifests import find_manifests, is_one_file
from streamload.pipeline.verify import NOT_KEPT
from streamload.report import Recorder
from streamload.sources.base import SourceObject

__all__ = [
    "Discovered",
    "Shards",
    "ask_checksums",
    "ask_sha256s",
    "discover",
    "find_shards",
    "read_config",
    "read_header",
    "read_small",
]

T = TypeVar("T")

# The first read of a file. Nearly all headers are shorter (the Hub's own client reads 100 kB and finds 97 % of them
# whole), and on an object store so much costs hardly more than a byte.
_FIRST_READ_BYTES = 256 << 10

_CONFIG_KEY = "config.json"
# A model's config is a few kilobytes; what is larger is something else.
_MAX_CONFIG_BYTES = 4 << 20

# Headers beyond this are read and parsed one at a time: parsed, a header takes many times its size.
_LARGE_HEADER_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Discovered:
    """What lies under a URI.

    Attributes:
        catalog: All tensors.
        objects: The shard files as the source knows them, by key.
        headers: Their headers, the eight bytes of length included, by key; empty where they were not to be kept.
        checksums: What `ask_checksums` found, by key; empty where it was not to ask.
        manifests: What manifests say of the shard files, by key; each fits its file. Empty where headers were not to be
            kept: nothing is verified then.
        presharded: Whether these are one rank's files of a pre-sharded checkpoint.
    """

    catalog: Catalog
    objects: dict[str, SourceObject]
    headers: dict[str, bytes]
    checksums: dict[str, Checksum | PartChecksums | str]
    manifests: dict[str, ManifestFile]
    presharded: bool


async def discover(
    fetcher: Fetcher,
    recorder: Recorder,
    concurrency: int,
    *,
    keep_headers: bool,
    checksums: bool,
    rank_files: RankFiles | None = None,
) -> Discovered:
    """Learn which tensors there are.

    Args:
        fetcher: Asks the source.
        recorder: Told of the time and the bytes that it takes.
        concurrency: How many requests are made at once.
        keep_headers: Whether the headers' bytes are wanted, to sum them up, and the manifests.
        checksums: Whether to ask for all objects' checksums at the same time.
        rank_files: What the wanted rank's files are called where the checkpoint is pre-sharded; it counts as that where
            there are any.

    Raises:
        CheckpointError: The files do not make a checkpoint, or a manifest was written for others.
        SourceError: The source's.
    """
    lanes: asyncio.Queue[str] = asyncio.Queue()
    for number in range(concurrency):
        lanes.put_nowait(f"header {number}")
    one_large, slots = asyncio.Lock(), asyncio.Semaphore(concurrency)

    async def sum_of(object: SourceObject) -> Checksum | PartChecksums | str:
        async with slots:
            return (await ask_checksums(fetcher, (object,), 1))[object.key]

    headers: dict[str, asyncio.Task[tuple[ShardFile, bytes] | StreamloadError]] = {}
    sums: dict[str, asyncio.Task[Checksum | PartChecksums | str | StreamloadError]] = {}
    async with asyncio.TaskGroup() as group:

        def begin(objects: Iterable[SourceObject]) -> None:
            for object in objects:
                header = _read_header(fetcher, recorder, object, lanes, one_large)
                headers[object.key] = group.create_task(_settled(header))
                if checksums:
                    sums[object.key] = group.create_task(_settled(sum_of(object)))

        shards = await find_shards(fetcher, recorder, concurrency, rank_files=rank_files, meanwhile=begin)
        listed, index, objects = shards.listed, shards.index, shards.objects
        with recorder.stage("headers"):
            for key in headers.keys() - objects.keys():
                for task in (headers.pop(key), sums.pop(key, None)):
                    if task is not None:
                        task.cancel()
            begin(object for key, object in objects.items() if key not in headers)
            manifesting = group.create_task(find_manifests(fetcher, recorder, listed, objects if keep_headers else ()))
            # Tasks of their own, so that the first that fails ends all the others.
            reading = [group.create_task(_result(headers[key])) for key in objects]
            asking: dict[str, asyncio.Task[Checksum | PartChecksums | str]] = {
                key: group.create_task(_result(sums[key])) for key in objects if key in sums
            }
            await asyncio.wait([*reading, *asking.values(), manifesting])
    found = [task.result() for task in reading]
    summed = {key: task.result() for key, task in asking.items()}
    recorder.in_turn(
        max(
            2 if any(file.header_bytes > _FIRST_READ_BYTES for file, _ in found) else 1,
            fetcher.source.checksum_trips if summed else 0,
        )
    )
    manifests = manifesting.result()
    for file, _ in found:
        if file.key in manifests:
            check_manifest(manifests[file.key], file)
    return Discovered(
        catalog=build_catalog([file for file, _ in found], index),
        objects=objects,
        headers={file.key: header for file, header in found} if keep_headers else {},
        checksums=summed,
        manifests=manifests,
        presharded=shards.presharded,
    )


@dataclass(frozen=True, slots=True)
class Shards:
    """Which files make the checkpoint.

    Attributes:
        listed: Everything under the URI, by its key.
        index: What the index says, if there is one that counts.
        objects: The shard files, by their keys.
        presharded: Whether these are one rank's files of a pre-sharded checkpoint.
    """

    listed: dict[str, SourceObject]
    index: Index | None
    objects: dict[str, SourceObject]
    presharded: bool


async def find_shards(
    fetcher: Fetcher,
    recorder: Recorder,
    concurrency: int,
    *,
    rank_files: RankFiles | None = None,
    all_ranks: bool = False,
    meanwhile: Callable[[Iterable[SourceObject]], None] | None = None,
) -> Shards:
    """List what lies under the URI, and choose the shard files.

    Args:
        fetcher: Asks the source.
        recorder: Told of the time that it takes.
        concurrency: How many requests are made at once.
        rank_files: As for `discover`.
        all_ranks: Whether every rank's files of a pre-sharded checkpoint count, for who reads files and not tensors.
        meanwhile: Is given all files that may be shard files when the index, which says which are, is asked for; only
            where waiting for the one costs more than asking for something about the others.

    Raises:
        CheckpointError: There is no shard file, or the index does not fit.
        SourceError: The source's.
    """
    started_s = recorder.now()
    with recorder.stage("list"):
        before = fetcher.source.requests
        listed = {object.key: object for object in await fetcher.ask(fetcher.source.list)}
        recorder.in_turn(fetcher.source.requests - before)
        names = tuple(listed)
        keys = None if rank_files is None else rank_files.choose(names)
        presharded = keys is not None
        overlapped = False
        if not presharded and choose_index(names) is not None:
            overlapped = meanwhile is not None and fetcher.source.most_concurrency is not None
            if overlapped and meanwhile is not None:
                meanwhile(object for key, object in listed.items() if key.endswith(".safetensors"))
        index = None if presharded else await _read_index(fetcher, recorder, listed)
        if keys is None:
            ordinary = all_ranks or index is not None or is_one_file(fetcher.source.uri, listed)
            names = names if ordinary else without_rank_files(names)
            keys = shard_keys(names, index, all_listed=fetcher.source.lists_folders)
        unseen = any(key not in listed for key in keys)
        recorder.in_turn((index is not None and (unseen or not overlapped)) + unseen)
        objects = await _find(fetcher, keys, listed, index, concurrency)
    # Until it is known what of it is wanted.
    recorder.total_bytes = sum(object.size_bytes for object in objects.values())
    recorder.event("list", "engine", started_s, detail=f"{len(listed)} objects, {len(objects)} shard files")
    return Shards(listed, index, objects, presharded)


async def read_header(fetcher: Fetcher, recorder: Recorder, object: SourceObject) -> tuple[ShardFile, bytes]:
    """Read and parse one file's header.

    Returns:
        What it says, and its bytes, the eight of its length included.

    Raises:
        HeaderError: It does not stand.
        SourceError: It cannot be read.
    """
    lanes: asyncio.Queue[str] = asyncio.Queue()
    lanes.put_nowait("header 0")
    return await _read_header(fetcher, recorder, object, lanes, asyncio.Lock())


async def ask_checksums(
    fetcher: Fetcher, objects: Iterable[SourceObject], concurrency: int
) -> dict[str, Checksum | PartChecksums | str]:
    """Ask what the source keeps as the objects' checksums.

    A load does not fail because this is refused: many stores keep none, or do not know the question.

    Args:
        fetcher: Asks the source.
        objects: Which ones.
        concurrency: How many requests are made at once.

    Returns:
        For each object's key the checksum, or why there is none.

    Raises:
        ObjectChangedError: An object is not the version that was listed.
        TransientError: The source failed again and again.
    """
    found = await _ask_each(fetcher, objects, concurrency, fetcher.source.checksum, "checksum")
    return {key: checksum or NOT_KEPT for key, checksum in found.items()}


async def ask_sha256s(
    fetcher: Fetcher, objects: Iterable[SourceObject], concurrency: int
) -> dict[str, bytes | Sha256 | str]:
    """The same for what the source keeps as their SHA-256; objects of which it keeps none are left out."""
    found = await _ask_each(fetcher, objects, concurrency, fetcher.source.sha256, "SHA-256")
    return {key: sha256 for key, sha256 in found.items() if sha256 is not None}


async def _ask_each(
    fetcher: Fetcher,
    objects: Iterable[SourceObject],
    concurrency: int,
    call: Callable[[SourceObject], Awaitable[T]],
    what: str,
) -> dict[str, T | str]:
    """An answer for each object, or why there is none."""
    slots = asyncio.Semaphore(concurrency)

    async def ask(object: SourceObject) -> T | str:
        async with slots:
            try:
                return await fetcher.ask(lambda: call(object), key=object.key)
            except (ObjectChangedError, TransientError):
                raise
            except SourceError as error:
                return f"its {what} could not be had: {error.cause}"

    async with asyncio.TaskGroup() as group:
        tasks = {object.key: group.create_task(ask(object)) for object in objects}
    return {key: task.result() for key, task in tasks.items()}


async def read_config(fetcher: Fetcher, recorder: Recorder) -> dict[str, object]:
    """Read the config.json beside the weights.

    Raises:
        CheckpointError: There is none, or it is no JSON object.
        SourceError: The source's.
    """
    try:
        content = await read_small(fetcher, recorder, _CONFIG_KEY)
    except NotFoundError as error:
        raise CheckpointError(
            "placements='auto' takes the kind of model from config.json, and there is none beside the weights",
            object=_CONFIG_KEY,
        ) from error
    try:
        config = json.loads(content)
    except ValueError as error:
        raise CheckpointError(f"config.json is not valid JSON: {error}", object=_CONFIG_KEY) from error
    if not isinstance(config, dict):
        raise CheckpointError("config.json is no JSON object", object=_CONFIG_KEY)
    return config


async def read_small(fetcher: Fetcher, recorder: Recorder, key: str) -> bytes:
    """Read one of the small files beside the weights.

    Raises:
        CheckpointError: It is too large to be one.
        NotFoundError: There is none.
        SourceError: The source's.
    """
    object = await fetcher.ask(lambda: fetcher.source.stat(key), key=key)
    if object.size_bytes > _MAX_CONFIG_BYTES:
        raise CheckpointError(f"{key} has {object.size_bytes} bytes: it is no model's config", object=key)
    return bytes(await _read_bytes(fetcher, recorder, object, 0, object.size_bytes))


async def _settled(call: Awaitable[T]) -> T | StreamloadError:
    """What a call brings, or the error that it ends with: whether it counts is not known yet."""
    try:
        return await call
    except StreamloadError as error:
        return error


async def _result(task: asyncio.Task[T | StreamloadError]) -> T:
    settled = await task
    if isinstance(settled, StreamloadError):
        raise settled
    return settled


async def _read_index(fetcher: Fetcher, recorder: Recorder, listed: dict[str, SourceObject]) -> Index | None:
    key = choose_index(tuple(listed))
    if key is None:
        return None
    object = listed[key]
    if object.size_bytes > MAX_INDEX_BYTES:
        raise IndexFileError(
            f"the index has {object.size_bytes} bytes, more than the {MAX_INDEX_BYTES} that are read", object=key
        )
    return parse_index(await _read_bytes(fetcher, recorder, object, 0, object.size_bytes), key=key)


async def _find(
    fetcher: Fetcher,
    keys: tuple[str, ...],
    listed: dict[str, SourceObject],
    index: Index | None,
    concurrency: int,
) -> dict[str, SourceObject]:
    """The shard files, those in deeper folders, which the listing does not show, included."""
    slots = asyncio.Semaphore(concurrency)

    async def find(key: str) -> SourceObject:
        try:
            async with slots:
                return await fetcher.ask(lambda: fetcher.source.stat(key), key=key)
        except NotFoundError as error:
            named = next((name for name, shard in index.weight_map.items() if shard == key), "") if index else ""
            raise IndexFileError(
                f"the index says that tensor {named!r} is in {key!r}, and there is no such file",
                uri=fetcher.source.uri,
                object=key,
            ) from error

    async with asyncio.TaskGroup() as group:
        unseen = {key: group.create_task(find(key)) for key in keys if key not in listed}
    return {key: unseen[key].result() if key in unseen else listed[key] for key in keys}


async def _read_header(
    fetcher: Fetcher,
    recorder: Recorder,
    object: SourceObject,
    lanes: asyncio.Queue[str],
    one_large: asyncio.Lock,
) -> tuple[ShardFile, bytes]:
    lane = await lanes.get()
    try:
        started_s = recorder.now()
        reader = HeaderReader(object.size_bytes, key=object.key)
        reader.feed(await _read_bytes(fetcher, recorder, object, 0, min(_FIRST_READ_BYTES, object.size_bytes)))
        needed = reader.needed
        if needed is None:
            file, header = _parse(reader, object)
        elif needed <= _LARGE_HEADER_BYTES:
            reader.feed(await _read_bytes(fetcher, recorder, object, reader.received, needed))
            file, header = _parse(reader, object)
        else:
            # The lock is held across the read on purpose: it is what bounds the memory.
            async with one_large:
                reader.feed(await _read_bytes(fetcher, recorder, object, reader.received, needed))
                file, header = _parse(reader, object)
    finally:
        lanes.put_nowait(lane)
    recorder.event(
        "header", lane, started_s, object=object.key, start=0, end=file.header_bytes, nbytes=file.header_bytes
    )
    return file, header


def _parse(reader: HeaderReader, object: SourceObject) -> tuple[ShardFile, bytes]:
    header = reader.header
    assert header is not None
    file = parse_header(header, key=object.key, size_bytes=object.size_bytes)
    return file, len(header).to_bytes(8, "little") + header


async def _read_bytes(fetcher: Fetcher, recorder: Recorder, object: SourceObject, start: int, end: int) -> bytearray:
    content = bytearray(end - start)
    await fetcher.read(object, start, end, Loan([memoryview(content)]))
    recorder.header_bytes += len(content)
    recorder.fetched_bytes += len(content)
    return content
