"""The executor of daemon threads."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Coroutine, Iterator
from functools import partial
from typing import Any

import pytest

from streamload.errors import SourceError
from streamload.sources.threads import DaemonExecutor, ThreadCall
from streamload.testing import run_on_each_loop

_HUNG_PROCESS = """
import threading
from streamload.sources.threads import DaemonExecutor
executor = DaemonExecutor(2)
running = threading.Event()
def hang():
    running.set()
    threading.Event().wait()
executor.submit(hang)
running.wait()
executor.shutdown(wait=False)
print(executor.join(0.0))
"""


class _Memory(bytearray):
    """A bytearray that weak references can point to."""


@pytest.fixture
def executor() -> Iterator[DaemonExecutor]:
    executor = DaemonExecutor(2)
    yield executor
    executor.shutdown()
    assert executor.join(10.0)


def test_runs_calls_and_hands_over_what_they_return_or_raise(executor: DaemonExecutor) -> None:
    def fail() -> None:
        raise KeyError("x")

    assert list(executor.map(lambda n: n * n, range(50))) == [n * n for n in range(50)]
    with pytest.raises(KeyError):
        executor.submit(fail).result()
    assert executor.submit(int, "7f", base=16).result() == 127


def test_with_fewer_threads_than_it_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """A container has a limit on them."""
    executor = DaemonExecutor(3)
    start, limit = threading.Thread.start, [0]

    def limited(thread: threading.Thread) -> None:
        if not limit[0]:
            raise RuntimeError("can't start new thread")
        limit[0] -= 1
        start(thread)

    monkeypatch.setattr(threading.Thread, "start", limited)
    ran: list[int] = []
    with pytest.raises(SourceError, match="no thread can be started"):
        executor.submit(ran.append, 1)
    limit[0] = 1
    for number in (2, 3):
        executor.submit(ran.append, number).result(timeout=10)
    executor.shutdown()
    assert executor.ended.done()
    assert ran == [2, 3]


def test_its_threads_are_daemons_with_names(executor: DaemonExecutor) -> None:
    together = threading.Barrier(2)
    seen = [executor.submit(lambda: (together.wait(), threading.current_thread())[1]) for _ in range(2)]
    threads = [future.result() for future in seen]
    assert {thread.name for thread in threads} == {"streamload-read-0", "streamload-read-1"}
    assert all(thread.daemon for thread in threads)


def test_a_call_cancelled_in_the_queue_never_runs() -> None:
    executor = DaemonExecutor(1)
    go_on = threading.Event()
    ran: list[str] = []
    first = executor.submit(go_on.wait)
    second = executor.submit(ran.append, "second")
    third = executor.submit(ran.append, "third")
    assert second.cancel()
    go_on.set()
    third.result()
    assert first.result()
    assert ran == ["third"]
    executor.shutdown()
    assert executor.join(10.0)


def test_shutdown_runs_the_queue_out_unless_told_to_cancel_it() -> None:
    for cancel in (False, True):
        executor = DaemonExecutor(1)
        begun, go_on = threading.Event(), threading.Event()
        ran: list[int] = []

        def block(begun: threading.Event = begun, go_on: threading.Event = go_on) -> None:
            begun.set()
            go_on.wait()

        executor.submit(block)
        queued = [executor.submit(ran.append, n) for n in range(3)]
        begun.wait()
        executor.shutdown(wait=False, cancel_futures=cancel)
        executor.shutdown(wait=False, cancel_futures=cancel)
        assert not executor.ended.done()
        go_on.set()
        executor.ended.result(10.0)
        assert executor.join(10.0)
        assert ran == ([] if cancel else [0, 1, 2])
        assert all(future.cancelled() == cancel for future in queued)


def test_after_shutdown_nothing_is_taken() -> None:
    executor = DaemonExecutor(1)
    executor.shutdown()
    assert executor.ended.done()
    assert executor.join(0.0)
    with pytest.raises(RuntimeError, match="shut down"):
        executor.submit(print)


def test_a_thread_that_hangs_is_told_and_not_waited_for() -> None:
    executor = DaemonExecutor(1, join_s=0.0)
    go_on = threading.Event()
    executor.submit(go_on.wait)
    executor.shutdown()
    assert not executor.join(0.0)
    go_on.set()
    assert executor.join(10.0)


@pytest.mark.parametrize("fails", [False, True])
def test_a_finished_call_keeps_nothing_alive(executor: DaemonExecutor, fails: bool) -> None:
    def use(memory: memoryview) -> None:
        if fails:
            raise ValueError("no")

    memory = _Memory(10)
    gone = weakref.ref(memory)
    # A later call on each thread would only hide what the thread still holds.
    future = executor.submit(use, memoryview(memory))
    assert isinstance(future.exception(), ValueError if fails else type(None))
    del memory, future
    gc.collect()
    executor.shutdown()
    assert executor.join(10.0)
    assert gone() is None


class _Gate:
    """A call that says when it began, and ends when it may."""

    def __init__(self) -> None:
        self.began = threading.Event()
        self.may_end = threading.Event()

    def __call__(self) -> str:
        self.began.set()
        assert self.may_end.wait(30)
        return "done"


async def _cancelled(call: ThreadCall[str]) -> None:
    """Someone waits for the call's result and is cancelled."""
    waiting = asyncio.create_task(call.result())
    await asyncio.sleep(0)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting


