"""Files and objects, read by the engine of Run:ai's Model Streamer."""

from __future__ import annotations

import asyncio
import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from streamload.checksums import Checksum, PartChecksums, Sha256
from streamload.errors import (
    MissingDependencyError,
    ObjectChangedError,
    OptionError,
    SourceError,
    TransientError,
)
from streamload.loan import Loan
from streamload.sources.base import Source, SourceObject
from streamload.sources.blobs import BlobSource, BlobStore
from streamload.sources.keys import check_key
from streamload.sources.local import LocalSource
from streamload.sources.operations import Operations
from streamload.sources.runai_engine import Engine, EngineError, EngineRead
from streamload.sources.runai_settings import RunaiSettings, Setup, file_strategy_is_set
from streamload.sources.runai_versions import Versions
from streamload.sources.s3 import S3Source
from streamload.uris import scheme_of

if TYPE_CHECKING:
    from streamload.sources.s3_client import Connection

__all__ = ["RunaiBlobSource", "RunaiFileSource", "RunaiObjectSource", "RunaiSource", "open_runai"]

_log = logging.getLogger("streamload.sources")

# Where a read's views are smaller than this on average, our own source reads it: each view is a request of the
# engine's, and one of our own fills them all.
_SMALL_VIEW_BYTES = 1 << 20

# How long the engine's thread may take from having ended the engine to being gone: microseconds, if it is scheduled.
_THREAD_EXIT_S = 1.0

# Codes of the engine's.
_NOT_INSTALLED = frozenset({4, 5, 12, 13, 14})
# Requests that it gave up, among them those that another user of it in this process has ended.
_AGAIN = frozenset({1, 2, 3, 15, 16, 19})


# What finds objects there; imported when it is first asked.
_STORES = {
    "az": ("streamload.sources.azure_blobs", "AzureStore"),
    "gs": ("streamload.sources.gcs_blobs", "GcsStore"),
}


class RunaiSource(Source):
    """A source of ours, whose large reads Run:ai's engine makes.

    Listing, checksums, headers and small reads are our own source's for the same place. The engine is given the lent
    memory itself. It sends no ``If-Match``: what pins a version is that the object is looked at after each read, at
    once for all reads of it that ended meanwhile.

    What is asked of the engine cannot be called back. A cancelled read ends when the engine has answered; where that
    takes longer than `grace_s`, its loan is quarantined. So does closing: the engine is ended by its last user in the
    process, and where that takes longer, its thread is left to itself.

    Args:
        uri: As the caller gave it.
        own: Our own source for the place.
        concurrency: How many workers the engine should have; None: its own choice.
        settings: The engine's.
        grace_s: How long a cancelled read, and `aclose`, wait for the engine, in seconds.
        small_view_bytes: Reads whose views are smaller on average are our own source's.
    """

    scheme: ClassVar[str] = "runai"

    def __init__(
        self,
        uri: str,
        own: Source,
        *,
        concurrency: int | None = None,
        settings: RunaiSettings | None = None,
        grace_s: float = 5.0,
        small_view_bytes: int = _SMALL_VIEW_BYTES,
    ) -> None:
        self._own = own
        super().__init__(uri)
        # Errors name what the caller named, and the report has one account.
        own.uri, own.paths = self.uri, self.paths
        self._workers = concurrency
        self._settings = settings or RunaiSettings()
        self._grace_s = grace_s
        self._small_view_bytes = small_view_bytes
        self._operations = Operations()
        self._engine: Engine | None = None
        self._versions = Versions(self._look)
        self._abandoned = 0

    @property
    def requests(self) -> int:
        """As of every source; a view that the engine fills counts as one."""
        return self._asked + self._own.requests

    @requests.setter
    def requests(self, count: int) -> None:
        self._asked = count

    async def list(self) -> list[SourceObject]:
        return await self._own.list()

    async def stat(self, key: str) -> SourceObject:
        return await self._own.stat(key)

    async def checksum(self, object: SourceObject) -> Checksum | PartChecksums | None:
        return await self._own.checksum(object)

    async def sha256(self, object: SourceObject) -> bytes | Sha256 | None:
        return await self._own.sha256(object)

    async def describe(self) -> dict[str, str]:
        return {"reads": "by Run:ai's engine", **await self._own.describe()}

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        if start == end:
            return
        check_key(object.key, uri=self.uri)
        async with self._operations.running():
            path = await self._path(object.key) if self._engine_reads(object, loan) else None
            if path is None:
                await self._own.read(object, start, end, loan)
                return
            try:
                if not 0 <= start < end <= object.size_bytes:
                    raise SourceError(f"the object has {object.size_bytes} bytes")
                await self._read_with_engine(object, path, start, loan)
            except SourceError as error:
                raise error.locate(uri=self.uri, object=object.key, start=start, end=end) from None
            except MissingDependencyError as error:
                raise error.locate(uri=self.uri) from None

    async def aclose(self) -> None:
        try:
            await self._operations.close()
        finally:
            try:
                await self._own.aclose()
            finally:
                engine, self._engine = self._engine, None
                if engine is not None and engine.release():
                    await self._await_end(engine)

    async def _await_end(self, engine: Engine) -> None:
        ended = asyncio.wrap_future(engine.ended)
        # Where a read was abandoned, the engine has had its grace.
        await asyncio.wait({ended}, timeout=0 if self._abandoned else self._grace_s)
        if engine.ended.done():
            engine.join(_THREAD_EXIT_S)
        else:
            _log.warning("%s: Run:ai's engine does not end; its thread is left behind", self.uri)
            ended.cancel()

    async def _read_with_engine(self, object: SourceObject, path: str, start: int, loan: Loan) -> None:
        read = EngineRead(await self._setup(), path, start, loan.views)
        if self._engine is None:
            self._engine = Engine.acquire()
        self._engine.submit(read)
        self._asked += len(loan.views)
        try:
            failure = await read.result()
        except asyncio.CancelledError:
            if not read.take_back() and not await read.left(self._grace_s):
                self._abandoned += 1
                loan.quarantine()
            raise
        if isinstance(failure, EngineError):
            if not failure.settled:
                loan.quarantine()
            self._forget_setup()
            # It names no reason; asking for the object ourselves often finds one.
            await self._versions.check(object)
            raise _translate(failure)
        if failure is not None:
            raise failure
        await self._versions.check(object)
        self.paths["by Run:ai's engine"] = self.paths.get("by Run:ai's engine", 0) + loan.nbytes

    async def _look(self, object: SourceObject) -> None:
        """Ask whether an object is still the version that was listed."""
        found = await self._own.stat(object.key)
        # Some servers quote the tag in one kind of answer and not in another.
        if (found.version.strip('"'), found.size_bytes) != (object.version.strip('"'), object.size_bytes):
            raise ObjectChangedError(
                f"the object is now version {found.version}; the one seen first was {object.version}"
            )

    def _engine_reads(self, object: SourceObject, loan: Loan) -> bool:
        """Whether a read is one for the engine."""
        return loan.nbytes >= self._small_view_bytes * len(loan.views)

    async def _setup(self) -> Setup:
        """What the engine must be started with."""
        raise NotImplementedError

    def _forget_setup(self) -> None:
        """The engine has failed: what it is started with is found anew for the next read."""

    async def _path(self, key: str) -> str | None:
        """An object, as the engine names it; None where it has no name for it, and our own source reads it."""
        raise NotImplementedError


