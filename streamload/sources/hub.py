"""Models on the Hugging Face Hub."""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable, Sequence
from functools import partial
from typing import ClassVar, NamedTuple, TypeVar
from urllib.parse import unquote, urlsplit

from streamload.errors import (
    NotFoundError,
    ObjectChangedError,
    OptionError,
    SourceError,
    StreamloadError,
    TransientError,
)
from streamload.loan import Loan
from streamload.sources.base import Source, SourceObject
from streamload.sources.http_client import HttpClient, Origin, Resource, checked_headers, origin_of
from streamload.sources.http_errors import refusal
from streamload.sources.http_ranges import RangeRead
from streamload.sources.hub_cache import CacheWriter
from streamload.sources.hub_errors import hub_refusal
from streamload.sources.hub_repository import HubFile, Snapshot, is_file_name, look_up
from streamload.sources.keys import check_key
from streamload.sources.local import LocalSource
from streamload.sources.operations import Operations
from streamload.sources.threads import DaemonExecutor, ThreadCall
from streamload.wire import Head

__all__ = ["HubSource"]

T = TypeVar("T")

_log = logging.getLogger("streamload.sources")

# Of a part of a name: what the Hub allows, roughly. It becomes part of a path and of an address.
_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"

_URI = re.compile(
    rf"(?P<repository>{_NAME}/{_NAME}|{_NAME}(?=[@:]|$))"
    # These two kinds of revisions have slashes, which nobody escapes. The colon is KServe's way to write it.
    r"(?:[@:](?P<revision>refs/(?:pr|convert)/[^/@]+|[^/@]+))?"
    r"(?:/(?P<path>.*))?",
    re.DOTALL,
)

# One asks the Hub; two write into the cache, so that one of them may sum a file up meanwhile.
_THREADS = 3

# How long the last thread may take from having nothing left to do to being gone: microseconds, if it is scheduled.
_THREAD_EXIT_S = 1.0


