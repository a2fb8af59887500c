"""A source whose objects lie in this process's memory: for tests, and for checkpoints that were never files."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Mapping
from typing import ClassVar

from streamload.checksums import Checksum, PartChecksums, PartialChecksum
from streamload.errors import ClosedError, NotFoundError, ObjectChangedError, SourceError
from streamload.loan import Loan
from streamload.sources.base import Source, SourceObject

__all__ = ["MemorySource"]


class MemorySource(Source):
    """Objects from a mapping of keys to bytes; the mapping may change while the source is open.

    Args:
        objects: Key to content.
        uri: What reports and errors should call this source.
    """

    scheme: ClassVar[str] = "memory"
    request_cost_bytes: ClassVar[int] = 4096
    read_bytes: ClassVar[int] = 8 << 20
    concurrency: ClassVar[int] = 4

    def __init__(self, objects: Mapping[str, bytes], *, uri: str = "memory://") -> None:
        super().__init__(uri)
        self.objects = objects
        self.closed = False

    async def list(self) -> list[SourceObject]:
        await self._turn()
        found = [self._describe(key) for key in sorted(self.objects) if "/" not in key]
        if not found:
            raise NotFoundError("nothing is there", uri=self.uri)
        return found

    async def stat(self, key: str) -> SourceObject:
        await self._turn()
        return self._describe(key)

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        if start == end:
            return
        await self._turn()
        if self._describe(object.key).version != object.version:
            raise ObjectChangedError("the object has changed since the load began", object=object.key)
        if not 0 <= start <= end <= object.size_bytes:
            raise SourceError(f"the object has {object.size_bytes} bytes", object=object.key, start=start, end=end)
        content = memoryview(self.objects[object.key])
        for view in loan.views:
            view[:] = content[start : start + view.nbytes]
            start += view.nbytes

    async def checksum(self, object: SourceObject) -> Checksum | PartChecksums | None:
        await self._turn()
        whole = PartialChecksum("CRC64NVME", object.size_bytes)
        whole.add(0, [self.objects[object.key]])
        return whole.result()

    async def aclose(self) -> None:
        self.closed = True

    async def _turn(self) -> None:
        """What every request does: count, and let others run."""
        if self.closed:
            raise ClosedError("the source is closed", uri=self.uri)
        self.requests += 1
        await asyncio.sleep(0)

    def _describe(self, key: str) -> SourceObject:
        try:
            content = self.objects[key]
        except KeyError:
            raise NotFoundError("there is no such object", uri=self.uri, object=key) from None
        return SourceObject(key, len(content), hashlib.sha256(content).hexdigest())