class RunaiFileSource(RunaiSource):
    """Files; see `RunaiSource`. Those that are in the page cache are read by our own source."""

    request_cost_bytes: ClassVar[int] = LocalSource.request_cost_bytes
    read_bytes: ClassVar[int] = 8 << 20
    # The engine's own threads are more; so many reads keep them busy while answers are passed on.
    concurrency: ClassVar[int] = 8
    # Past the page cache the engine can only read where a byte's address and its offset differ by whole blocks. That is
    # what it is chosen for: files read for the first time come fastest so.
    congruence_bytes: ClassVar[int] = 4096

    _own: LocalSource

    def __init__(self, uri: str, own: LocalSource, **arguments: Any) -> None:
        super().__init__(uri, own, **arguments)
        self._cached: frozenset[str] = frozenset()

    async def list(self) -> list[SourceObject]:
        objects = await super().list()
        # Past the page cache these would come several times slower than out of it. Whoever has said how the engine is
        # to read files wants it to.
        if not file_strategy_is_set():
            self._cached = await self._own.find_cached(objects)
        return objects

    def _engine_reads(self, object: SourceObject, loan: Loan) -> bool:
        return object.key not in self._cached and super()._engine_reads(object, loan)

    async def _setup(self) -> Setup:
        return Setup.of("file", self._settings, concurrency=self._workers)

    async def _path(self, key: str) -> str | None:
        return _in_utf8(await self._own.path_of(key))


