"""What a sidecar stages onto a volume: read from there, as it lands."""

from __future__ import annotations

import os
from functools import partial
from typing import Any, ClassVar

from streamload.errors import NotFoundError, ObjectChangedError, SourceError
from streamload.loan import Loan
from streamload.sources.base import SourceObject
from streamload.sources.keys import check_key
from streamload.sources.local import LocalSource
from streamload.sources.positional import OpenFile
from streamload.sources.sidecar_client import PATIENCE_S, SidecarClient, socket_path
from streamload.sources.sidecar_protocol import OBJECTS, RANGE, START, STATUS, VERDICT
from streamload.sources.threads import ThreadCall
from streamload.uris import scrub_uri

__all__ = ["SidecarSource"]

# A file gets its name once, while one who was told its old one is about to open it.
_TRIES = 3


class _LandedFile(OpenFile):
    """A file on the volume, of which parts may have landed.

    Args:
        path: Where it is now.
        size_bytes: Its length, which it has from the start.
        mtime_ns: When it was changed last; None while it is not whole.
    """

    def __init__(self, path: str, size_bytes: int, mtime_ns: int | None) -> None:
        super().__init__(path, "")
        self._size_bytes = size_bytes
        self._mtime_ns = mtime_ns

    def check(self, fd: int) -> None:
        _check(os.fstat(fd), self._size_bytes, self._mtime_ns)


def _check(status: os.stat_result, size_bytes: int, mtime_ns: int | None) -> None:
    """See that a file is what the sidecar told of.

    Raises:
        ObjectChangedError: It is not.
    """
    if status.st_size != size_bytes:
        raise ObjectChangedError(f"the file on the volume has {status.st_size} bytes, not {size_bytes}")
    if mtime_ns is not None and status.st_mtime_ns != mtime_ns:
        raise ObjectChangedError("the file on the volume was changed since it was staged")


class _Object:
    """One version of an object, and what the sidecar has told of it.

    Attributes:
        path: Where it can be read, relative to the socket's folder; None before it was asked for.
        landed: A range that can be read.
        stamp: What we know it by: of all that was read of it nothing was replaced as long as the sidecar knows this.
        file: The open file.
    """

    __slots__ = ("file", "landed", "mtime_ns", "object", "path", "stamp")

    def __init__(self, object: SourceObject) -> None:
        self.object = object
        self.path: str | None = None
        self.landed = (0, 0)
        self.mtime_ns: int | None = None
        self.stamp: str | None = None
        self.file: OpenFile | None = None

    def take(self, said: dict[str, Any], *, uri: str) -> None:
        """Note where it can be read.

        Raises:
            SourceError: The answer makes no sense, or names what does not lie in the socket's folder.
        """
        path, stamp, landed, mtime_ns = (said.get(name) for name in ("path", "stamp", "landed", "mtime_ns"))
        if (
            not isinstance(path, str)
            or not isinstance(stamp, str)
            or not isinstance(mtime_ns, int | None)
            or not (isinstance(landed, list) and len(landed) == 2 and all(type(each) is int for each in landed))
        ):
            raise SourceError("the sidecar's answer makes no sense", uri=uri, object=self.object.key)
        check_key(path, uri=uri)
        self.path, self.mtime_ns = path, mtime_ns
        self.landed = (landed[0], landed[1])
        # The first one: what was read since then is what counts.
        self.stamp = stamp if self.stamp is None else self.stamp

    def has(self, start: int, end: int) -> bool:
        """Whether a range can be read."""
        return self.path is not None and self.landed[0] <= start and end <= self.landed[1]

    def asked(self, **more: int) -> dict[str, Any]:
        """What to ask the sidecar."""
        return {"key": self.object.key, "version": self.object.version, "stamp": self.stamp, **more}


