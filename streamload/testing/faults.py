"""A source that fails when it is told to."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import ClassVar, Self, TypeVar

from streamload.checksums import Checksum, PartChecksums, Sha256
from streamload.errors import StreamloadError, TransientError, TruncatedReadError
from streamload.loan import Loan
from streamload.sources import Source, SourceObject

__all__ = ["FaultSource"]

T = TypeVar("T")


class FaultSource(Source):
    """Passes everything on to another source, except for the operations that it spoils.

    The operations are the calls of `list`, `stat`, `checksum` and `read`, counted from 1 in the order in which they
    begin. To find all that a load does, run it once with no fault and take `operations`; then spoil each in turn.

    Args:
        inner: The source that answers. It is entered and closed with this one.
        fail_at: The first operation to spoil; 0 for none.
        times: How many to spoil from there on; None for all.
        error: Makes what a spoiled operation raises. By default a TransientError, or, where bytes are let through, a
            TruncatedReadError. A StreamloadError's ``valid_bytes`` are set to what was let through.
        block: Wait, instead of failing, until cancelled or until `release` is called; a released operation then goes on
            as if nothing had been.
        let_through_bytes: How many leading bytes of a spoiled read arrive before it fails or waits.

    Attributes:
        operations: How many have begun.
        running: How many are under way.
        blocked: Done as soon as an operation waits. Its ``result()`` waits on another thread, and
            ``asyncio.wrap_future(source.blocked)`` on the same one.
        closed: Whether `aclose` was called.
    """

    scheme: ClassVar[str] = "fault"
    request_cost_bytes: ClassVar[int] = 4096
    read_bytes: ClassVar[int] = 8 << 20
    concurrency: ClassVar[int] = 4

    def __init__(
        self,
        inner: Source,
        *,
        fail_at: int = 0,
        times: int | None = 1,
        error: Callable[[], BaseException] | None = None,
        block: bool = False,
        let_through_bytes: int = 0,
    ) -> None:
        super().__init__(inner.uri)
        self._inner = inner
        self._fail_at = fail_at
        self._times = times
        self._error = error
        self._block = block
        self._let_through_bytes = let_through_bytes
        self.operations = 0
        self.running = 0
        self.closed = False
        self.blocked = _event()
        self._released = _event()

    async def __aenter__(self) -> Self:
        await self._inner.__aenter__()
        return self

    def release(self) -> None:
        """Let all that waits go on, now and later. May be called on any thread."""
        if not self._released.done():
            self._released.set_result(None)

    async def list(self) -> list[SourceObject]:
        return await self._operate(self._inner.list)

    async def stat(self, key: str) -> SourceObject:
        return await self._operate(lambda: self._inner.stat(key))

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        async def let_through() -> int:
            count = min(self._let_through_bytes, loan.nbytes)
            if count:
                part = Loan(_first(loan.views, count), parent=loan)
                await self._inner.read(object, start, start + count, part)
            return count

        await self._operate(lambda: self._inner.read(object, start, end, loan), let_through)

    async def checksum(self, object: SourceObject) -> Checksum | PartChecksums | None:
        return await self._operate(lambda: self._inner.checksum(object))

    async def sha256(self, object: SourceObject) -> bytes | Sha256 | None:
        return await self._inner.sha256(object)

    async def conclude(self) -> dict[str, str]:
        return await self._inner.conclude()

    async def describe(self) -> dict[str, str]:
        return await self._inner.describe()

    async def aclose(self) -> None:
        self.closed = True
        await self._inner.aclose()

    async def _operate(
        self, call: Callable[[], Awaitable[T]], let_through: Callable[[], Awaitable[int]] | None = None
    ) -> T:
        self.operations += 1
        spoiled = self._spoils(self.operations)
        self.running += 1
        try:
            if spoiled:
                arrived = 0 if let_through is None else await let_through()
                if not self._block:
                    raise self._make_error(arrived)
                if not self.blocked.done():
                    self.blocked.set_result(None)
                await asyncio.wrap_future(self._released)
            return await call()
        finally:
            self.running -= 1
            self.requests = self._inner.requests

    def _spoils(self, operation: int) -> bool:
        if not 0 < self._fail_at <= operation:
            return False
        return self._times is None or operation < self._fail_at + self._times

    def _make_error(self, arrived: int) -> BaseException:
        if self._error is not None:
            error = self._error()
        elif arrived:
            error = TruncatedReadError("spoiled: the bytes ended here")
        else:
            error = TransientError("spoiled")
        if isinstance(error, StreamloadError):
            error.valid_bytes = arrived
        return error


def _event() -> Future[None]:
    future: Future[None] = Future()
    # One who waits on an event loop and is cancelled must not cancel it for the others.
    future.set_running_or_notify_cancel()
    return future


def _first(views: Sequence[memoryview], count: int) -> list[memoryview]:
    """The first so many bytes of the views."""
    parts: list[memoryview] = []
    for view in views:
        parts.append(view[:count])
        count -= parts[-1].nbytes
        if not count:
            break
    return parts
