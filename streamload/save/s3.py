"""Objects in S3: uploaded in parts with checksums, there when the upload is completed and not before.

Sources: "Checking object integrity in Amazon S3" and "Uploading and copying objects using multipart upload", Amazon S3
user guide.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from streamload.checksums import Checksum, RunningChecksum, combined
from streamload.errors import AccessError, ChecksumError, NotFoundError, OptionError, SourceError
from streamload.save.base import NOTHING_KEPT, Ask, Destination, NewFile
from streamload.sources.s3 import place_of
from streamload.sources.s3_client import Asked, S3Client

__all__ = ["S3Destination"]

# S3 takes no smaller parts, but for the last one, and no more of them.
_LEAST_PART_BYTES = 5 << 20
_MOST_PARTS = 10_000
# As large as reads are: S3's own advice for one connection's share.
_PART_BYTES = 8 << 20
_MIB = 1 << 20

_CONNECTIONS = 16
_CONNECT_TIMEOUT_S = 5.0
_READ_TIMEOUT_S = 60.0
_MAX_PAGES = 100

# How long a cancelled save waits for an upload that is just being begun, in order to know what to abort.
_GRACE_S = 10.0


class S3Destination(Destination):
    """The objects under ``s3://bucket/prefix``; credentials and endpoint are found as those of `S3Source`.

    Every object is uploaded in parts, each with its CRC-64/NVME, which the store compares. What it then keeps as the
    object's is compared with ours when the upload is completed. What fails or is cancelled is aborted.

    Args:
        uri: The URI.
        memory_bytes: The limit on parts that are filled or on their way; one part at least is.
        ask: Makes requests again.
        files: How many are written at the same time by one task: each of them has a part that waits for more bytes.

    Raises:
        OptionError: The URI names one object, or a version.
    """

    held_bytes = _LEAST_PART_BYTES

    def __init__(self, uri: str, *, memory_bytes: int, ask: Ask, files: int = 1) -> None:
        super().__init__(uri)
        self._usual_part_bytes = _PART_BYTES
        if files > 1:
            self._usual_part_bytes = max(_LEAST_PART_BYTES, min(_PART_BYTES, memory_bytes // (files + 1)))
        place = place_of(uri)
        if place.name is not None:
            raise OptionError("this names one object: name the prefix that the files belong under", uri=uri)
        self.prefix = place.prefix
        self._asked = Asked(
            place.bucket,
            versions={},
            requester_pays=place.requester_pays,
            anonymous=False,
            connections=_CONNECTIONS,
            connect_timeout_s=_CONNECT_TIMEOUT_S,
            read_timeout_s=_READ_TIMEOUT_S,
        )
        self._ask = ask
        self._client: S3Client | None = None
        self._opening = asyncio.Lock()
        self._memory_bytes = memory_bytes
        self._held_bytes = 0
        self._freed = asyncio.Condition()
        self.requests = 0

    async def claim(self, name: str) -> None:
        # An object store knows no locks.
        pass

    async def prepare(
        self, mine: Callable[[str], bool], kept: Mapping[str, dict[str, Any]] = NOTHING_KEPT
    ) -> list[str]:
        there = await self._list("list_objects_v2", "Contents", {"NextContinuationToken": "ContinuationToken"})
        try:
            markers = {"NextKeyMarker": "KeyMarker", "NextUploadIdMarker": "UploadIdMarker"}
            unfinished = await self._list("list_multipart_uploads", "Uploads", markers)
        except SourceError:
            # Not allowed, or not known to the store: its own rules for unfinished uploads then have to do.
            unfinished = []
        for upload in unfinished:
            name = upload["Key"].removeprefix(self.prefix)
            if mine(name) and kept.get(name, {}).get("upload") != upload["UploadId"]:
                await self.abort(name, upload["UploadId"])
        names = (entry["Key"].removeprefix(self.prefix) for entry in there)
        return sorted(name for name in names if mine(name))

    def check_fits(self, sizes: Sequence[int]) -> None:
        # S3 takes 10,000 parts at most, so those of a large object are larger than usual.
        part_bytes = max(map(self._part_bytes, sizes), default=0)
        needed = (len(sizes) + 1) * part_bytes
        if len(sizes) > 1 and needed > self._memory_bytes:
            raise OptionError(
                f"{len(sizes)} objects are written at the same time, the largest of them in parts of {part_bytes} "
                f"bytes: it takes {needed} bytes of memory for parts, and there are {self._memory_bytes}, half of "
                "memory_bytes: raise it, or lower max_file_bytes",
                uri=self.uri,
            )

    async def create(self, name: str, size_bytes: int) -> NewFile:
        file = _Upload(self, name, size_bytes, self._part_bytes(size_bytes))
        try:
            await file.begin()
        except BaseException:
            await file.discard()
            raise
        return file

    async def reopen(
        self, name: str, size_bytes: int, kept: Mapping[str, Any], sums: Sequence[tuple[int, int]] = ()
    ) -> NewFile | None:
        file = _Upload(self, name, size_bytes, self._part_bytes(size_bytes))
        return file if await file.reopen(kept) else None

    async def remove(self, name: str) -> None:
        await self.call("delete_object", name)

    async def abort(self, name: str, upload_id: str) -> None:
        """Abort an upload; where there is none any more, nothing happens.

        Raises:
            SourceError: It cannot be done.
        """
        try:
            await self.call("abort_multipart_upload", name, UploadId=upload_id)
        except NotFoundError:
            pass

    async def call(self, operation: str, name: str, *, body: bytes | None = None, **arguments: Any) -> dict[str, Any]:
        """Make a request about one object, again where that may help.

        Raises:
            SourceError: Of the kind that fits; located.
        """

        async def attempt() -> dict[str, Any]:
            client = await self._open()
            # A reader, since aiohttp warns of large bodies that are bytes; a new one each time, since it is read.
            given = arguments if body is None else {**arguments, "Body": io.BytesIO(body)}
            return await client.call(operation, Key=self.prefix + name, **given)

        try:
            found: dict[str, Any] = await self._ask(attempt, name)
        except SourceError as error:
            raise error.locate(uri=self.uri, object=name) from None
        return found

    def _part_bytes(self, size_bytes: int) -> int:
        part_bytes = max(self._usual_part_bytes, -(-size_bytes // _MOST_PARTS // _MIB) * _MIB)
        return max(_LEAST_PART_BYTES, min(part_bytes, size_bytes))

    async def take(self, nbytes: int) -> None:
        """Wait until so much memory may be held; where nothing is, any amount may."""
        async with self._freed:
            await self._freed.wait_for(lambda: not self._held_bytes or self._held_bytes + nbytes <= self._memory_bytes)
            self._held_bytes += nbytes

    async def give(self, nbytes: int) -> None:
        """So much memory is no longer held."""
        # At once: whoever is cancelled below has given it back all the same.
        self._held_bytes -= nbytes
        async with self._freed:
            self._freed.notify_all()

    async def aclose(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def _open(self) -> S3Client:
        async with self._opening:
            if self._client is None:
                self._client = await S3Client.open(self._asked, count=self._count)
        return self._client

    def _count(self) -> None:
        self.requests += 1

    async def _list(self, operation: str, field: str, markers: dict[str, str]) -> list[dict[str, Any]]:
        """All pages of a listing of what lies directly under the prefix.

        Args:
            operation: The client's method.
            field: Where an answer has the entries.
            markers: Where it says how to go on, and what the next request calls that.
        """
        found: list[dict[str, Any]] = []
        more: dict[str, Any] = {}

        async def attempt() -> dict[str, Any]:
            client = await self._open()
            return await client.call(operation, Prefix=self.prefix, Delimiter="/", **more)

        for _ in range(_MAX_PAGES):
            try:
                page = await self._ask(attempt, "")
            except SourceError as error:
                raise error.locate(uri=self.uri) from None
            found += page.get(field, ())
            more = {theirs: page[ours] for ours, theirs in markers.items() if page.get(ours)}
            if not page.get("IsTruncated") or not more:
                return found
        raise SourceError(f"there are more than {len(found)} entries under this prefix", uri=self.uri)


class _Upload(NewFile):
    def __init__(self, folder: S3Destination, name: str, size_bytes: int, part_bytes: int) -> None:
        super().__init__(name, size_bytes)
        self._folder = folder
        self._part_bytes = part_bytes
        self._id: str | None = None
        # A part that is being filled; it gives its bytes out without copying them.
        self._buffer: io.BytesIO | None = None
        self._written = 0
        self._sending: list[asyncio.Task[dict[str, Any]]] = []
        self._sums: list[tuple[int, int]] = []
        self._parts: list[dict[str, Any]] = []
        self._failed: BaseException | None = None

    async def begin(self) -> None:
        """Have an upload. Cancelled, this still waits to learn which one it is: it has to be aborted."""
        asking = asyncio.ensure_future(
            self._folder.call(
                "create_multipart_upload", self.name, ChecksumAlgorithm="CRC64NVME", ChecksumType="FULL_OBJECT"
            )
        )
        try:
            answer = await asyncio.shield(asking)
        except asyncio.CancelledError:
            await asyncio.wait({asking}, timeout=_GRACE_S)
            if asking.done() and not asking.cancelled() and asking.exception() is None:
                self._id = asking.result()["UploadId"]
            asking.cancel()
            raise
        self._id = answer["UploadId"]

    async def write(self, data: memoryview) -> None:
        while data.nbytes:
            buffer = self._buffer
            if buffer is None:
                self._look()
                await self._folder.take(self._part_bytes)
                buffer = self._buffer = io.BytesIO()
            piece = data[: self._part_bytes - buffer.tell()]
            buffer.write(piece)
            self._written += piece.nbytes
            data = data[piece.nbytes :]
            if buffer.tell() == self._part_bytes:
                self._send(buffer)

    def _send(self, buffer: io.BytesIO) -> None:
        """Send the part that is filled; its memory is given back when it has gone."""
        self._buffer = None
        body = buffer.getvalue()
        running = RunningChecksum("CRC64NVME")
        running.add(memoryview(body))
        self._sums.append((len(body), running.value))
        self._sending.append(asyncio.create_task(self._send_part(len(self._sums), body, running.value)))

    async def _send_part(self, number: int, body: bytes, value: int) -> dict[str, Any]:
        text = _base64(value)
        try:
            answer = await self._folder.call(
                "upload_part", self.name, body=body, UploadId=self._id, PartNumber=number, ChecksumCRC64NVME=text
            )
            return {"PartNumber": number, "ETag": answer["ETag"], "ChecksumCRC64NVME": text}
        except BaseException as error:
            self._failed = self._failed or error
            raise
        finally:
            await self._folder.give(self._part_bytes)

    def _look(self) -> None:
        """Raise what a part has failed with, rather than sending others after it."""
        if self._failed is not None:
            raise self._failed

    async def finish(self) -> None:
        if self._written != self.size_bytes:
            raise AssertionError(f"{self._written} of {self.size_bytes} bytes were written")
        if self._buffer is None and not self._sums:  # no bytes at all are one part
            await self._folder.take(self._part_bytes)
            self._buffer = io.BytesIO()
        if self._buffer is not None:
            self._send(self._buffer)
        sent = list(self._sending)
        done, _ = await asyncio.wait(sent, return_when=asyncio.FIRST_EXCEPTION)
        self._look()
        self._parts = [task.result() for task in sent]
        assert len(done) == len(sent)

    async def publish(self) -> None:
        if self.published:
            return
        # From here on, cancelled or cut off, it may have been completed all the same: then it has to be removed.
        self.doubtful = True
        try:
            answer = await self._folder.call(
                "complete_multipart_upload", self.name, UploadId=self._id, MultipartUpload={"Parts": self._parts}
            )
        except NotFoundError:
            # Perhaps an attempt whose answer was lost has completed it; or somebody has aborted it.
            answer = await self._folder.call("head_object", self.name, ChecksumMode="ENABLED")
            if not self._is_ours(answer):
                self.doubtful = False
                raise
        except AccessError as error:
            # Refused at once, it was not done. Whether an attempt without an answer has done it, nobody knows.
            self.doubtful = (error.attempts or 1) > 1
            raise
        self.published, self.doubtful = True, False
        self._id = None
        # Each part was compared when it came. What they were put together to is told only now.
        kept = answer.get("ChecksumCRC64NVME")
        if kept is not None and kept not in self._whole():
            raise ChecksumError(
                f"the store says that the object sums up to {kept}, and what was sent to {self._whole()[0]}",
                uri=self._folder.uri,
                object=self.name,
            )

    def _whole(self) -> tuple[str, str]:
        """The object's checksum as S3 writes it; and as stores do that know a checksum of checksums only."""
        whole = combined("CRC64NVME", self._sums)
        composite = Checksum.of_checksums("CRC64NVME", (value for _, value in self._sums))
        return _base64(whole.value), f"{_base64(composite.value)}-{len(self._sums)}"

    async def keep(self) -> dict[str, Any] | None:
        if not self._parts:
            return None
        parts = [[part["ETag"], part["ChecksumCRC64NVME"]] for part in self._parts]
        return {"upload": self._id, "part_bytes": self._part_bytes, "parts": parts}

    async def leave(self) -> None:
        if not self._parts:
            await self.discard()

    async def reopen(self, kept: Mapping[str, Any]) -> bool:
        """Have the finished upload, or the object that has come of it; whether it is there."""
        self._id, self._part_bytes = kept["upload"], kept["part_bytes"]
        self._parts = [
            {"PartNumber": number, "ETag": tag, "ChecksumCRC64NVME": text}
            for number, (tag, text) in enumerate(kept["parts"], 1)
        ]
        for number, part in enumerate(self._parts):
            nbytes = min(self._part_bytes, self.size_bytes - number * self._part_bytes)
            self._sums.append((nbytes, int.from_bytes(base64.b64decode(part["ChecksumCRC64NVME"]), "big")))
        try:
            there = await self._list_parts()
        except NotFoundError:
            self._id = None
            self.published = await self._is_there()
            return self.published
        return there == [(part["PartNumber"], part["ETag"].strip('"')) for part in self._parts]

    async def _list_parts(self) -> list[tuple[int, str]]:
        found: list[tuple[int, str]] = []
        more: dict[str, Any] = {}
        while True:
            page = await self._folder.call("list_parts", self.name, UploadId=self._id, **more)
            found += [(part["PartNumber"], part["ETag"].strip('"')) for part in page.get("Parts", ())]
            if not page.get("IsTruncated") or len(found) > _MOST_PARTS:
                return found
            more = {"PartNumberMarker": page["NextPartNumberMarker"]}

    async def discard(self) -> None:
        sending, self._sending = self._sending, []
        for task in sending:
            task.cancel()
        if sending:
            # Before the upload is aborted: a part that is still arriving then would stay.
            await asyncio.gather(*sending, return_exceptions=True)
        if self._buffer is not None:
            self._buffer = None
            await self._folder.give(self._part_bytes)
        try:
            if self._id is not None:
                await self._folder.abort(self.name, self._id)
                self._id = None
        finally:
            # After the upload is aborted: from then on it cannot be completed any more. But also where that fails.
            if self.published or (self.doubtful and await self._is_there()):
                await self._folder.remove(self.name)
            self.published = self.doubtful = False

    async def _is_there(self) -> bool:
        """Whether what is under its name is certainly what the upload was completed to."""
        try:
            return self._is_ours(await self._folder.call("head_object", self.name, ChecksumMode="ENABLED"))
        except NotFoundError:
            return False

    def _is_ours(self, answer: Mapping[str, Any]) -> bool:
        """Whether what a store says of an object is said of what was sent, and not of an earlier one."""
        if answer.get("ContentLength") != self.size_bytes:
            return False
        kept = answer.get("ChecksumCRC64NVME")
        if kept is not None:
            return kept in self._whole()
        try:
            tags = [bytes.fromhex(part["ETag"].strip('"')) for part in self._parts]
        except ValueError:
            return False
        # As S3 makes it, and stores that keep no checksum do, where nothing is encrypted.
        tag = f"{hashlib.md5(b''.join(tags), usedforsecurity=False).hexdigest()}-{len(tags)}"
        return str(answer.get("ETag")).strip('"') == tag


def _base64(value: int) -> str:
    return base64.b64encode(value.to_bytes(8, "big")).decode()