def _on_one_thread(body: Callable[[DaemonExecutor, _Gate], Coroutine[Any, Any, None]]) -> None:
    async def run() -> None:
        executor, gate = DaemonExecutor(1), _Gate()
        try:
            await body(executor, gate)
        finally:
            gate.may_end.set()
            executor.shutdown()

    run_on_each_loop(run)


def test_a_thread_call_gives_what_the_call_returns_or_raises() -> None:
    def fail() -> str:
        raise KeyError("x")

    async def body(executor: DaemonExecutor, gate: _Gate) -> None:
        gate.may_end.set()
        assert await ThreadCall(executor, gate).result() == "done"
        with pytest.raises(KeyError):
            await ThreadCall(executor, fail).result()
        assert await ThreadCall(executor, gate).result() == "done", "the thread is gone"

    _on_one_thread(body)


def test_a_thread_call_that_has_not_begun_can_be_taken_back() -> None:
    calls: list[str] = []

    async def body(executor: DaemonExecutor, gate: _Gate) -> None:
        calls.clear()
        first = ThreadCall(executor, gate)
        await asyncio.to_thread(gate.began.wait, 30)
        second = ThreadCall(executor, lambda: calls.append("second") or "second")  # type: ignore[func-returns-value]
        await _cancelled(second)
        assert second.take_back()
        assert not first.take_back(), "a thread is in it"
        gate.may_end.set()
        assert await first.result() == "done"
        assert first.take_back(), "nobody is in it any more"
        assert await ThreadCall(executor, lambda: "third").result() == "third"
        assert calls == []

    _on_one_thread(body)


def test_who_waits_for_a_thread_to_leave_waits_for_that_whoever_cancels() -> None:
    async def body(executor: DaemonExecutor, gate: _Gate) -> None:
        call = ThreadCall(executor, gate)
        await asyncio.to_thread(gate.began.wait, 30)
        await _cancelled(call)
        assert not await call.left(0.0)
        leaving = asyncio.create_task(call.left(30.0))
        for _ in range(3):
            await asyncio.sleep(0)
            leaving.cancel()
        assert not leaving.done()
        gate.may_end.set()
        assert await leaving
        assert call.over

    _on_one_thread(body)


def test_a_thread_call_may_end_after_its_loop() -> None:
    executor, gate = DaemonExecutor(1), _Gate()

    async def leave() -> None:
        ThreadCall(executor, gate)
        await asyncio.to_thread(gate.began.wait, 30)

    asyncio.run(leave())
    gate.may_end.set()
    assert executor.submit(lambda: 7).result(30) == 7, "the thread died of the closed loop"
    executor.shutdown()


@pytest.mark.parametrize("fails", [False, True])
def test_a_thread_call_that_is_over_keeps_nothing_alive(fails: bool) -> None:
    def use(memory: memoryview) -> str:
        if fails:
            raise ValueError("no")
        return "used"

    async def body(executor: DaemonExecutor, gate: _Gate) -> None:
        memory = _Memory(10)
        gone = weakref.ref(memory)
        call = ThreadCall(executor, partial(use, memoryview(memory)))
        try:
            assert await call.result() == "used"
        except ValueError:
            assert fails
        del memory
        # The thread has answered, and may not have let go yet: it has when it takes the next call.
        await ThreadCall(executor, lambda: "next").result()
        if fails:
            del call  # an error's traceback knows the frame that raised it
            gc.collect()
        assert gone() is None

    _on_one_thread(body)


def test_needs_a_thread() -> None:
    with pytest.raises(ValueError, match="at least 1"):
        DaemonExecutor(0)


def test_a_process_ends_although_a_thread_hangs() -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _HUNG_PROCESS], capture_output=True, text=True, timeout=60, check=True
    )
    assert ended.stdout.strip() == "False"