class SidecarSource(LocalSource):
    """The files that a sidecar stages onto a volume that it shares with us; see docs/serve.md.

    A range that has landed is read from the volume as any file is, with positional reads; the others are waited for,
    and the sidecar brings them first. What is read may not have been verified yet: `conclude` waits for the sidecar's
    verdict on every object of which something was read. A sidecar that crashes is waited for, and gone on with: it
    knows by a stamp whether what was read before still holds.

    Args:
        uri: ``sidecar://`` and the socket's absolute path.
        concurrency: As for `LocalSource`.
        grace_s: As for `LocalSource`.
        patience_s: How long to wait for a sidecar that does not answer, in seconds.

    Raises:
        OptionError: The URI names no socket.
    """

    scheme: ClassVar[str] = "sidecar"

    def __init__(
        self, uri: str, *, concurrency: int | None = None, grace_s: float = 5.0, patience_s: float = PATIENCE_S
    ) -> None:
        path = socket_path(uri)
        super().__init__(os.path.dirname(path), concurrency=concurrency, grace_s=grace_s)
        self.uri = scrub_uri(uri)
        self._root = os.path.dirname(path)
        self._client = SidecarClient(path, uri=self.uri, patience_s=patience_s)
        self._objects: dict[tuple[str, str], _Object] = {}
        self._listed: dict[str, SourceObject] = {}
        self._used: dict[tuple[str, str], _Object] = {}
        self._landed_files: list[_LandedFile] = []
        self._calls = 0

    @property
    def requests(self) -> int:
        """As of every source; those to the sidecar count as well."""
        return self._calls + self._client.requests

    @requests.setter
    def requests(self, count: int) -> None:
        self._calls = count - (self._client.requests if hasattr(self, "_client") else 0)

    async def list(self) -> list[SourceObject]:
        async with self._operations.running():
            objects = await self._list()
        found = [object for object in objects.values() if "/" not in object.key]
        if not found:
            raise NotFoundError("nothing is staged directly under the folder", uri=self.uri)
        return sorted(found, key=lambda object: object.key)

    async def stat(self, key: str) -> SourceObject:
        check_key(key, uri=self.uri)
        if key not in self._listed:
            async with self._operations.running():
                await self._list()
        object = self._listed.get(key)
        if object is None:
            raise NotFoundError("no such file is staged", uri=self.uri, object=key)
        return object

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        if start == end:
            return
        if not 0 <= start < end <= object.size_bytes:
            raise SourceError(
                f"the file has {object.size_bytes} bytes", uri=self.uri, object=object.key, start=start, end=end
            )
        known = self._known(object)
        for last in (False,) * (_TRIES - 1) + (True,):
            if not known.has(start, end):
                async with self._operations.running():
                    said = await self._client.ask("POST", RANGE, known.asked(start=start, end=end))
                known.take(said, uri=self.uri)
                if not known.has(start, end):
                    # What has not landed reads as zeros.
                    raise SourceError("the sidecar's answer makes no sense", uri=self.uri, object=object.key)
            self._used[object.key, object.version] = known
            path = known.path
            try:
                await super().read(object, start, end, loan)
                return
            except NotFoundError:
                if last:
                    raise
                # The file has got its name since; another read may have found that out before.
                if known.path == path:
                    known.path = known.file = None

    async def conclude(self) -> dict[str, str]:
        vouched: dict[str, str] = {}
        for known in [*self._used.values()]:
            async with self._operations.running():
                said = await self._client.ask("POST", VERDICT, known.asked())
                known.take(said, uri=self.uri)
                # What was read must be what the verdict is on, and not have been changed by a stranger since.
                look = partial(_look, os.path.join(self._root or "", known.path or ""), known)
                await self._ask(ThreadCall(self._threads, look).result(), known.object.key)
            if isinstance(said.get("verified"), str):
                vouched[known.object.key] = f"the sidecar: {said['verified']}"
        return vouched

    async def describe(self) -> dict[str, str]:
        async with self._operations.running():
            try:
                status = await self._client.ask("GET", STATUS, patience_s=0.0)
            except SourceError as error:
                return {"sidecar": error.cause}
        return {"sidecar": str(status.get("state")), "stages": str(status.get("uri"))}

    async def aclose(self) -> None:
        try:
            await super().aclose()
        finally:
            for file in self._landed_files:
                file.close()

    async def _list(self) -> dict[str, SourceObject]:
        """What is staged; where staging has failed before, it is begun again."""
        await self._client.ask("POST", START)
        said = (await self._client.ask("GET", OBJECTS)).get("objects")
        listed: dict[str, SourceObject] = {}
        for each in said if isinstance(said, list) else []:
            match each:
                case {"key": str(key), "size_bytes": int(size_bytes), "version": str(version)}:
                    listed[key] = object = SourceObject(key, size_bytes, version)
                case _:
                    raise SourceError("the sidecar's answer makes no sense", uri=self.uri)
            if "path" in each:
                self._known(object).take(each, uri=self.uri)
        self._listed = listed
        return listed

    def _known(self, object: SourceObject) -> _Object:
        return self._objects.setdefault((object.key, object.version), _Object(object))

    def _open(self, root: str, object: SourceObject) -> OpenFile:
        known = self._known(object)
        assert known.path is not None
        if known.file is None:
            # Open until the end: what is read of an object is of one file.
            known.file = _LandedFile(os.path.join(root, known.path), object.size_bytes, known.mtime_ns)
            self._landed_files.append(known.file)
        return known.file


def _look(path: str, known: _Object) -> None:
    named = os.stat(path)
    _check(named, known.object.size_bytes, known.mtime_ns)
    was_read = None if known.file is None else known.file.status()
    if was_read is not None and not os.path.samestat(named, was_read):
        raise ObjectChangedError("the file on the volume is another file than the one that was read")
