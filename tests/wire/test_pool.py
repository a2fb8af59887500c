"""Connections that are kept, lost, repeated, spread and closed.

Invariants, beside those of `test_connection`:

1. A connection is used again only after an answer that ended exactly where it should, and never after an error.
2. A request is sent again only on a connection that was used before and only where not one byte came; at most once.
3. No answer is taken for another request's.
4. After `Pool.aclose` no socket, task or timer is left; what was under way has failed with one of `streamload.errors`.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest

from streamload.errors import ClosedError, SourceError, TransientError
from streamload.testing import run_on_each_loop
from streamload.wire import Pool
from tests.wire.server import (
    REQUEST,
    Lent,
    Peer,
    Script,
    answer,
    client_tls,
    closing,
    pattern,
    serve,
    server_tls,
    turn,
    until,
    watching,
    wired,
)

_BODY = pattern(40)
_OTHER = pattern(40, seed=50)
_WHOLE = answer(_BODY)
_HEAD = _WHOLE[: -len(_BODY)]


async def _get(pool: Pool, body: bytes = _BODY) -> None:
    lent = Lent(11, 29)
    await pool.ask(REQUEST, lent.place)
    lent.check(body)


async def _silent(peer: Peer) -> None:
    await peer.request()


async def _resets(peer: Peer) -> None:
    await peer.request()
    peer.reset()


async def _answers_all(peer: Peer) -> None:
    while True:
        await peer.request()
        peer.send(_WHOLE)


# Connections that are used again


def test_one_connection_serves_many_requests() -> None:
    async def body() -> None:
        async with wired(_answers_all) as (server, pool):
            for _ in range(20):
                await _get(pool)
            assert (server.connections, server.requests, pool.connections) == (1, 20, 1)

    run_on_each_loop(body)


def test_requests_at_once_have_connections_of_their_own() -> None:
    """And each gets its own answer, in whatever order they come."""

    async def body() -> None:
        both = asyncio.Event()

        def waits(content: bytes) -> Script:
            async def script(peer: Peer) -> None:
                await peer.request()
                await both.wait()
                peer.send(answer(content))

            return script

        async with wired(waits(_BODY), waits(_OTHER)) as (server, pool):
            lents = [Lent(40), Lent(20, 20)]
            asking = [asyncio.ensure_future(pool.ask(REQUEST, lent.place)) for lent in lents]
            await until(lambda: server.requests == 2)
            both.set()
            await asyncio.gather(*asking)
            assert sorted(lent.content for lent in lents) == sorted([_BODY, _OTHER])
            assert pool.connections == 2

    run_on_each_loop(body)


@pytest.mark.parametrize(
    "last",
    [
        answer(_BODY, "Connection: close"),
        _WHOLE.replace(b"HTTP/1.1", b"HTTP/1.0"),
    ],
)
def test_an_answer_that_is_the_last_one_of_its_connection(last: bytes) -> None:
    async def one(peer: Peer) -> None:
        await peer.request()
        peer.send(last)  # and does not close: the client does

    async def body() -> None:
        async with wired(one) as (server, pool):
            for count in (1, 2, 3):
                await _get(pool)
                await turn()
                assert (server.connections, pool.connections) == (count, 0)

    run_on_each_loop(body)


def test_an_error_is_the_last_answer_of_its_connection() -> None:
    async def fails(peer: Peer) -> None:
        while True:
            await peer.request()
            peer.send(answer(b"<Error/>", status=503))

    async def body() -> None:
        async with wired(fails) as (server, pool):
            for count in (1, 2):
                lent = Lent(40)
                assert (await pool.ask(REQUEST, lent.place)).explanation == b"<Error/>"
                assert lent.untouched
                assert server.connections == count

    run_on_each_loop(body)


# Bytes that nobody asked for


def test_an_answer_before_the_request() -> None:
    async def talks_first(peer: Peer) -> None:
        peer.send(answer(_OTHER))
        await peer.request()
        peer.send(_WHOLE)

    async def body() -> None:
        async with wired(talks_first) as (_, pool):
            lent = Lent(40)
            # The first bytes on a connection cannot be told from an answer. Whatever it is taken for: no crash.
            with contextlib.suppress(SourceError):
                await pool.ask(REQUEST, lent.place)
                lent.check(_OTHER)

    run_on_each_loop(body)


def test_a_server_that_closes_before_the_request() -> None:
    async def leaves(peer: Peer) -> None:
        peer.close()

    async def body() -> None:
        async with wired(leaves) as (server, pool):
            with pytest.raises(TransientError):
                await _get(pool)
            assert server.connections == 1

    run_on_each_loop(body)


def test_bytes_on_an_idle_connection_close_it() -> None:
    async def body() -> None:
        async with wired(_answers_all) as (server, pool):
            await _get(pool)
            server.peers[0].send(answer(_OTHER))
            await turn()
            assert pool.connections == 0
            await _get(pool)
            assert (server.connections, server.requests) == (2, 2)

    run_on_each_loop(body)


def _with_another(extra: bytes, *, at_once: bool) -> Script:
    """Answers with something behind the body: in one piece with all, or in one piece with the body."""

    async def script(peer: Peer) -> None:
        await peer.request()
        if at_once:
            peer.send(_WHOLE + extra)
        else:
            peer.send(_HEAD)
            await turn()
            peer.send(_BODY + extra)

    return script


def test_another_answer_in_the_same_piece_as_the_head() -> None:
    async def body() -> None:
        async with wired(_with_another(answer(_OTHER), at_once=True), _answers_all) as (server, pool):
            lent = Lent(40)
            with pytest.raises(SourceError, match="more bytes") as caught:
                await pool.ask(REQUEST, lent.place)
            assert not caught.value.retryable
            assert lent.untouched
            await _get(pool)
            assert server.connections == 2

    run_on_each_loop(body)


@pytest.mark.parametrize("extra", [b"!", answer(_OTHER)], ids=["a byte", "an answer"])
def test_more_bytes_in_the_same_piece_as_the_body_then_a_pause(extra: bytes) -> None:
    async def body() -> None:
        async with wired(_with_another(extra, at_once=False), _answers_all) as (server, pool):
            await _get(pool)
            await turn()
            assert pool.connections == 0
            await _get(pool)
            assert server.connections == 2

    run_on_each_loop(body)


def test_another_answer_in_the_same_piece_as_the_body_and_the_next_request_at_once() -> None:
    """It is in the socket already when the next request is sent: it cannot be that one's answer."""

    async def body() -> None:
        async with wired(_with_another(answer(_OTHER), at_once=False), _answers_all) as (_, pool):
            await _get(pool)
            await _get(pool)

    run_on_each_loop(body)


