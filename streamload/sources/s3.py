"""Objects in S3, and in what speaks its protocol."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from streamload.checksums import ALGORITHMS, Checksum, PartChecksums, Sha256
from streamload.errors import (
    CredentialsError,
    NotFoundError,
    ObjectChangedError,
    OptionError,
    SourceError,
    TransientError,
    TruncatedReadError,
)
from streamload.loan import Loan
from streamload.sources.base import Source, SourceObject
from streamload.sources.keys import check_key
from streamload.sources.operations import Operations
from streamload.sources.s3_settings import S3Settings
from streamload.sources.writer import ViewWriter

if TYPE_CHECKING:
    from streamload.sources.s3_client import Connection, S3Client
    from streamload.wire import Head

__all__ = ["Place", "S3Source", "place_of"]

# A listing of so many objects is not a checkpoint's, and would take a minute: 1000 come with each page.
_MAX_PAGES = 100

# Of those that are named where there is nothing beside them.
_SHOWN_FOLDERS = 5

# Of a number of 64 bits with a sign.
_MAX_SIZE_BYTES = (1 << 63) - 1

# Connections beyond those that read: for listing, and for a read that begins while another one's connection is closing.
_SPARE_CONNECTIONS = 4

# As the AWS command line writes them: an access point of S3's, of S3 Object Lambda's or of an outpost, with a slash or
# a colon before its name; then the key.
_ARN = re.compile(
    r"(?P<bucket>arn:aws[a-z-]*:"
    r"(?:s3|s3-object-lambda):[a-z0-9-]*:[0-9]{12}:accesspoint[/:][A-Za-z0-9.-]{1,63}"
    r"|arn:aws[a-z-]*:s3-outposts:[a-z0-9-]+:[0-9]{12}:outpost[/:][A-Za-z0-9-]{1,63}[/:]accesspoint[/:][A-Za-z0-9-]{1,63}"
    r")(?:/(?P<path>.*))?",
    re.DOTALL,
)

# All that any bucket's name can have: S3 itself and its likes are stricter, each in its own way.
_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")

# What may follow a question mark; after any other word it belongs to the key, which may have one.
_OPTIONS = re.compile(r"(?:versionId|requestPayer)=[^&?/]*(?:&(?:versionId|requestPayer)=[^&?/]*)*")

# The most that is taken from the connection's buffer at once. aiohttp stops reading the socket when it holds 128 KiB,
# so this takes all there is; where that is one piece, as when we keep up, it is handed over without being joined.
_MAX_PIECE_BYTES = 1 << 20


class S3Source(Source):
    """The objects directly under ``s3://bucket/prefix``, or one, ``s3://bucket/folder/name.safetensors``.

    A prefix means a folder, with a slash at its end or without. In the bucket's place there may be the ARN of an access
    point. ``?versionId=...`` after one object's name means that version of it; ``?requestPayer=requester`` says that
    whoever asks pays for it, and ``&`` joins the two.

    Endpoint, region, addressing style and credentials are found as by all AWS tools: environment, profile, container,
    instance role; credentials that expire are refreshed, and found anew where the server says that they have expired.
    Every read is of one ETag, sent as ``If-Match`` and compared with the answer's.

    A read that ends early, by an error or cancelled, closes its connection: the rest of its body would come first.

    Args:
        uri: The URI, taken literally: ``%`` and ``+`` have no meaning in it, nor has any other ``?``.
        concurrency: How many reads should be possible at once; by default, the class's `most_concurrency`.
        s3_anonymous: Whether to ask without credentials, and not to look for any.
        s3_settings: What counts more than what AWS tools would find.
        connect_timeout_s: How long making a connection may take: two lost packets are mended after 3 s.
        read_timeout_s: How long a connection may be silent. S3 sends the first byte within a second nearly always; a
            store that fetches from a slower one takes longer.

    Raises:
        OptionError: The URI names no bucket, an ARN that is no access point's, or a version of more than one object.
    """

    scheme: ClassVar[str] = "s3"
    # What one connection brings (about 90 MB/s) in half the time that a request waits for its first byte (about 25 ms).
    # Only half: where the link, not the waiting, is the limit, what is read through is paid in full.
    request_cost_bytes: ClassVar[int] = 1 << 20
    # S3's own advice is ranges of 8 to 16 MB; the smaller ones share the work out more evenly and retry less.
    read_bytes: ClassVar[int] = 8 << 20
    # What a link of 5 Gbit/s takes at about 90 MB/s a connection; where more bring more, there will be more. A link
    # that is full with so many sees twice as many connections at most, while that is tried.
    concurrency: ClassVar[int] = 8
    # What a link of 50 Gbit/s takes.
    most_concurrency: ClassVar[int | None] = 64
    hedged: ClassVar[bool] = True
    shared_versions: ClassVar[bool] = True

    def __init__(
        self,
        uri: str,
        *,
        concurrency: int | None = None,
        s3_anonymous: bool = False,
        s3_settings: S3Settings | None = None,
        connect_timeout_s: float = 5.0,
        read_timeout_s: float = 20.0,
    ) -> None:
        super().__init__(uri)
        self._place = place_of(uri)
        self.companions = not self._place.versions
        self._connections = (concurrency or self.most_concurrency or self.concurrency) + _SPARE_CONNECTIONS
        self._settings = S3Settings() if s3_settings is None else s3_settings
        self._anonymous = s3_anonymous or self._settings.anonymous
        self._connect_timeout_s = connect_timeout_s
        self._read_timeout_s = read_timeout_s
        self._operations = Operations()
        self._client: S3Client | None = None
        self._in_parts: set[str] = set()  # objects of which the listing tells that their checksum is of parts
        self._opening = asyncio.Lock()

    async def list(self) -> list[SourceObject]:
        if self._place.name is not None:
            return [await self.stat(self._place.name)]
        async with self._operations.running():
            try:
                objects, folders = await self._list_folder(await self._open())
            except SourceError as error:
                raise error.locate(uri=self.uri) from None
        if not objects:
            raise NotFoundError(f"there are no objects under this prefix{_shown(folders)}", uri=self.uri)
        return sorted(objects, key=lambda object: object.key)

    async def stat(self, key: str) -> SourceObject:
        check_key(key, uri=self.uri)
        async with self._operations.running():
            try:
                client = await self._open()
                answer = await client.head(self._place.prefix + key)
                return _object(key, answer.get("ContentLength"), answer.get("ETag"))
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
                await self._fetch(await self._open(), object, start, end, loan)
            except SourceError as error:
                raise error.locate(uri=self.uri, object=object.key, start=start, end=end) from None

    async def check_version(self, object: SourceObject) -> None:
        """Ask whether an object is still the version that was listed.

        By one byte of it, since that goes without aiobotocore, which takes ten times as long to ask for less.

        Raises:
            ObjectChangedError: It is another one.
            SourceError: It cannot be asked for.
        """
        from streamload.sources.s3_wire import UnservedError

        check_key(object.key, uri=self.uri)
        key = self._place.prefix + object.key

        def accept(head: Head) -> None:
            _check_head(head.status, head.headers.get("etag"), head.headers.get("content-range"), object, 0, 1)

        async with self._operations.running():
            try:
                client = await self._open()
                try:
                    await client.get(key, 0, 1, object.version, Loan([memoryview(bytearray(1))]), accept)
                except UnservedError:
                    await client.call("head_object", version=object.version, Key=key, IfMatch=object.version)
            except SourceError as error:
                raise error.locate(uri=self.uri, object=object.key) from None

    async def checksum(self, object: SourceObject) -> Checksum | PartChecksums | None:
        from streamload.sources.s3_checksums import composite_of, part_checksums, sha256_of, whole_checksum

        async with self._asking(object) as client:
            parts = None
            if object.key in self._in_parts:
                # Both at once: the one is of no use without the other.
                try:
                    async with asyncio.TaskGroup() as group:
                        head = group.create_task(self._head_with_checksums(client, object))
                        listing = group.create_task(self._list_parts(client, object))
                except ExceptionGroup as errors:
                    raise errors.exceptions[0] from None
                answer, parts = head.result(), listing.result()
            else:
                answer = await self._head_with_checksums(client, object)
            composite = composite_of(answer)
            if composite is not None:
                if parts is None:
                    self.checksum_trips = 2
                    parts = await self._list_parts(client, object)
                return part_checksums(*composite, parts, object.size_bytes)
            whole = whole_checksum(answer)
            if whole is None and sha256_of(answer) is not None:
                raise SourceError("the store keeps a SHA-256 instead, which is compared with verify='sha256' only")
            return whole

    async def sha256(self, object: SourceObject) -> bytes | Sha256 | None:
        from streamload.sources.s3_checksums import part_sha256s, sha256_of, whole_sha256

        async with self._asking(object) as client:
            text = sha256_of(await self._head_with_checksums(client, object))
            if text is None:
                return None
            if "-" not in text:
                return whole_sha256(text)
            return part_sha256s(text, await self._list_parts(client, object), object.size_bytes)

    @asynccontextmanager
    async def _asking(self, object: SourceObject) -> AsyncIterator[S3Client]:
        """The client, for questions about an object; errors are located."""
        check_key(object.key, uri=self.uri)
        async with self._operations.running():
            try:
                yield await self._open()
            except SourceError as error:
                raise error.locate(uri=self.uri, object=object.key) from None

    async def _head_with_checksums(self, client: S3Client, object: SourceObject) -> dict[str, Any]:
        return await client.call(
            "head_object",
            version=object.version,
            Key=self._place.prefix + object.key,
            IfMatch=object.version,
            ChecksumMode="ENABLED",
        )

    async def describe(self) -> dict[str, str]:
        async with self._operations.running():
            try:
                client = await self._open()
            except CredentialsError as error:
                return {"credentials": f"none: {error.cause}"}
            except SourceError as error:
                return {"answer": f"none: {error.cause}"}
            return await client.describe(self._place.prefix)

    async def connection(self) -> Connection:
        """Where objects are asked for, and with what: for those who ask S3 themselves.

        Raises:
            CredentialsError: There are no credentials.
        """
        async with self._operations.running():
            try:
                return await (await self._open()).connection()
            except SourceError as error:
                raise error.locate(uri=self.uri) from None

    def plain_uri_of(self, key: str) -> str | None:
        """An object as ``s3://bucket/key``; None where more than that is to be said to S3."""
        place = self._place
        if place.versions or place.requester_pays or place.bucket.startswith("arn:"):
            return None
        return f"s3://{place.bucket}/{place.prefix}{key}"

    async def aclose(self) -> None:
        try:
            await self._operations.close()
        finally:
            client, self._client = self._client, None
            if client is not None:
                await client.aclose()

    async def _open(self) -> S3Client:
        """The client, made by the first operation that needs it."""
        if self._client is None:
            async with self._opening:
                if self._client is None:
                    # Only here: importing botocore and aiohttp takes as long as a small load. On a thread: a sidecar's
                    # startup probe is answered meanwhile.
                    await asyncio.to_thread(import_module, "streamload.sources.s3_client")
                    from streamload.sources.s3_client import Asked, S3Client

                    asked = Asked(
                        self._place.bucket,
                        versions=self._place.versions,
                        requester_pays=self._place.requester_pays,
                        anonymous=self._anonymous,
                        connections=self._connections,
                        connect_timeout_s=self._connect_timeout_s,
                        read_timeout_s=self._read_timeout_s,
                        settings=self._settings,
                    )
                    self._client = await S3Client.open(asked, count=self._count)
        return self._client

    def _count(self) -> None:
        if self.asked_at_s is None:
            self.asked_at_s = time.monotonic()
        self.requests += 1

    async def _list_folder(self, client: S3Client) -> tuple[Sequence[SourceObject], Sequence[str]]:
        """The objects, and the names of some of the folders beside them."""
        prefix = self._place.prefix
        objects: list[SourceObject] = []
        folders: list[str] = []
        more: dict[str, str] = {}
        for _ in range(_MAX_PAGES):
            page = await client.call("list_objects_v2", Prefix=prefix, Delimiter="/", **more)
            for entry in page.get("Contents", ()):
                name = entry.get("Key", "")
                if not name.startswith(prefix) or not name:
                    raise SourceError(f"{client.host} lists {name!r}, which is not under the prefix that was asked for")
                key = name.removeprefix(prefix)
                # Consoles mark a folder with an empty object that is called as the folder is.
                if key and not key.endswith("/"):
                    combinable = set(ALGORITHMS).intersection(entry.get("ChecksumAlgorithm", ()))
                    if combinable and entry.get("ChecksumType") == "COMPOSITE":
                        self._in_parts.add(key)
                    objects.append(_object(key, entry.get("Size"), entry.get("ETag")))
            if len(folders) <= _SHOWN_FOLDERS:
                folders += [str(entry.get("Prefix")).removeprefix(prefix) for entry in page.get("CommonPrefixes", ())]
            if not page.get("IsTruncated"):
                return objects, folders
            token = page.get("NextContinuationToken")
            if not token:
                raise SourceError(f"{client.host} says that its listing goes on, and not where")
            more = {"ContinuationToken": token}
        raise SourceError(f"there are more than {len(objects)} objects under this prefix: this is no checkpoint")

    async def _list_parts(self, client: S3Client, object: SourceObject) -> Sequence[dict[str, Any]]:
        """The parts that an object was uploaded in, with their sizes and checksums."""
        parts: list[dict[str, Any]] = []
        more: dict[str, Any] = {}
        for _ in range(_MAX_PAGES):
            page = await client.call(
                "get_object_attributes",
                Key=self._place.prefix + object.key,
                ObjectAttributes=["ETag", "ObjectParts"],
                **more,
            )
            # It takes no If-Match.
            if str(page.get("ETag")).strip('"') != object.version.strip('"'):
                raise ObjectChangedError(f"the object is now version {page.get('ETag')}, not {object.version}")
            listed = page.get("ObjectParts", {})
            parts += listed.get("Parts", ())
            if not listed.get("IsTruncated"):
                return parts
            more = {"PartNumberMarker": listed.get("NextPartNumberMarker")}
        raise SourceError(f"there are more than {len(parts)} parts")

    async def _fetch(self, client: S3Client, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        """Read a range on the direct way where that serves it, else with aiobotocore."""
        from streamload.sources.s3_wire import UnservedError

        def accept(head: Head) -> None:
            _check_head(head.status, head.headers.get("etag"), head.headers.get("content-range"), object, start, end)

        try:
            await client.get(self._place.prefix + object.key, start, end, object.version, loan, accept)
        except UnservedError as error:
            self._note_path(f"through aiobotocore: {error}", end - start)
            await self._fetch_plainly(client, object, start, end, ViewWriter(loan.views))
        else:
            self._note_path("from the socket into place", end - start)

    def _note_path(self, path: str, nbytes: int) -> None:
        self.paths[path] = self.paths.get(path, 0) + nbytes

    async def _fetch_plainly(
        self, client: S3Client, object: SourceObject, start: int, end: int, writer: ViewWriter
    ) -> None:
        answer = await client.call(
            "get_object",
            version=object.version,
            Key=self._place.prefix + object.key,
            Range=f"bytes={start}-{end - 1}",
            IfMatch=object.version,
        )
        body = answer["Body"]
        try:
            status = answer["ResponseMetadata"]["HTTPStatusCode"]
            _check_head(status, answer.get("ETag"), answer.get("ContentRange"), object, start, end)
            with client.translating():
                # To the end of the body, not of the range: only then does the connection return to the pool.
                while piece := await body.read(_MAX_PIECE_BYTES):
                    if writer.write(piece):
                        raise SourceError(f"{client.host} sent more bytes than were asked for")
        except TransientError as error:
            error.valid_bytes = writer.filled
            raise
        finally:
            # A connection whose body was read to its end is in the pool by now, and this does nothing.
            body.close()
        if writer.filled < end - start:
            raise TruncatedReadError(
                f"{client.host} sent {writer.filled} of {end - start} bytes", valid_bytes=writer.filled
            )


class Place(NamedTuple):
    """What an S3 URI means."""

    bucket: str  # its name, or the ARN of an access point
    prefix: str  # empty, or with a slash at its end
    name: str | None  # of the one object that the URI names
    versions: dict[str, str]  # of that object, by its key in the bucket; empty for the newest
    requester_pays: bool


def place_of(uri: str) -> Place:
    """Take an S3 URI apart.

    Raises:
        OptionError: It names no bucket, or makes no sense.
    """
    rest, options = _options_of(uri.partition("://")[2], uri)
    bucket, _, path = rest.partition("/")
    arn = _ARN.fullmatch(rest)
    if bucket.startswith("arn:"):
        if arn is None:
            raise OptionError("this is not the ARN of an access point, with a prefix or key after it or not", uri=uri)
        bucket, path = arn["bucket"], arn["path"] or ""
    # Who writes user:password@bucket may mean it; it has no meaning here, and must not come as far as a message.
    if not bucket or "@" in bucket or (":" in bucket and not bucket.startswith("arn:")):
        raise OptionError("an S3 URI is s3://bucket, s3://bucket/prefix or s3://bucket/key.safetensors", uri=uri)
    if not arn and not _BUCKET.fullmatch(bucket):
        raise OptionError(
            f"{bucket!r} cannot be a bucket's name: those have letters, digits, dots, dashes and underscores only",
            uri=uri,
        )
    version_id, requester_pays = options.get("versionId"), "requestPayer" in options
    if path.endswith(".safetensors"):
        folder, slash, name = path.rpartition("/")
        versions = {} if version_id is None else {path: version_id}
        return Place(bucket, folder + slash, name, versions, requester_pays)
    if version_id is not None:
        raise OptionError("versionId is of one object: name one that ends in .safetensors, not a prefix", uri=uri)
    return Place(bucket, path if path.endswith("/") or not path else f"{path}/", None, {}, requester_pays)


def _options_of(rest: str, uri: str) -> tuple[str, dict[str, str]]:
    """What comes before the last question mark, and the options after it; all of it where those are none."""
    before, mark, after = rest.rpartition("?")
    if not mark or not _OPTIONS.fullmatch(after):
        return rest, {}
    options: dict[str, str] = {}
    for field in after.split("&"):
        name, _, value = field.partition("=")
        if name in options:
            raise OptionError(f"{name} is given twice", uri=uri)
        if not value or (name == "requestPayer" and value != "requester"):
            raise OptionError(f"{name} is {value!r}: what is known is versionId=ID and requestPayer=requester", uri=uri)
        options[name] = value
    return before, options


def _shown(folders: Sequence[str]) -> str:
    """The folders that somebody may have meant."""
    if not folders:
        return ""
    more = ", …" if len(folders) > _SHOWN_FOLDERS else ""
    return f", only folders: {', '.join(folders[:_SHOWN_FOLDERS])}{more}"


def _object(key: str, size_bytes: int | None, tag: str | None) -> SourceObject:
    if size_bytes is None or not tag:
        raise SourceError("the server tells no size or no ETag, so no version can be pinned", object=key)
    if not 0 <= size_bytes <= _MAX_SIZE_BYTES:
        raise SourceError(f"the server says that the object has {size_bytes} bytes", object=key)
    # It goes into the head of requests as it is.
    if not (tag.isascii() and tag.isprintable()):
        raise SourceError(f"the server tells an ETag that is none: {tag!r}", object=key)
    return SourceObject(key, size_bytes, tag)


def _check_head(
    status: int, tag: str | None, content_range: str | None, object: SourceObject, start: int, end: int
) -> None:
    """Refuse an answer that is not exactly the range that was asked for, of the version that was."""
    if not tag:
        raise SourceError("the answer has no ETag, so its version is not known")
    # Some servers quote the tag in one kind of answer and not in another.
    if tag.strip('"') != object.version.strip('"'):
        raise ObjectChangedError(f"the object is now version {tag}; the one seen first was {object.version}")
    if status == 206:
        asked = f"bytes {start}-{end - 1}/"
        if content_range not in {f"{asked}{object.size_bytes}", f"{asked}*"}:
            raise SourceError(f"asked for {asked}{object.size_bytes}, the answer has {content_range}")
    elif status != 200:
        raise SourceError(f"the server answered {status} to a range request")
    elif (start, end) != (0, object.size_bytes):
        raise SourceError("the server ignores ranges: it answered 200 with the whole object")