class RunaiObjectSource(RunaiSource):
    """Objects in S3; see `RunaiSource`.

    The engine gets the endpoint, the region and the credentials that our own S3 source has found. It does not renew
    them: after a failed read, those of that moment are compared, and the engine is started anew where they are others.
    """

    request_cost_bytes: ClassVar[int] = S3Source.request_cost_bytes
    # Each is cut into requests of 8 MiB by the engine, and followed by one look at the object's version.
    read_bytes: ClassVar[int] = 16 << 20
    concurrency: ClassVar[int] = 8

    _own: S3Source

    def __init__(self, uri: str, own: S3Source, **arguments: Any) -> None:
        super().__init__(uri, own, **arguments)
        self._connected: Setup | None = None

    async def _setup(self) -> Setup:
        if self._connected is None:
            found = await self._own.connection()
            self._connected = Setup.of(
                "s3",
                self._settings,
                concurrency=self._workers,
                virtual=found.virtual,
                credentials=_credentials(found),
            )
        return self._connected

    def _forget_setup(self) -> None:
        self._connected = None

    async def _look(self, object: SourceObject) -> None:
        await self._own.check_version(object)

    async def _path(self, key: str) -> str | None:
        uri = self._own.plain_uri_of(key)
        return None if uri is None else _path_of(uri)


class RunaiBlobSource(RunaiSource):
    """Objects in Google Cloud Storage and Azure; see `RunaiSource`. The engine finds its credentials itself."""

    request_cost_bytes: ClassVar[int] = RunaiObjectSource.request_cost_bytes
    read_bytes: ClassVar[int] = RunaiObjectSource.read_bytes
    concurrency: ClassVar[int] = RunaiObjectSource.concurrency

    _own: BlobSource

    async def _setup(self) -> Setup:
        return Setup.of(scheme_of(self._own.plain_uri_of("")), self._settings, concurrency=self._workers)

    async def _path(self, key: str) -> str | None:
        return _path_of(self._own.plain_uri_of(key))


def open_runai(
    uri: str,
    *,
    concurrency: int | None = None,
    s3_anonymous: bool = False,
    runai_chunk_bytes: int | None = None,
    runai_request_timeout_s: float | None = None,
    runai_virtual_addressing: bool | None = None,
) -> RunaiSource:
    """Make the source for ``runai+s3://...`` and its like, or for what follows the plus sign alone.

    Args:
        uri: What is read.
        concurrency: How many reads should be possible at once; None: the source's own number.
        s3_anonymous: Whether S3 is to be asked without credentials, which the engine does not do.
        runai_chunk_bytes: See `RunaiSettings`.
        runai_request_timeout_s: See `RunaiSettings`.
        runai_virtual_addressing: See `RunaiSettings`.

    Raises:
        OptionError: The engine cannot read what the URI names.
    """
    settings = RunaiSettings(runai_chunk_bytes, runai_request_timeout_s, runai_virtual_addressing)
    plain = uri
    if scheme_of(uri).startswith("runai+"):
        plain = uri[len("runai+") :]
    if scheme_of(plain) == "file":
        return RunaiFileSource(uri, LocalSource(plain), concurrency=concurrency, settings=settings)
    if scheme_of(plain) == "s3":
        if s3_anonymous:
            raise OptionError("Run:ai's engine asks S3 with credentials only: read it without that engine", uri=uri)
        own = S3Source(plain)
        if own.plain_uri_of("any") is None:
            raise OptionError("Run:ai's engine knows no versions, access points or requests at one's own cost", uri=uri)
        return RunaiObjectSource(uri, own, concurrency=concurrency, settings=settings)
    if scheme_of(plain) in _STORES:
        module, name = _STORES[scheme_of(plain)]

        def open_store(bucket: str) -> BlobStore:
            store: BlobStore = getattr(import_module(module), name)(bucket)
            return store

        return RunaiBlobSource(uri, BlobSource(plain, open_store), concurrency=concurrency, settings=settings)
    raise OptionError(f"Run:ai's engine does not read {scheme_of(plain)}://", uri=uri)


def _credentials(found: Connection) -> tuple[tuple[str, str], ...]:
    """In the engine's words."""
    said = {
        "access_key_id": found.access_key,
        "secret_access_key": found.secret_key,
        "session_token": found.token,
        "region_name": found.region,
        "endpoint": found.endpoint,
    }
    return tuple((name, value) for name, value in said.items() if value)


def _path_of(uri: str) -> str | None:
    """An object's URI, where the engine can read it: it takes it for one line, and slashes in a row for one."""
    return None if "\n" in uri or "//" in uri.partition("://")[2] else _in_utf8(uri)


def _in_utf8(name: str) -> str | None:
    try:
        name.encode()
    except UnicodeEncodeError:
        return None
    return name


def _translate(failure: EngineError) -> SourceError | MissingDependencyError:
    """The engine's failure, where the object is there and unchanged."""
    text = f"Run:ai's engine: {failure}"
    if failure.code in _NOT_INSTALLED:
        return MissingDependencyError(f"{text}: what it needs to read such a place is not installed, or does not load")
    if failure.code in _AGAIN:
        return TransientError(text)
    return SourceError(text)