# Requests that are sent again


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
@pytest.mark.parametrize("noticed", [False, True])
def test_an_idle_connection_that_the_server_closes(noticed: bool, reset: bool) -> None:
    async def body() -> None:
        async with wired(_answers_all) as (server, pool):
            await _get(pool)
            server.peers[0].reset() if reset else server.peers[0].close()
            if noticed:
                await turn()
                assert pool.connections == 0
            await _get(pool)
            assert server.connections == 2

    run_on_each_loop(body)


@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_a_server_that_takes_a_second_request_and_closes(reset: bool) -> None:
    """The request is sent again once, on a new connection; if that ends in the same way, it fails."""

    async def one(peer: Peer) -> None:
        await peer.request()
        peer.send(_WHOLE)
        await peer.request()
        peer.reset() if reset else peer.close()

    async def none(peer: Peer) -> None:
        await peer.request()
        peer.reset() if reset else peer.close()

    async def body() -> None:
        async with wired(one, _answers_all) as (server, pool):
            await _get(pool)
            await _get(pool)
            assert [len(peer.requests) for peer in server.peers] == [2, 1]
        async with wired(one, none) as (server, pool):
            await _get(pool)
            with pytest.raises(TransientError):
                await _get(pool)
            assert [len(peer.requests) for peer in server.peers] == [2, 1]

    run_on_each_loop(body)


