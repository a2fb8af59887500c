"""An event loop on a thread of its own, to which another loop sends coroutines."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

from streamload.errors import ClosedError

__all__ = ["LoopThread"]

T = TypeVar("T")

# How long to wait for a loop to close on which nothing runs any more.
_CLOSE_GRACE_S = 0.5


class LoopThread:
    """Runs coroutines for the event loop on which it is made, on a loop of the same kind and a daemon thread.

    While one loop's thread copies from a socket inside the kernel, or decrypts, it does not hold the interpreter's
    lock: two of them receive nearly twice as fast.

    Args:
        name: The thread's.
        at_end: Called on the thread and awaited when it is stopped, however whoever stops it is interrupted.

    Raises:
        OSError: There is no file descriptor left for another loop.
        RuntimeError: There is no thread left.
    """

    def __init__(self, name: str, at_end: Callable[[], Coroutine[Any, Any, None]] | None = None) -> None:
        self._at_end = at_end
        self._home = asyncio.get_running_loop()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._failure: BaseException | None = None
        self._closing = False
        self._started = threading.Event()
        self._stop: asyncio.Event
        self._quiet = asyncio.Event()  # nothing runs there any more
        self._ended = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._thread.start()
        # A fraction of a millisecond, once.
        self._started.wait()
        if self._failure is not None:
            self._thread.join()
            raise self._failure

    async def run(self, make: Callable[[], Coroutine[Any, Any, T]]) -> T:
        """Run a coroutine there and wait for its end.

        Cancelled, it cancels the coroutine and still waits until that has ended: whatever it was lent is free then.

        Args:
            make: Makes the coroutine; called on the thread.

        Raises:
            ClosedError: The thread was stopped.
            Exception: What the coroutine raised.
        """
        loop = self._loop
        assert loop is not None
        # What is sent after the thread was told to stop might never begin, and never end.
        if self._closing:
            raise ClosedError("the connections were closed")
        call = _Call(make, self._home)
        loop.call_soon_threadsafe(call.begin, loop)
        cancelled: asyncio.CancelledError | None = None
        while not call.ended:
            try:
                await call.changed()
            except asyncio.CancelledError as error:
                cancelled = error
                # A closed loop means that the coroutine has ended, and the news of it is on the way.
                with contextlib.suppress(RuntimeError):
                    loop.call_soon_threadsafe(call.cancel)
        if cancelled is not None:
            raise cancelled
        return call.result()

    async def aclose(self) -> None:
        """Cancel what runs there and end the thread. May be called twice.

        Cancelled while it waits, the thread ends all the same; where its loop does not close at once, a moment later.
        """
        if not self._closing and self._loop is not None:
            self._closing = True
            self._loop.call_soon_threadsafe(self._stop.set)
        await self._quiet.wait()
        # All that is left is to close the loop, for which uvloop waits for names that are being looked up: ten seconds
        # and longer, where the name server does not answer.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_CLOSE_GRACE_S):
                await self._ended.wait()
            # The thread has only its last instructions before it.
            self._thread.join()

    def _run(self) -> None:
        try:
            with asyncio.Runner(debug=self._home.get_debug(), loop_factory=type(self._home)) as runner:
                runner.run(self._main())
        except BaseException as error:
            self._failure = error
        finally:
            self._started.set()
            self._tell(self._quiet)
            self._tell(self._ended)

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._started.set()
        await self._stop.wait()
        if self._at_end is not None:
            await self._at_end()
        left = asyncio.all_tasks() - {asyncio.current_task()}
        for task in left:
            task.cancel()
        await asyncio.gather(*left, return_exceptions=True)
        self._tell(self._quiet)

    def _tell(self, event: asyncio.Event) -> None:
        """Set one of the home loop's events."""
        with contextlib.suppress(RuntimeError):  # nobody is left to be told
            self._home.call_soon_threadsafe(event.set)


class _Call(Generic[T]):
    """One coroutine: begun and cancelled on the thread's loop, waited for on the home loop."""

    __slots__ = ("_home", "_make", "_task", "_waiter", "ended")

    def __init__(self, make: Callable[[], Coroutine[Any, Any, T]], home: asyncio.AbstractEventLoop) -> None:
        self._make = make
        self._home = home
        self._task: asyncio.Task[T]
        self._waiter: asyncio.Future[None] | None = None
        self.ended = False

    # On the thread

    def begin(self, loop: asyncio.AbstractEventLoop) -> None:
        self._task = loop.create_task(self._made())
        self._task.add_done_callback(self._tell)

    async def _made(self) -> T:
        # In here, so that failing to make it is its outcome, too, and is told.
        return await self._make()

    def cancel(self) -> None:
        self._task.cancel()

    def _tell(self, task: asyncio.Task[T]) -> None:
        self._home.call_soon_threadsafe(self._hear)

    # On the home loop

    def _hear(self) -> None:
        self.ended = True
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def changed(self) -> asyncio.Future[None]:
        """Done when the coroutine has ended; a new one each time, since a cancelled waiter cancels its future."""
        self._waiter = self._home.create_future()
        return self._waiter

    def result(self) -> T:
        if self._task.cancelled():
            # Nobody here has asked for that: the thread was stopped.
            raise ClosedError("the connections were closed")
        return self._task.result()
