"""Brings the files of one version onto a volume: the part that the init hook and whoever serves files share.

::

    list ─► what of it is there already? ─► lock ─► what did a killed process leave? ─► room? ─► pieces
                                                                                                   │
    read, summed up on the way (pipeline/fetch.py) ◄── workers, each with memory for one piece ◄───┘
      │
      ▼  compared where a stretch is complete (checks.py)
    written in place, noted in the journal ─► the last piece of a file: fsync, rename ─► READY

All of it runs on one event loop, in one TaskGroup; what blocks is called on daemon threads.
"""

from __future__ import annotations

import asyncio
import logging
import mmap
import os
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from types import TracebackType
from typing import Self

from streamload.errors import CredentialsError, NotFoundError, SourceError, StreamloadError, TransientError
from streamload.options import LoadOptions
from streamload.pipeline.budget import Budget
from streamload.pipeline.concurrency import ConcurrencyTuner
from streamload.pipeline.discover import ask_checksums, ask_sha256s
from streamload.pipeline.fetch import Fetcher
from streamload.pipeline.hedge import Hedger
from streamload.pipeline.manifests import find_manifests
from streamload.pipeline.pace import Pace
from streamload.planning import effective_reads
from streamload.report import Recorder
from streamload.sources import Source, SourceObject, open_source
from streamload.stage import cache
from streamload.stage.calls import BlockingCalls
from streamload.stage.checks import Check, check_for
from streamload.stage.conflicts import look
from streamload.stage.files import StagedFile, remove_unfinished
from streamload.stage.journal import Journal, Noted, read_journal
from streamload.stage.listing import FileState, Lister, Listing
from streamload.stage.locks import FileLock
from streamload.stage.names import (
    JOURNAL_NAME,
    LOCK_NAME,
    USE_NAME,
    is_weights,
    unfinished_name,
    version_name,
)
from streamload.stage.options import StageOptions
from streamload.stage.pieces import pieces_of
from streamload.stage.ready import Ready, ReadyFile, is_as_staged, read_ready, remove_ready, write_ready
from streamload.stage.staged import Place, Staged, StagedState
from streamload.stage.volume import check_space, in_memory, sync_folder
from streamload.stage.workers import Workers
from streamload.uris import scrub_uri

__all__ = ["Stager"]

_logger = logging.getLogger("streamload.stage")

# How often one who waits for another process looks whether that is done, or gone.
_LOOK_AGAIN_S = 0.1
# When a log line says so.
_SAY_AFTER_S = 1.0

_PAGE_BYTES = mmap.PAGESIZE

# With 64 MiB, reads of 4 MiB: a sixth less processor time for each byte than with 1 MiB, and a dozen of them fill a
# link of 10 Gbit/s at 100 MiB/s each.
_READS_IN_MEMORY = 16
_LEAST_READ_BYTES = 1 << 20

# What is cancelled waits so long for a thread of the source that does not return: SIGTERM ends a container's process
# within two seconds, or so it is promised.
_GRACE_S = 1.0

_SWITCHED_OFF = "verify is off"