def test_one_byte_of_an_answer_and_the_request_is_not_sent_again() -> None:
    async def one(peer: Peer) -> None:
        await peer.request()
        peer.send(_WHOLE)
        await peer.request()
        peer.send(b"H")
        peer.close()

    async def body() -> None:
        async with wired(one) as (server, pool):
            await _get(pool)
            with pytest.raises(TransientError):
                await _get(pool)
            assert (server.connections, server.requests) == (1, 2)

    run_on_each_loop(body)


async def _idle(pool: Pool, count: int) -> None:
    """Make so many connections, and leave them idle."""
    await asyncio.gather(*[_get(pool) for _ in range(count)])
    assert pool.connections == count


def _one_then(then: Callable[[Peer], None], together: asyncio.Barrier) -> Script:
    async def script(peer: Peer) -> None:
        await peer.request()
        await together.wait()
        peer.send(_WHOLE)
        await peer.request()
        then(peer)

    return script


def test_several_idle_connections_that_fail_and_the_request_is_sent_again_once() -> None:
    async def body() -> None:
        script = _one_then(Peer.close, asyncio.Barrier(4))
        async with wired(script, script, script, script, closing(_WHOLE)) as (server, pool):
            await _idle(pool, 4)
            with contextlib.suppress(TransientError):
                await _get(pool)
            assert server.requests <= 4 + 2

    run_on_each_loop(body)


def test_a_silent_server_is_not_asked_again() -> None:
    """It may well have the request: a stall is one, wherever it happens, and takes its time once."""

    async def body() -> None:
        script = _one_then(lambda _: None, asyncio.Barrier(3))
        async with wired(script, script, script, _silent, stall_s=0.1) as (server, pool):
            await _idle(pool, 3)
            with pytest.raises(TransientError, match="sent nothing"):
                await _get(pool)
            assert server.requests == 3 + 1

    run_on_each_loop(body)


# Making connections


class _LookUp:
    """Takes the place of the event loop's look-up of one name.

    Attributes:
        calls: How often it was asked.
    """

    def __init__(self, *results: Sequence[str] | OSError) -> None:
        self._results = list(results)
        self.calls = 0

    async def getaddrinfo(self, host: str, port: int, **_: Any) -> list[Any]:
        assert host == "server.test"
        self.calls += 1
        result = self._results[0] if len(self._results) == 1 else self._results.pop(0)
        if isinstance(result, OSError):
            raise result
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in result]


@contextlib.asynccontextmanager
async def _named(
    look_up: _LookUp,
    port: int,
    *,
    tls: ssl.SSLContext | None = None,
    connect_timeout_s: float = 20.0,
    stall_s: float = 20.0,
) -> AsyncIterator[Pool]:
    """A pool that asks ``server.test``."""
    loop = asyncio.get_running_loop()
    plain = loop.getaddrinfo
    loop.getaddrinfo = look_up.getaddrinfo  # type: ignore[method-assign,assignment]
    pool = Pool("server.test", port, tls=tls, connect_timeout_s=connect_timeout_s, stall_s=stall_s)
    try:
        yield pool
    finally:
        await pool.aclose()
        loop.getaddrinfo = plain  # type: ignore[method-assign]


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def test_nobody_listens() -> None:
    async def body() -> None:
        async with watching():
            pool = Pool("127.0.0.1", _closed_port(), tls=None, connect_timeout_s=20.0, stall_s=20.0)
            with pytest.raises(TransientError, match="cannot reach"):
                await _get(pool)
            assert pool.connections == 0
            await pool.aclose()

    run_on_each_loop(body)


