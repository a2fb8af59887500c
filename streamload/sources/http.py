"""Files on any HTTP server that honours ranges."""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import ClassVar
from urllib.parse import SplitResult, quote, unquote, urlsplit

from streamload.errors import (
    AccessError,
    NotFoundError,
    ObjectChangedError,
    OptionError,
    SourceError,
    TransientError,
)
from streamload.loan import Loan
from streamload.sources.base import Source, SourceObject
from streamload.sources.http_answers import parse_http_date
from streamload.sources.http_client import HttpClient, Origin, Resource, checked_headers, escaped, origin_of
from streamload.sources.http_errors import refusal
from streamload.sources.http_ranges import RangeRead, check_identity, total_bytes
from streamload.sources.keys import check_key
from streamload.sources.operations import Operations
from streamload.wire import Head

__all__ = ["HttpSource"]

# What a folder is looked for, one after the other: HTTP has no way to list one.
_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"

# Last-Modified counts seconds: a file that was written twice within one may have changed unseen (RFC 9110, 8.8.2.2).
_SETTLED_S = 1.0


class HttpSource(Source):
    """The files under ``https://host/folder``, or one, ``https://host/folder/name.safetensors``.

    HTTP cannot list a folder: the index file in it says which files there are, and without one there is
    ``model.safetensors``. A query in the URI goes with each request, as signed addresses need it; a user name and a
    password in it are sent as basic authentication. They and `http_headers` go to the URI's own scheme, host and port
    and to nobody that it redirects to.

    Every read is of one version: that of a strong ETag, sent as ``If-Match``, or of a Last-Modified, sent as
    ``If-Unmodified-Since``; either is compared with the answer's, since not every server knows those conditions.

    Args:
        uri: The URI, with ``%`` escapes; what may not stand in one is escaped.
        concurrency: How many reads should be possible at once. Connections are made as they are needed.
        http_headers: What goes with each request.
        connect_timeout_s: How long making a connection may take: two lost packets are mended after 3 s.
        read_timeout_s: How long a connection may be silent.

    Raises:
        OptionError: The URI names no server, or a header cannot be sent.
    """

    scheme: ClassVar[str] = "http"
    # As from an object store: what one connection brings in half the time that a request waits for its first byte.
    request_cost_bytes: ClassVar[int] = 1 << 20
    read_bytes: ClassVar[int] = 8 << 20
    concurrency: ClassVar[int] = 8
    # Half of what an object store is asked for: it may be a single server, which others want something of, too.
    most_concurrency: ClassVar[int | None] = 32
    lists_folders: ClassVar[bool] = False
    hedged: ClassVar[bool] = True
    shared_versions: ClassVar[bool] = True

    def __init__(
        self,
        uri: str,
        *,
        concurrency: int | None = None,
        http_headers: Mapping[str, str] | None = None,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 20.0,
    ) -> None:
        super().__init__(uri)
        self._place = _Place(uri)
        self._client = HttpClient(
            self._place.origin,
            checked_headers(http_headers or {}) | self._place.authorization,
            connect_timeout_s=connect_timeout_s,
            stall_s=read_timeout_s,
            count=self._count,
            paths=self.paths,
        )
        self._operations = Operations()
        self._resources: dict[str, Resource] = {}

    async def list(self) -> list[SourceObject]:
        if self._place.name is not None:
            return [await self.stat(self._place.name)]
        for key in (_INDEX, _SINGLE):
            try:
                return [await self.stat(key)]
            except NotFoundError:
                pass
            except AccessError as error:
                # Not taken for missing: there may be an index, and what else lies there another checkpoint.
                hint = f"a store that lists nothing says so as well where there is no {key}: then name the file"
                raise AccessError(f"{error.cause}; {hint}", uri=self.uri, object=key) from None
        raise NotFoundError(
            f"neither {_INDEX} nor {_SINGLE} is there, and HTTP cannot list what is: name the file", uri=self.uri
        )

    async def stat(self, key: str) -> SourceObject:
        check_key(key, uri=self.uri)
        async with self._operations.running():
            try:
                return _object(key, await self._look(key))
            except SourceError as error:
                raise error.locate(uri=self.uri, object=key) from None

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        if start == end:
            return
        check_key(object.key, uri=self.uri)
        async with self._operations.running():
            try:
                if not 0 <= start < end <= object.size_bytes:
                    raise SourceError(f"the object has {object.size_bytes} bytes")
                await self._fetch(object, start, end, loan)
            except SourceError as error:
                raise error.locate(uri=self.uri, object=object.key, start=start, end=end) from None

    async def describe(self) -> dict[str, str]:
        facts = {"server": f"{self._place.origin.host}:{self._place.origin.port}"}
        async with self._operations.running():
            for key in (self._place.name,) if self._place.name is not None else (_INDEX, _SINGLE):
                try:
                    head = await self._look(key)
                except NotFoundError as error:
                    facts["answer"] = error.cause
                except SourceError as error:
                    return facts | {"answer": error.cause}
                else:
                    named = "ETag" if _strong_tag(head) else "Last-Modified" if _modified(head) else "none"
                    ranges = "honoured" if head.status == 206 else "ignored"
                    return facts | {"answer": str(head.status), "ranges": ranges, "version": named}
        return facts

    async def aclose(self) -> None:
        try:
            await self._operations.close()
        finally:
            await self._client.aclose()

    def _count(self) -> None:
        self.requests += 1

    def _resource(self, key: str) -> Resource:
        resource = self._resources.get(key)
        if resource is None:
            resource = self._resources[key] = Resource(self._place.address(key))
        return resource

    async def _look(self, key: str) -> Head:
        """The head of an answer that tells the object's size and version.

        Its first byte is asked for, not a HEAD: an address that is signed for a GET is good for nothing else, and the
        answer tells whether ranges are honoured.
        """
        byte = memoryview(bytearray(1))

        def accept(head: Head) -> list[memoryview] | None:
            return [byte] if head.status == 206 else None

        resource = self._resource(key)
        head, origin = await self._client.get(resource, {"Range": "bytes=0-0"}, accept)
        if head.status == 416 and total_bytes(head) == 0:
            # An empty object has no first byte. The refusal often leaves out the version.
            head, origin = await self._client.get(resource, {}, lambda head: None)
        if head.status >= 300:
            raise refusal(head, origin.host)
        check_identity(head)
        return head

    async def _fetch(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        def check(head: Head) -> None:
            _check_version(head, object.version)

        range_read = RangeRead(start, end, object.size_bytes, loan, check)
        condition = "If-Match" if object.version.startswith('"') else "If-Unmodified-Since"
        headers = {"Range": range_read.header, condition: object.version}
        try:
            head, origin = await self._client.get(
                self._resource(object.key), headers, range_read.accept, range_read.landed
            )
        except TransientError as error:
            range_read.correct(error)
            raise
        if head.status >= 300:
            raise refusal(head, origin.host)


class _Place:
    """What a URI means.

    Attributes:
        origin: Who is asked.
        name: Of the one object that the URI names; None for a folder.
        authorization: The header that the URI's user name and password make; empty where it has none.
    """

    def __init__(self, uri: str) -> None:
        try:
            parts = urlsplit(uri)
            self.origin: Origin = origin_of(parts)
        except (ValueError, SourceError):
            raise OptionError("an HTTP URI is https://host/folder or https://host/name.safetensors", uri=uri) from None
        if parts.fragment:
            raise OptionError("what follows a # is not asked for: in a name, write %23", uri=uri)
        folder, slash, name = parts.path.rpartition("/")
        single = name.endswith(".safetensors")
        self.name: str | None = unquote(name) if single else None
        self._folder = escaped(folder + slash if single else parts.path.rstrip("/") + "/") or "/"
        self._path = escaped(parts.path)
        self._parts = parts._replace(netloc=parts.netloc.rpartition("@")[2])
        self.authorization = _authorization(parts)

    def address(self, key: str) -> str:
        """Where an object is, with the URI's query."""
        # As it was given, where it was: a signature may be of that spelling.
        path = self._path if key == self.name else self._folder + quote(key, safe="/")
        return self._parts._replace(path=path, query=escaped(self._parts.query)).geturl()


def _authorization(parts: SplitResult) -> dict[str, str]:
    if parts.username is None:
        return {}
    pair = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": "Basic " + base64.b64encode(pair.encode()).decode("ascii")}


def _object(key: str, head: Head) -> SourceObject:
    size_bytes = total_bytes(head) if head.status == 206 else head.body_bytes
    if size_bytes is None:
        raise SourceError("the server does not tell how long the object is")
    tag, modified = _strong_tag(head), _modified(head)
    if tag is not None:
        return SourceObject(key, size_bytes, tag)
    if modified is None:
        raise SourceError("the server tells neither a strong ETag nor Last-Modified, so no version can be pinned")
    modified_s, now_s = parse_http_date(modified), parse_http_date(head.headers.get("date"))
    if modified_s is not None and now_s is not None and now_s - modified_s < _SETTLED_S:
        raise TransientError("the object was changed within this second, and may still be", retry_after_s=_SETTLED_S)
    return SourceObject(key, size_bytes, modified)


def _strong_tag(head: Head) -> str | None:
    """The ETag, where it says that the bytes are the same; a weak one says only that they mean the same."""
    tag = head.headers.get("etag", "")
    return tag if tag.startswith('"') else None


def _modified(head: Head) -> str | None:
    return head.headers.get("last-modified")


def _check_version(head: Head, version: str) -> None:
    """Refuse an answer of another version than the one that was seen first."""
    name, found = ("ETag", _strong_tag(head)) if version.startswith('"') else ("Last-Modified", _modified(head))
    if found is None:
        raise SourceError(f"the answer has no {name}, so its version is not known")
    if found != version:
        raise ObjectChangedError(f"the object is now version {found}; the one seen first was {version}")
