"""From a source to a catalog: list, index, headers; a few requests, in parallel."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from streamload.checkpoint import (
    MAX_INDEX_BYTES,
    Catalog,
    HeaderReader,
    Index,
    ShardFile,
    build_catalog,
    choose_index,
    parse_header,
    parse_index,
    shard_keys,
)
from streamload.checksums import Checksum
from streamload.errors import IndexFileError, NotFoundError
from streamload.loan import Loan
from streamload.pipeline.fetch import Fetcher
from streamload.report import Recorder
from streamload.sources.base import SourceObject

__all__ = ["Discovered", "discover"]

# The first read of a file. Nearly all headers are shorter (the Hub's own client reads 100 kB and finds 97 % of them
# whole), and on an object store so much costs hardly more than a byte.
_FIRST_READ_BYTES = 256 << 10

# Headers beyond this are read and parsed one at a time: parsed, a header takes many times its size.
_LARGE_HEADER_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class Discovered:
    """What lies under a URI.

    Attributes:
        catalog: All tensors.
        objects: The shard files as the source knows them, by key.
        headers: Their headers, the eight bytes of length included, by key.
        checksums: What the source keeps of them, where it keeps something and was asked, by key.
    """

    catalog: Catalog
    objects: dict[str, SourceObject]
    headers: dict[str, bytes]
    checksums: dict[str, Checksum]


async def discover(fetcher: Fetcher, recorder: Recorder, concurrency: int, *, checksums: bool = True) -> Discovered:
    """Learn which tensors there are.

    Args:
        fetcher: Asks the source.
        recorder: Told of the time and the bytes that it takes.
        concurrency: How many headers are read at once.
        checksums: Whether to ask for the objects' checksums as well.

    Raises:
        CheckpointError: The files do not make a checkpoint.
        SourceError: The source's.
    """
    started_s = recorder.now()
    with recorder.stage("list"):
        listed = {object.key: object for object in await fetcher.ask(fetcher.source.list)}
        index = await _read_index(fetcher, recorder, listed)
        keys = shard_keys(tuple(listed), index)
        objects = {key: listed.get(key) or await _find(fetcher, key, index) for key in keys}
    recorder.event("list", "engine", started_s, detail=f"{len(listed)} objects, {len(objects)} shard files")

    slots = asyncio.Semaphore(concurrency)
    one_large = asyncio.Lock()
    with recorder.stage("headers"):
        async with asyncio.TaskGroup() as group:
            reading = [
                group.create_task(_read_header(fetcher, recorder, object, slots, one_large))
                for object in objects.values()
            ]
            asking = {
                object.key: group.create_task(_ask_checksum(fetcher, object, slots))
                for object in objects.values()
                if checksums
            }
    found = [task.result() for task in reading]
    return Discovered(
        catalog=build_catalog([file for file, _ in found], index),
        objects=objects,
        headers={file.key: header for file, header in found},
        checksums={key: sum for key, task in asking.items() if (sum := task.result()) is not None},
    )


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


async def _find(fetcher: Fetcher, key: str, index: Index | None) -> SourceObject:
    """A shard file that the listing does not show: in a deeper folder, perhaps."""
    try:
        return await fetcher.ask(lambda: fetcher.source.stat(key), key=key)
    except NotFoundError as error:
        named = next((name for name, shard in index.weight_map.items() if shard == key), "") if index else ""
        raise IndexFileError(
            f"the index says that tensor {named!r} is in {key!r}, and there is no such file",
            uri=fetcher.source.uri,
            object=key,
        ) from error


async def _read_header(
    fetcher: Fetcher,
    recorder: Recorder,
    object: SourceObject,
    slots: asyncio.Semaphore,
    one_large: asyncio.Lock,
) -> tuple[ShardFile, bytes]:
    started_s = recorder.now()
    async with slots:
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
    recorder.event(
        "header", "engine", started_s, object=object.key, start=0, end=file.header_bytes, nbytes=file.header_bytes
    )
    return file, header


async def _ask_checksum(fetcher: Fetcher, object: SourceObject, slots: asyncio.Semaphore) -> Checksum | None:
    async with slots:
        return await fetcher.ask(lambda: fetcher.source.checksum(object), key=object.key)


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