def test_a_dead_address_is_left_alone_for_a_while() -> None:
    async def body() -> None:
        async with serve(_answers_all) as server:
            look_up = _LookUp(["127.0.0.2", "127.0.0.1"])
            async with _named(look_up, server.port) as pool:
                tried: list[str] = []
                loop = asyncio.get_running_loop()
                plain = loop.create_connection

                async def create_connection(factory: Any, host: str, *args: Any, **more: Any) -> Any:
                    tried.append(host)
                    return await plain(factory, host, *args, **more)

                loop.create_connection = create_connection  # type: ignore[method-assign,assignment]
                try:
                    await asyncio.gather(*[_get(pool) for _ in range(3)])
                    first = len(tried)
                    assert "127.0.0.2" in tried
                    lents = [Lent(40) for _ in range(6)]
                    await asyncio.gather(*[pool.ask(REQUEST, lent.place) for lent in lents])
                finally:
                    loop.create_connection = plain  # type: ignore[method-assign]
                assert set(tried[first:]) == {"127.0.0.1"}
                assert pool.connections == 6

    run_on_each_loop(body)


def test_connections_are_spread_over_the_addresses() -> None:
    async def body() -> None:
        together = asyncio.Barrier(4)

        async def waits(peer: Peer) -> None:
            await peer.request()
            await together.wait()
            peer.send(_WHOLE)

        async with serve(waits) as one, serve(waits, address="127.0.0.2", port=one.port) as two:
            look_up = _LookUp(["127.0.0.1", "127.0.0.2"])
            async with _named(look_up, one.port) as pool:
                asking = []
                for count in range(1, 5):
                    asking.append(asyncio.ensure_future(_get(pool)))
                    await until(lambda count=count: one.requests + two.requests == count)  # type: ignore[misc]
                await asyncio.gather(*asking)
                assert (one.connections, two.connections) == (2, 2)
                assert look_up.calls == 1

    run_on_each_loop(body)


def test_connections_that_are_made_at_once_are_spread_too() -> None:
    async def body() -> None:
        hold = asyncio.Event()

        async def waits(peer: Peer) -> None:
            await peer.request()
            await hold.wait()
            peer.send(_WHOLE)

        async with serve(waits) as one, serve(waits, address="127.0.0.2", port=one.port) as two:
            look_up = _LookUp(["127.0.0.1", "127.0.0.2"])
            async with _named(look_up, one.port) as pool:
                asking = [asyncio.ensure_future(_get(pool)) for _ in range(6)]
                await until(lambda: one.requests + two.requests == 6)
                hold.set()
                await asyncio.gather(*asking)
                assert (one.connections, two.connections) == (3, 3)
                assert look_up.calls == 1

    run_on_each_loop(body)


@pytest.mark.parametrize("bad", [_resets, closing(_WHOLE[:-1]), _silent], ids=["resets", "cuts", "hangs"])
def test_an_address_with_a_bad_server_is_left_alone_for_a_while(bad: Script) -> None:
    async def body() -> None:
        async with (
            serve(_answers_all) as good,
            serve(bad, address="127.0.0.2", port=good.port) as broken,
            _named(_LookUp(["127.0.0.2", "127.0.0.1"]), good.port, stall_s=0.2) as pool,
        ):
            with pytest.raises(TransientError):
                await _get(pool)
            lents = [Lent(40) for _ in range(4)]
            await asyncio.gather(*[pool.ask(REQUEST, lent.place) for lent in lents])
            assert (good.connections, broken.connections) == (4, 1)

    run_on_each_loop(body)


def test_an_old_connection_that_ends_says_nothing_about_its_address() -> None:
    async def body() -> None:
        async def answers_one(peer: Peer) -> None:
            await peer.request()
            peer.send(_WHOLE)
            await peer.request()
            peer.close()

        async with (
            serve(answers_one, _answers_all) as one,
            serve(_answers_all, address="127.0.0.2", port=one.port) as two,
            _named(_LookUp(["127.0.0.1", "127.0.0.2"]), one.port) as pool,
        ):
            await _get(pool)
            assert (one.connections, two.connections) == (1, 0)
            lents = [Lent(40) for _ in range(6)]
            await asyncio.gather(*[pool.ask(REQUEST, lent.place) for lent in lents])
            assert one.connections > 1

    run_on_each_loop(body)


