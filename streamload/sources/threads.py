"""Daemon threads that make blocking calls for an event loop."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, Generic, ParamSpec, TypeVar

from streamload.errors import SourceError

__all__ = ["DaemonExecutor", "Handed", "ThreadCall"]

P = ParamSpec("P")
T = TypeVar("T")

_Job = tuple[Future[Any] | None, Callable[[], Any]]


class DaemonExecutor(Executor):
    """Runs calls on a fixed number of daemon threads, in the order in which they were submitted.

    The standard pool joins its threads when the interpreter exits, so one read from a mount that hangs keeps the whole
    process alive. These threads are daemons: they end at `shutdown`, or with the process if the kernel holds them.

    Args:
        max_workers: How many threads there may be. Each submission starts another one until there are so many, or
            until the system has no more.
        name: What their names begin with.
        join_s: How long `shutdown` waits for them where it is asked to wait, in seconds.
    """

    def __init__(self, max_workers: int, *, name: str = "streamload-read", join_s: float = 5.0) -> None:
        if max_workers < 1:
            raise ValueError(f"max_workers is {max_workers}, it must be at least 1")
        self._max_workers = max_workers
        self._name = name
        self._join_s = join_s
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._working = 0
        self._shut_down = False
        #: Done once `shutdown` was called and the last thread has run out; what an event loop can wait for.
        self.ended: Future[None] = Future()
        self.ended.set_running_or_notify_cancel()  # one who waits and gives up must not cancel it for all

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Queue a call; see `concurrent.futures.Executor.submit`."""
        future: Future[T] = Future()
        self._put(future, partial(fn, *args, **kwargs))
        return future

    def post(self, fn: Callable[[], None]) -> None:
        """Queue a call that tells its outcome by itself, and must not raise: half the cost of `submit`."""
        self._put(None, fn)

    def _put(self, future: Future[Any] | None, fn: Callable[[], Any]) -> None:
        with self._lock:
            if self._shut_down:
                raise RuntimeError("the executor was shut down")
            if len(self._threads) < self._max_workers:
                name = f"{self._name}-{len(self._threads)}"
                thread = threading.Thread(target=self._work, name=name, daemon=True)
                try:
                    thread.start()
                except RuntimeError as error:
                    # There may be no more; those that there are do. What was not begun must not be in the queue.
                    if not self._threads:
                        raise SourceError(f"no thread can be started: {error}") from error
                else:
                    self._threads.append(thread)
                    self._working += 1
            self._jobs.put((future, fn))

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more calls and let the threads end once the queue is empty.

        Args:
            wait: Wait for the threads, for at most `join_s`. `join` tells whether they have ended.
            cancel_futures: Empty the queue first; what was in it never runs.
        """
        with self._lock:
            if cancel_futures:
                self._cancel_queued()
            if not self._shut_down:
                self._shut_down = True
                for _ in self._threads:
                    self._jobs.put(None)
                if not self._threads:
                    self.ended.set_result(None)
        if wait:
            self.join(self._join_s)

    def join(self, timeout_s: float) -> bool:
        """Wait for the threads to end, for at most so many seconds. Returns whether all of them have."""
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in self._threads)

    def _cancel_queued(self) -> None:
        stops = 0
        while True:
            try:
                job = self._jobs.get_nowait()
            except Empty:
                break
            if job is None:
                stops += 1
            elif job[0] is not None:
                job[0].cancel()
        # A second shutdown meets what the first one put in to stop the threads.
        for _ in range(stops):
            self._jobs.put(None)

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            future, fn = job
            if future is None:
                fn()
            else:
                _run(future, fn)
            # A finished job holds its arguments, and through them memory that was lent for one read only.
            del job, future, fn
        with self._lock:
            self._working -= 1
            last = not self._working
        if last:
            self.ended.set_result(None)


def _run(future: Future[Any], call: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        result = call()
    except BaseException as error:
        future.set_exception(error)
        # The error's traceback holds this frame: without this the two would keep each other alive.
        del future, call
    else:
        future.set_result(result)


class Handed(Generic[T]):
    """What an event loop has handed to another thread, and awaits. Made on the loop.

    Unlike a future's, its cancellation is not the end of it: the one who was cancelled can take it back before it has
    begun, and else wait until the thread has left it.
    """

    __slots__ = ("_loop", "_ticket", "_waiter", "over")

    def __init__(self) -> None:
        #: Whether the thread has left it.
        self.over = False
        self._loop = asyncio.get_running_loop()
        self._waiter: asyncio.Future[T] = self._loop.create_future()
        self._ticket = [None]  # whoever pops it, which is atomic, has it: the thread, or the one who takes it back

    async def result(self) -> T:
        """What comes of it. Cancelled, it goes on: `take_back` it, or wait until it has `left`."""
        return await self._waiter

    def take_back(self) -> bool:
        """Whether there is nothing to wait for: it had not begun and never will, or the thread has left it."""
        return self.claim() or self.over

    async def left(self, timeout_s: float) -> bool:
        """Wait until the thread has left it, for at most so many seconds, whoever cancels; whether it has."""
        deadline = self._loop.time() + timeout_s
        while not self.over and (left_s := deadline - self._loop.time()) > 0:
            self._waiter = self._loop.create_future()
            try:
                await asyncio.wait({self._waiter}, timeout=left_s)
            except asyncio.CancelledError:
                # Cancelled once more. The caller raises the first one; until then the memory is not ours to return.
                continue
        return self.over

    def claim(self) -> bool:
        """Whether it is the caller's from now on: the thread's, to begin it, or of the one who takes it back."""
        try:
            self._ticket.pop()
        except IndexError:
            return False
        return True

    def post(self, outcome: Callable[[], None]) -> None:
        """Have the loop told. On the thread."""
        try:
            self._loop.call_soon_threadsafe(outcome)
        except RuntimeError:  # the loop is closed: nobody waits any more
            return


class ThreadCall(Handed[T]):
    """One blocking call, made on a thread and awaited on an event loop.

    Args:
        threads: Where it is queued, at once.
        fn: The call.
    """

    __slots__ = ("_fn",)

    def __init__(self, threads: DaemonExecutor, fn: Callable[[], T]) -> None:
        super().__init__()
        self._fn: Callable[[], T] | None = fn
        threads.post(self._run)

    def _run(self) -> None:
        if not self.claim():
            return
        fn, self._fn = self._fn, None
        assert fn is not None
        try:
            outcome = partial(self._return, fn())
        except BaseException as error:
            outcome = partial(self._raise, error)
        self.post(outcome)

    def _return(self, result: T) -> None:
        self.over = True
        if not self._waiter.done():
            self._waiter.set_result(result)

    def _raise(self, error: BaseException) -> None:
        self.over = True
        if not self._waiter.done():
            self._waiter.set_exception(error)
