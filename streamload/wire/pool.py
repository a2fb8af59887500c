"""Connections to one server, kept for the next request and spread over its addresses."""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections import Counter

from streamload.errors import ClosedError, SourceError, TransientError
from streamload.wire.connection import Connection, Landed, Place, Response
from streamload.wire.tls import NO_TLS, is_plain

__all__ = ["Pool"]

# How long the answer to a look-up of the name is used: S3's addresses change within seconds, to spread the load.
_ADDRESSES_S = 20.0

# How long an address at which nobody answered, or a connection broke or fell silent, is left alone, while there are
# others.
_SHUNNED_S = 30.0

# How many addresses are tried before a connection counts as impossible.
_ATTEMPTS = 3


class Pool:
    """Asks one server, over as many connections as there are requests at once.

    Used on one event loop.

    Args:
        host: The name to look up, and to find in the certificate.
        port: The port.
        tls: How to make connections secure; None for plain ones.
        connect_timeout_s: How long making one may take, in seconds.
        stall_s: For how long the server may send nothing while it owes an answer, in seconds.
    """

    def __init__(
        self, host: str, port: int, *, tls: ssl.SSLContext | None, connect_timeout_s: float, stall_s: float
    ) -> None:
        self.name = f"{host}:{port}"
        self._host = host
        self._port = port
        self._tls = tls
        self._connect_timeout_s = connect_timeout_s
        self._stall_s = stall_s
        self._idle: list[Connection] = []
        self._open: dict[Connection, str] = {}
        self._connecting: dict[asyncio.Task[Connection], str] = {}
        self._looking: asyncio.Task[list[str] | str] | None = None
        self._addresses: list[str] = []
        self._looked_up_s = float("-inf")
        self._shunned: dict[str, float] = {}
        self._closed = False

    async def ask(self, request: bytes, place: Place, landed: Landed | None = None) -> Response:
        """Send a request and wait for the whole answer; see `Connection.ask`.

        A server may close a connection that has been idle just as the next request is sent. That one is sent again on
        another connection: a GET may be.

        Raises:
            ClosedError: The pool is closed.
            TransientError: No connection, or it broke or stalled.
            SourceError: What the server sent is no answer, or its certificate is not good.
        """
        idle = self._take_idle()
        if idle is not None:
            try:
                return await self._ask(idle, request, place, landed)
            except TransientError:
                if self._closed or not idle.silent:
                    raise
        return await self._ask(await self._connect(), request, place, landed)

    async def _ask(self, connection: Connection, request: bytes, place: Place, landed: Landed | None) -> Response:
        address, is_new = self._open.get(connection), connection.exchanges == 0
        try:
            response = await connection.ask(request, place, landed)
            # One turn of the loop, in which TLS hands over what it has already decrypted and nobody asked for.
            await asyncio.sleep(0)
        except TransientError:
            # An old connection that ends without a word was idle for too long; that says nothing about its address.
            if address is not None and (is_new or not connection.silent):
                self._shun(address)
            connection.abort()
            raise
        except BaseException:
            connection.abort()
            raise
        if connection.idle and not self._closed:
            self._idle.append(connection)
        else:
            connection.abort()
        return response

    async def aclose(self) -> None:
        """Close all connections; what is under way on them fails. May be called twice."""
        self._closed = True
        self._idle.clear()
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait({self._looking})
        while self._connecting:
            for connecting in self._connecting:
                connecting.cancel()
            await asyncio.wait(self._connecting)
        for connection in self._open:
            connection.abort(ClosedError("the connections were closed"))
        while self._open:
            await asyncio.wait([connection.lost for connection in self._open])

    @property
    def connections(self) -> int:
        """How many are open."""
        return len(self._open)

    def _take_idle(self) -> Connection | None:
        # The last one used comes first: those at the bottom grow old, and the server closes them.
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
            connection.abort()
        return None

    async def _connect(self) -> Connection:
        error: Exception | None = None
        for _ in range(_ATTEMPTS):
            address = await self._choose_address()
            if self._closed:
                raise ClosedError("the connections were closed")
            try:
                async with asyncio.timeout(self._connect_timeout_s):
                    return await self._connect_to(address)
            except ssl.SSLCertVerificationError as refused:
                raise SourceError(f"no secure connection to {self.name}: {refused.verify_message}") from None
            except (OSError, TimeoutError) as failure:  # ssl.SSLError is an OSError
                if is_plain(failure):
                    raise SourceError(f"no secure connection to {self.name}: {NO_TLS}") from None
                error = failure
                self._shun(address)
        late = f"no answer within {self._connect_timeout_s:g} s"
        cause = late if isinstance(error, TimeoutError) else str(error) or type(error).__name__
        raise TransientError(f"cannot reach {self.name}: {cause}", throttled=isinstance(error, TimeoutError))

    async def _connect_to(self, address: str) -> Connection:
        # A task, so that closing the pool can end it.
        connecting = asyncio.create_task(self._make(address))
        self._connecting[connecting] = address
        connecting.add_done_callback(self._connecting.pop)
        try:
            connection = await connecting
        except asyncio.CancelledError:
            # It may have been made just before this was cancelled, and nobody else knows of it.
            if connecting.done() and not connecting.cancelled() and connecting.exception() is None:
                connecting.result().abort()
            task = asyncio.current_task()
            if self._closed and (task is None or not task.cancelling()):
                raise ClosedError("the connections were closed") from None
            raise
        if self._closed:
            connection.abort()
            raise ClosedError("the connections were closed")
        return connection

    async def _make(self, address: str) -> Connection:
        _, connection = await asyncio.get_running_loop().create_connection(
            lambda: Connection(self.name, stall_s=self._stall_s),
            address,
            self._port,
            ssl=self._tls,
            server_hostname=self._host if self._tls is not None else None,
        )
        # Here, and not by whoever waits for it: they may be gone, and closing the pool has to find it.
        self._open[connection] = address
        connection.lost.add_done_callback(lambda _: self._open.pop(connection, None))
        return connection

    async def _choose_address(self) -> str:
        """The address with the fewest connections, those that are being made included, of those that are good."""
        loop = asyncio.get_running_loop()
        if loop.time() - self._looked_up_s > _ADDRESSES_S or not self._addresses:
            await self._refresh_addresses()
        now = loop.time()
        good = [address for address in self._addresses if now - self._shunned.get(address, -_SHUNNED_S) >= _SHUNNED_S]
        used = Counter([*self._open.values(), *self._connecting.values()])
        # Where none is good, the one that failed first has had the most time to get well.
        return (
            min(good, key=lambda address: used[address])
            if good
            else min(self._addresses, key=lambda address: self._shunned[address])
        )

    def _shun(self, address: str) -> None:
        self._shunned[address] = asyncio.get_running_loop().time()

    async def _refresh_addresses(self) -> None:
        """Look the name up, once for all who need it now; an old answer is better than none."""
        if self._looking is None or self._looking.done():
            if self._closed:
                raise ClosedError("the connections were closed")
            self._looking = asyncio.create_task(self._look_up())
        looking = self._looking
        # Whoever is cancelled leaves it to the others.
        await asyncio.wait({looking})
        if looking.cancelled():
            raise ClosedError("the connections were closed")
        found = looking.result()
        if not isinstance(found, str):
            self._addresses = found
            self._looked_up_s = asyncio.get_running_loop().time()
        elif not self._addresses:
            raise TransientError(f"looking up {self._host} {found}")

    async def _look_up(self) -> list[str] | str:
        """The addresses, or why there are none."""
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                found = await asyncio.get_running_loop().getaddrinfo(self._host, self._port, type=socket.SOCK_STREAM)
        except TimeoutError:
            return f"took more than {self._connect_timeout_s:g} s"
        except (OSError, UnicodeError) as error:
            return f"failed: {error}"
        return list(dict.fromkeys(str(place[4][0]) for place in found)) or "found no address"