def test_addresses_are_looked_up_again_when_they_are_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamload.wire.pool._ADDRESSES_S", -1.0)

    async def body() -> None:
        async with serve(closing(_WHOLE)) as one, serve(closing(_WHOLE), address="127.0.0.2", port=one.port) as two:
            look_up = _LookUp(["127.0.0.1"], socket.gaierror(-3, "try again"), ["127.0.0.2"])
            async with _named(look_up, one.port) as pool:
                await _get(pool)
                await _get(pool)
                assert (one.connections, two.connections) == (2, 0), "the old answer is better than none"
                await _get(pool)
                assert (one.connections, two.connections) == (2, 1)

    run_on_each_loop(body)


def test_a_look_up_that_fails_once() -> None:
    async def body() -> None:
        async with serve(_answers_all) as server:
            look_up = _LookUp(socket.gaierror(-3, "try again"), ["127.0.0.1"])
            async with _named(look_up, server.port) as pool:
                with pytest.raises(TransientError, match="looking up"):
                    await _get(pool)
                await _get(pool)
                assert look_up.calls == 2

    run_on_each_loop(body)


def test_a_look_up_that_finds_nothing() -> None:
    async def body() -> None:
        async with _named(_LookUp([]), 80) as pool:
            with pytest.raises(TransientError):
                await _get(pool)

    run_on_each_loop(body)


def test_a_look_up_without_an_end() -> None:
    async def body() -> None:
        look_up = _LookUp([])

        async def never(*_: Any, **__: Any) -> list[Any]:
            return await asyncio.get_running_loop().create_future()  # type: ignore[no-any-return]

        look_up.getaddrinfo = never  # type: ignore[method-assign]
        async with _named(look_up, 80, connect_timeout_s=0.05) as pool:
            with pytest.raises(TransientError, match="looking up"):
                await _get(pool)

    run_on_each_loop(body)


# TLS


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
def test_tls(version: ssl.TLSVersion) -> None:
    async def body() -> None:
        async with wired(_answers_all, server=server_tls(version), client=client_tls()) as (server, pool):
            for _ in range(3):
                await _get(pool)
            assert (server.connections, server.requests) == (1, 3)

    run_on_each_loop(body)