class HubSource(Source):
    """A model repository, ``hf://org/model[@revision]``, or a folder or one file in it, ``hf://…/name.safetensors``.

    The revision is resolved once, by huggingface_hub, to a commit, and everything is of that commit. What lies in the
    Hub's cache is read from there; the rest is read in ranges from where the Hub redirects to. The token goes to the
    Hub and to nobody that it redirects to.

    ``HF_TOKEN``, ``HF_ENDPOINT``, ``HF_HUB_CACHE``, ``HF_HUB_OFFLINE`` and the others mean what they mean to
    huggingface_hub, which reads them when it is imported.

    Args:
        uri: The URI; in the revision, ``%`` escapes are undone.
        concurrency: How many reads should be possible at once. Connections are made as they are needed.
        revision: A branch, a tag or a commit, in place of one in the URI.
        allow_patterns: Globs of paths in the repository, as huggingface_hub matches them; other files are left out.
        ignore_patterns: The same; these files are left out.
        download_dir: The cache's folder, in place of the usual one.
        cache: Whether files that are read whole are put into the cache.
        connect_timeout_s: How long making a connection may take: two lost packets are mended after 3 s.
        read_timeout_s: How long a connection may be silent.
        grace_s: How long closing waits for a call that does not return, in seconds.

    Raises:
        OptionError: The URI names no repository, or another revision than `revision`.
    """

    scheme: ClassVar[str] = "hf"
    # As from an object store, which is what is behind the Hub.
    request_cost_bytes: ClassVar[int] = 1 << 20
    read_bytes: ClassVar[int] = 8 << 20
    concurrency: ClassVar[int] = 8
    most_concurrency: ClassVar[int | None] = 64
    hedged: ClassVar[bool] = True
    shared_versions: ClassVar[bool] = True

    def __init__(
        self,
        uri: str,
        *,
        concurrency: int | None = None,
        revision: str | None = None,
        allow_patterns: Sequence[str] | None = None,
        ignore_patterns: Sequence[str] | None = None,
        download_dir: str | None = None,
        cache: bool = False,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 20.0,
        grace_s: float = 5.0,
    ) -> None:
        super().__init__(uri)
        self._place = _place_of(uri, revision)
        self._look_up = partial(
            look_up,
            self._place.repository,
            self._place.revision,
            allow_patterns=allow_patterns,
            ignore_patterns=ignore_patterns,
            download_dir=download_dir,
        )
        self._cached = cache
        # What a read has brought goes into the cache, and is compared there; one that is asked for twice and cancelled
        # when it is nearly done would leave that to nobody.
        self.hedged = not cache  # type: ignore[misc]
        self._timeouts = (connect_timeout_s, read_timeout_s)
        self._grace_s = grace_s
        self._threads = DaemonExecutor(_THREADS, name="streamload-hub")
        self._operations = Operations()
        self._opening = asyncio.Lock()
        self._opened: _Opened | None = None

    async def list(self) -> list[SourceObject]:
        if self._place.name is not None:
            return [await self.stat(self._place.name)]
        async with self._operations.running():
            try:
                files = (await self._open()).snapshot.files
            except StreamloadError as error:
                raise error.locate(uri=self.uri) from None
        folder = self._place.folder
        found = [_object(path.removeprefix(folder), file) for path, file in files.items() if path.startswith(folder)]
        objects = sorted((object for object in found if "/" not in object.key), key=lambda object: object.key)
        if not objects:
            raise NotFoundError("there are no files here at this revision, or all are left out", uri=self.uri)
        return objects

    async def stat(self, key: str) -> SourceObject:
        check_key(key, uri=self.uri)
        async with self._operations.running():
            try:
                return _object(key, self._file(await self._open(), key))
            except StreamloadError as error:
                raise error.locate(uri=self.uri, object=key) from None

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        if start == end:
            return
        check_key(object.key, uri=self.uri)
        async with self._operations.running():
            try:
                opened = await self._open()
                file = self._file(opened, object.key)
                if file.etag != object.version:
                    raise ObjectChangedError(f"the file is {file.etag} at commit {opened.snapshot.commit}")
                if not 0 <= start < end <= object.size_bytes:
                    raise SourceError(f"the object has {object.size_bytes} bytes")
                if opened.writer is not None:
                    opened.writer.use(file)
                if file.cached is not None:
                    await self._read_cached(opened, file.cached, start, end, loan)
                elif opened.writer is None:
                    await self._fetch(opened, file, start, end, loan)
                else:
                    await self._fetch_and_keep(opened, opened.writer, file, start, end, loan)
            except StreamloadError as error:
                if error.object is not None and error.object != object.key:
                    error.object = object.key  # not where it lies in the cache
                raise error.locate(uri=self.uri, object=object.key, start=start, end=end) from None

    async def sha256(self, object: SourceObject) -> bytes | None:
        check_key(object.key, uri=self.uri)
        async with self._operations.running():
            try:
                return self._file(await self._open(), object.key).sha256
            except StreamloadError as error:
                raise error.locate(uri=self.uri, object=object.key) from None

    async def describe(self) -> dict[str, str]:
        async with self._operations.running():
            try:
                snapshot = (await self._open()).snapshot
            except StreamloadError as error:
                return {"answer": error.cause}
        cached = sum(file.cached is not None for file in snapshot.files.values())
        return {
            "endpoint": f"{snapshot.asked.endpoint}{' (not asked: HF_HUB_OFFLINE)' if snapshot.offline else ''}",
            "token": "found" if snapshot.asked.with_token else "none",
            "commit": snapshot.commit,
            "cache": f"{snapshot.folder} ({cached} of {len(snapshot.files)} files)",
        }

    async def aclose(self) -> None:
        try:
            if self._opened is not None and self._opened.writer is not None:
                self._opened.writer.stop()
            await self._operations.close()
        finally:
            # Only now: an operation that was under way may have opened it.
            opened, self._opened = self._opened, None
            try:
                if opened is not None:
                    await opened.aclose(self._threads, self._grace_s)
            finally:
                await self._end_threads()

    async def _end_threads(self) -> None:
        self._threads.shutdown(wait=False, cancel_futures=True)
        ended = asyncio.wrap_future(self._threads.ended)
        await asyncio.wait({ended}, timeout=self._grace_s)
        if self._threads.ended.done():
            self._threads.join(_THREAD_EXIT_S)
        else:
            _log.warning("%s: a call to the Hub or the disk does not return; its thread is left behind", self.uri)
            ended.cancel()

    async def _open(self) -> _Opened:
        """The repository at its commit, looked up by the first operation that needs it."""
        if self._opened is None:
            # Held while the Hub is asked, on purpose: whoever comes meanwhile wants the same answer.
            async with self._opening:
                if self._opened is None:
                    snapshot = await self._run(self._look_up)
                    if not snapshot.offline:
                        self._count()
                    self._opened = _Opened(snapshot, self._timeouts, self._count, self.paths, keep=self._kept(snapshot))
        return self._opened

    def _kept(self, snapshot: Snapshot) -> set[str] | None:
        """The weights that make up what the URI names; None where nothing is to be kept."""
        if not self._cached:
            return None
        place = self._place
        if place.name is not None:
            return {place.folder + place.name}
        names = {path.removeprefix(place.folder) for path in snapshot.files if path.startswith(place.folder)}
        return {place.folder + name for name in names if name.endswith(".safetensors") and "/" not in name}

    async def _run(self, call: Callable[[], T]) -> T:
        """Make a blocking call on a thread. Cancelled, the call goes on, and closing waits for it."""
        threaded = ThreadCall(self._threads, call)
        try:
            return await threaded.result()
        except asyncio.CancelledError:
            threaded.take_back()
            raise

    def _count(self) -> None:
        self.requests += 1

    def _note_path(self, path: str, nbytes: int) -> None:
        self.paths[path] = self.paths.get(path, 0) + nbytes

    def _file(self, opened: _Opened, key: str) -> HubFile:
        file = opened.snapshot.files.get(self._place.folder + key)
        if file is None:
            raise NotFoundError("the repository has no such file at this revision, or it is left out by a pattern")
        return file

    async def _read_cached(self, opened: _Opened, place: str, start: int, end: int, loan: Loan) -> None:
        local = opened.local
        try:
            object = opened.cached.get(place)
            if object is None:
                object = opened.cached[place] = await local.stat(place)
            await local.read(object, start, end, loan)
        except SourceError as error:
            # Named as it was asked for; where it lies in the cache belongs to the cause.
            error.uri = error.object = error.start = error.end = None
            error.cause = f"{error.cause} (read from the cache: {opened.snapshot.folder}/{place})"
            raise
        self._count()
        self._note_path("from the cache", end - start)

    async def _fetch(self, opened: _Opened, file: HubFile, start: int, end: int, loan: Loan) -> None:
        snapshot, client = opened.snapshot, opened.client
        assert client is not None, "offline, all files are cached"

        def check(head: Head) -> None:
            _check_head(head, file, snapshot)

        range_read = RangeRead(start, end, file.size_bytes, loan, check)
        try:
            head, origin = await client.get(
                opened.resource(file),
                {"Range": range_read.header},
                range_read.accept,
                range_read.landed,
                redirected=check,
            )
        except TransientError as error:
            range_read.correct(error)
            raise
        if head.status >= 300:
            by_hub = origin == opened.origin
            raise hub_refusal(head, origin.host, snapshot.asked) if by_hub else refusal(head, origin.host)

    async def _fetch_and_keep(
        self, opened: _Opened, writer: CacheWriter, file: HubFile, start: int, end: int, loan: Loan
    ) -> None:
        """Fetch a range, and write what has come of it into the cache."""
        try:
            await self._fetch(opened, file, start, end, loan)
        except TransientError as error:
            # Another try goes on behind these.
            await self._keep(writer, file, start, loan, error.valid_bytes)
            raise
        await self._keep(writer, file, start, loan, end - start)

    async def _keep(self, writer: CacheWriter, file: HubFile, start: int, loan: Loan, nbytes: int) -> None:
        if not nbytes or loan.gaps is not None:  # what is in a gap is anything
            return
        views = _first(loan.views, nbytes)
        call = ThreadCall(self._threads, lambda: writer.write(file, start, views))
        try:
            whole = await call.result()
        except asyncio.CancelledError:
            # The memory is somebody else's as soon as this ends, and must not be in a file then.
            if not call.take_back() and not await call.left(self._grace_s):
                loan.quarantine()
            raise
        if whole:
            await self._run(lambda: writer.finish(file))


