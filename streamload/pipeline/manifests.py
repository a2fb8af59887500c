"""The manifests that lie beside shard files: which there are, and what they say."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping

from streamload.checkpoint import MANIFEST_NAME, MAX_MANIFEST_BYTES, ManifestFile, manifest_names, parse_manifest
from streamload.errors import ManifestError, SourceError, TransientError
from streamload.loan import Loan
from streamload.pipeline.fetch import Fetcher
from streamload.report import Recorder
from streamload.sources.base import SourceObject

__all__ = ["find_manifests", "is_one_file", "read_manifests"]


async def find_manifests(
    fetcher: Fetcher, recorder: Recorder, listed: Mapping[str, SourceObject], keys: Iterable[str]
) -> dict[str, ManifestFile]:
    """Read what manifests say of some shard files.

    Args:
        fetcher: Asks the source.
        recorder: Told of the bytes that it takes.
        listed: What lies in the checkpoint's folder.
        keys: The shard files.

    Returns:
        What they say, by the files' keys; files that no manifest tells of are missing.

    Raises:
        ManifestError: A manifest is none.
        SourceError: It cannot be read.
    """
    names = {key: manifest_names(key) for key in keys}
    found = await read_manifests(fetcher, recorder, listed, (name for these in names.values() for name in these))
    said: dict[str, ManifestFile] = {}
    for key, candidates in names.items():
        for name in candidates:
            if key in found.get(name, {}):
                said[key] = found[name][key]
                break
    return said


async def read_manifests(
    fetcher: Fetcher, recorder: Recorder, listed: Mapping[str, SourceObject], names: Iterable[str]
) -> dict[str, dict[str, ManifestFile]]:
    """Read manifests.

    Args:
        fetcher: Asks the source.
        recorder: Told of the bytes that it takes.
        listed: What lies in the checkpoint's folder.
        names: What they may be called.

    Returns:
        For each that is there, what it says by the files' keys.

    Raises:
        ManifestError: It is none.
        SourceError: It cannot be read.
    """
    if not fetcher.source.companions:
        return {}
    wanted = dict.fromkeys(names)
    there = {name: listed[name] for name in wanted if name in listed}
    if is_one_file(fetcher.source.uri, listed):
        there = await _look_for(fetcher, wanted)
    elif not fetcher.source.lists_folders:
        # Only that of the whole checkpoint: to look for those of each file would be a request or more for each.
        there = await _look_for(fetcher, wanted.keys() & {MANIFEST_NAME})
    async with asyncio.TaskGroup() as group:
        reading = {name: group.create_task(_read(fetcher, recorder, object)) for name, object in there.items()}
    return {name: task.result() for name, task in reading.items()}


def is_one_file(uri: str, listed: Mapping[str, SourceObject]) -> bool:
    """Whether the URI names a file: then what lies beside it was not listed."""
    return len(listed) == 1 and uri.partition("?")[0].endswith(".safetensors")


async def _look_for(fetcher: Fetcher, names: Iterable[str]) -> dict[str, SourceObject]:
    """Those that are there. Where that is refused, which S3 does as well where nothing is there, they are not."""

    async def look(name: str) -> SourceObject | None:
        try:
            return await fetcher.ask(lambda: fetcher.source.stat(name), key=name)
        except TransientError:
            raise
        except SourceError:
            return None

    async with asyncio.TaskGroup() as group:
        tasks = {name: group.create_task(look(name)) for name in names}
    return {name: object for name, task in tasks.items() if (object := task.result()) is not None}


async def _read(fetcher: Fetcher, recorder: Recorder, object: SourceObject) -> dict[str, ManifestFile]:
    if object.size_bytes > MAX_MANIFEST_BYTES:
        raise ManifestError(
            f"the manifest has {object.size_bytes} bytes, more than the {MAX_MANIFEST_BYTES} that are read",
            object=object.key,
        )
    content = bytearray(object.size_bytes)
    await fetcher.read(object, 0, object.size_bytes, Loan([memoryview(content)]))
    recorder.header_bytes += len(content)
    recorder.fetched_bytes += len(content)
    return parse_manifest(content, key=object.key)
