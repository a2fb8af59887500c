"""One connection to an HTTP/1.1 server, one exchange at a time."""

from __future__ import annotations

import asyncio
import contextlib
import select
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import cast

from streamload.errors import SourceError, StreamloadError, TransientError, TruncatedReadError
from streamload.wire.head import MAX_HEAD_BYTES, ErrorBody, Head, parse_head
from streamload.wire.tls import ONLY_TLS, is_alert

__all__ = ["Connection", "Landed", "Place", "Response"]

Place = Callable[[Head], Sequence[memoryview] | None]
"""Looks at a head and says where its body goes: views that are together as long as it, in order; None where the answer
is an error, whose body is kept as its explanation. Raises where it is neither."""

Landed = Callable[[memoryview], None]
"""Told of each piece of a body that is in place, in order."""

# How much of an answer is received before its head was seen. What of this belongs to the body is copied, once.
_HEAD_BUFFER_BYTES = 8 << 10

# For how long after its last byte a connection is taken to be as it was.
_FRESH_S = 0.05

_END_OF_HEAD = b"\r\n\r\n"


@dataclass(frozen=True, slots=True)
class Response:
    """An answer whose body is in its place.

    Attributes:
        head: Status and headers.
        explanation: The body of an error; empty for any other answer.
    """

    head: Head
    explanation: bytes


class _State(Enum):
    IDLE = auto()
    HEAD = auto()
    BODY = auto()
    ERROR = auto()
    CLOSED = auto()