class Stager:
    """Stages what a URI names into a folder; an async context manager, used on one event loop.

    `run` does all of it. Meanwhile others on the same loop may ask what has landed, wait for a range, and have it
    brought first. Interrupted anywhere, by SIGKILL too, another run goes on from what has landed.

    Args:
        uri: As for `streamload.open`; a folder, or one file.
        folder: Where to: a folder of this machine. With a cache, a link to a version in it; None: no link.
        options: What to stage.
        reading: How to read; ``memory_bytes`` is filled in.

    Attributes:
        uri: The URI without credentials.
        folder: Where the files are, or will be; in a cache, known when they are listed.
        recorder: Counts.

    Raises:
        OptionError: Nothing serves the URI, or there is nowhere to stage to.
    """

    def __init__(self, uri: str, folder: str | None, options: StageOptions, reading: LoadOptions) -> None:
        assert reading.memory_bytes is not None
        # What a relative path means depends on where a process runs.
        self.uri = os.path.abspath(uri) if "://" not in uri else scrub_uri(uri)
        self.folder = folder or ""
        self._link = folder if options.cache is not None else None
        self._options = options
        self._reading = reading
        self._memory_bytes = reading.memory_bytes
        number = None if reading.concurrency == "auto" else reading.concurrency
        of_source = {"s3_settings": options.s3, "grace_s": _GRACE_S, **reading.for_source()}
        self.source: Source = open_source(uri, source=reading.source, concurrency=number, **of_source)
        self.recorder = Recorder(self.uri, "none", self._memory_bytes, on_event=reading.on_event)
        self.recorder.source = self.source.scheme
        self.recorder.count_requests(lambda: self.source.requests)
        if reading.read_bytes is None and self.source.most_concurrency is not None:
            # Longer than a load's of so little memory: nothing waits for what arrives but the volume, so that fewer
            # reads at once do, and each costs processor time.
            read_bytes = max(_LEAST_READ_BYTES, self._memory_bytes // _READS_IN_MEMORY)
            reading = replace(reading, read_bytes=min(self.source.read_bytes, read_bytes))
        self._read_bytes, begin, most = effective_reads(self.source, reading)
        # Every other write is of whole pages.
        self._read_bytes = max(_PAGE_BYTES, self._read_bytes - self._read_bytes % _PAGE_BYTES)
        # A quarter of the memory is for late reads that are asked for again.
        room = max(1, 3 * self._memory_bytes // (4 * self._read_bytes))
        self._tuner = ConcurrencyTuner(min(begin, room), most=min(most, room))
        pace = None if reading.max_bytes_per_s is None else Pace(reading.max_bytes_per_s)
        self._budget = Budget(self._memory_bytes)
        hedger = Hedger(self.source, self._budget, self.recorder, pace=pace) if self.source.hedged else None
        self._fetcher = Fetcher(self.source, self.recorder, pace=pace, hedger=hedger, refused=self._tuner.refused)
        self._lister = Lister(self.uri, self._fetcher, options)
        self._calls = BlockingCalls(self.folder)
        self._files: dict[str, FileState] = {}
        self._listed = asyncio.Event()
        self._failure: BaseException | None = None
        self._journal: Journal | None = None
        self._locks: list[FileLock] = []  # all that there are, held or not
        self._use: FileLock | None = None
        self._workers: Workers | None = None
        self._wanted: list[tuple[str, int, int]] = []  # before there were pieces
        self._phases: dict[str, float] = {}
        self._phase_began = self.recorder.now()
        self._memory = False
        self._asked_at_s: float | None = None

    async def __aenter__(self) -> Self:
        await self.source.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def settle(self) -> None:
        """All is staged, and will only be read: end the source and the threads, and keep the lock on what is used."""
        await self.source.aclose()
        await self._calls.aclose()

    async def aclose(self) -> None:
        """End everything: the source, the threads, the locks. May be called twice."""
        try:
            await self.source.aclose()
        finally:
            if await self._calls.aclose():
                self._let_go()
            else:
                # Something may still write: the next one who stages here waits until that has returned.
                self._calls.ended.add_done_callback(lambda _: self._let_go())

    def _let_go(self) -> None:
        """No thread of ours writes any more. On the loop, or on the last of those threads."""
        self._close_files()
        for lock in self._locks:
            lock.release()

    def _close_files(self) -> None:
        journal, self._journal = self._journal, None
        if journal is not None:
            journal.close()
        for file in self._files.values():
            if file.staged is not None:
                file.staged.close()

    # What has landed, for who reads meanwhile.

    async def objects(self) -> dict[str, SourceObject]:
        """What is staged, by its key; waits until it is listed.

        Raises:
            StreamloadError: It cannot be listed.
        """
        await self._listed.wait()
        if self._failure is not None and not self._files:
            raise self._failure.with_traceback(None)
        return {key: file.object for key, file in self._files.items()}

    def identity(self, key: str) -> str:
        """What tells this version of a file from all others, on every volume that it is staged onto."""
        return self._files[key].identity

    def landed(self, key: str, start: int, end: int) -> bool:
        """Whether a range of a file is in its place; verified as far as its stretches are complete."""
        file = self._files[key]
        return file.ready is not None or file.landed.cover(start, end)

    def is_whole(self, key: str) -> bool:
        """Whether all of a file is there, verified as far as its source allows."""
        return self._files[key].ready is not None

    def place(self, key: str, start: int, end: int) -> Place:
        """Where a range that has landed can be read now."""
        file = self._files[key]
        if file.ready is not None:
            path = os.path.join(self.folder, key)
            # A file that was staged before there were stamps was whole before anybody read it.
            stamp = file.ready.stamps[-1] if file.ready.stamps else ""
            return Place(path, stamp, (0, file.object.size_bytes), file.ready.mtime_ns, file.ready.verified)
        around = file.landed.around(start, end)
        assert around is not None
        return Place(os.path.join(self.folder, unfinished_name(key)), file.stamps[-1], around)

    def knows(self, key: str, stamp: str) -> bool:
        """Whether nothing of a file was replaced since somebody was told this stamp."""
        file = self._files[key]
        stamps = file.stamps if file.ready is None else file.ready.stamps
        return stamp in stamps or (not stamp and not stamps)

    def want(self, key: str, start: int, end: int) -> None:
        """Have a range brought before everything that nobody has asked for."""
        if self._workers is None:
            self._wanted.append((key, start, end))
        else:
            self._workers.want(self._files[key], start, end)

    async def wait(self, key: str, start: int, end: int) -> None:
        """Wait until a range has landed.

        Raises:
            StreamloadError: It never will: staging has failed.
        """
        file = self._files[key]
        if not self.landed(key, start, end):
            waiter = (start, end, self._promise())
            file.waiters.append(waiter)
            try:
                await waiter[2]
            finally:
                # Where it has landed, it is gone from there already; else the one who waited has left.
                if waiter in file.waiters:
                    file.waiters.remove(waiter)

    async def whole(self, key: str) -> None:
        """Wait until a file is whole, verified as far as its source allows, and under its name.

        Raises:
            StreamloadError: It never will be: staging has failed, or what came is not what it should be.
        """
        file = self._files[key]
        if file.ready is None:
            future = self._promise()
            file.wholly.append(future)
            try:
                await future
            finally:
                file.wholly.remove(future)

    def _promise(self) -> asyncio.Future[None]:
        """What is done when what somebody waits for is there.

        Raises:
            StreamloadError: It never will be.
        """
        if self._failure is not None:
            # Each time it is raised it would hold on to the frames of one who asks more.
            raise self._failure.with_traceback(None)
        return asyncio.get_running_loop().create_future()

    def stop(self) -> bool:
        """Begin no more reads, so that `run` fails once those that are under way have landed.

        Returns:
            Whether there are any; else it is to be cancelled.
        """
        if self._workers is None or self._workers.stopped:
            return False
        self._workers.stopped = True
        return True

    def fail(self, error: BaseException) -> None:
        """Nothing more will land: whoever waits is told why.

        Args:
            error: What is told; of one that is not ours, only that staging was ended.
        """
        self._failure = error if isinstance(error, StreamloadError) else SourceError("staging was ended", uri=self.uri)
        self._listed.set()
        for file in self._files.values():
            for future in [*file.wholly, *(waiter[2] for waiter in file.waiters)]:
                if not future.done():
                    future.set_exception(self._failure)

    # Staging.

    async def run(self) -> Staged:
        """Stage everything; once.

        Where it fails, whoever waits is told; where it is cancelled, who cancels it knows why, and says so by `fail`.

        Raises:
            StreamloadError: It could not be done; what has landed is kept for the next run.
        """
        try:
            return await self._run()
        except BaseException as error:
            # Of a TaskGroup's children, the one that failed first.
            first: BaseException = error
            while isinstance(first, BaseExceptionGroup):
                first = first.exceptions[0]
            if not isinstance(first, asyncio.CancelledError):
                self.fail(first)
            if isinstance(first, StreamloadError):
                raise first.locate(uri=self.uri) from first.__cause__
            raise
        finally:
            if not self._calls.hanging:
                self._close_files()

    async def _run(self) -> Staged:
        listing = await self._list()
        if listing is None:
            return await self._present_offline()
        if self._options.cache is not None:
            self._move_to(cache.version_folder(self._options.cache, self.uri, listing.digest))
            self._use = await self._hold(USE_NAME, shared=True)
            await self._calls.run(self._use.touch)
        ready = await self._calls.run(lambda: read_ready(self.folder))
        if not await self._is_present(ready, listing):
            lock_began = self.recorder.now()
            lock = await self._hold(LOCK_NAME)
            if self.recorder.now() - lock_began > _SAY_AFTER_S:
                # What the other one has staged may be newer than what was listed before.
                again = await self._list()
                if again is not None and self._options.cache is None:
                    listing = again
            self._phase("wait")
            ready = await self._calls.run(lambda: read_ready(self.folder))
            if not await self._is_present(ready, listing):
                await self._stage(listing, ready, lock)
                await self._link_to_version()
                # Who serves the files keeps this open, and others find all there from now on.
                lock.release()
                return self._staged("staged")
            lock.release()
        self._adopt(listing, {file.key: file for file in ready.files} if ready is not None else {})
        self._phase("check")
        await self._link_to_version()
        return self._staged("present")

    async def _list(self) -> Listing | None:
        """List what there is to stage; None where the source is not to be asked, or may be out of reach and is."""
        if self._options.offline == "only":
            return None
        try:
            said = await self._calls.run(lambda: read_ready(self.folder)) if self.folder else None
            if self._asked_at_s is None:
                self._asked_at_s = time.monotonic()
            return await self._lister.ask(said)
        except (TransientError, CredentialsError) as error:
            if self._options.offline == "no":
                raise
            _logger.warning("%s cannot be reached, a complete copy counts: %s", self.uri, error)
            return None
        finally:
            self._phase("list")

    async def _is_present(self, ready: Ready | None, listing: Listing) -> bool:
        """Whether a marker vouches for all of this version, and the files are as it says."""
        if ready is None or ready.digest != listing.digest:
            return False
        return await self._calls.run(lambda: all(self._counts(file) for file in ready.files))

    def _counts(self, file: ReadyFile) -> bool:
        """Whether a file need not be read again: it is as it was staged, and compared where that is required."""
        compared = file.verified is not None or not file.size_bytes or not is_weights(file.key)
        return (compared or self._reading.verify != "require") and is_as_staged(self.folder, file)

    async def _present_offline(self) -> Staged:
        """What a marker vouches for, without having asked the source.

        Raises:
            NotFoundError: There is no complete copy.
        """
        folders = [self.folder]
        if self._options.cache is not None:
            parent = os.path.join(self._options.cache, version_name(self.uri))
            versions = await self._calls.run(lambda: cache.cached_versions(self._options.cache or ""))
            folders = [version.path for version in reversed(versions) if os.path.dirname(version.path) == parent]
        for folder in folders:
            self._move_to(folder)
            if self._options.cache is not None:
                self._use = await self._hold(USE_NAME, shared=True)
                await self._calls.run(self._use.touch)
            ready = await self._calls.run(lambda: read_ready(self.folder))
            if ready is not None and await self._calls.run(lambda: self._vouches(ready)):  # noqa: B023
                files = {
                    file.key: FileState(SourceObject(file.key, file.size_bytes, ""), file.identity)
                    for file in ready.files
                }
                listing = Listing(files, {}, ready.digest, ready.index, ready.shards)
                self._adopt(listing, {file.key: file for file in ready.files})
                self._phase("check")
                await self._link_to_version()
                return self._staged("present")
            if self._use is not None:
                self._use.release()
        raise NotFoundError("there is no complete copy of it, and the source was not asked", uri=self.uri)

    def _vouches(self, ready: Ready) -> bool:
        options = self._options
        same = (ready.uri, ready.include, ready.exclude) == (self.uri, options.include, options.exclude)
        return same and all(self._counts(file) for file in ready.files)

    def _adopt(self, listing: Listing, there: dict[str, ReadyFile]) -> None:
        """It is known what there is, and which files are whole."""
        self._files = listing.files
        for key, file in listing.files.items():
            ready = there.get(key)
            if ready is not None and ready.identity == file.identity:
                file.ready = ready
                self.recorder.arrived_bytes += file.object.size_bytes
        recorder = self.recorder
        recorder.planned(len(self._files), 0, sum(file.object.size_bytes for file in self._files.values()))
        self._listed.set()

    async def _hold(self, name: str, *, shared: bool = False) -> FileLock:
        """Take a lock in the folder; wait for who has it, and find it free where that one has died."""
        lock = self._lock_on(os.path.join(self.folder, name))

        def take() -> bool:
            os.makedirs(self.folder, exist_ok=True)
            # Between the two calls the folder may have been removed from its cache.
            with suppress(FileNotFoundError):
                return lock.take(shared=shared)
            return False

        await self._take(take, self.folder)
        return lock

    def _lock_on(self, path: str) -> FileLock:
        """A lock that is released in the end, also where a thread gets it for one who was cancelled meanwhile."""
        lock = FileLock(path)
        self._locks.append(lock)
        return lock

    async def _take(self, take: Callable[[], bool], where: str) -> None:
        """Try until it works. A lock cannot be waited for on an event loop, and this can be cancelled."""
        began, said = self.recorder.now(), False
        while not await self._calls.run(take):
            if not said and self.recorder.now() - began > _SAY_AFTER_S:
                said = True
                _logger.info("%s: another process is at work there; waiting for it", where)
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def _stage(self, listing: Listing, ready: Ready | None, lock: FileLock) -> None:
        if self._options.cache is None and await self._calls.run(lambda: cache.is_version(self.folder)):
            raise SourceError(
                f"{self.folder} is a version in a cache, which others may use: stage with that cache, or elsewhere"
            )
        noted = await self._calls.run(lambda: read_journal(self.folder))
        known = dict(noted.whole)
        known |= {file.key: file for file in ready.files} if ready is not None else {}
        replaced = self._options.on_conflict == "replace"
        there = await self._calls.run(lambda: look(self.folder, listing, known, counts=self._counts, replace=replaced))
        self._adopt(listing, there)
        files = [file for file in listing.files.values() if file.ready is None]
        await self._find_checks(files, listing.listed)
        self._memory = await self._calls.run(lambda: in_memory(self.folder))
        await self._calls.run(lambda: remove_unfinished(self.folder, but=[file.object.key for file in files]))
        await self._make_room(files)
        await self._calls.run(lambda: self._begin(files, noted, known))
        kept = self.recorder.arrived_bytes
        _logger.info(
            "%s: staging %d files into %s, %d of %d bytes are there",
            self.uri,
            len(self._files),
            self.folder,
            kept,
            self.recorder.total_bytes,
            extra={"fields": {"files": len(self._files), "kept_bytes": kept, "total_bytes": self.recorder.total_bytes}},
        )
        self._phase("check")
        assert self._journal is not None
        self._workers = Workers(
            self._fetcher,
            self.recorder,
            budget=self._budget,
            tuner=self._tuner,
            calls=self._calls,
            journal=self._journal,
            read_bytes=self._read_bytes,
        )
        for key, start, end in self._wanted:
            self._workers.want(self._files[key], start, end)
        await self._workers.bring(files)
        if any(file.ready is None for file in files):
            # Stopped; or a task has ended as cancelled, which ends a TaskGroup's block without an error.
            raise SourceError("staging was stopped; what has landed is kept")
        self._phase("read")
        await self.source.conclude()
        await self._calls.run(lambda: self._conclude(listing, known, lock))
        self._phase("finish")

    async def _find_checks(self, files: list[FileState], listed: dict[str, SourceObject]) -> None:
        """Find out what the files have to sum up to."""
        if self._reading.verify == "off":
            for file in files:
                file.check = Check(file.object, reason=_SWITCHED_OFF)
            return
        verify = self._reading.verify
        wanted = [file.object for file in files]
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(ask_checksums(self._fetcher, wanted, self._tuner.most))
            weights = [object.key for object in wanted if object.key.endswith(".safetensors")]
            finding = group.create_task(find_manifests(self._fetcher, self.recorder, listed, weights))
        kept, said = asking.result(), finding.result()
        # A CRC is summed up as the bytes land; a SHA-256 only in the end, from the volume.
        unsummed = [each for each in wanted if isinstance(kept[each.key], str) and each.key not in said]
        digested = wanted if verify == "sha256" else unsummed
        sha256s = await ask_sha256s(self._fetcher, digested, self._tuner.most) if digested else {}
        for file in files:
            key = file.object.key
            required = verify == "require" and is_weights(key)
            file.check = check_for(file.object, said.get(key), kept[key], sha256s.get(key), required=required)

    async def _make_room(self, files: list[FileState]) -> None:
        """See that there is room before the first byte.

        Raises:
            SourceError: There is none.
        """
        options = self._options
        needed = await self._calls.run(lambda: sum(self._needed(file) for file in files))
        if options.cache is not None and options.keep_bytes is not None:
            keep_bytes = options.keep_bytes
            lock = self._lock_on(os.path.join(options.cache, cache.CACHE_LOCK_NAME))
            await self._take(lock.take, options.cache)
            try:
                await self._calls.run(
                    lambda: cache.evict(
                        options.cache or "",
                        keep_bytes=keep_bytes,
                        keep_s=options.keep_s,
                        needed_bytes=needed,
                        now_s=time.time(),
                        spare=lambda path: path == self.folder,
                    )
                )
            finally:
                lock.release()
        await self._calls.run(lambda: check_space(self.folder, needed, memory_bytes=self._memory_bytes))

    def _needed(self, file: FileState) -> int:
        """How much room a file takes beyond what it has."""
        with suppress(OSError):
            status = os.lstat(os.path.join(self.folder, unfinished_name(file.object.key)))
            return max(0, file.object.size_bytes - status.st_blocks * 512)
        return file.object.size_bytes

    def _begin(self, files: list[FileState], noted: Noted, known: dict[str, ReadyFile]) -> None:
        """On a thread: open the unfinished files and the journal; nothing is whole from here on."""
        self._journal = Journal(self.folder)
        # What only the marker has said until now: who goes on from here must know these files for ours.
        kept = [file for key, file in known.items() if file != noted.whole.get(key) and is_as_staged(self.folder, file)]
        if kept:
            self._journal.vouch(kept)
            sync_folder(self.folder)
        remove_ready(self.folder)
        # Their unfinished files are gone. Another version's may lie there when this one is staged again.
        for gone in noted.landed.keys() - {file.identity for file in files}:
            self._journal.forget(gone, 0, sys.maxsize)
        for file in files:
            pieces = noted.landed.get(file.identity, [])
            assert file.check is not None
            same = [piece for piece in pieces if piece.algorithm == file.check.algorithm]
            size = file.object.size_bytes
            staged = StagedFile(self.folder, file.object.key, size, memory=self._memory)
            if not staged.open(keep=bool(same)):
                self._journal.forget(file.identity, 0, size)
                same = []
            file.staged = staged
            stamp = secrets.token_hex(8)
            self._journal.stamp(file.identity, stamp)
            file.stamps = [*(noted.stamps.get(file.identity, []) if same else []), stamp]
            cut = pieces_of(size, same, piece_bytes=self._read_bytes)
            file.pending = {piece.start: piece for piece in cut}
            file.missing = len(file.pending)

    def _conclude(self, listing: Listing, known: dict[str, ReadyFile], lock: FileLock) -> None:
        """On a thread: remove what an older version had beyond this one, and write the marker.

        Raises:
            SourceError: The files are not what was staged.
        """
        files = [file.ready for file in self._files.values() if file.ready is not None]
        if not lock.counts:
            raise SourceError("the lock on this folder was removed meanwhile; nothing is marked as whole")
        for file in files:
            if not is_as_staged(self.folder, file):
                raise SourceError("this was changed or removed since it was staged, a moment ago", object=file.key)
        for key, said in known.items():
            if key not in self._files and is_as_staged(self.folder, said):
                os.unlink(os.path.join(self.folder, key))
        write_ready(
            self.folder,
            Ready(
                uri=self.uri,
                digest=listing.digest,
                include=self._options.include,
                exclude=self._options.exclude,
                files=tuple(files),
                index=listing.index,
                shards=listing.shards,
            ),
        )
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self.folder, JOURNAL_NAME))

    async def _link_to_version(self) -> None:
        """With a cache: the version is in use from now on, and the folder is a link to it."""
        if self._use is not None:
            await self._calls.run(self._use.touch)
        if self._link is not None:
            link = self._link
            await self._calls.run(lambda: cache.link_to(link, os.path.abspath(self.folder)))

    def _move_to(self, folder: str) -> None:
        """It is known where in the cache the version lies."""
        self.folder = self._calls.folder = folder

    def _phase(self, name: str) -> None:
        now = self.recorder.now()
        self._phases[name] = self._phases.get(name, 0.0) + now - self._phase_began
        self._phase_began = now

    def _staged(self, state: StagedState) -> Staged:
        report = self.recorder.report()
        nbytes = sum(file.object.size_bytes for file in self._files.values())
        landed_bytes = 0 if self._workers is None else self._workers.landed_bytes
        return Staged(
            uri=self.uri,
            folder=self.folder,
            state=state,
            files=len(self._files),
            nbytes=nbytes,
            fetched_bytes=landed_bytes,
            kept_bytes=nbytes - landed_bytes,
            requests=report.requests,
            retries=report.retries,
            hedged_bytes=report.hedged_bytes,
            concurrency=report.concurrency,
            seconds=report.seconds,
            phases=dict(self._phases),
            verified=report.verified,
            unverified=report.unverified,
            asked_at_s=self._asked_at_s if self.source.asked_at_s is None else self.source.asked_at_s,
        )