class _Opened:
    """A repository at its commit, and how its files are had.

    Attributes:
        snapshot: What is in it.
        origin: Who the Hub is.
        client: Asks it, and those that it redirects to; None offline.
        local: Reads its folder in the cache.
        cached: What `local` has found there, by its place.
        writer: Puts files there; None where it is not to.
    """

    def __init__(
        self,
        snapshot: Snapshot,
        timeouts: tuple[float, float],
        count: Callable[[], None],
        paths: dict[str, int],
        *,
        keep: set[str] | None,
    ) -> None:
        self.snapshot = snapshot
        self.origin: Origin = origin_of(urlsplit(snapshot.asked.endpoint))
        self.client: HttpClient | None = None
        if not snapshot.offline:
            self.client = HttpClient(
                self.origin,
                checked_headers(snapshot.headers),
                connect_timeout_s=timeouts[0],
                stall_s=timeouts[1],
                count=count,
                paths=paths,
            )
        self.local = LocalSource(snapshot.folder)
        self.cached: dict[str, SourceObject] = {}
        self.writer = None if keep is None else CacheWriter(snapshot, keep)
        self._resources: dict[str, Resource] = {}

    def resource(self, file: HubFile) -> Resource:
        """Where a file is had."""
        resource = self._resources.get(file.path)
        if resource is None:
            resource = self._resources[file.path] = Resource(self.snapshot.url(file))
        return resource

    async def aclose(self, threads: DaemonExecutor, grace_s: float) -> None:
        """Close everything; what was read whole becomes a snapshot in the cache, unless the disk hangs."""
        try:
            if self.writer is not None:
                call = ThreadCall(threads, self.writer.close)
                try:
                    async with asyncio.timeout(grace_s):
                        await call.result()
                except TimeoutError:
                    call.take_back()
                    _log.warning("%s: the cache does not answer, and is left as it is", self.snapshot.folder)
        finally:
            try:
                if self.client is not None:
                    await self.client.aclose()
            finally:
                await self.local.aclose()