class Connection(asyncio.BufferedProtocol):
    """Sends a request and receives its answer's body where it belongs.

    It serves again only after an answer that ended exactly where it should. Anything else closes it: an error, a byte
    too many, bytes that nobody asked for, a caller that is cancelled. Once an exchange is over, however it ended,
    nothing is written into its views: they are known only between `get_buffer` and `buffer_updated`, which the event
    loop calls without a pause between them.

    Args:
        host: Who is at the other end, for errors.
        stall_s: For how long the server may send nothing while an answer is expected, in seconds.
    """

    def __init__(self, host: str, *, stall_s: float) -> None:
        self.host = host
        self.exchanges = 0
        self._stall_s = stall_s
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport | None = None
        self._pending = select.poll()
        self._state = _State.IDLE
        # What is received while it is not known where it belongs. A view: asyncio's TLS receives into slices of it.
        self._buffer = memoryview(bytearray(_HEAD_BUFFER_BYTES))
        self._head = bytearray()
        self._place: Place | None = None
        self._landed: Landed | None = None
        self._response_head: Head | None = None
        self._views: list[memoryview] = []  # what is still to be filled
        self._filled = 0
        self._error_body: ErrorBody | None = None
        self._done: asyncio.Future[Response] | None = None
        self._heard_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        #: Whether the last exchange ended by losing the connection before a single byte came: as it does where the
        #: server had closed it and did not see the request.
        self.silent = False
        #: Done when the event loop has let go of the socket.
        self.lost: asyncio.Future[None] = self._loop.create_future()

    # What the pool asks

    @property
    def idle(self) -> bool:
        """Whether another exchange can begin, as far as the event loop has looked."""
        return self._state is _State.IDLE and self._transport is not None and not self._transport.is_closing()

    @property
    def usable(self) -> bool:
        """Whether another exchange can begin: nothing has come, or is about to be received, that nobody asked for."""
        if not self.idle:
            return False
        # A system call lets other threads have the interpreter's lock, and getting it back takes a tenth of a
        # millisecond where they are busy. Right after an answer there is nothing to see that the event loop has not
        # seen: what a server says when it closes an idle connection, it says later.
        if self._loop.time() - self._heard_s < _FRESH_S:
            return True
        # Data or the connection's end that the event loop has not looked at yet; it would be taken for an answer.
        return not self._pending.poll(0)

    async def ask(self, request: bytes, place: Place, landed: Landed | None = None) -> Response:
        """Send a request and wait for the whole answer.

        Args:
            request: Its head, and no body.
            place: Where the answer's body goes.
            landed: Told of its pieces as they come.

        Raises:
            TransientError: The connection broke or stalled; ``valid_bytes`` says how much of the body is in place.
            SourceError: What the server sent is not an answer, or is not followed by silence; or what `place` raised.
        """
        assert self._done is None, "one exchange at a time"
        if self._state is not _State.IDLE or self._transport is None:
            raise self._broken(None)
        self.exchanges += 1
        self._state = _State.HEAD
        self._head.clear()
        self.silent = False
        self._place = place
        self._landed = landed
        self._filled = 0
        self._done = self._loop.create_future()
        self._heard_s = self._loop.time()
        self._timer = self._loop.call_at(self._heard_s + self._stall_s, self._check_stall)
        self._transport.write(request)
        try:
            return await self._done
        finally:
            self._timer.cancel()
            self._place = None
            self._landed = None
            self._done = None
            self._views = []
            if self._state is not _State.IDLE:
                self.abort()

    def abort(self, error: StreamloadError | None = None) -> None:
        """Close at once; what is under way fails, with this error where there is one."""
        self._fail(error or TransientError(f"the connection to {self.host} was given up"))
        if self._transport is not None:
            # uvloop's raises where it has closed the socket and not yet said so.
            with contextlib.suppress(RuntimeError):
                self._transport.abort()

    # What the event loop calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        socket = transport.get_extra_info("socket")
        if socket is not None:
            self._pending.register(socket.fileno(), select.POLLIN)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._views[0] if self._state is _State.BODY else self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        # A head, or an error's explanation, comes in one go: who sends it byte by byte is as good as silent.
        if self._state is _State.BODY:
            self._heard_s = self._loop.time()
        before = self._state
        try:
            self._receive(nbytes)
        except Exception as error:  # of `place` or `landed`, which may raise what they like
            self._fail(error)
        if self._state is not before:
            self._heard_s = self._loop.time()

    def eof_received(self) -> bool:
        if self._state is _State.ERROR and self._error_body is not None:
            self._finish(reusable=False)
        return False

    def connection_lost(self, error: Exception | None) -> None:
        self.silent = self._state is _State.HEAD and not self._head
        self._fail(self._broken(error))
        self._transport = None
        self.lost.set_result(None)

    # How an answer is received

    def _receive(self, nbytes: int) -> None:
        if self._state is _State.BODY:
            self._advance(nbytes)
        elif self._state is _State.HEAD:
            self._receive_head(nbytes)
        elif self._state is _State.ERROR:
            self._receive_error(bytes(self._buffer[:nbytes]))
        elif self._state is _State.IDLE:
            # Whatever it is, it is not an answer to anything, and would be taken for the next one.
            self.abort()

    def _receive_head(self, nbytes: int) -> None:
        # The end may lie across two pieces.
        searched = max(0, len(self._head) - len(_END_OF_HEAD) + 1)
        self._head += self._buffer[:nbytes]
        end = self._head.find(_END_OF_HEAD, searched)
        if end < 0:
            if is_alert(self._head):
                self._fail(SourceError(f"no answer from {self.host}: {ONLY_TLS}"))
            elif len(self._head) > MAX_HEAD_BYTES:
                self._fail(SourceError(f"{self.host} sent a head without an end ({len(self._head)} bytes)"))
            return
        end += len(_END_OF_HEAD)
        self._begin_body(bytes(self._head[:end]), bytes(self._head[end:]))

    def _begin_body(self, data: bytes, rest: bytes) -> None:
        assert self._place is not None
        head = parse_head(data)
        if head.status < 200:
            raise SourceError(f"{self.host} answered {head.status} to a request that asks for no such thing")
        views = self._place(head)
        self._response_head = head
        if views is None:
            self._state = _State.ERROR
            self._error_body = ErrorBody(data)
            self._receive_error(rest)
            return
        self._views = [view for view in views if view.nbytes]
        nbytes = sum(view.nbytes for view in self._views)
        if head.body_bytes != nbytes:
            how = head.headers.get("transfer-encoding", "unknown") if head.body_bytes is None else head.body_bytes
            raise SourceError(f"{self.host} was asked for {nbytes} bytes; the length of its answer is {how}")
        if len(rest) > nbytes:
            raise SourceError(f"{self.host} sent more bytes than it said")
        self._state = _State.BODY
        for view in self._views.copy():
            if not rest:
                break
            piece, rest = rest[: view.nbytes], rest[view.nbytes :]
            view[: len(piece)] = piece
            self._advance(len(piece))
        if not self._views and self._state is _State.BODY:
            self._finish(reusable=head.keep_alive)

    def _advance(self, nbytes: int) -> None:
        """So many bytes of the first view are in place."""
        self._filled += nbytes
        if self._landed is not None:
            self._landed(self._views[0][:nbytes])
        if nbytes < self._views[0].nbytes:
            self._views[0] = self._views[0][nbytes:]
            return
        del self._views[0]
        if not self._views:
            assert self._response_head is not None
            self._finish(reusable=self._response_head.keep_alive)

    def _receive_error(self, data: bytes) -> None:
        assert self._error_body is not None
        self._error_body.feed(data)
        if self._error_body.complete:
            # Not used again: whether anything follows an error's body is not worth knowing.
            self._finish(reusable=False)

    def _finish(self, *, reusable: bool) -> None:
        """The answer is whole."""
        assert self._response_head is not None
        explanation = b"" if self._error_body is None else self._error_body.content
        self._error_body = None
        self._state = _State.IDLE if reusable else _State.CLOSED
        if self._done is not None and not self._done.done():
            self._done.set_result(Response(self._response_head, explanation))

    def _fail(self, error: Exception) -> None:
        self._state = _State.CLOSED
        self._views = []
        if isinstance(error, TransientError):
            error.valid_bytes = self._filled
        if self._done is not None and not self._done.done():
            self._done.set_exception(error)

    def _check_stall(self) -> None:
        """The timer is not set anew with every piece: when it fires, it looks when the last one came."""
        due_s = self._heard_s + self._stall_s
        if self._loop.time() < due_s:
            self._timer = self._loop.call_at(due_s, self._check_stall)
        else:
            self._fail(TransientError(f"{self.host} sent nothing for {self._stall_s:g} s", throttled=True))

    def _broken(self, error: Exception | None) -> SourceError:
        cause = f": {error}" if error is not None else ""
        if self._state is _State.BODY:
            return TruncatedReadError(f"the connection to {self.host} ended inside the body{cause}")
        if self._head:
            return TransientError(f"the connection to {self.host} ended inside the answer's head{cause}")
        return TransientError(f"the connection to {self.host} ended before it answered{cause}")