@pytest.mark.parametrize("nbytes", [40, 8192, 20_000, 1_000_000])
def test_tls_with_the_head_in_a_record_of_its_own(nbytes: int) -> None:
    """The records arrive together: the event loop decrypts several of them for one call of the protocol."""
    content = pattern(nbytes)

    async def records(peer: Peer) -> None:
        await peer.request()
        data = answer(content)
        head = len(data) - nbytes
        peer.send(data[:30])
        peer.send(data[30:head])
        for start in range(head, len(data), 7000):
            peer.send(data[start : start + 7000])

    async def body() -> None:
        async with wired(records, server=server_tls(), client=client_tls(), stall_s=0.5) as (_, pool):
            lent = Lent(nbytes // 3, nbytes - nbytes // 3)
            await pool.ask(REQUEST, lent.place)
            lent.check(content)

    run_on_each_loop(body)


def test_tls_with_an_explanation_in_records_of_its_own() -> None:
    explanation = pattern(3000)

    async def records(peer: Peer) -> None:
        await peer.request()
        data = answer(explanation, status=503)
        for start in range(0, len(data), 500):
            peer.send(data[start : start + 500])

    async def body() -> None:
        async with wired(records, server=server_tls(), client=client_tls(), stall_s=0.5) as (_, pool):
            response = await pool.ask(REQUEST, Lent(40).place)
            assert response.explanation == explanation

    run_on_each_loop(body)


@pytest.mark.parametrize("sent", [0, 10, len(_HEAD), len(_HEAD) + 20])
@pytest.mark.parametrize("reset", [False, True], ids=["closed", "reset"])
def test_tls_that_ends_early(sent: int, reset: bool) -> None:
    async def ends(peer: Peer) -> None:
        await peer.request()
        peer.send(_WHOLE[:sent])
        peer.reset() if reset else peer.close()

    async def body() -> None:
        async with wired(ends, server=server_tls(), client=client_tls()) as (_, pool):
            lent = Lent(40)
            with pytest.raises(TransientError) as caught:
                await pool.ask(REQUEST, lent.place)
            valid = caught.value.valid_bytes
            assert valid <= max(0, sent - len(_HEAD)) if reset else valid == max(0, sent - len(_HEAD))
            lent.check(_BODY[:valid])

    run_on_each_loop(body)


@pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3])
@pytest.mark.parametrize("talks", [False, True], ids=["closes", "talks"])
def test_tls_with_a_server_that_does_not_wait_for_the_request(version: ssl.TLSVersion, talks: bool) -> None:
    async def hasty(peer: Peer) -> None:
        peer.send(answer(_OTHER, "Connection: close")) if talks else peer.close()

    async def body() -> None:
        async with wired(hasty, server=server_tls(version), client=client_tls()) as (_, pool):
            for _ in range(5):
                lent = Lent(40)
                with contextlib.suppress(SourceError):
                    await pool.ask(REQUEST, lent.place)
                    lent.check(_OTHER)

    run_on_each_loop(body)


def test_a_certificate_of_an_unknown_authority() -> None:
    async def body() -> None:
        client = ssl.create_default_context()
        async with wired(_answers_all, server=server_tls(), client=client) as (server, pool):
            with pytest.raises(SourceError, match="no secure connection") as caught:
                await _get(pool)
            assert not caught.value.retryable
            assert server.requests == 0

    run_on_each_loop(body)


def test_a_certificate_of_another_name() -> None:
    async def body() -> None:
        async with serve(_answers_all, tls=server_tls()) as server:
            client = client_tls()
            for name, good in [("server.test", True), ("localhost", False)]:
                pool = Pool(name, server.port, tls=client, connect_timeout_s=20.0, stall_s=20.0)
                look_up = _LookUp(["127.0.0.1"])
                loop = asyncio.get_running_loop()
                plain = loop.getaddrinfo

                async def getaddrinfo(_: str, port: int, look_up: _LookUp = look_up, **more: Any) -> list[Any]:
                    return await look_up.getaddrinfo("server.test", port, **more)

                loop.getaddrinfo = getaddrinfo  # type: ignore[method-assign,assignment]
                try:
                    if good:
                        await _get(pool)
                    else:
                        with pytest.raises(SourceError, match="no secure connection") as caught:
                            await _get(pool)
                        assert not caught.value.retryable
                finally:
                    await pool.aclose()
                    loop.getaddrinfo = plain  # type: ignore[method-assign]

    run_on_each_loop(body)


def test_a_server_without_tls() -> None:
    async def body() -> None:
        async def refuse(peer: Peer) -> None:
            peer.send(b"HTTP/1.1 400 Bad Request\r\n\r\n")
            peer.close()

        async with wired(refuse, client=client_tls()) as (_, pool):
            with pytest.raises(SourceError):
                await _get(pool)

    run_on_each_loop(body)


# The end


def test_a_closed_pool() -> None:
    async def body() -> None:
        async with wired(_answers_all) as (server, pool):
            await _get(pool)
            await pool.aclose()
            await pool.aclose()
            with pytest.raises(ClosedError):
                await _get(pool)
            assert server.connections == 1

    run_on_each_loop(body)


