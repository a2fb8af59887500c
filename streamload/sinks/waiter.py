"""A thread that waits, so that an event loop need not."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Callable
from queue import SimpleQueue
from typing import NamedTuple

__all__ = ["Waiter"]


class _Job(NamedTuple):
    call: Callable[[], None]
    done: Callable[[BaseException | None], None]


class Waiter:
    """Runs blocking calls one after another on a daemon thread, and tells the event loop how each ended.

    Made, used and closed on one event loop. A daemon, unlike an executor's thread: a call that never returns does not
    keep the interpreter from ending. The thread also ends, after the calls that it still has, when the waiter is
    garbage.

    Args:
        name: The thread's name.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        self._thread = threading.Thread(target=_run, args=(self._jobs, self._loop), name=name, daemon=True)
        self._thread.start()
        # The queue's put may be called from inside the garbage collector; that is what sets SimpleQueue apart.
        weakref.finalize(self, self._jobs.put, None).atexit = False

    def submit(self, call: Callable[[], None], done: Callable[[BaseException | None], None]) -> None:
        """Run `call` on the thread after all that was submitted before it, then `done` on the loop.

        Args:
            call: May block, and may raise.
            done: Gets what `call` raised, or None. Not called where the loop has ended by then.
        """
        self._jobs.put(_Job(call, done))

    async def aclose(self, timeout_s: float) -> bool:
        """Wait until all that was submitted is done and the thread has ended.

        Cancelled, or out of time, it leaves the thread to finish by itself; nothing may be submitted any more.

        Args:
            timeout_s: How long to wait.

        Returns:
            Whether the thread has ended.
        """
        idle = asyncio.Event()
        self.submit(_nothing, lambda error: idle.set())
        self._jobs.put(None)
        try:
            async with asyncio.timeout(timeout_s):
                await idle.wait()
        except TimeoutError:
            return False
        self._thread.join()  # it is at its last instructions
        return True


def _run(jobs: SimpleQueue[_Job | None], loop: asyncio.AbstractEventLoop) -> None:
    # A function of what it needs, and not a method: the thread does not keep the waiter alive.
    while (job := jobs.get()) is not None:
        error: BaseException | None = None
        try:
            job.call()
        except BaseException as raised:
            error = raised
        try:
            loop.call_soon_threadsafe(job.done, error)
        except RuntimeError:
            # The loop has ended, and nobody is left to tell. The calls that follow are made all the same: they wait for
            # copies whose memory must not be freed before.
            pass
        # While this waits for the next job, it must not keep alive what the last one held.
        del job, error


def _nothing() -> None:
    pass
