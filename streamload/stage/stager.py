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
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, TypeVar

from streamload.checkpoint import MAX_INDEX_BYTES, choose_index, parse_index
from streamload.errors import (
    CheckpointError,
    CredentialsError,
    IndexFileError,
    NotFoundError,
    SourceError,
    StreamloadError,
    TransientError,
)
from streamload.loan import Loan
from streamload.options import LoadOptions
from streamload.pipeline.budget import Budget
from streamload.pipeline.concurrency import ConcurrencyTuner
from streamload.pipeline.discover import ask_checksums
from streamload.pipeline.fetch import Fetcher
from streamload.pipeline.hedge import Hedger
from streamload.pipeline.manifests import find_manifests
from streamload.pipeline.pace import Pace
from streamload.planning import effective_reads
from streamload.report import Recorder
from streamload.sources import Source, SourceObject, open_source
from streamload.sources.keys import check_key
from streamload.sources.os_errors import translate_os_error
from streamload.sources.threads import DaemonExecutor, ThreadCall
from streamload.stage import cache
from streamload.stage.checks import Check, check_for
from streamload.stage.files import StagedFile
from streamload.stage.journal import Journal, Landed, Noted, read_journal
from streamload.stage.locks import FileLock
from streamload.stage.names import (
    JOURNAL_NAME,
    LOCK_NAME,
    READY_NAME,
    USE_NAME,
    choose,
    identity,
    is_unfinished,
    unfinished_name,
    version_digest,
    version_name,
)
from streamload.stage.options import StageOptions
from streamload.stage.pieces import Piece, Ranges, pieces_of
from streamload.stage.ready import Ready, ReadyFile, is_as_staged, read_ready, remove_ready, write_ready
from streamload.stage.volume import check_space, in_memory
from streamload.uris import scrub_uri

__all__ = ["Staged", "StagedState", "Stager"]

T = TypeVar("T")
StagedState: TypeAlias = Literal["staged", "present"]

_logger = logging.getLogger("streamload.stage")

# Where a disk takes more than one write at a time, so many keep it filled.
_WRITERS = 4
# What is cancelled waits so long for a call to the kernel that is under way: a piece's write takes less, an fsync of a
# slow disk may not, and SIGTERM is to end the process within two seconds.
_GRACE_S = 1.0
_THREAD_EXIT_S = 0.5
# How often one who waits for another process looks whether that is done, or gone.
_LOOK_AGAIN_S = 0.1
# When a log line says so.
_SAY_AFTER_S = 1.0

_PAGE_BYTES = mmap.PAGESIZE

# With 64 MiB, reads of 4 MiB: a sixth less processor time for each byte than with 1 MiB, and a dozen of them fill a
# link of 10 Gbit/s at 100 MiB/s each.
_READS_IN_MEMORY = 16
_LEAST_READ_BYTES = 1 << 20

_SWITCHED_OFF = "verify is off"


@dataclass(frozen=True, slots=True)
class Staged:
    """What staging has come to.

    Attributes:
        uri: Where the files come from, without credentials.
        folder: Where they are.
        state: ``present``: all of it was there already; ``staged``: not so.
        files: How many there are.
        nbytes: Their bytes.
        fetched_bytes: Of these, what was read from the source this time.
        kept_bytes: What was not, because it was there already.
        requests: Requests sent to the source.
        retries: Attempts that failed and were made again.
        hedged_bytes: Bytes of late reads that were asked for a second time.
        concurrency: Reads in flight at most, at the end.
        seconds: All of it, from the call on.
        phases: Where that time went: ``list`` (the import of the source's client included), ``wait`` (for another
            process), ``check`` (what is there, and what it has to sum up to), ``read`` (reading and writing),
            ``finish`` (what was left to make durable, and the marker).
        verified: Bytes that were compared with something, by what it was.
        unverified: Bytes that were not, by the reason.
        asked_at_s: When the source was asked first, by `time.monotonic`; None where it was not.
        first_request_s: The same, counted from the process's start.
        peak_rss_bytes: The most memory that the process ever had; None where the system does not tell.
    """

    uri: str
    folder: str
    state: StagedState
    files: int
    nbytes: int
    fetched_bytes: int
    kept_bytes: int
    requests: int
    retries: int
    hedged_bytes: int
    concurrency: int
    seconds: float
    phases: dict[str, float]
    verified: dict[str, int] = field(default_factory=dict)
    unverified: dict[str, int] = field(default_factory=dict)
    asked_at_s: float | None = None
    first_request_s: float | None = None
    peak_rss_bytes: int | None = None

    @property
    def gb_per_s(self) -> float:
        """Bytes read a second while reading, in units of 10^9."""
        seconds = self.phases.get("read", 0.0) + self.phases.get("finish", 0.0)
        return self.fetched_bytes / seconds / 1e9 if seconds else 0.0