@pytest.mark.parametrize("sent", [0, 10, len(_HEAD), len(_HEAD) + 20])
def test_closing_ends_what_is_under_way(sent: int) -> None:
    """At once: the stall limit of 20 s has nothing to do with it."""

    async def waits(peer: Peer) -> None:
        await peer.request()
        peer.send(_WHOLE[:sent])

    async def body() -> None:
        async with wired(waits) as (server, pool):
            lent = Lent(40)
            asking = asyncio.ensure_future(pool.ask(REQUEST, lent.place))
            await until(lambda: server.requests == 1)
            await turn()
            await pool.aclose()
            await turn()
            ended = asking.done()
            asking.cancel()
            (result,) = await asyncio.gather(asking, return_exceptions=True)
            before = bytes(lent.memory)
            server.peers[0].send(_WHOLE[sent:])
            await turn()
            assert lent.memory == before
            assert ended, "it waits on a connection that is closed"
            assert isinstance(result, SourceError | ClosedError)

    run_on_each_loop(body)


def test_closing_counts_down_to_nothing() -> None:
    async def body() -> None:
        async with wired(closing(_WHOLE[:20])) as (_, pool):
            with pytest.raises(TransientError):
                await _get(pool)
            await pool.aclose()
            assert pool.connections == 0

    run_on_each_loop(body)


def test_closing_while_connecting() -> None:
    """Nothing is connected afterwards, and whoever asked hears of it."""

    async def body() -> None:
        # A plain server never answers the TLS greeting.
        async def mute(peer: Peer) -> None:
            await peer.gone()

        async with serve(mute) as server, watching():
            pool = Pool("127.0.0.1", server.port, tls=client_tls(), connect_timeout_s=0.2, stall_s=20.0)
            asking = asyncio.ensure_future(_get(pool))
            await until(lambda: server.connections == 1)
            await turn()
            await pool.aclose()
            (result,) = await asyncio.gather(asking, return_exceptions=True)
            assert isinstance(result, ClosedError | TransientError)
            await server.clients_gone()
            assert server.connections == 1, "a pool that is closed made a connection"

    run_on_each_loop(body)


def test_closing_does_not_leave_a_connection_half_made() -> None:
    """No socket is left when `aclose` returns, whatever the connect timeout: the server sees its end."""

    async def body() -> None:
        async def mute(peer: Peer) -> None:
            await peer.gone()

        async with serve(mute) as server:
            pool = Pool("127.0.0.1", server.port, tls=client_tls(), connect_timeout_s=20.0, stall_s=20.0)
            asking = asyncio.ensure_future(_get(pool))
            await until(lambda: server.connections == 1)
            await turn()
            await pool.aclose()
            await turn()
            ended = asking.done()
            asking.cancel()
            (result,) = await asyncio.gather(asking, return_exceptions=True)
            assert ended, "it goes on connecting"
            assert isinstance(result, ClosedError | TransientError)

    run_on_each_loop(body)


def test_a_caller_that_is_cancelled_while_connecting() -> None:
    async def body() -> None:
        async def mute(peer: Peer) -> None:
            await peer.gone()

        async with wired(mute, client=client_tls()) as (server, pool):
            asking = asyncio.ensure_future(_get(pool))
            await until(lambda: server.connections == 1)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking
            assert pool.connections == 0

    run_on_each_loop(body)


@pytest.mark.parametrize("secure", [False, True])
def test_a_caller_that_is_cancelled_at_any_turn(secure: bool) -> None:
    """The connection may be made in the very turn in which its caller is cancelled: it is closed all the same."""

    async def body() -> None:
        async def mute(peer: Peer) -> None:
            await peer.gone()

        async with serve(mute, tls=server_tls() if secure else None) as server:
            for turns in range(40):
                pool = Pool(
                    "127.0.0.1",
                    server.port,
                    tls=client_tls() if secure else None,
                    connect_timeout_s=20.0,
                    stall_s=20.0,
                )
                asking = asyncio.ensure_future(_get(pool))
                for _ in range(turns):
                    await asyncio.sleep(0)
                asking.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await asking
                await pool.aclose()
                await server.clients_gone()

    run_on_each_loop(body)
