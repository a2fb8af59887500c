"""The engine's thread: it ends with its coroutine, can be cancelled from anywhere, and lets scripts exit."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from streamload.errors import StreamloadError
from streamload.pipeline.engine import Engine, first_error, new_event_loop, run_in_thread


def test_the_loop_is_a_uvloop() -> None:
    loop = new_event_loop()
    loop.close()
    assert type(loop).__module__.startswith("uvloop")


def test_the_thread_ends_with_the_coroutine() -> None:
    async def main() -> None:
        pass

    engine = Engine(main)
    engine.start()
    engine.finished.result(timeout=10)
    assert engine.join(10)


def test_cancel_reaches_the_coroutine_and_its_cleanup_runs() -> None:
    entered, cleaned = threading.Event(), threading.Event()

    async def main() -> None:
        try:
            entered.set()
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    engine = Engine(main)
    engine.start()
    assert entered.wait(10)
    engine.cancel()
    assert engine.join(10)
    assert cleaned.is_set()
    engine.cancel()
    engine.post(print)


def test_without_a_loop_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_loop(*_: object, **__: object) -> asyncio.Runner:
        raise OSError(24, "Too many open files")

    async def main() -> None:
        raise AssertionError("there is nothing to run it on")

    monkeypatch.setattr(asyncio, "Runner", no_loop)
    with pytest.raises(OSError, match="Too many open files"):
        run_in_thread(main)


def test_a_loop_that_does_not_close_keeps_nobody() -> None:
    """That of uvloop waits for a name server, asyncio's for its threads; what was asked for is there already."""
    release = threading.Event()

    async def main() -> int:
        asyncio.get_running_loop().run_in_executor(None, release.wait)
        return 5

    try:
        assert run_in_thread(main) == 5
    finally:
        release.set()
    for thread in threading.enumerate():
        if thread.name == "streamload-engine":
            thread.join(10)
            assert not thread.is_alive()


def test_an_interrupt_while_it_starts_leaves_no_thread() -> None:
    main_thread, interrupted, cleaned = threading.get_ident(), threading.Event(), threading.Event()

    def interrupting_loop() -> asyncio.AbstractEventLoop:
        signal.pthread_kill(main_thread, signal.SIGINT)
        assert interrupted.wait(30)
        return asyncio.new_event_loop()

    async def main() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            cleaned.set()

    engine = Engine(main, loop_factory=interrupting_loop)
    with pytest.raises(KeyboardInterrupt):
        engine.start()
    assert engine.started
    interrupted.set()
    assert engine.join(30)
    assert cleaned.is_set()


def test_cancelled_before_it_starts_it_ends_at_once() -> None:
    async def main() -> None:
        await asyncio.Event().wait()

    engine = Engine(main)
    engine.cancel()
    assert not engine.join(30)
    engine.start()
    assert engine.join(30)


def test_a_loop_that_cannot_be_made_does_not_hang_the_caller() -> None:
    def no_loop() -> asyncio.AbstractEventLoop:
        raise OSError("no file descriptors left")

    async def main() -> None:
        pass

    engine = Engine(main, loop_factory=no_loop)
    engine.start()
    with pytest.raises(OSError, match="descriptors"):
        engine.finished.result(timeout=10)


def test_run_in_thread_returns_and_raises_the_first_error() -> None:
    async def seven() -> int:
        return 7

    async def fail() -> None:
        async with asyncio.TaskGroup() as group:
            group.create_task(broken("first"))
            group.create_task(broken("second"))

    async def broken(cause: str) -> None:
        raise StreamloadError(cause)

    assert run_in_thread(seven) == 7
    with pytest.raises(StreamloadError, match="first"):
        run_in_thread(fail)


def test_run_in_thread_works_inside_a_running_loop() -> None:
    async def inner() -> int:
        return 3

    async def outer() -> int:
        return run_in_thread(inner)

    assert asyncio.run(outer()) == 3


def test_first_error_looks_into_nested_groups() -> None:
    root = StreamloadError("root")
    assert first_error(BaseExceptionGroup("a", [BaseExceptionGroup("b", [root]), ValueError()])) is root
    assert first_error(root) is root


def test_a_script_that_leaves_an_engine_running_exits() -> None:
    script = """
        import asyncio, threading
        from streamload.pipeline.engine import Engine

        entered = threading.Event()

        async def main():
            try:
                entered.set()
                await asyncio.Event().wait()
            finally:
                print("cleaned up")

        Engine(main).start()
        entered.wait()
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "cleaned up\n", "")
