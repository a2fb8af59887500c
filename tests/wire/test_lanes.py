"""Requests spread over event loops, and what is left of those.

Invariants: a call to another loop ends only when what it runs there has ended, however often it is cancelled; after
closing, no thread, task or connection is left, and what was under way has failed with one of `streamload.errors`.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import threading
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from streamload.errors import ClosedError, TransientError
from streamload.testing import run_on_each_loop
from streamload.wire import Lanes, Server, lanes
from streamload.wire.loops import LoopThread
from tests.wire.server import (
    REQUEST,
    Lent,
    Peer,
    Script,
    ScriptedServer,
    answer,
    client_tls,
    closing,
    pattern,
    serve,
    server_tls,
    until,
)

_BODY = pattern(40)


@contextlib.asynccontextmanager
async def _laned(*scripts: Script, most: int = 2) -> AsyncIterator[tuple[ScriptedServer, Lanes, Server]]:
    async with serve(*scripts) as scripted:
        opened = Lanes(connect_timeout_s=20.0, stall_s=20.0, most=most)
        try:
            yield scripted, opened, Server("127.0.0.1", scripted.port, None)
        finally:
            await opened.aclose()
        assert opened.connections == 0
        await scripted.clients_gone()


def _threads() -> list[str]:
    return sorted(thread.name for thread in threading.enumerate() if thread.name.startswith("streamload-io"))


class _Hold:
    """A server's connections, each of which answers when it is told to."""

    def __init__(self) -> None:
        self.go = asyncio.Event()

    async def script(self, peer: Peer) -> None:
        while True:
            await peer.request()
            await self.go.wait()
            peer.send(answer(_BODY))


def test_requests_at_once_go_to_both_lanes() -> None:
    async def body() -> None:
        hold = _Hold()
        async with _laned(hold.script, hold.script, hold.script, hold.script) as (server, opened, where):
            lents = [Lent(11, 29) for _ in range(4)]
            asking = [asyncio.ensure_future(opened.ask(where, REQUEST, lent.place)) for lent in lents]
            await until(lambda: server.requests == 4)
            assert _threads() == ["streamload-io-1"]
            assert [sum(pool.connections for pool in lane.pools.values()) for lane in opened._lanes] == [2, 2]
            hold.go.set()
            await asyncio.gather(*asking)
            for lent in lents:
                lent.check(_BODY)
            # One at a time stays where it is, on the connections that are there.
            for _ in range(3):
                lent = Lent(40)
                await opened.ask(where, REQUEST, lent.place)
                lent.check(_BODY)
            assert server.connections == 4
        assert _threads() == []

    run_on_each_loop(body)


@pytest.mark.parametrize(("cores", "threads"), [(1, 0), (2, 0), (3, 1), (8, 1)])
def test_a_second_loop_decrypts_only_where_there_are_cores_to_spare(
    cores: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)))

    async def body() -> None:
        hold = _Hold()
        async with serve(*[hold.script] * 4, tls=server_tls()) as server:
            opened = Lanes(connect_timeout_s=20.0, stall_s=20.0)
            try:
                where = Server("127.0.0.1", server.port, client_tls())
                lents = [Lent(11, 29) for _ in range(4)]
                asking = [asyncio.ensure_future(opened.ask(where, REQUEST, lent.place)) for lent in lents]
                await until(lambda: server.requests == 4)
                assert len(_threads()) == threads
                hold.go.set()
                await asyncio.gather(*asking)
            finally:
                await opened.aclose()

    run_on_each_loop(body)


def test_one_request_needs_no_thread() -> None:
    async def body() -> None:
        async with _laned(closing(answer(_BODY))) as (_, opened, where):
            lent = Lent(40)
            await opened.ask(where, REQUEST, lent.place)
            lent.check(_BODY)
            assert _threads() == []

    run_on_each_loop(body)


def test_a_request_that_is_cancelled_writes_nothing_more() -> None:
    async def body() -> None:
        hold = _Hold()
        async with _laned(hold.script, hold.script) as (server, opened, where):
            lents = [Lent(40), Lent(40)]
            asking = [asyncio.ensure_future(opened.ask(where, REQUEST, lent.place)) for lent in lents]
            await until(lambda: server.requests == 2)
            for task in asking:
                task.cancel()
            assert [type(error) for error in await asyncio.gather(*asking, return_exceptions=True)] == [
                asyncio.CancelledError,
                asyncio.CancelledError,
            ]
            hold.go.set()
            await until(lambda: opened.connections == 0)
            assert all(lent.untouched for lent in lents)

    run_on_each_loop(body)