class _Place(NamedTuple):
    repository: str
    revision: str | None
    folder: str  # empty, or with a slash at its end
    name: str | None  # of the one file that the URI names


def _place_of(uri: str, revision: str | None) -> _Place:
    found = _URI.fullmatch(uri.partition("://")[2])
    if found is None or found["repository"].startswith(("datasets/", "spaces/")):
        raise OptionError("a Hub URI is hf://org/model, hf://org/model@revision, or one with a path behind it", uri=uri)
    named = None if found["revision"] is None else unquote(found["revision"])
    if named is not None and revision is not None and named != revision:
        raise OptionError(f"the URI names the revision {named!r}, and revision is {revision!r}", uri=uri)
    path = (found["path"] or "").rstrip("/")
    if path and not is_file_name(path):
        raise OptionError("the path in this URI leads out of the repository, or nowhere", uri=uri)
    if path.endswith(".safetensors"):
        folder, slash, name = path.rpartition("/")
        return _Place(found["repository"], named or revision, folder + slash, name)
    return _Place(found["repository"], named or revision, f"{path}/" if path else "", None)


def _object(key: str, file: HubFile) -> SourceObject:
    return SourceObject(key, file.size_bytes, file.etag)


def _check_head(head: Head, file: HubFile, snapshot: Snapshot) -> None:
    """Refuse what the Hub says of another file than the one that was listed, wherever it says it."""
    commit = head.headers.get("x-repo-commit")
    if commit is None:
        return  # it is not the Hub who answers, but the store that it sent us to
    if commit != snapshot.commit:
        raise ObjectChangedError(f"the Hub answers with commit {commit}, not {snapshot.commit}")
    size = head.headers.get("x-linked-size", str(file.size_bytes))
    tag = head.headers.get("x-linked-etag", head.headers.get("etag", file.etag))
    if size != str(file.size_bytes) or tag.removeprefix("W/").strip('"') != file.etag:
        raise ObjectChangedError(f"the file is {tag} with {size} bytes; it was listed as {file.etag}")


def _first(views: Sequence[memoryview], nbytes: int) -> list[memoryview]:
    """The first bytes of views."""
    found: list[memoryview] = []
    for view in views:
        if nbytes <= 0:
            break
        found.append(view[:nbytes])
        nbytes -= view.nbytes
    return found
