"""A source for streamload: the files in a tar archive, ``tar:///models/llama.tar``."""

from __future__ import annotations

import asyncio
import os
import tarfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar, TypeVar

from streamload.errors import ClosedError, NotFoundError, ObjectChangedError, SourceError, TruncatedReadError
from streamload.loan import Loan
from streamload.sources import Source, SourceObject

__all__ = ["TarSource"]

T = TypeVar("T")


class TarSource(Source):
    """The files at the top of an uncompressed archive; those in its folders can be found by their names.

    Args:
        uri: ``tar://`` and the archive's path.
        concurrency: How many reads should be possible at once.
    """

    scheme: ClassVar[str] = "tar"
    request_cost_bytes: ClassVar[int] = 64 << 10
    read_bytes: ClassVar[int] = 8 << 20
    concurrency: ClassVar[int] = 4

    def __init__(self, uri: str, *, concurrency: int | None = None) -> None:
        super().__init__(uri)
        self._path = uri.partition("://")[2]
        self._threads = ThreadPoolExecutor(concurrency or self.concurrency)
        self._offsets: dict[tuple[str, str], int] = {}
        self._closed = False

    async def list(self) -> list[SourceObject]:
        found = [object for object in await self._call(self._members) if "/" not in object.key]
        if not found:
            raise NotFoundError("there are no files in this archive", uri=self.uri)
        return found

    async def stat(self, key: str) -> SourceObject:
        for object in await self._call(self._members):
            if object.key == key:
                return object
        raise NotFoundError("there is no such file in this archive", uri=self.uri, object=key)

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        if start == end:
            return
        try:
            if not 0 <= start < end <= object.size_bytes:
                raise SourceError(f"the file has {object.size_bytes} bytes")
            await self._call(lambda: self._fill(object, start, loan.views))
        except SourceError as error:
            raise error.locate(uri=self.uri, object=object.key, start=start, end=end) from None

    async def aclose(self) -> None:
        self._closed = True
        self._threads.shutdown()

    async def _call(self, function: Callable[[], T]) -> T:
        """Call a function on a thread. Cancelled, it ends when the thread has left it: until then it may write."""
        if self._closed:
            raise ClosedError("the source was closed", uri=self.uri)
        self.requests += 1
        call = asyncio.get_running_loop().run_in_executor(self._threads, function)
        try:
            return await asyncio.shield(call)
        except asyncio.CancelledError:
            while not call.done():
                try:
                    await asyncio.wait({call})
                except asyncio.CancelledError:
                    continue  # once more: the first one is raised, and the memory is not ours to return yet
            call.exception()  # nobody wants to know
            raise

    def _members(self) -> Sequence[SourceObject]:
        objects = []
        try:
            with tarfile.open(self._path, "r:") as archive:
                version = _version_of(os.stat(self._path))
                for member in archive:
                    if member.isfile():
                        objects.append(SourceObject(member.name, member.size, version))
                        self._offsets[member.name, version] = member.offset_data
        except FileNotFoundError:
            raise NotFoundError("there is no such archive", uri=self.uri) from None
        except (OSError, tarfile.TarError) as error:
            raise SourceError(f"this cannot be read as an archive: {error}", uri=self.uri) from error
        return sorted(objects, key=lambda object: object.key)

    def _fill(self, object: SourceObject, start: int, views: Sequence[memoryview]) -> None:
        try:
            with open(self._path, "rb", buffering=0) as file:
                file.seek(self._offsets[object.key, object.version] + start)
                for view in views:
                    filled = 0
                    while filled < view.nbytes:
                        count = file.readinto(view[filled:])
                        if not count:
                            raise TruncatedReadError("the archive ends before the file does")
                        filled += count
                # Of what was read, whatever has been put into its place meanwhile.
                version = _version_of(os.fstat(file.fileno()))
        except FileNotFoundError:
            raise NotFoundError("the archive is gone") from None
        if version != object.version:
            raise ObjectChangedError(f"the archive is now {version}, and was {object.version}")


def _version_of(status: os.stat_result) -> str:
    return f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}"
