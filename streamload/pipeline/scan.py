"""Reads whole objects within a memory limit, only to sum up their bytes."""

from __future__ import annotations

import asyncio
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice

from streamload.checksums import Algorithm, PartialChecksum, RunningChecksum
from streamload.errors import StreamloadError
from streamload.loan import Loan
from streamload.pipeline.fetch import Fetcher
from streamload.report import Recorder
from streamload.sources.base import SourceObject

__all__ = ["Scan", "scan"]


class Scan:
    """One object, and the stretches of it that are summed up.

    Args:
        object: The object.
        algorithm: How its stretches are summed up.
        ends: Where they end, in ascending order, none of them empty; the first one begins at the object's first byte.

    Attributes:
        values: What each stretch sums up to; None where it has not come.
        error: Why the rest of them has not, where that is so.
    """

    def __init__(self, object: SourceObject, algorithm: Algorithm, ends: Sequence[int]) -> None:
        self.object = object
        self.algorithm: Algorithm = algorithm
        self.ends = ends
        self.values: list[int | None] = [None] * len(ends)
        self.error: StreamloadError | None = None
        self._begun: dict[int, PartialChecksum] = {}

    @property
    def nbytes(self) -> int:
        """How many bytes are summed up."""
        return self.ends[-1] if self.ends else 0

    def running(self, start: int) -> RunningChecksum:
        """What sums up a read that begins at `start`."""
        ends = islice(self.ends, bisect_right(self.ends, start), None)
        return RunningChecksum(self.algorithm, (end - start for end in ends))

    def add(self, start: int, sums: Iterable[tuple[int, int]]) -> None:
        """Take a read's sums."""
        for nbytes, value in sums:
            number = bisect_right(self.ends, start)
            began = self.ends[number - 1] if number else 0
            stretch = self._begun.get(number)
            if stretch is None:
                stretch = self._begun[number] = PartialChecksum(self.algorithm, self.ends[number] - began)
            stretch.add_sum(start - began, nbytes, value)
            if stretch.complete:
                self.values[number] = stretch.result().value
                del self._begun[number]
            start += nbytes


async def scan(
    fetcher: Fetcher,
    recorder: Recorder,
    scans: Sequence[Scan],
    *,
    read_bytes: int,
    concurrency: int,
    progressed: Callable[[int], object] = lambda nbytes: None,
) -> None:
    """Read everything and sum it up. An object that cannot be read has an `error`, and does not end the others.

    Args:
        fetcher: Reads, with retries.
        recorder: Told how many bytes were read.
        scans: What to read; the sums are put there.
        read_bytes: How large a read is.
        concurrency: How many there are at once, each with memory of that size.
        progressed: Told of the length of each read that has ended.
    """
    todo = _slices(scans, read_bytes)
    reads = sum(-(-each.nbytes // read_bytes) for each in scans)

    async def work(lane: str) -> None:
        memory = memoryview(bytearray(read_bytes))
        for each, start, end in todo:
            if each.error is not None:
                continue
            loan = Loan([memory[: end - start]])
            loan.checksum = each.running(start)
            try:
                await fetcher.read(each.object, start, end, loan, lane)
            except StreamloadError as error:
                each.error = error
                if loan.quarantined:
                    memory = memoryview(bytearray(read_bytes))
                continue
            running = loan.checksum
            if running is None or running.nbytes != loan.nbytes:
                running = each.running(start)
                running.add(loan.views[0])
            each.add(start, running.sums())
            recorder.fetched_bytes += end - start
            progressed(end - start)

    async with asyncio.TaskGroup() as group:
        for number in range(min(concurrency, reads)):
            group.create_task(work(f"worker {number}"))


def _slices(scans: Iterable[Scan], read_bytes: int) -> Iterator[tuple[Scan, int, int]]:
    for each in scans:
        for start in range(0, each.nbytes, read_bytes):
            yield each, start, min(start + read_bytes, each.nbytes)
