"""A checkpoint's files onto a volume: what an init container does before the engine starts."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any, Unpack, cast

from streamload.deadlines import deadline
from streamload.errors import OptionError, StreamloadError
from streamload.options import LoadOptions, resolve
from streamload.pipeline.engine import run_in_thread
from streamload.progress import watch
from streamload.stage import StageArguments, Staged, StageOptions, Stager
from streamload.uris import scheme_of, scrub_uri

__all__ = ["folder_path", "process_began_s", "split_options", "stage_checkpoint"]

# More memory than this brings nothing: it is only for what is on its way from the source to the volume.
_MEMORY_DEFAULT_MOST = 256 << 20

_OF_STAGING = frozenset(field.name for field in dataclasses.fields(StageOptions))


def stage_checkpoint(
    uri: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None, **options: Unpack[StageArguments]
) -> Staged:
    """Copy a checkpoint's files onto a volume: verified, durable, and marked as whole when all of them are there.

    Where all of it is there already, nothing is read. What an interrupted call has left is gone on from. Of several
    processes that stage the same into the same place, one works and the others wait for it, and one of them takes over
    if it dies. Needs no torch. Docs: docs/stage.md.

    Args:
        uri: A folder, or one file, as for `streamload.open`.
        folder: Where to. With a ``cache``, this becomes a link to the version in the cache; None: no link.
        **options: The fields of `StageOptions`, and those of `LoadOptions` that say how to read.

    Returns:
        What it has come to.

    Raises:
        OptionError: Bad options.
        SourceError: The source failed, the volume did, or it has no room.
        ChecksumError: What came is not what the source or its manifest says.
        CheckpointError: The index or a manifest does not fit the files.
    """
    staging, reading = split_options(dict(options))
    if folder is None and staging.cache is None:
        raise OptionError("there is neither a folder to stage into nor a cache")
    stager = Stager(os.fspath(uri), None if folder is None else folder_path(os.fspath(folder)), staging, reading)
    recorder = stager.recorder

    def how_far() -> str:
        return f"{recorder.arrived_bytes} of {recorder.total_bytes} bytes are there"

    async def body() -> Staged:
        async with stager, watch(reading.progress, recorder), deadline(reading.deadline_s, how_far):
            return await stager.run()

    try:
        staged = run_in_thread(body)
    except StreamloadError as error:
        raise error.locate(uri=scrub_uri(os.fspath(uri))) from error.__cause__
    began_s = process_began_s()
    asked = staged.asked_at_s is not None and began_s is not None
    return dataclasses.replace(
        staged,
        first_request_s=cast("float", staged.asked_at_s) - cast("float", began_s) if asked else None,
        peak_rss_bytes=_peak_rss_bytes(),
    )


def split_options(given: dict[str, Any]) -> tuple[StageOptions, LoadOptions]:
    """What to stage, and how to read it.

    The memory is what that needs at most, where nothing else is said.

    Raises:
        OptionError: An option has no meaning.
    """
    staging = StageOptions.resolve({name: given.pop(name) for name in list(given) if name in _OF_STAGING})
    options, origins = resolve(given)
    memory = next(each for each in origins if each.name == "memory_bytes")
    assert options.memory_bytes is not None
    if memory.origin.startswith("default"):
        options = dataclasses.replace(options, memory_bytes=min(options.memory_bytes, _MEMORY_DEFAULT_MOST))
    return staging, options


def folder_path(folder: str) -> str:
    """The path of a folder of this machine.

    Raises:
        OptionError: It is none.
    """
    if scheme_of(folder) != "file":
        raise OptionError(f"{scrub_uri(folder)} is no folder of this machine: files are staged into one")
    # Imported here: `import streamload` brings no source in.
    from streamload.sources.local import path_of

    return path_of(folder)


def process_began_s() -> float | None:
    """When this process began, by `time.monotonic`; None where the system does not tell. Source: proc(5)."""
    try:
        with open("/proc/self/stat", encoding="utf-8", errors="replace") as file:
            # The program's name stands in parentheses, and may hold anything.
            ticks = int(file.read().rpartition(")")[2].split()[19])
        ago_s = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError):
        return None
    return time.monotonic() - ago_s


def _peak_rss_bytes() -> int | None:
    """Not that of getrusage, which counts what the process was before it became this program. Source: proc(5)."""
    try:
        with open("/proc/self/status", encoding="utf-8", errors="replace") as file:
            return next((int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM:")), None)
    except OSError:
        return None
