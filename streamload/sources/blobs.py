"""Objects in stores whose protocol we do not speak: found, and read in small pieces, with their makers' own clients."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, TypeVar

from streamload.checksums import Checksum
from streamload.errors import (
    NotFoundError,
    OptionError,
    SourceError,
    StreamloadError,
    TransientError,
)
from streamload.loan import Loan
from streamload.sources.base import Source, SourceObject
from streamload.sources.http_answers import ERRORS, THROTTLED
from streamload.sources.keys import check_key
from streamload.sources.operations import Operations
from streamload.sources.threads import DaemonExecutor, ThreadCall
from streamload.sources.writer import ViewWriter

__all__ = ["BlobSource", "BlobStore", "error_of_status"]

_log = logging.getLogger("streamload.sources")

T = TypeVar("T")

# Requests at once. They are few: what is large is not read here.
_THREADS = 8
_THREAD_EXIT_S = 1.0


def error_of_status(status: int | None, what: str) -> SourceError:
    """The error that a status of HTTP's means; not located.

    Args:
        status: None where there was no answer.
        what: What the client says, without anything that could hold a credential.
    """
    if status is None:
        return TransientError(f"there was no answer: {what}")
    text = f"the store answered {status} {what}"
    kind = ERRORS.get(status, SourceError)
    return TransientError(text, throttled=status in THROTTLED) if kind is TransientError else kind(text)


class BlobStore(ABC):
    """One bucket or container, asked with blocking calls, each on a thread of its own choosing.

    Versions are what the store can be asked to insist on. All methods may raise what `translate` knows.
    """

    @abstractmethod
    def list(self, prefix: str) -> Sequence[SourceObject]:
        """The objects directly under a prefix, by their whole names."""

    @abstractmethod
    def stat(self, name: str) -> SourceObject:
        """One object, by its whole name."""

    @abstractmethod
    def read(self, object: SourceObject, start: int, end: int) -> bytes:
        """Bytes of an object, by its whole name, at its version."""

    @abstractmethod
    def checksum(self, name: str) -> Checksum | None:
        """What the store keeps of an object's content."""

    @abstractmethod
    def translate(self, error: Exception) -> StreamloadError | None:
        """The error of ours that says the same, not located; None where it is not the client's."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections."""


class BlobSource(Source):
    """The objects directly under ``scheme://bucket/prefix``, or one, ``scheme://bucket/folder/name.safetensors``.

    A cancelled call is left to its thread, which holds no lent memory: what it brings is copied when it has come.

    Args:
        uri: The URI, taken literally.
        open_store: Makes the client for a bucket; called on a thread, by the first request.
        grace_s: How long `aclose` waits for calls under way, in seconds.

    Raises:
        OptionError: The URI names no bucket.
    """

    scheme: ClassVar[str] = "blobs"
    request_cost_bytes: ClassVar[int] = 1 << 20
    read_bytes: ClassVar[int] = 8 << 20
    concurrency: ClassVar[int] = _THREADS

    def __init__(self, uri: str, open_store: Callable[[str], BlobStore], *, grace_s: float = 5.0) -> None:
        super().__init__(uri)
        self._bucket, self._prefix, self._name = _place_of(uri)
        self._open_store = open_store
        self._grace_s = grace_s
        self._operations = Operations()
        self._threads = DaemonExecutor(_THREADS, name="streamload-blobs")
        self._opening = asyncio.Lock()
        self._store: BlobStore | None = None

    def plain_uri_of(self, key: str) -> str:
        """An object as ``scheme://bucket/key``."""
        return f"{self.uri.partition('://')[0].rpartition('+')[2]}://{self._bucket}/{self._prefix}{key}"

    async def list(self) -> list[SourceObject]:
        if self._name is not None:
            return [await self.stat(self._name)]
        found = await self._ask(lambda store: store.list(self._prefix))
        # Consoles mark a folder with an empty object that is called as the folder is.
        objects = [self._relative(object) for object in found if not object.key.endswith("/")]
        if not objects:
            raise NotFoundError("there are no objects under this prefix", uri=self.uri)
        return sorted(objects, key=lambda object: object.key)

    async def stat(self, key: str) -> SourceObject:
        check_key(key, uri=self.uri)
        return self._relative(await self._ask(lambda store: store.stat(self._prefix + key), key))

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        if start == end:
            return
        check_key(object.key, uri=self.uri)
        whole = SourceObject(self._prefix + object.key, object.size_bytes, object.version)
        try:
            if not 0 <= start < end <= object.size_bytes:
                raise SourceError(f"the object has {object.size_bytes} bytes")
            content = await self._ask(lambda store: store.read(whole, start, end), object.key)
            if len(content) != end - start:
                raise SourceError(f"the store sent {len(content)} of {end - start} bytes")
        except SourceError as error:
            raise error.locate(uri=self.uri, object=object.key, start=start, end=end) from None
        ViewWriter(loan.views).write(content)

    async def checksum(self, object: SourceObject) -> Checksum | None:
        check_key(object.key, uri=self.uri)
        return await self._ask(lambda store: store.checksum(self._prefix + object.key), object.key)

    async def aclose(self) -> None:
        try:
            await self._operations.close()
        finally:
            store, self._store = self._store, None
            self._threads.shutdown(wait=False, cancel_futures=True)
        ended = asyncio.wrap_future(self._threads.ended)
        await asyncio.wait({ended}, timeout=self._grace_s)
        if self._threads.ended.done():
            self._threads.join(_THREAD_EXIT_S)
            if store is not None:
                store.close()
        else:
            _log.warning("%s: a request does not end; its thread is left behind", self.uri)
            ended.cancel()

    def _relative(self, object: SourceObject) -> SourceObject:
        return SourceObject(object.key.removeprefix(self._prefix), object.size_bytes, object.version)

    async def _ask(self, call: Callable[[BlobStore], T], key: str | None = None) -> T:
        """Have a thread ask the store; the client's error becomes ours."""
        async with self._operations.running():
            if self._store is None:
                # Held while it is opened on purpose: one client serves all.
                async with self._opening:
                    if self._store is None:
                        self._store = await self._run(lambda: self._open_store(self._bucket))
            store = self._store
            self.requests += 1
            try:
                return await self._run(lambda: call(store))
            except StreamloadError as error:
                raise error.locate(uri=self.uri, object=key) from None
            except Exception as error:
                translated = store.translate(error)
                if translated is None:
                    raise
                # Not chained: the client's texts may show a signed address.
                raise translated.locate(uri=self.uri, object=key) from None

    async def _run(self, function: Callable[[], T]) -> T:
        call = ThreadCall(self._threads, function)
        try:
            return await call.result()
        except asyncio.CancelledError:
            call.take_back()
            raise
        except StreamloadError as error:
            raise error.locate(uri=self.uri) from None


def _place_of(uri: str) -> tuple[str, str, str | None]:
    """The bucket, the prefix with a slash at its end, and the name of the one object, if the URI names one."""
    bucket, _, path = uri.partition("://")[2].partition("/")
    if not bucket or "@" in bucket or ":" in bucket:
        scheme = uri.partition("://")[0]
        raise OptionError(f"such a URI is {scheme}://bucket, with a prefix or one object's key after it", uri=uri)
    if path.endswith(".safetensors"):
        folder, slash, name = path.rpartition("/")
        return bucket, folder + slash, name
    return bucket, path if path.endswith("/") or not path else f"{path}/", None
