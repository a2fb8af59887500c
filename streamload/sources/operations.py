"""The operations that are running on a source, so that closing it ends them."""

from __future__ import annotations

import asyncio
from types import TracebackType

from streamload.errors import ClosedError

__all__ = ["Operations"]


class Operations:
    """Refuses operations on a closed source and, when it closes, ends those that are running.

    Used on one event loop.
    """

    def __init__(self) -> None:
        self.closed = False
        self._running: set[asyncio.Timeout] = set()
        self._all_left = asyncio.Event()

    def running(self) -> _Operation:
        """Hold one operation, which `close` cancels and which then ends with ClosedError.

        Raises:
            ClosedError: On entering it: the source is closed. On leaving it: the source was closed meanwhile.
        """
        return _Operation(self)

    def _enter(self, scope: asyncio.Timeout) -> None:
        self._running.add(scope)

    def _leave(self, scope: asyncio.Timeout) -> None:
        self._running.discard(scope)
        if not self._running:
            self._all_left.set()

    async def close(self) -> None:
        """Cancel what is running and wait until it has ended. May be called twice, and while another call waits."""
        self.closed = True
        now = asyncio.get_running_loop().time()
        for scope in self._running:
            if not scope.expired():
                scope.reschedule(now)
        while self._running:
            self._all_left.clear()
            await self._all_left.wait()


class _Operation:
    """A timeout that has no instant yet: `Operations.close` sets it to now.

    So the cancellation by closing and one from outside are told apart by the standard library's own accounts. A class
    rather than a generator, because it is entered for every read.
    """

    __slots__ = ("_operations", "_scope")

    def __init__(self, operations: Operations) -> None:
        self._operations = operations
        self._scope = asyncio.timeout(None)

    async def __aenter__(self) -> None:
        if self._operations.closed:
            raise ClosedError("the source was closed")
        await self._scope.__aenter__()
        self._operations._enter(self._scope)

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._operations._leave(self._scope)
        try:
            await self._scope.__aexit__(kind, error, trace)
        except TimeoutError:
            raise ClosedError("the source was closed") from None