class _File:
    """One file, and how far it is."""

    def __init__(self, object: SourceObject, of: str) -> None:
        self.object = object
        self.identity = of
        self.ready: ReadyFile | None = None  # it is whole, under its name
        self.staged: StagedFile | None = None
        self.check: Check | None = None
        self.landed = Ranges()
        self.pending: dict[int, Piece] = {}  # not begun yet, by their first byte
        self.missing = 0  # pieces that have not landed
        self.waiters: list[tuple[int, int, asyncio.Future[None]]] = []
        self.wholly: list[asyncio.Future[None]] = []


@dataclass(frozen=True, slots=True)
class _Listing:
    """What there is to stage, at which versions."""

    files: dict[str, _File]
    listed: dict[str, SourceObject]  # what else lies beside them, manifests perhaps
    digest: str
    index: str | None
    shards: tuple[str, ...]


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
        self.source: Source = open_source(uri, concurrency=number)
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
        self._threads = DaemonExecutor(_WRITERS, name="streamload-stage")
        self._hanging = False
        self._files: dict[str, _File] = {}
        self._listed = asyncio.Event()
        self._failure: BaseException | None = None
        self._journal: Journal | None = None
        self._lock: FileLock | None = None
        self._use: FileLock | None = None
        self._urgent: dict[tuple[str, int], Piece] = {}
        self._order: Iterable[str] = ()
        self._wanted: list[tuple[str, int, int]] = []
        self._workers = 0
        self._buffers: list[memoryview] = []
        self._landed_bytes = 0
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

    async def aclose(self) -> None:
        """End everything: the source, the threads, the locks. May be called twice."""
        try:
            await self.source.aclose()
        finally:
            self._threads.shutdown(wait=False, cancel_futures=True)
            ended = asyncio.wrap_future(self._threads.ended)
            await asyncio.wait({ended}, timeout=0 if self._hanging else _GRACE_S)
            if self._threads.ended.done():
                self._threads.join(_THREAD_EXIT_S)
                for lock in (self._lock, self._use):
                    if lock is not None:
                        lock.release()
            else:
                # A call to the kernel does not return, and may still write: the locks stay until the process ends.
                _logger.warning("%s: a call to the kernel does not return; its thread is left behind", self.folder)
                ended.cancel()

    # What has landed, for who reads meanwhile.

    async def objects(self) -> dict[str, SourceObject]:
        """What is staged, by its key; waits until it is listed.

        Raises:
            StreamloadError: It cannot be listed.
        """
        await self._listed.wait()
        if self._failure is not None and not self._files:
            raise self._failure
        return {key: file.object for key, file in self._files.items()}

    def landed(self, key: str, start: int, end: int) -> bool:
        """Whether a range of a file is in its place; verified as far as its stretches are complete."""
        file = self._files[key]
        return file.ready is not None or file.landed.cover(start, end)

    def where(self, key: str) -> str:
        """Where a file's landed bytes can be read now."""
        file = self._files[key]
        whole = file.ready is not None or file.staged is None
        return os.path.join(self.folder, key if whole else unfinished_name(key))

    def want(self, key: str, start: int, end: int) -> None:
        """Have a range brought before everything that nobody has asked for."""
        if self._files[key].staged is None:
            self._wanted.append((key, start, end))  # not cut into pieces yet
            return
        pending = self._files[key].pending
        for at in [at for at, piece in pending.items() if piece.start < end and start < piece.end]:
            self._urgent[key, at] = pending.pop(at)

    async def wait(self, key: str, start: int, end: int) -> None:
        """Wait until a range has landed.

        Raises:
            StreamloadError: It never will: staging has failed.
        """
        file = self._files[key]
        if not self.landed(key, start, end):
            await self._wait(lambda future: file.waiters.append((start, end, future)))

    async def whole(self, key: str) -> None:
        """Wait until a file is whole, verified as far as its source allows, and under its name.

        Raises:
            StreamloadError: It never will be: staging has failed, or what came is not what it should be.
        """
        file = self._files[key]
        if file.ready is None:
            await self._wait(file.wholly.append)

    async def _wait(self, enlist: Callable[[asyncio.Future[None]], None]) -> None:
        if self._failure is not None:
            raise self._failure
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        enlist(future)
        await future

    # Staging.

    async def run(self) -> Staged:
        """Stage everything; once.

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
            self._fail(first)
            if isinstance(first, StreamloadError):
                raise first.locate(uri=self.uri) from first.__cause__
            raise
        finally:
            if self._journal is not None and not self._hanging:
                self._journal.close()
                self._journal = None
            for file in self._files.values():
                if file.staged is not None and not self._hanging:
                    file.staged.close()

    async def _run(self) -> Staged:
        listing = await self._list()
        if listing is None:
            return await self._present_offline()
        if self._options.cache is not None:
            self.folder = cache.version_folder(self._options.cache, self.uri, listing.digest)
            self._use = await self._hold(USE_NAME, shared=True)
            self._use.touch()
        ready = await self._call(lambda: read_ready(self.folder))
        if not await self._is_present(ready, listing):
            lock_began = self.recorder.now()
            self._lock = await self._hold(LOCK_NAME)
            if self.recorder.now() - lock_began > _SAY_AFTER_S:
                # What the other one has staged may be newer than what was listed before.
                again = await self._list()
                if again is not None and self._options.cache is None:
                    listing = again
            self._phase("wait")
            ready = await self._call(lambda: read_ready(self.folder))
            if not await self._is_present(ready, listing):
                await self._stage(listing, ready)
                await self._link_to_version()
                return self._staged("staged")
        self._adopt(listing, {file.key: file for file in ready.files} if ready is not None else {})
        self._phase("check")
        await self._link_to_version()
        return self._staged("present")

    async def _list(self) -> _Listing | None:
        """List what there is to stage; None where the source is not to be asked, or may be out of reach and is."""
        if self._options.offline == "only":
            return None
        try:
            return await self._ask_source()
        except (TransientError, CredentialsError) as error:
            if self._options.offline == "no":
                raise
            _logger.warning("%s cannot be reached, a complete copy counts: %s", self.uri, error)
            return None
        finally:
            self._phase("list")

    async def _ask_source(self) -> _Listing:
        fetcher = self._fetcher
        if self._asked_at_s is None:
            self._asked_at_s = time.monotonic()
        listed = {object.key: object for object in await fetcher.ask(self.source.list)}
        for name in listed:
            check_key(name, uri=self.uri)
        key = choose_index(tuple(listed))
        shards: tuple[str, ...] | None = None
        index = None if key is None else identity(self.uri, listed[key])
        if key is not None:
            said = await self._call(lambda: read_ready(self.folder)) if self.folder else None
            # The index is what it was: so is what it names.
            shards = said.shards if said is not None and said.index == index else await self._read_index(listed[key])
        options = self._options
        keys = choose(listed, include=options.include, exclude=options.exclude, shards=shards)
        if not keys:
            raise CheckpointError(f"none of the {len(listed)} files there is to be staged: include and exclude say so")
        async with asyncio.TaskGroup() as group:
            deeper = {name: group.create_task(self._stat(name)) for name in keys if name not in listed}
        objects = [deeper[name].result() if name in deeper else listed[name] for name in keys]
        files = {object.key: _File(object, identity(self.uri, object)) for object in objects}
        digest = version_digest(file.identity for file in files.values())
        return _Listing(files, listed, digest, index, shards or ())

    async def _stat(self, key: str) -> SourceObject:
        try:
            return await self._fetcher.ask(lambda: self.source.stat(key), key=key)
        except NotFoundError as error:
            raise IndexFileError(f"the index names {key!r}, and there is no such file", object=key) from error

    async def _read_index(self, object: SourceObject) -> tuple[str, ...]:
        if object.size_bytes > MAX_INDEX_BYTES:
            raise IndexFileError(
                f"the index has {object.size_bytes} bytes, more than the {MAX_INDEX_BYTES} that are read",
                object=object.key,
            )
        content = bytearray(object.size_bytes)
        await self._fetcher.read(object, 0, object.size_bytes, Loan([memoryview(content)]))
        return parse_index(content, key=object.key).shards

    async def _is_present(self, ready: Ready | None, listing: _Listing) -> bool:
        """Whether a marker vouches for all of this version, and the files are as it says."""
        if ready is None or ready.digest != listing.digest:
            return False
        return await self._call(lambda: all(is_as_staged(self.folder, file) for file in ready.files))

    async def _present_offline(self) -> Staged:
        """What a marker vouches for, without having asked the source.

        Raises:
            NotFoundError: There is no complete copy.
        """
        folders = [self.folder]
        if self._options.cache is not None:
            parent = os.path.join(self._options.cache, version_name(self.uri))
            versions = await self._call(lambda: cache.cached_versions(self._options.cache or ""))
            folders = [version.path for version in reversed(versions) if os.path.dirname(version.path) == parent]
        for folder in folders:
            self.folder = folder
            if self._options.cache is not None:
                self._use = await self._hold(USE_NAME, shared=True)
                self._use.touch()
            ready = await self._call(lambda: read_ready(self.folder))
            if ready is not None and await self._call(lambda: self._vouches(ready)):  # noqa: B023
                files = {
                    file.key: _File(SourceObject(file.key, file.size_bytes, ""), file.identity) for file in ready.files
                }
                listing = _Listing(files, {}, ready.digest, ready.index, ready.shards)
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
        return same and all(is_as_staged(self.folder, file) for file in ready.files)

    def _adopt(self, listing: _Listing, there: dict[str, ReadyFile]) -> None:
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
        lock = FileLock(os.path.join(self.folder, name))

        def take() -> bool:
            os.makedirs(self.folder, exist_ok=True)
            # Between the two calls the folder may have been removed from its cache.
            with suppress(FileNotFoundError):
                return lock.take(shared=shared)
            return False

        await self._take(take, self.folder)
        return lock

    async def _take(self, take: Callable[[], bool], where: str) -> None:
        """Try until it works. A lock cannot be waited for on an event loop, and this can be cancelled."""
        began, said = self.recorder.now(), False
        while not await self._call(take):
            if not said and self.recorder.now() - began > _SAY_AFTER_S:
                said = True
                _logger.info("%s: another process is at work there; waiting for it", where)
            await asyncio.sleep(_LOOK_AGAIN_S)

    async def _stage(self, listing: _Listing, ready: Ready | None) -> None:
        noted = await self._call(lambda: read_journal(self.folder))
        known = dict(noted.whole)
        known |= {file.key: file for file in ready.files} if ready is not None else {}
        there = await self._call(lambda: self._look(listing, known))
        self._adopt(listing, there)
        files = [file for file in listing.files.values() if file.ready is None]
        await self._find_checks(files, listing.listed)
        self._memory = await self._call(lambda: in_memory(self.folder))
        await self._make_room(files)
        await self._call(lambda: self._begin(files, noted))
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
        await self._bring(files)
        self._phase("read")
        await self._call(lambda: self._conclude(listing, known))
        self._phase("finish")

    def _look(self, listing: _Listing, known: dict[str, ReadyFile]) -> dict[str, ReadyFile]:
        """On a thread: which files are there, whole; what is in the way of the others is refused, or will be replaced.

        Raises:
            SourceError: Something is in the way.
        """
        there: dict[str, ReadyFile] = {}
        for key, file in listing.files.items():
            path = os.path.join(self.folder, key)
            said = known.get(key)
            if said is not None and is_as_staged(self.folder, said):
                if said.identity == file.identity:
                    there[key] = said
            elif os.path.isdir(path) and not os.path.islink(path):
                raise SourceError("a folder is in the way of this file", object=key)
            elif os.path.lexists(path) and self._options.on_conflict == "refuse":
                why = "is not what was staged here" if said is not None else "was not staged here"
                raise SourceError(
                    f"the file in its place {why}; remove it, or say on_conflict='replace' (--on-conflict replace)",
                    object=key,
                )
        marker = os.path.join(self.folder, READY_NAME)
        if os.path.lexists(marker) and read_ready(self.folder) is None and self._options.on_conflict == "refuse":
            raise SourceError(
                "the marker there is not one of ours; remove it, or say on_conflict='replace' (--on-conflict replace)",
                object=READY_NAME,
            )
        return there

    async def _find_checks(self, files: list[_File], listed: dict[str, SourceObject]) -> None:
        """Find out what the files have to sum up to."""
        if self._reading.verify == "off":
            for file in files:
                file.check = Check(file.object, reason=_SWITCHED_OFF)
            return
        required = self._reading.verify == "require"
        wanted = [file.object for file in files]
        async with asyncio.TaskGroup() as group:
            asking = group.create_task(ask_checksums(self._fetcher, wanted, self._tuner.most))
            weights = [object.key for object in wanted if object.key.endswith(".safetensors")]
            finding = group.create_task(find_manifests(self._fetcher, self.recorder, listed, weights))
        kept, said = asking.result(), finding.result()
        for file in files:
            key = file.object.key
            file.check = check_for(file.object, said.get(key), kept[key], required=required)

    async def _make_room(self, files: list[_File]) -> None:
        """See that there is room before the first byte.

        Raises:
            SourceError: There is none.
        """
        options = self._options
        needed = await self._call(lambda: sum(self._needed(file) for file in files))
        if options.cache is not None and options.keep_bytes is not None:
            keep_bytes = options.keep_bytes
            lock = FileLock(os.path.join(options.cache, cache.CACHE_LOCK_NAME))
            await self._take(lock.take, options.cache)
            try:
                await self._call(
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
        await self._call(lambda: check_space(self.folder, needed, memory_bytes=self._memory_bytes))

    def _needed(self, file: _File) -> int:
        """How much room a file takes beyond what it has."""
        with suppress(OSError):
            status = os.lstat(os.path.join(self.folder, unfinished_name(file.object.key)))
            return max(0, file.object.size_bytes - status.st_blocks * 512)
        return file.object.size_bytes

    def _begin(self, files: list[_File], noted: Noted) -> None:
        """On a thread: open the unfinished files and the journal; nothing is whole from here on."""
        remove_ready(self.folder)
        self._journal = Journal(self.folder)
        mine = {unfinished_name(file.object.key) for file in files}
        for name in os.listdir(self.folder):
            if is_unfinished(name) and name not in mine:
                os.unlink(os.path.join(self.folder, name))
        for file in files:
            pieces = noted.landed.get(file.identity, [])
            assert file.check is not None
            same = [piece for piece in pieces if piece.algorithm == file.check.algorithm]
            size = file.object.size_bytes
            staged = StagedFile(self.folder, file.object.key, size, memory=self._memory)
            staged.open(keep=bool(same))
            file.staged = staged
            cut = pieces_of(size, same, piece_bytes=self._read_bytes)
            file.pending = {piece.start: piece for piece in cut}
            file.missing = len(file.pending)

    async def _bring(self, files: list[_File]) -> None:
        self._order = [file.object.key for file in files]
        for key, start, end in self._wanted:
            if self._files[key].ready is None:
                self.want(key, start, end)
        self.recorder.start("read")
        try:
            async with asyncio.TaskGroup() as group:
                for file in files:
                    if not file.missing:
                        group.create_task(self._finish(file))
                self._tuner.begin(self.recorder.now(), 0)
                self._staff(group)
        finally:
            self.recorder.stop("read")

    def _staff(self, group: asyncio.TaskGroup) -> None:
        """Have as many workers as reads may be in flight; those who are too many leave by themselves."""
        self.recorder.reading(self._tuner.target)
        left = len(self._urgent) + sum(len(file.pending) for file in self._files.values())
        while self._workers < self._tuner.target and left > 0:
            self._workers += 1
            left -= 1
            group.create_task(self._work(group, f"worker {self._workers}"))

    async def _work(self, group: asyncio.TaskGroup, lane: str) -> None:
        await self._budget.acquire(self._read_bytes)
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

    def _next(self) -> tuple[_File, Piece] | None:
        """What to bring next: what somebody waits for, then the files in their order."""
        while self._urgent:
            key, at = next(iter(self._urgent))
            return self._files[key], self._urgent.pop((key, at))
        for key in self._order:
            pending = self._files[key].pending
            if pending:
                return self._files[key], pending.pop(next(iter(pending)))
        return None

    async def _land(self, file: _File, piece: Piece, memory: memoryview, lane: str) -> None:
        """Have one piece in its place, summed up and noted."""
        assert file.check is not None
        assert file.staged is not None
        start, end = piece.start, piece.end
        check, staged = file.check, file.staged
        if piece.noted is not None and (sums := await self._call(lambda: _sums_of(staged, check, piece, memory))):
            self._compare(file, start, sums)
        else:
            # What is noted and wrong may be longer than what is read at once now.
            for at in range(start, end, memory.nbytes):
                await self._fetch(file, at, min(end, at + memory.nbytes), memory, lane)
        self._note_landed(file, start, end)

    async def _fetch(self, file: _File, start: int, end: int, memory: memoryview, lane: str) -> None:
        """Read a range from the source into its place."""
        assert file.check is not None
        check, view = file.check, memory[: end - start]
        loan = Loan([view])
        loan.checksum = check.running(start)
        began_s = self.recorder.now()
        await self._fetcher.read(file.object, start, end, loan, lane)
        self.recorder.reads += 1
        self.recorder.fetched_bytes += end - start
        self._landed_bytes += end - start
        self.recorder.event("read", lane, began_s, object=file.object.key, start=start, end=end, nbytes=end - start)
        self._tuner.read_ended(self.recorder.now(), self._landed_bytes)
        running = loan.checksum
        if running is None or running.nbytes != loan.nbytes:
            running = check.running(start)
            running.add(view)
        sums = running.sums()
        self._compare(file, start, sums)
        await self._call(lambda: self._put(file, start, view, sums), file.object.key)

    def _note_landed(self, file: _File, start: int, end: int) -> None:
        file.landed.add(start, end)
        self.recorder.arrived_bytes += end - start
        for waiter in [waiter for waiter in file.waiters if file.landed.cover(waiter[0], waiter[1])]:
            file.waiters.remove(waiter)
            if not waiter[2].done():
                waiter[2].set_result(None)

    def _compare(self, file: _File, start: int, sums: list[tuple[int, int]]) -> None:
        assert file.check is not None
        try:
            file.check.add(start, sums)
        except StreamloadError as error:
            # Some of the stretch may be noted as landed, and any of it may be what is wrong.
            assert self._journal is not None
            self._journal.forget(file.identity, error.start or 0, error.end or file.object.size_bytes)
            raise

    def _put(self, file: _File, start: int, view: memoryview, sums: list[tuple[int, int]]) -> None:
        """On a thread: write a piece, then note it."""
        assert file.staged is not None
        assert file.check is not None
        assert self._journal is not None
        file.staged.write(view, start)
        algorithm = file.check.algorithm
        self._journal.landed(file.identity, Landed(algorithm, start, view.nbytes, _combined(algorithm, sums)))

    async def _finish(self, file: _File) -> None:
        """All of a file has landed: make it durable and give it its name."""
        assert file.check is not None
        check = file.check
        whole = str(check.whole())
        file.ready = await self._call(lambda: self._publish(file, whole), file.object.key)
        if check.by is not None:
            self.recorder.verified(file.object.size_bytes, _what(check.by))
        elif check.reason is not None:
            self.recorder.unverified(file.object.size_bytes, check.reason)
        _logger.info(
            "%s: %s is whole, %d bytes",
            self.uri,
            file.object.key,
            file.object.size_bytes,
            extra={"fields": {"file": file.object.key, "nbytes": file.object.size_bytes}},
        )
        for future in [*file.wholly, *(waiter[2] for waiter in file.waiters)]:
            if not future.done():
                future.set_result(None)

    def _publish(self, file: _File, whole: str) -> ReadyFile:
        staged, check = file.staged, file.check
        assert staged is not None
        assert check is not None
        assert self._journal is not None
        mtime_ns = staged.sync()
        ready = ReadyFile(
            staged.key, file.identity, staged.size_bytes, mtime_ns, whole, None if check.by is None else _what(check.by)
        )
        self._journal.whole(ready)
        staged.publish()
        staged.close()
        return ready

    def _conclude(self, listing: _Listing, known: dict[str, ReadyFile]) -> None:
        """On a thread: remove what an older version had beyond this one, and write the marker."""
        for key, said in known.items():
            if key not in self._files and is_as_staged(self.folder, said):
                os.unlink(os.path.join(self.folder, key))
        files = [file.ready for file in self._files.values()]
        write_ready(
            self.folder,
            Ready(
                uri=self.uri,
                digest=listing.digest,
                include=self._options.include,
                exclude=self._options.exclude,
                files=tuple(file for file in files if file is not None),
                index=listing.index,
                shards=listing.shards,
            ),
        )
        with suppress(FileNotFoundError):
            os.unlink(os.path.join(self.folder, JOURNAL_NAME))

    async def _link_to_version(self) -> None:
        """With a cache: the version is in use from now on, and the folder is a link to it."""
        if self._use is not None:
            self._use.touch()
        if self._link is not None:
            link = self._link
            await self._call(lambda: cache.link_to(link, os.path.abspath(self.folder)))

    def _fail(self, error: BaseException) -> None:
        """Nothing more will land: whoever waits is told why."""
        self._failure = error if isinstance(error, StreamloadError) else SourceError("staging was ended", uri=self.uri)
        self._listed.set()
        for file in self._files.values():
            for future in [*file.wholly, *(waiter[2] for waiter in file.waiters)]:
                if not future.done():
                    future.set_exception(self._failure)

    def _phase(self, name: str) -> None:
        now = self.recorder.now()
        self._phases[name] = self._phases.get(name, 0.0) + now - self._phase_began
        self._phase_began = now

    def _staged(self, state: StagedState) -> Staged:
        report = self.recorder.report()
        nbytes = sum(file.object.size_bytes for file in self._files.values())
        return Staged(
            uri=self.uri,
            folder=self.folder,
            state=state,
            files=len(self._files),
            nbytes=nbytes,
            fetched_bytes=self._landed_bytes,
            kept_bytes=nbytes - self._landed_bytes,
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

    async def _call(self, call: Callable[[], T], key: str | None = None) -> T:
        """Make a call on a thread; returns or raises only when the thread has left it, unless it hangs.

        Raises:
            SourceError: What the system's error means.
        """
        running = ThreadCall(self._threads, call)
        try:
            return await running.result()
        except asyncio.CancelledError:
            if not running.take_back() and not await running.left(_GRACE_S):
                self._hanging = True
            raise
        except OSError as error:
            if isinstance(error, SourceError):
                raise error.locate(uri=self.folder, object=key) from None
            raise translate_os_error(error, uri=self.folder, object=key) from error
        except ValueError as error:  # a path with a null byte
            raise SourceError(str(error), uri=self.folder, object=key) from error


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


def _combined(algorithm: Any, sums: list[tuple[int, int]]) -> int:
    from streamload.checksums import combined

    return combined(algorithm, sums).value


def _what(by: str) -> str:
    return by.removeprefix("by ").removesuffix(" it")
