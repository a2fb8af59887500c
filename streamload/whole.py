"""Reading all of a checkpoint to sum it up: what verifying it and writing its manifest have in common."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

from streamload.checkpoint import ShardFile
from streamload.deadlines import deadline
from streamload.errors import CheckpointError, StreamloadError
from streamload.options import LoadOptions, Options, resolve
from streamload.pipeline.discover import read_header
from streamload.pipeline.engine import run_in_thread
from streamload.pipeline.fetch import Fetcher
from streamload.pipeline.pace import Pace
from streamload.pipeline.scan import Scan, scan
from streamload.planning import effective_reads, source_for
from streamload.progress import watch
from streamload.report import Recorder
from streamload.sources import Source, SourceObject
from streamload.uris import scrub_uri

__all__ = ["WholeRead"]

T = TypeVar("T")

# How many headers are read and parsed at once: parsed, one takes many times its size.
_HEADERS = 4


class WholeRead:
    """Options, a source, and how to read all of it.

    Args:
        uri: As for `streamload.open`.
        options: The fields of `LoadOptions`.

    Attributes:
        name: The URI as it was given.
        options: With ``memory_bytes`` filled in.
        source: Opened by `run`.
        recorder: Counts.
        fetcher: Reads, with retries.
        concurrency: How many reads are in flight.

    Raises:
        OptionError: Bad options, or nothing serves the URI.
    """

    def __init__(self, uri: str, options: Options) -> None:
        self.name = uri
        self.options: LoadOptions = resolve(cast("dict[str, Any]", options))[0]
        assert self.options.memory_bytes is not None
        self.source: Source = source_for(uri, self.options)
        self.recorder = Recorder(scrub_uri(uri), "none", self.options.memory_bytes, on_event=self.options.on_event)
        pace = None if self.options.max_bytes_per_s is None else Pace(self.options.max_bytes_per_s)
        self.fetcher = Fetcher(self.source, self.recorder, pace=pace)
        self._read_bytes, self.concurrency, most = effective_reads(self.source, self.options)
        self._read_bytes = min(self._read_bytes, self.options.memory_bytes)
        self.concurrency = max(1, min(max(self.concurrency, most // 2), self.options.memory_bytes // self._read_bytes))

    def run(self, main: Callable[[], Awaitable[T]]) -> T:
        """Run it on a thread of its own, with the source open, within the deadline.

        Raises:
            StreamloadError: The coroutine's; located.
        """

        async def body() -> T:
            async with (
                self.source,
                watch(self.options.progress, self.recorder),
                deadline(self.options.deadline_s, self._how_far),
            ):
                result = await main()
                await self.source.conclude()
                return result

        try:
            return run_in_thread(body)
        except StreamloadError as error:
            raise error.locate(uri=self.recorder.uri) from error.__cause__

    async def scan(self, scans: Sequence[Scan]) -> None:
        """Read and sum up."""
        recorder = self.recorder
        recorder.planned(len(scans), 0, sum(each.nbytes for each in scans))

        def progressed(nbytes: int) -> None:
            recorder.arrived_bytes += nbytes

        await scan(
            self.fetcher,
            recorder,
            scans,
            read_bytes=self._read_bytes,
            concurrency=self.concurrency,
            progressed=progressed,
        )

    async def headers(self, objects: Iterable[SourceObject]) -> dict[str, ShardFile | StreamloadError]:
        """What the files' headers say, by key, or what is wrong with them."""
        slots = asyncio.Semaphore(_HEADERS)

        async def read(object: SourceObject) -> ShardFile | StreamloadError:
            async with slots:
                try:
                    return (await read_header(self.fetcher, self.recorder, object))[0]
                except CheckpointError as error:
                    return error

        async with asyncio.TaskGroup() as group:
            tasks = {object.key: group.create_task(read(object)) for object in objects}
        return {key: task.result() for key, task in tasks.items()}

    def _how_far(self) -> str:
        return f"{self.recorder.arrived_bytes} of {self.recorder.total_bytes} bytes were read"
