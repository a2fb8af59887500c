"""SIGINT and SIGTERM: the first ends the command in good order, a later one ends the process."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

__all__ = ["Signals", "Stopped"]

_NUMBERS = (signal.SIGINT, signal.SIGTERM)

# `timeout`, and some supervisors, send a signal to the process and then to its group: it arrives twice. What comes
# within this time of the first one is not somebody who has lost patience.
_SAME_S = 1.0

_SHOW_CURSOR = "\x1b[?25h"


class Stopped(BaseException):
    """A signal says that the command should end. Not an error: what catches those must let it pass."""


class Signals:
    """Handles SIGINT and SIGTERM for as long as its block runs; does nothing outside the main thread.

    The first signal raises `Stopped` in the main thread, or calls what `calling` was given. After that no signal raises
    anything any more, so that what is being closed can be closed; one that comes a second later or more ends the
    process at once.

    Attributes:
        number: The first signal; None before it.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._at_s = 0.0
        self._call: Callable[[], object] | None = None
        self._before: dict[int, Any] = {}

    @property
    def name(self) -> str:
        """The first signal's name."""
        return "" if self.number is None else signal.Signals(self.number).name

    @contextmanager
    def calling(self, callback: Callable[[], object]) -> Iterator[None]:
        """Have the first signal call `callback` instead of raising, for as long as the block runs.

        An exception out of a signal's handler can come up anywhere, inside a finalizer too, which would swallow it:
        whoever drops many objects that have some is better served this way. `callback` runs on the main thread between
        any two instructions; it must not take a lock.
        """
        self._call = callback
        try:
            yield
        finally:
            self._call = None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._handle) for number in _NUMBERS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        # Once stopped, the process is about to end: the interpreter's own handler would print a traceback on the way.
        if self.number is None:
            for number, handler in self._before.items():
                signal.signal(number, handler)

    def _handle(self, number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number is None:
            self.number, self._at_s = number, now
            if self._call is None:
                raise Stopped
            self._call()
        elif now - self._at_s >= _SAME_S:
            if sys.stderr is not None and sys.stderr.isatty():
                # The progress bar has hidden it, and will not come to show it again.
                os.write(sys.stderr.fileno(), _SHOW_CURSOR.encode())
            os._exit(128 + self.number)
