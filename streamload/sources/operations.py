"""The operations that are running on a source, so that closing it ends them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

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

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Hold one operation, which `close` cancels and which then ends with ClosedError.

        Raises:
            ClosedError: The source is closed, or was while the operation ran.
        """
        if self.closed:
            raise ClosedError("the source was closed")
        # A timeout that has no instant yet: `close` sets it to now. Its cancellation and one from outside are told
        # apart by the standard library's own accounts.
        scope = asyncio.timeout(None)
        try:
            async with scope:
                self._running.add(scope)
                try:
                    yield
                finally:
                    self._running.discard(scope)
                    if not self._running:
                        self._all_left.set()
        except TimeoutError:
            if scope.expired():
                raise ClosedError("the source was closed") from None
            raise

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
