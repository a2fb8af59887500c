"""Brings pieces: read, summed up, compared, written, noted; and files: made durable, and named."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import mmap
from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from streamload.checksums import Algorithm, Sha256, combined
from streamload.errors import ChecksumError, SourceError, StreamloadError
from streamload.loan import Loan
from streamload.pipeline.budget import Budget
from streamload.pipeline.concurrency import ConcurrencyTuner
from streamload.pipeline.fetch import Fetcher
from streamload.report import Recorder
from streamload.stage.calls import BlockingCalls
from streamload.stage.checks import Check
from streamload.stage.files import StagedFile
from streamload.stage.journal import Journal, Landed
from streamload.stage.listing import FileState
from streamload.stage.pieces import Piece
from streamload.stage.ready import ReadyFile

__all__ = ["Workers"]

_logger = logging.getLogger("streamload.stage")


class Workers:
    """As many workers as reads may be in flight, each with memory for one piece.

    Args:
        fetcher: Reads, with retries.
        recorder: Told of it.
        budget: Where the credit for the memory comes from.
        tuner: Says how many reads are in flight at most.
        calls: Makes the calls that block.
        journal: Where pieces are noted.
        read_bytes: How large a read is.

    Attributes:
        landed_bytes: How many bytes were read from the source.
        stopped: Set to begin no more pieces; `bring` returns when those that are under way have landed.
    """

    def __init__(
        self,
        fetcher: Fetcher,
        recorder: Recorder,
        *,
        budget: Budget,
        tuner: ConcurrencyTuner,
        calls: BlockingCalls,
        journal: Journal,
        read_bytes: int,
    ) -> None:
        self._fetcher = fetcher
        self._recorder = recorder
        self._budget = budget
        self._tuner = tuner
        self._calls = calls
        self._journal = journal
        self._read_bytes = read_bytes
        self._files: dict[str, FileState] = {}
        self._urgent: dict[tuple[str, int], Piece] = {}
        self._workers = 0
        self._buffers: list[memoryview] = []
        self.landed_bytes = 0
        self.stopped = False

    def want(self, file: FileState, start: int, end: int) -> None:
        """Have a range brought before everything that nobody has asked for."""
        for at in [at for at, piece in file.pending.items() if piece.start < end and start < piece.end]:
            self._urgent[file.object.key, at] = file.pending.pop(at)

    async def bring(self, files: Sequence[FileState]) -> None:
        """Bring all pieces of files that are open and cut, and give each file its name when it is whole.

        Raises:
            BaseExceptionGroup: The TaskGroup's, the first error first.
        """
        self._files = {file.object.key: file for file in files}
        self._recorder.start("read")
        try:
            async with asyncio.TaskGroup() as group:
                for file in files:
                    if not file.missing:
                        group.create_task(self._finish(file))
                self._tuner.begin(self._recorder.now(), 0)
                self._staff(group)
        finally:
            self._recorder.stop("read")
            # Who serves the files keeps this for as long, and needs no memory for that.
            self._buffers.clear()

    def _staff(self, group: asyncio.TaskGroup) -> None:
        """Have as many workers as reads may be in flight; those who are too many leave by themselves."""
        self._recorder.reading(self._tuner.target)
        left = len(self._urgent) + sum(len(file.pending) for file in self._files.values())
        while self._workers < self._tuner.target and left > 0 and not self.stopped:
            self._workers += 1
            left -= 1
            group.create_task(self._work(group, f"worker {self._workers}"))

    async def _work(self, group: asyncio.TaskGroup, lane: str) -> None:
        await self._budget.acquire(self._read_bytes)
        self._recorder.peak_staged_bytes = self._budget.peak_bytes
        memory = self._buffers.pop() if self._buffers else memoryview(mmap.mmap(-1, self._read_bytes))
        while self._workers <= self._tuner.target and (found := self._next()) is not None:
            file, piece = found
            await self._land(file, piece, memory, lane)
            file.missing -= 1
            if not file.missing:
                group.create_task(self._finish(file))
            self._staff(group)
        self._workers -= 1
        self._buffers.append(memory)
        self._budget.give_back(self._read_bytes)

    def _next(self) -> tuple[FileState, Piece] | None:
        """What to bring next: what somebody waits for, then the files in their order."""
        if self.stopped:
            return None
        if self._urgent:
            key, at = next(iter(self._urgent))
            return self._files[key], self._urgent.pop((key, at))
        for key in self._files:
            pending = self._files[key].pending
            if pending:
                return self._files[key], pending.pop(next(iter(pending)))
        return None

    async def _land(self, file: FileState, piece: Piece, memory: memoryview, lane: str) -> None:
        """Have one piece in its place, summed up and noted."""
        assert file.check is not None
        assert file.staged is not None
        start, end = piece.start, piece.end
        check, staged = file.check, file.staged
        if piece.noted is not None and (sums := await self._calls.run(lambda: _sums_of(staged, check, piece, memory))):
            await self._compare(file, start, sums)
        else:
            if piece.noted is not None:
                # Who has read it under another process may have read what is replaced now.
                await self._calls.run(lambda: self._begin_anew(file, start, end))
            # What is noted and wrong may be longer than what is read at once now.
            for at in range(start, end, memory.nbytes):
                await self._fetch(file, at, min(end, at + memory.nbytes), memory, lane)
        self._note_landed(file, start, end)

    async def _fetch(self, file: FileState, start: int, end: int, memory: memoryview, lane: str) -> None:
        """Read a range from the source into its place."""
        assert file.check is not None
        check, view = file.check, memory[: end - start]
        loan = Loan([view])
        loan.checksum = check.running(start)
        began_s = self._recorder.now()
        await self._fetcher.read(file.object, start, end, loan, lane)
        self._recorder.reads += 1
        self._recorder.fetched_bytes += end - start
        self.landed_bytes += end - start
        self._recorder.event("read", lane, began_s, object=file.object.key, start=start, end=end, nbytes=end - start)
        self._tuner.read_ended(self._recorder.now(), self.landed_bytes)
        running = loan.checksum
        if running is None or running.nbytes != loan.nbytes:
            running = check.running(start)
            running.add(view)
        sums = running.sums()
        await self._compare(file, start, sums)
        await self._calls.run(lambda: self._put(file, start, view, sums), file.object.key)

    def _note_landed(self, file: FileState, start: int, end: int) -> None:
        file.landed.add(start, end)
        self._recorder.arrived_bytes += end - start
        for waiter in [waiter for waiter in file.waiters if file.landed.cover(waiter[0], waiter[1])]:
            file.waiters.remove(waiter)
            if not waiter[2].done():
                waiter[2].set_result(None)

    def _begin_anew(self, file: FileState, start: int, end: int) -> None:
        """On a thread: what was noted of a range does not count, nor what readers knew the file by."""
        self._journal.forget(file.identity, start, end)
        self._journal.stamp(file.identity, file.stamps[-1])
        del file.stamps[:-1]

    async def _compare(self, file: FileState, start: int, sums: list[tuple[int, int]]) -> None:
        assert file.check is not None
        try:
            file.check.add(start, sums)
        except StreamloadError as error:
            # Some of the stretch may be noted as landed, and any of it may be what is wrong.
            await self._forget(file, error.start or 0, error.end or file.object.size_bytes)
            raise

    async def _forget(self, file: FileState, start: int, end: int) -> None:
        """What is noted of a range is wrong."""
        # Where that cannot be noted, the next run finds out once more; the error that counts is what was wrong.
        with suppress(SourceError):
            await self._calls.run(lambda: self._journal.forget(file.identity, start, end), file.object.key)

    def _put(self, file: FileState, start: int, view: memoryview, sums: list[tuple[int, int]]) -> None:
        """On a thread: write a piece, then note it."""
        assert file.staged is not None
        assert file.check is not None
        file.staged.write(view, start)
        algorithm = file.check.algorithm
        self._journal.landed(file.identity, Landed(algorithm, start, view.nbytes, _combined(algorithm, sums)))

    async def _finish(self, file: FileState) -> None:
        """All of a file has landed: make it durable and give it its name."""
        assert file.check is not None
        check = file.check
        whole = str(check.whole())
        if check.sha256 is not None:
            await self._compare_sha256(file, check.sha256)
        file.ready = await self._calls.run(lambda: self._publish(file, whole), file.object.key)
        if check.by is not None:
            self._recorder.verified(file.object.size_bytes, _what(check.by))
        elif check.reason is not None:
            self._recorder.unverified(file.object.size_bytes, check.reason)
        _logger.info(
            "%s: %s is whole, %d bytes",
            self._recorder.uri,
            file.object.key,
            file.object.size_bytes,
            extra={"fields": {"file": file.object.key, "nbytes": file.object.size_bytes}},
        )
        for future in [*file.wholly, *(waiter[2] for waiter in file.waiters)]:
            if not future.done():
                future.set_result(None)
        # Before the marker vouches for it, but after everybody knows the name: under its old one nobody finds it now.
        assert file.staged is not None
        await self._calls.run(file.staged.sync_name, file.object.key)

    async def _compare_sha256(self, file: FileState, expected: Sha256) -> None:
        """Read a file from the volume in its order, in which it has not come, and compare.

        Raises:
            ChecksumError: It is not what the store says that it is.
        """
        assert file.staged is not None
        staged = file.staged
        await self._budget.acquire(self._read_bytes)
        try:
            memory = memoryview(mmap.mmap(-1, self._read_bytes))
            start = 0
            for end, wanted in zip(expected.ends, expected.digests, strict=True):
                digest, began = hashlib.sha256(), start
                while start < end:
                    # In short calls: what is cancelled waits for the one that is under way.
                    view = memory[: min(memory.nbytes, end - start)]
                    await self._calls.run(partial(_digest, digest, staged, view, start), file.object.key)
                    start += view.nbytes
                if digest.digest() != wanted:
                    await self._forget(file, began, end)
                    raise ChecksumError(
                        f"what was read has the SHA-256 {digest.hexdigest()}, but the store's is {wanted.hex()}",
                        object=file.object.key,
                        start=began,
                        end=end,
                    )
        finally:
            self._budget.give_back(self._read_bytes)

    def _publish(self, file: FileState, whole: str) -> ReadyFile:
        staged, check = file.staged, file.check
        assert staged is not None
        assert check is not None
        try:
            mtime_ns = staged.sync()
        except OSError:
            # The kernel tells of pages that it could not write only once. What it has in memory still would pass for
            # what is on the disk.
            self._journal.forget(file.identity, 0, staged.size_bytes)
            raise
        ready = ReadyFile(
            staged.key,
            file.identity,
            staged.size_bytes,
            mtime_ns,
            whole,
            None if check.by is None else _what(check.by),
            tuple(file.stamps),
        )
        self._journal.whole(ready)
        staged.publish()
        return ready


def _digest(digest: hashlib._Hash, file: StagedFile, view: memoryview, start: int) -> None:
    """On a thread: sum up a piece, from the volume."""
    if not file.read(view, start):
        raise SourceError("the unfinished file was truncated")
    digest.update(view)


def _sums_of(file: StagedFile, check: Check, piece: Piece, memory: memoryview) -> list[tuple[int, int]]:
    """On a thread: the sums of a piece that a journal notes; none where its bytes are not what the journal says."""
    assert piece.noted is not None
    running = check.running(piece.start)
    for at in range(piece.start, piece.end, memory.nbytes):
        view = memory[: min(memory.nbytes, piece.end - at)]
        if not file.read(view, at):
            return []
        running.add(view)
    sums = running.sums()
    return sums if _combined(check.algorithm, sums) == piece.noted.value else []


def _combined(algorithm: Algorithm, sums: list[tuple[int, int]]) -> int:
    return combined(algorithm, sums).value


def _what(by: str) -> str:
    return by.removeprefix("by ").removesuffix(" it")
