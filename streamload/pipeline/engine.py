"""The thread that a load runs on, with an event loop of its own."""

from __future__ import annotations

import asyncio
import atexit
import os
import signal
import threading
import weakref
from collections.abc import Callable, Coroutine
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, TypeVar

__all__ = ["Engine", "first_error", "new_event_loop", "run_in_thread"]

T = TypeVar("T")

# At the interpreter's end: how long to wait for a load to let go. Reads that hang longer than this sit in daemon
# threads, which the interpreter leaves behind.
_EXIT_GRACE_S = 10.0

# How long to wait for a loop to close on which nothing runs any more. uvloop's waits for names that are being looked
# up: ten seconds and longer where the name server does not answer.
_CLOSE_GRACE_S = 0.5

_MAIN_THREADS_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP}

_live: weakref.WeakSet[Engine] = weakref.WeakSet()


def new_event_loop() -> asyncio.AbstractEventLoop:
    """A uvloop; where it cannot be imported or would not survive, asyncio's own."""
    if not all(map(_is_open, range(3))):
        # A new descriptor would take a standard stream's number, and libuv ends the process when it closes such a one.
        return asyncio.new_event_loop()
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


def _is_open(descriptor: int) -> bool:
    try:
        os.fstat(descriptor)
    except OSError:
        return False
    return True


class Engine:
    """Runs one coroutine to its end on a daemon thread.

    The coroutine's own outcome is its own business: it hands results and errors over by other means. `finished` is done
    when the coroutine, every task of its loop, the loop and, but for its last instructions, the thread are gone.

    Args:
        main: Makes the coroutine; called on the thread.
        loop_factory: Makes the event loop.
    """

    def __init__(
        self,
        main: Callable[[], Coroutine[Any, Any, None]],
        *,
        loop_factory: Callable[[], asyncio.AbstractEventLoop] = new_event_loop,
    ) -> None:
        self.finished: Future[None] = Future()
        self.finished.set_running_or_notify_cancel()  # whoever waits for it and is cancelled must not cancel it
        self._main = main
        self._loop_factory = loop_factory
        self._loop: asyncio.AbstractEventLoop | None = None
        self._task: asyncio.Task[None] | None = None
        self._started = threading.Event()
        self._ended = False  # whoever started it wants it no more, and its loop may not have been there to be told
        self._cancellable = True
        self._closing = False  # the coroutine has ended, and the loop is about to
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="streamload-engine", daemon=True)

    def start(self) -> None:
        """Start the thread; returns when its loop runs, so that `post` reaches it.

        Interrupted meanwhile, the thread ends by itself, and `join` waits for it.
        """
        _live.add(self)
        try:
            self._thread.start()
            self._started.wait()
        except BaseException:
            self._ended = True
            raise

    @property
    def started(self) -> bool:
        """Whether there is a thread, or was one."""
        return self._thread.ident is not None

    def post(self, callback: Callable[..., object], *args: object) -> None:
        """Call `callback` on the loop soon; nothing happens where the loop has ended. From any thread."""
        loop = self._loop
        # A forked child has a copy of the loop without the thread, and shares the descriptor that wakes the parent's.
        if loop is None or self._process != os.getpid():
            return
        try:
            loop.call_soon_threadsafe(callback, *args)
        except RuntimeError:  # the loop is closed
            return

    def cancel(self) -> None:
        """Cancel the coroutine, without waiting; the first call counts. From any thread, the collector included."""
        self._ended = True
        self.post(self._cancel)

    def ignore_cancel(self) -> None:
        """Called by the coroutine when all that is left is closing, which another cancellation must not cut off."""
        self._cancellable = False

    def join(self, timeout_s: float | None = None) -> bool:
        """Wait until the thread has ended; whether it has."""
        if not self.started or threading.current_thread() is self._thread:
            return False
        # A thread can be joined a moment later than it has a number.
        if not self._started.wait(timeout_s):
            return False
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _cancel(self) -> None:
        if self._cancellable and self._task is not None:
            self._cancellable = False
            self._task.cancel()

    def _run(self) -> None:
        failure: BaseException | None = None
        # A signal that the kernel gives to this thread, or to one started from it, would not wake a main thread that
        # waits: Python's handler runs there, but only once that thread does something.
        signal.pthread_sigmask(signal.SIG_BLOCK, _MAIN_THREADS_SIGNALS)
        try:
            with asyncio.Runner(loop_factory=self._loop_factory) as runner:
                runner.run(self._body())
        except asyncio.CancelledError:
            pass
        except BaseException as error:
            failure = error
        self._started.set()
        if failure is None:
            self.finished.set_result(None)
        else:
            self.finished.set_exception(failure)

    async def _body(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._task = asyncio.current_task()
        self._started.set()
        if self._ended:
            self._cancel()
        try:
            await self._main()
        finally:
            self._closing = True


def run_in_thread(main: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """Run a coroutine to its end on an engine's thread, whether or not the caller's thread has a running loop.

    A caller that is interrupted cancels it. Of an exception group, the error that came first is raised.
    """
    result: Future[T] = Future()

    async def body() -> None:
        try:
            result.set_result(await main())
        except BaseException as error:
            result.set_exception(first_error(error))

    engine = Engine(body)
    # Where its loop cannot be made, the coroutine never runs.
    either: list[Future[Any]] = [result, engine.finished]
    try:
        engine.start()
        wait(either, return_when=FIRST_COMPLETED)
        if not result.done():
            engine.finished.result()
        return result.result()
    finally:
        engine.cancel()
        if engine.started:
            wait(either, return_when=FIRST_COMPLETED)
        engine.join(_CLOSE_GRACE_S)


def first_error(error: BaseException) -> BaseException:
    """The error that came first: a TaskGroup keeps its children's in the order in which they failed."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


@atexit.register
def _close_all() -> None:
    """Let a script end that still holds an open load."""
    engines = list(_live)
    for engine in engines:
        engine.cancel()
    for engine in engines:
        engine.join(_CLOSE_GRACE_S if engine._closing else _EXIT_GRACE_S)
