"""Requests spread over several event loops, each with connections of its own."""

from __future__ import annotations

import os
import ssl
from contextlib import AsyncExitStack
from typing import NamedTuple

from streamload.errors import ClosedError
from streamload.wire.connection import Landed, Place, Response
from streamload.wire.loops import LoopThread
from streamload.wire.pool import Pool

__all__ = ["Lanes", "Server"]

# The caller's own loop and one more. Two keep two cores busy, and a third gains nothing: what Python does for each read
# happens under one lock.
_LANES = 2


class Server(NamedTuple):
    """Who is asked.

    Attributes:
        host: The name to look up, and to find in the certificate.
        port: The port.
        tls: How to make connections secure; None for plain ones.
    """

    host: str
    port: int
    tls: ssl.SSLContext | None


class Lanes:
    """Asks servers, each request on the event loop that has the fewest under way.

    The first lane is the loop on which this is used; the others are threads, started when requests at once make use of
    them. Each lane has connections of its own, which never leave it.

    Args:
        connect_timeout_s: How long making a connection may take, in seconds.
        stall_s: For how long a server may send nothing while it owes an answer, in seconds.
        most: How many lanes there may be.
    """

    def __init__(self, *, connect_timeout_s: float, stall_s: float, most: int | None = None) -> None:
        self._connect_timeout_s = connect_timeout_s
        self._stall_s = stall_s
        cores = len(os.sched_getaffinity(0))
        self._most = most or min(_LANES, cores)
        # Decrypting lets go of the interpreter's lock for each record, 16 KiB: two loops that do it spend a tenth of
        # their time on handing it over, which only cores that nobody else needs make up for.
        self._most_secure = most or max(1, min(_LANES, cores - 1))
        self._lanes = [_Lane()]
        self._closed = False

    async def ask(self, server: Server, request: bytes, place: Place, landed: Landed | None = None) -> Response:
        """Send a request and wait for the whole answer; see `Pool.ask`.

        `place` and `landed` are called on the thread of whichever lane asks. Cancelled or not, when this ends nothing
        writes into the views any more.

        Raises:
            ClosedError: The lanes are closed.
            TransientError: No connection, or it broke or stalled.
            SourceError: What the server sent is no answer, or its certificate is not good.
        """
        if self._closed:
            raise ClosedError("the connections were closed")
        lane = self._choose(self._most if server.tls is None else self._most_secure)
        pool = lane.pools.get(server)
        if pool is None:
            pool = lane.pools[server] = Pool(
                server.host,
                server.port,
                tls=server.tls,
                connect_timeout_s=self._connect_timeout_s,
                stall_s=self._stall_s,
            )
        lane.under_way += 1
        try:
            if lane.thread is None:
                return await pool.ask(request, place, landed)
            return await lane.thread.run(lambda: pool.ask(request, place, landed))
        finally:
            lane.under_way -= 1

    async def aclose(self) -> None:
        """Close all connections and end the threads; what is under way fails. May be called twice."""
        self._closed = True
        # All of them, whatever happens while one is closed: a cancellation must not leave a thread behind.
        async with AsyncExitStack() as stack:
            for lane in self._lanes:
                stack.push_async_callback(lane.aclose)

    @property
    def connections(self) -> int:
        """How many are open."""
        return sum(pool.connections for lane in self._lanes for pool in lane.pools.values())

    def _choose(self, most: int) -> _Lane:
        lane = min(self._lanes[:most], key=lambda lane: lane.under_way)
        if lane.under_way and len(self._lanes) < min(most, self._most):
            try:
                lane = _Lane(f"streamload-io-{len(self._lanes)}")
            except (OSError, RuntimeError):
                # No thread or descriptor is left to this process: fewer lanes do, too.
                self._most = len(self._lanes)
            else:
                self._lanes.append(lane)
        return lane


class _Lane:
    """One event loop and its connections.

    Args:
        thread: The name of the thread on which it runs; None for the caller's own.

    Attributes:
        thread: Where it is not the caller's own.
        under_way: How many requests it has.
    """

    def __init__(self, thread: str | None = None) -> None:
        self.pools: dict[Server, Pool] = {}
        self.under_way = 0
        self.thread = None if thread is None else LoopThread(thread, self._close_pools)

    async def aclose(self) -> None:
        if self.thread is None:
            await self._close_pools()
        else:
            # Cancelled or not, it closes the pools first.
            await self.thread.aclose()

    async def _close_pools(self) -> None:
        for pool in self.pools.values():
            await pool.aclose()
