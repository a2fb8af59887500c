"""Calls that block on the volume, made on daemon threads."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from streamload.errors import SourceError
from streamload.sources.os_errors import translate_os_error
from streamload.sources.threads import DaemonExecutor, ThreadCall

__all__ = ["BlockingCalls"]

T = TypeVar("T")

_logger = logging.getLogger("streamload.stage")

# Where a disk takes more than one write at a time, so many keep it filled.
_THREADS = 4
# What is cancelled waits so long for a call to the kernel that is under way: a piece's write takes less, an fsync of a
# slow disk may not, and SIGTERM is to end the process within two seconds.
_GRACE_S = 1.0
_THREAD_EXIT_S = 0.5


class BlockingCalls:
    """Runs calls on threads, and says in which folder they failed.

    Args:
        folder: For errors.

    Attributes:
        folder: As above; may be set later.
        hanging: Whether a call did not return in time, and may still write.
    """

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.hanging = False
        self._threads = DaemonExecutor(_THREADS, name="streamload-stage")

    @property
    def ended(self) -> Future[None]:
        """Done, after `aclose`, when the last thread has left the kernel."""
        return self._threads.ended

    async def run(self, call: Callable[[], T], key: str | None = None) -> T:
        """Make a call on a thread; returns or raises only when the thread has left it, unless it hangs.

        Raises:
            SourceError: What the system's error means.
        """
        running = ThreadCall(self._threads, call)
        try:
            return await running.result()
        except asyncio.CancelledError:
            if not running.take_back() and not await running.left(_GRACE_S):
                self.hanging = True
            raise
        except OSError as error:
            if isinstance(error, SourceError):
                raise error.locate(uri=self.folder, object=key) from None
            raise translate_os_error(error, uri=self.folder, object=key) from error
        except ValueError as error:  # a path with a null byte
            raise SourceError(str(error), uri=self.folder, object=key) from error

    async def aclose(self) -> bool:
        """End the threads; whether they have ended. May be called twice."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        ended = asyncio.wrap_future(self._threads.ended)
        await asyncio.wait({ended}, timeout=0 if self.hanging else _GRACE_S)
        if self._threads.ended.done():
            self._threads.join(_THREAD_EXIT_S)
            return True
        _logger.warning("%s: a call to the kernel does not return; its thread is left behind", self.folder)
        ended.cancel()
        return False