def test_closing_ends_what_is_under_way_on_every_lane() -> None:
    async def body() -> None:
        hold = _Hold()
        async with _laned(hold.script, hold.script) as (server, opened, where):
            asking = [asyncio.ensure_future(opened.ask(where, REQUEST, Lent(40).place)) for _ in range(2)]
            await until(lambda: server.requests == 2)
            await opened.aclose()
            assert [type(error) for error in await asyncio.gather(*asking, return_exceptions=True)] == [
                ClosedError,
                ClosedError,
            ]
            assert _threads() == []
            await opened.aclose()
            with pytest.raises(ClosedError):
                await opened.ask(where, REQUEST, Lent(40).place)
            hold.go.set()  # the server's own end of it

    run_on_each_loop(body)


def test_errors_come_from_every_lane() -> None:
    async def cut(peer: Peer) -> None:
        await peer.request()
        peer.send(answer(_BODY)[:-7])
        peer.close()

    async def body() -> None:
        async with _laned(cut, cut) as (_, opened, where):
            found = await asyncio.gather(
                *(opened.ask(where, REQUEST, Lent(40).place) for _ in range(2)), return_exceptions=True
            )
            assert [getattr(error, "valid_bytes", None) for error in found] == [33, 33]

    run_on_each_loop(body)


def test_without_a_thread_to_be_had_one_lane_does_it_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str, at_end: object) -> LoopThread:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(lanes, "LoopThread", refuse)

    async def body() -> None:
        hold = _Hold()
        hold.go.set()
        async with _laned(hold.script, hold.script) as (_, opened, where):
            lents = [Lent(40), Lent(40)]
            await asyncio.gather(*(opened.ask(where, REQUEST, lent.place) for lent in lents))
            for lent in lents:
                lent.check(_BODY)

    run_on_each_loop(body)


def test_a_call_gives_back_what_it_returns_or_raises() -> None:
    async def body() -> None:
        thread = LoopThread("streamload-io-test")

        async def name() -> str:
            await asyncio.sleep(0)
            return threading.current_thread().name

        async def fail() -> None:
            raise TransientError("no")

        try:
            assert await thread.run(name) == "streamload-io-test"
            with pytest.raises(TransientError, match="no"):
                await thread.run(fail)
        finally:
            await thread.aclose()
        with pytest.raises(ClosedError):
            await thread.run(name)

    run_on_each_loop(body)


def test_a_cancelled_call_waits_for_its_coroutine() -> None:
    """However often it is cancelled, and however long the coroutine takes to end."""

    async def body() -> None:
        thread = LoopThread("streamload-io-test")
        begun, cleaning, may_end = threading.Event(), threading.Event(), threading.Event()
        ended = False

        async def stubborn() -> None:
            nonlocal ended
            begun.set()
            try:
                await asyncio.Event().wait()
            finally:
                cleaning.set()
                while not may_end.is_set():
                    try:
                        await asyncio.sleep(0)
                    except asyncio.CancelledError:
                        pass
                ended = True

        try:
            task = asyncio.ensure_future(thread.run(stubborn))
            await until(begun.is_set)
            task.cancel()
            await until(cleaning.is_set)
            task.cancel()
            for _ in range(5):
                await asyncio.sleep(0)
            assert not task.done()
            may_end.set()
            with pytest.raises(asyncio.CancelledError):
                await task
            assert ended
        finally:
            may_end.set()
            await thread.aclose()

    run_on_each_loop(body)


@pytest.mark.parametrize("attempt", range(4))
def test_closing_that_is_cancelled_leaves_neither_thread_nor_connection(attempt: int) -> None:
    """Whether the thread has heard of it by then is its own affair: `_laned` looks for what is left."""

    async def body() -> None:
        hold = _Hold()
        hold.go.set()
        async with _laned(hold.script, hold.script) as (_, opened, where):
            await asyncio.gather(*(opened.ask(where, REQUEST, Lent(40).place) for _ in range(2)))
            assert _threads() == ["streamload-io-1"]
            closing_them = asyncio.ensure_future(opened.aclose())
            await asyncio.sleep(0)
            closing_them.cancel()
            with pytest.raises(asyncio.CancelledError):
                await closing_them
            await until(lambda: _threads() == [])

    run_on_each_loop(body)


def test_what_cannot_even_be_made_is_told() -> None:
    async def body() -> None:
        thread = LoopThread("streamload-io-test")

        def refuse() -> Coroutine[Any, Any, None]:
            raise MemoryError("no")

        try:
            with pytest.raises(MemoryError):
                await thread.run(refuse)
        finally:
            await thread.aclose()

    run_on_each_loop(body)


def test_a_thread_that_is_stopped_ends_its_calls() -> None:
    async def body() -> None:
        thread = LoopThread("streamload-io-test")
        begun = threading.Event()

        async def wait() -> None:
            begun.set()
            await asyncio.Event().wait()

        task = asyncio.ensure_future(thread.run(wait))
        await until(begun.is_set)
        await thread.aclose()
        with pytest.raises(ClosedError):
            await task

    run_on_each_loop(body)
