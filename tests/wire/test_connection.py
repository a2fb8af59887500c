"""One connection, with a server that does whatever it likes.

Invariants, of `Connection.ask` and of all that is built on it:

1. It returns only when the views hold exactly the body's bytes.
2. Nothing outside the views is ever written, and nothing into them once it has ended: returned, raised, cancelled.
3. Every other outcome is one of `streamload.errors`, or what the caller's own functions raised; of a TransientError,
   ``valid_bytes`` bytes are in place, and ``landed`` was told of exactly those.
4. The connection is usable only after an answer that ended exactly where it should.

The first half of the tests hands bytes to the protocol as an event loop would, without one that decides when; the
second half has real sockets on both event loops.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamload.errors import SourceError, TransientError, TruncatedReadError
from streamload.testing import run_on_each_loop
from streamload.wire import Response
from streamload.wire.connection import Connection
from tests.wire.server import REQUEST, Lent, Peer, Script, answer, closing, pattern, turn, until, wired

_BODY = pattern(40)
_SIZES = (0, 7, 1, 0, 32, 0)
_WHOLE = answer(_BODY, 'ETag: "a"')
_HEAD_BYTES = len(_WHOLE) - len(_BODY)
_LIMIT = 64 << 10


class _Transport(asyncio.Transport):
    """A transport whose server is the test."""

    def __init__(self, connection: Connection) -> None:
        super().__init__()
        self._connection = connection
        self._closing = False
        self.sent = b""
        connection.connection_made(self)

    def write(self, data: Any) -> None:
        assert not self._closing
        self.sent += bytes(data)

    def is_closing(self) -> bool:
        return self._closing

    def abort(self) -> None:
        self.lose(None)

    def lose(self, error: Exception | None) -> None:
        if not self._closing:
            self._closing = True
            asyncio.get_running_loop().call_soon(self._connection.connection_lost, error)

    def feed(self, data: bytes) -> None:
        """What a readable socket leads to; once it is closing, it is not read."""
        while data and not self._closing:
            buffer = self._connection.get_buffer(-1)
            with memoryview(buffer).cast("B") as view:
                assert view.nbytes
                nbytes = min(view.nbytes, len(data))
                view[:nbytes] = data[:nbytes]
            data = data[nbytes:]
            self._connection.buffer_updated(nbytes)

    def end(self) -> None:
        if not self._closing and not self._connection.eof_received():
            self.lose(None)


class _Exchange:
    """One request that is under way on a connection without a socket."""

    def __init__(self, lent: Lent) -> None:
        self.lent = lent
        self.landed = b""
        self.connection = Connection("server", stall_s=20.0)
        self.transport = _Transport(self.connection)
        self.task = asyncio.ensure_future(self.connection.ask(REQUEST, lent.place, self._land))

    def _land(self, piece: memoryview) -> None:
        self.landed += piece

    def cancel(self) -> None:
        self.task.cancel()

    async def outcome(self) -> Response | BaseException:
        """How it ended; afterwards the server goes on talking, and nobody may be touched by that."""
        (result,) = await asyncio.gather(self.task, return_exceptions=True)
        before = bytes(self.lent.memory)
        usable = self.connection.usable
        self.transport.feed(b"Z" * 200)
        await turn(3)
        self.transport.end()
        await turn(3)
        assert self.lent.memory == before, "something was written after the end"
        assert not self.connection.usable
        assert self.connection.lost.done()
        assert self.transport.sent == REQUEST
        assert self.landed == self.lent.content[: len(self.landed)]
        if isinstance(result, TransientError):
            assert len(self.landed) == result.valid_bytes
        elif isinstance(result, Response):
            assert len(self.landed) == (self.lent.nbytes if result.head.status < 300 else 0)
        if not isinstance(result, Response | asyncio.CancelledError):
            assert not usable
            assert isinstance(result, SourceError), repr(result)
        self.usable = usable
        return result


def _run(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    with asyncio.Runner(debug=True) as runner:
        runner.run(body())


@pytest.fixture(scope="module")
def runner() -> Iterator[asyncio.Runner]:
    """One loop for many examples."""
    with asyncio.Runner() as runner:
        yield runner


async def _two_pieces(cut: int) -> None:
    exchange = _Exchange(Lent(*_SIZES))
    await turn(1)
    exchange.transport.feed(_WHOLE[:cut])
    await turn(2)
    exchange.transport.feed(_WHOLE[cut:])
    result = await exchange.outcome()
    assert isinstance(result, Response)
    exchange.lent.check(_BODY)
    assert exchange.usable


def test_an_answer_in_any_two_pieces() -> None:
    async def body() -> None:
        for cut in range(len(_WHOLE) + 1):
            await _two_pieces(cut)

    _run(body)


def test_an_answer_byte_by_byte() -> None:
    async def body() -> None:
        exchange = _Exchange(Lent(*_SIZES))
        await turn(1)
        for at in range(len(_WHOLE)):
            assert not exchange.task.done()
            exchange.transport.feed(_WHOLE[at : at + 1])
            await turn(1)
        assert isinstance(await exchange.outcome(), Response)
        exchange.lent.check(_BODY)

    _run(body)


@pytest.mark.parametrize("failure", [None, ConnectionResetError(104, "reset")])
def test_an_answer_that_ends_anywhere(failure: Exception | None) -> None:
    async def body() -> None:
        for cut in range(len(_WHOLE)):
            exchange = _Exchange(Lent(*_SIZES))
            await turn(1)
            exchange.transport.feed(_WHOLE[:cut])
            exchange.transport.lose(failure) if failure is not None else exchange.transport.end()
            error = await exchange.outcome()
            assert isinstance(error, TransientError)
            assert isinstance(error, TruncatedReadError) == (cut >= _HEAD_BYTES)
            assert error.valid_bytes == max(0, cut - _HEAD_BYTES)
            exchange.lent.check(_BODY[: error.valid_bytes])
            assert exchange.connection.silent == (cut == 0)

    _run(body)


def test_a_cancelled_request_at_any_byte() -> None:
    async def body() -> None:
        for cut in range(len(_WHOLE) + 1):
            exchange = _Exchange(Lent(*_SIZES))
            await turn(1)
            exchange.transport.feed(_WHOLE[:cut])
            exchange.task.cancel()
            assert isinstance(await exchange.outcome(), asyncio.CancelledError)
            # Where it was whole when the cancellation came, the connection could go on.
            assert exchange.usable == (cut == len(_WHOLE))
            exchange.lent.check(_BODY[: max(0, cut - _HEAD_BYTES)])

    _run(body)


def test_one_byte_too_many_anywhere_after_the_end() -> None:
    """In the last piece of the answer, or in a piece of its own before the caller even sees the answer."""

    async def body() -> None:
        for cut in range(len(_WHOLE) + 1):
            exchange = _Exchange(Lent(*_SIZES))
            await turn(1)
            exchange.transport.feed(_WHOLE[:cut])
            exchange.transport.feed(_WHOLE[cut:] + b"!")
            result = await exchange.outcome()
            assert not exchange.usable, "a byte too many"
            if isinstance(result, Response):
                exchange.lent.check(_BODY)
            else:
                assert isinstance(result, SourceError)
                exchange.lent.check(b"")

    _run(body)


def test_the_views_are_let_go() -> None:
    """Whoever lent the memory can take it back: no export of it is left when the exchange is over."""

    async def ended(cut: int, then: Callable[[_Exchange], None]) -> None:
        memory = bytearray(40)
        lent = Lent()
        lent.views = [memoryview(memory)[:9], memoryview(memory)[9:]]
        exchange = _Exchange(lent)
        await turn(1)
        exchange.transport.feed(_WHOLE[:cut])
        then(exchange)
        await asyncio.gather(exchange.task, return_exceptions=True)
        lent.views.clear()
        memory.append(0)

    async def body() -> None:
        for cut in (0, _HEAD_BYTES - 1, _HEAD_BYTES, _HEAD_BYTES + 9, len(_WHOLE) - 1):
            await ended(cut, lambda exchange: exchange.transport.end())
            await ended(cut, lambda exchange: exchange.transport.lose(ConnectionResetError()))
            await ended(cut, lambda exchange: exchange.cancel())
        await ended(len(_WHOLE), lambda _: None)

    _run(body)


def test_an_aborted_request_ends() -> None:
    """`abort`: what is under way fails."""

    async def body() -> None:
        for cut in (0, 5, _HEAD_BYTES, _HEAD_BYTES + 3):
            exchange = _Exchange(Lent(*_SIZES))
            await turn(1)
            exchange.transport.feed(_WHOLE[:cut])
            exchange.connection.abort()
            await turn()
            ended = exchange.task.done()
            if not ended:
                exchange.task.cancel()
            await exchange.outcome()
            exchange.lent.check(_BODY[: max(0, cut - _HEAD_BYTES)])
            assert ended, "it waits for a server that it no longer listens to"

    _run(body)


_pieces = st.sampled_from(
    [
        b"HTTP/1.1 206 Said\r\n",
        b"HTTP/1.0 206 Said\r\n",
        b"HTTP/1.1 200 Said\r\n",
        b"HTTP/1.1 404 Said\r\n",
        b"HTTP/1.1 100 Said\r\n",
        b"Content-Length: 40\r\n",
        b"Content-Length: 4\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Connection: close\r\n",
        b"\r\n",
        b"\n",
        b"28\r\n",
        b"0\r\n\r\n",
        _BODY,
        _WHOLE,
        _WHOLE[:_HEAD_BYTES],
        _WHOLE[:_HEAD_BYTES] + _BODY[:39],
    ]
)


@st.composite
def _mutants(draw: st.DrawFn) -> bytes:
    """A good answer with something cut out or put in."""
    start = draw(st.integers(0, len(_WHOLE)))
    end = draw(st.integers(start, min(len(_WHOLE), start + 8)))
    return _WHOLE[:start] + draw(st.binary(max_size=4) | _pieces) + _WHOLE[end:]


def _check_success(lent: Lent, response: Response, sent: bytes, usable: bool) -> None:
    """Against a reader that is too simple to be wrong: split at the first empty line."""
    head, _, rest = sent.partition(b"\r\n\r\n")
    assert response.head.status == 206
    assert b"content-length:" in head.lower()
    assert rest[: lent.nbytes] == lent.content
    assert len(rest) >= lent.nbytes
    assert response.head.body_bytes == lent.nbytes
    if usable:
        assert len(rest) == lent.nbytes
        assert b"close" not in head.lower()


@given(
    data=st.binary(max_size=300) | st.lists(_pieces | st.binary(max_size=4), max_size=8).map(b"".join) | _mutants(),
    seed=st.integers(0, 1 << 16),
    then=st.sampled_from(["end", "reset", "cancel"]),
)
def test_any_bytes_are_an_answer_or_an_error(runner: asyncio.Runner, data: bytes, seed: int, then: str) -> None:
    async def body() -> None:
        random = Random(seed)
        exchange = _Exchange(Lent(*_SIZES))
        await turn(1)
        rest = data
        while rest:
            nbytes = random.choice([1, 3, 20, 400])
            exchange.transport.feed(rest[:nbytes])
            rest = rest[nbytes:]
            await turn(random.choice([0, 0, 2]))
        if not exchange.task.done():
            if then == "cancel":
                exchange.task.cancel()
            elif then == "reset":
                exchange.transport.lose(ConnectionResetError(104, "reset"))
            else:
                exchange.transport.end()
        result = await exchange.outcome()
        exchange.lent.check(b"")
        if isinstance(result, Response) and result.head.status < 300:
            _check_success(exchange.lent, result, data, exchange.usable)
        elif isinstance(result, Response):
            assert not exchange.usable
            assert exchange.lent.untouched
        elif isinstance(result, TransientError):
            _, _, rest = data.partition(b"\r\n\r\n")
            exchange.lent.check(rest[: result.valid_bytes])

    runner.run(body())


# With sockets


async def _ask_twice(cut: int, script: Callable[[int], Script]) -> None:
    """The answer in two writes, then one more request on the same connection."""
    async with wired(script(cut)) as (server, pool):
        for _ in range(2):
            lent = Lent(*_SIZES)
            await pool.ask(REQUEST, lent.place)
            lent.check(_BODY)
        assert (server.connections, server.requests) == (1, 2)


def _paused(cut: int) -> Script:
    async def script(peer: Peer) -> None:
        for _ in range(2):
            await peer.request()
            peer.send(_WHOLE[:cut])
            await turn(6)
            peer.send(_WHOLE[cut:])

    return script


def test_a_pause_anywhere() -> None:
    async def body() -> None:
        for cut in range(len(_WHOLE) + 1):
            await _ask_twice(cut, _paused)

    run_on_each_loop(body)


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_an_end_anywhere(reset: bool) -> None:
    def ends(cut: int) -> Script:
        async def script(peer: Peer) -> None:
            await peer.request()
            peer.send(_WHOLE[:cut])
            if reset and cut % 2:
                await turn(6)  # the client has seen what was sent; otherwise the reset may throw it away
            peer.reset() if reset else peer.close()

        return script

    async def body() -> None:
        for cut in range(len(_WHOLE)):
            async with wired(ends(cut)) as (server, pool):
                lent = Lent(*_SIZES)
                with pytest.raises(TransientError) as caught:
                    await pool.ask(REQUEST, lent.place)
                arrived = max(0, cut - _HEAD_BYTES)
                valid = caught.value.valid_bytes
                assert valid <= arrived if reset and not cut % 2 else valid == arrived
                if not reset:
                    assert isinstance(caught.value, TruncatedReadError) == (cut >= _HEAD_BYTES)
                lent.check(_BODY[:valid])
                assert (server.connections, server.requests) == (1, 1)

    run_on_each_loop(body)


def test_large_bodies_over_many_views() -> None:
    content = pattern(3_000_001)
    sizes = (1, 0, 8191, 8192, 8193, 65536, 3_000_001 - 1 - 8191 - 8192 - 8193 - 65536)

    async def body() -> None:
        async with wired(closing(answer(content))) as (_, pool):
            lent = Lent(*sizes)
            await pool.ask(REQUEST, lent.place)
            lent.check(content)

    run_on_each_loop(body)


@pytest.mark.parametrize("sizes", [(), (0,), (0, 0)])
def test_a_body_without_bytes(sizes: tuple[int, ...]) -> None:
    async def body() -> None:
        async with wired(closing(answer(b""))) as (_, pool):
            lent = Lent(*sizes)
            response = await pool.ask(REQUEST, lent.place)
            assert response.head.body_bytes == 0
            assert lent.untouched

    run_on_each_loop(body)


@pytest.mark.parametrize("sent", [65_530, 65_537, 300_000])
@pytest.mark.parametrize("start", [b"HTTP/1.1 206 Said\r\nX: ", b"\0", b"HTTP/1.1 206 Said\r\n"])
def test_a_head_without_an_end(start: bytes, sent: int) -> None:
    async def body() -> None:
        async with wired(closing(start + b"a" * (sent - len(start)))) as (_, pool):
            lent = Lent(*_SIZES)
            with pytest.raises(SourceError) as caught:
                await pool.ask(REQUEST, lent.place)
            assert caught.value.retryable is (sent <= _LIMIT)
            assert lent.untouched

    run_on_each_loop(body)


@pytest.mark.parametrize(
    "data",
    [
        answer(_BODY, status=200),
        answer(_BODY, status=204),
        answer(_BODY + b"!"),
        answer(_BODY, length=39),
        answer(_BODY, length=41),
        answer(_BODY, length=0),
        answer(_BODY, length=-40),
        answer(_BODY, length=(1 << 64) - 1),
        answer(_BODY, length=1 << 64),
        answer(_BODY, "Content-Length: 40"),
        answer(_BODY, "Content-Length: 41"),
        answer(_BODY, "Transfer-Encoding: chunked"),
        b"HTTP/1.1 206 Said\r\nTransfer-Encoding: chunked\r\n\r\n28\r\n%b\r\n0\r\n\r\n" % _BODY,
        b"HTTP/1.1 206 Said\r\n\r\n" + _BODY,
        b"HTTP/1.1 100 Continue\r\n\r\n" + _WHOLE,
        b"HTTP/1.1 103 Early Hints\r\nLink: <a>\r\n\r\n" + _WHOLE,
        b"HTTP/1.1 101 Switching Protocols\r\nContent-Length: 40\r\n\r\n" + _BODY,
        b"HTTP/2.0 206 Said\r\nContent-Length: 40\r\n\r\n" + _BODY,
        b"HTTP/0.9 206 Said\r\nContent-Length: 40\r\n\r\n" + _BODY,
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\x04\0\0\0\0\0",
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"GET /weights HTTP/1.1\r\nContent-Length: 40\r\n\r\n" + _BODY,
        _BODY + b"\r\n\r\n" + _WHOLE,
        b"\r\n\r\n" + _WHOLE,
    ],
)
def test_what_is_not_the_answer(data: bytes) -> None:
    async def body() -> None:
        async with wired(closing(data), closing(_WHOLE)) as (server, pool):
            lent = Lent(*_SIZES)
            with pytest.raises(SourceError) as caught:
                await pool.ask(REQUEST, lent.place)
            assert not caught.value.retryable
            assert lent.untouched
            await pool.ask(REQUEST, lent.place)
            lent.check(_BODY)
            assert server.connections == 2

    run_on_each_loop(body)


def test_switching_protocols_is_an_error_like_any_other() -> None:
    data = b"HTTP/1.1 101 Switching Protocols\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n"

    async def body() -> None:
        async with wired(closing(data)) as (_, pool):
            with pytest.raises(SourceError) as caught:
                await pool.ask(REQUEST, Lent(*_SIZES).place)
            assert not caught.value.retryable

    run_on_each_loop(body)


def test_a_length_of_very_many_digits() -> None:
    data = b"HTTP/1.1 206 Said\r\nContent-Length: %b40\r\n\r\n" % (b"0" * 5000) + _BODY

    async def body() -> None:
        async with wired(closing(data)) as (_, pool):
            lent = Lent(*_SIZES)
            try:
                await pool.ask(REQUEST, lent.place)
            except SourceError:
                assert lent.untouched
            else:
                lent.check(_BODY)

    run_on_each_loop(body)


def test_place_refuses() -> None:
    """What `place` raises is what the caller gets, and the connection is not used again."""
    refusal = SourceError("another version")

    def refuse(_: object) -> None:
        raise refusal

    async def body() -> None:
        async with wired(closing(_WHOLE)) as (server, pool):
            for count in (1, 2):
                with pytest.raises(SourceError) as caught:
                    await pool.ask(REQUEST, refuse)
                assert caught.value is refusal
                await turn()
                assert pool.connections == 0
                assert server.connections == count

    run_on_each_loop(body)


@pytest.mark.parametrize("at", [0, 20])
def test_landed_refuses(at: int) -> None:
    """What `landed` raises is what the caller gets, whether its piece came with the head or alone."""
    refusal = SourceError("another checksum")

    def refuse(_: memoryview) -> None:
        raise refusal

    async def script(peer: Peer) -> None:
        await peer.request()
        cut = len(_WHOLE) if at == 0 else _HEAD_BYTES
        peer.send(_WHOLE[:cut])
        await turn()
        peer.send(_WHOLE[cut:])

    async def body() -> None:
        async with wired(script) as (_, pool):
            with pytest.raises(SourceError) as caught:
                await pool.ask(REQUEST, Lent(*_SIZES).place, refuse)
            assert caught.value is refusal
            await turn()
            assert pool.connections == 0

    run_on_each_loop(body)


def _chunked(body: bytes, size: int) -> bytes:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])
    return b"HTTP/1.1 503 Said\r\nTransfer-Encoding: chunked\r\n\r\n" + chunks


@pytest.mark.parametrize("nbytes", [0, 1, 5000, 65_536, 65_537, 300_000])
@pytest.mark.parametrize("kind", ["length", "chunked", "until close"])
def test_errors_are_explained(kind: str, nbytes: int) -> None:
    explanation = pattern(nbytes)
    data = {
        "length": answer(explanation, status=503),
        "chunked": _chunked(explanation, 3000),
        "until close": b"HTTP/1.1 503 Said\r\n\r\n" + explanation,
    }[kind]

    async def body() -> None:
        async with wired(closing(data)) as (server, pool):
            for count in (1, 2):
                lent = Lent(*_SIZES)
                response = await pool.ask(REQUEST, lent.place)
                assert response.head.status == 503
                assert response.explanation == explanation[:_LIMIT]
                assert lent.untouched
                assert server.connections == count, "whether anything follows an error's body is not known"

    run_on_each_loop(body)


def test_an_explanation_byte_by_byte_without_the_next_answer() -> None:
    explanation = b"<Error/>"
    data = answer(explanation, status=404)

    async def byte_by_byte(peer: Peer) -> None:
        await peer.request()
        for at in range(len(data)):
            peer.send(data[at : at + 1])
            await turn(4)
        peer.send(_WHOLE)

    async def body() -> None:
        async with wired(byte_by_byte, closing(data + answer(b"another", status=500))) as (_, pool):
            for _ in range(2):
                lent = Lent(*_SIZES)
                response = await pool.ask(REQUEST, lent.place)
                assert (response.head.status, response.explanation) == (404, explanation)
                assert lent.untouched

    run_on_each_loop(body)


@pytest.mark.parametrize("sent", [0, 1, _HEAD_BYTES, _HEAD_BYTES + 1, len(_WHOLE) - 1])
def test_a_server_that_falls_silent(sent: int) -> None:
    async def falls_silent(peer: Peer) -> None:
        await peer.request()
        peer.send(_WHOLE[:sent])

    async def body() -> None:
        async with wired(falls_silent, stall_s=0.05) as (server, pool):
            lent = Lent(*_SIZES)
            with pytest.raises(TransientError, match=r"sent nothing for 0\.05 s") as caught:
                await pool.ask(REQUEST, lent.place)
            assert caught.value.valid_bytes == max(0, sent - _HEAD_BYTES)
            lent.check(_BODY[: caught.value.valid_bytes])
            assert server.requests == 1
            before = bytes(lent.memory)
            server.peers[0].send(_WHOLE[sent:])
            await turn()
            assert lent.memory == before

    run_on_each_loop(body)


def test_a_slow_server_does_not_stall() -> None:
    """The limit is on silence, not on the answer: it takes longer than that as a whole."""

    async def slow(peer: Peer) -> None:
        await peer.request()
        peer.send(_WHOLE[:_HEAD_BYTES])
        await drip(peer, _WHOLE[_HEAD_BYTES:])

    async def body() -> None:
        async with wired(slow, stall_s=0.2) as (_, pool):
            lent = Lent(*_SIZES)
            await pool.ask(REQUEST, lent.place)
            lent.check(_BODY)

    run_on_each_loop(body)


async def drip(peer: Peer, data: bytes) -> None:
    """Send byte by byte, each long before a connection counts as silent."""
    loop = asyncio.get_running_loop()
    started = loop.time()
    for at in range(len(data)):
        wake = loop.create_future()
        loop.call_at(started + 0.005 * at, wake.set_result, None)
        await wake
        peer.send(data[at : at + 1])


@pytest.mark.parametrize("part", ["head", "explanation"])
def test_who_drips_what_should_come_in_one_go_is_silent(part: str) -> None:
    """A byte now and then would hold a request for days."""
    refused = answer(b"x" * 100, status=404)
    sent = 0 if part == "head" else refused.index(b"x")

    async def slow(peer: Peer) -> None:
        await peer.request()
        peer.send(refused[:sent])
        await drip(peer, b"HTTP/1.1 200 OK\r\nX: " + b"y" * 100 if part == "head" else refused[sent:])

    async def body() -> None:
        async with wired(slow, stall_s=0.1) as (_, pool):
            with pytest.raises(TransientError, match=r"sent nothing for 0\.1 s"):
                await pool.ask(REQUEST, Lent(*_SIZES).place)

    run_on_each_loop(body)


@pytest.mark.parametrize("sent", [0, 1, _HEAD_BYTES, _HEAD_BYTES + 1, len(_WHOLE) - 1])
def test_a_cancelled_caller(sent: int) -> None:
    async def waits(peer: Peer) -> None:
        await peer.request()
        peer.send(_WHOLE[:sent])

    async def body() -> None:
        async with wired(waits, closing(_WHOLE)) as (server, pool):
            lent = Lent(*_SIZES)
            asking = asyncio.ensure_future(pool.ask(REQUEST, lent.place))
            await until(lambda: server.requests == 1)
            await turn()
            # What has arrived but not been read yet may not be written either.
            server.peers[0].send(_WHOLE[sent:])
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            before = bytes(lent.memory)
            server.peers[0].send(_WHOLE)
            await turn()
            assert lent.memory == before
            lent.check(_BODY[: max(0, sent - _HEAD_BYTES)])
            assert pool.connections == 0
            await pool.ask(REQUEST, lent.place)
            assert server.connections == 2

    run_on_each_loop(body)
