"""Run:ai's engine, ``libstreamer``: one thread that asks it and turns its answers into ends of reads."""

from __future__ import annotations

import atexit
import ctypes
import inspect
import logging
import os
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from functools import partial
from importlib import import_module
from queue import Empty, SimpleQueue
from typing import Any

from streamload.errors import MissingDependencyError, SourceError, StreamloadError
from streamload.sources.runai_settings import Setup, variables_set
from streamload.sources.threads import Handed

__all__ = ["Engine", "EngineError", "EngineRead"]

_log = logging.getLogger("streamload.sources")

_INSTALL = "pip install 'streamload[runai]'"

# The engine must not be asked by one thread while it answers another, so a read that is submitted while the thread
# waits for an answer waits as well: no longer than this. Answers come more often where there is anything to gain.
_POLL_MS = 2

# How often a thread that waits for another engine to end looks whether it is still wanted.
_LOOK_AGAIN_S = 0.05

# How long the interpreter's exit waits for the engine: beyond what its requests take to fail. The libraries under it
# crash where the process ends while their requests are under way.
_EXIT_S = 60.0

# Codes of the engine's that are a request's own end: nothing writes into its memory after them. After any other
# failure it may have stopped waiting for something that is still under way.
_SUCCESS = 0
_ENDED = 1
_SETTLED = frozenset({_SUCCESS, 2, 3, 15, 19})

# What is called, and with what: a version that has less is no use, one that has more is.
_CALLS = {
    "runai_start": (),
    "runai_end": ("streamer",),
    "runai_set_credentials": ("streamer", "s3_credentials"),
    "runai_request": ("streamer", "paths", "num_ranges", "range_offsets", "range_sizes", "range_dsts"),
    "runai_response": ("streamer", "timeout_ms"),
    "runai_response_str": ("response_code",),
}

# The plugin for an object store ends the requests of all engines in a process when one of them ends. So there is one
# engine at a time, and this is held from its start to its end, which may come long after everybody has left it.
_LIFETIME = threading.Lock()


class EngineError(Exception):
    """What the engine said instead of having read.

    Attributes:
        code: Its number; None where it was the call that failed.
        settled: Whether nothing writes into the memory any more.
    """

    def __init__(self, text: str, code: int | None, *, settled: bool) -> None:
        super().__init__(text)
        self.code = code
        self.settled = settled


class EngineRead(Handed[Exception | None]):
    """One read: waits in line, is submitted, and ends when the engine has answered for each of its views.

    Args:
        setup: What the engine must have been started with.
        path: The object, as the engine names it.
        start: The first byte.
        views: Where the bytes go, in order.
    """

    def __init__(self, setup: Setup, path: str, start: int, views: Sequence[memoryview]) -> None:
        super().__init__()
        self.setup = setup
        self.path = path
        self.code = _SUCCESS
        self.settled = True
        self.offsets: list[int] = []
        self.sizes = [view.nbytes for view in views]
        for size in self.sizes:
            self.offsets.append(start)
            start += size
        # They hold the memory, until the engine has left it: the addresses alone would not.
        self._memory: list[Any] = [ctypes.c_char.from_buffer(view) for view in views]

    @property
    def addresses(self) -> list[int]:
        return [ctypes.addressof(memory) for memory in self._memory]

    def end(self, failure: Exception | None) -> None:
        """Tell the one who waits. On the engine's thread, when it has left the views or is past knowing it."""
        if not isinstance(failure, EngineError) or failure.settled:
            self._memory.clear()
        self.post(partial(self._set, failure))

    def _set(self, failure: Exception | None) -> None:
        self.over = not isinstance(failure, EngineError) or failure.settled
        if not self._waiter.done():
            self._waiter.set_result(failure)


class Engine:
    """The process's engine and its thread: they begin with its first user and end with the last.

    Attributes:
        ended: Done when the thread is about to end.
    """

    _current: Engine | None = None
    _process: int | None = None  # the one that has had an engine
    # The kind of object store that this process has read. The library calls the first plugin that it has loaded,
    # whatever it is asked for later: that fails, hangs, or worse.
    _store: str | None = None
    _guard = threading.Lock()

    def __init__(self) -> None:
        self.ended: Future[None] = Future()
        self.ended.set_running_or_notify_cancel()  # one who waits and gives up must not cancel it for all
        self._users = 0
        self._reads: SimpleQueue[EngineRead | None] = SimpleQueue()
        self._next: EngineRead | None = None  # taken from the queue, and not yet submitted
        self._flying: dict[int, EngineRead] = {}
        self._unsettled: list[EngineRead] = []  # they hold memory that may be written to until the engine has ended
        self._stopped = False
        self._calls: Any = None
        self._streamer: Any = None
        self._setup: Setup | None = None
        self._lifetime = ExitStack()
        self._thread = threading.Thread(target=self._work, name="streamload-runai", daemon=True)

    @classmethod
    def acquire(cls) -> Engine:
        """The engine, for one more user. Each call that returns is paired with one of `release`.

        Raises:
            SourceError: This process was forked from one that had an engine: a child has none of its threads.
        """
        with cls._guard:
            if cls._process not in (None, os.getpid()):
                raise SourceError("Run:ai's engine was in use before this process was forked; spawn processes instead")
            cls._process = os.getpid()
            if cls._current is None:
                engine = cls()
                try:
                    engine._thread.start()
                except RuntimeError as error:
                    raise SourceError(f"no thread can be started for Run:ai's engine: {error}") from error
                cls._current = engine
            cls._current._users += 1
            return cls._current

    def release(self) -> bool:
        """Leave it. The last one ends it; whether this was the last. What it was cancelled in must have been left."""
        with Engine._guard:
            self._users -= 1
            if self._users:
                return False
            self._stop()
            return True

    @classmethod
    def end_at_exit(cls) -> None:
        """End it whoever uses it, and let none begin: the process is about to end."""
        if cls._process != os.getpid():
            return
        with cls._guard:
            if cls._current is not None:
                cls._current._stop()
        # Kept. Those that were left behind before have it until they have ended.
        if not _LIFETIME.acquire(timeout=_EXIT_S):
            _log.warning("Run:ai's engine does not end; the process may crash when it exits")

    def _stop(self) -> None:
        if Engine._current is self:
            Engine._current = None
        self._stopped = True
        self._reads.put(None)

    def submit(self, read: EngineRead) -> None:
        """Put a read in line."""
        self._reads.put(read)

    def join(self, timeout_s: float) -> None:
        """Wait for the thread, for at most so many seconds."""
        self._thread.join(timeout_s)

    def _work(self) -> None:
        try:
            while not _LIFETIME.acquire(timeout=_LOOK_AGAIN_S):
                if self._stopped:
                    return
            try:
                self._serve()
            finally:
                _LIFETIME.release()
        except BaseException:
            _log.exception("the thread that asks Run:ai's engine has failed")
            raise
        finally:
            self._end_all(SourceError("Run:ai's engine has ended"))
            self.ended.set_result(None)

    def _serve(self) -> None:
        try:
            while True:
                if self._next is None:
                    self._next = self._take(wait=not self._flying)
                if self._stopped:
                    return
                if self._next is not None and self._fits(self._next):
                    read, self._next = self._next, None
                    self._submit(read)
                    del read
                elif self._flying:
                    self._answer()
        finally:
            self._finish()

    def _take(self, *, wait: bool) -> EngineRead | None:
        try:
            return self._reads.get(block=wait)
        except Empty:
            return None

    def _fits(self, read: EngineRead) -> bool:
        """Whether a read can be submitted now: those that need another start wait until all others have ended."""
        return read.setup == self._setup or not self._flying

    def _submit(self, read: EngineRead) -> None:
        if not read.claim():
            return
        try:
            if read.setup != self._setup:
                self._finish()
                self._start(read.setup)
            number = self._calls.runai_request(
                self._streamer, [read.path], [len(read.sizes)], read.offsets, read.sizes, read.addresses
            )
        except StreamloadError as error:
            read.end(error)
        except Exception as error:
            # It does not say whether any of it was accepted.
            self._unsettled.append(read)
            read.end(EngineError(str(error), None, settled=False))
        else:
            self._flying[number] = read

    def _start(self, setup: Setup) -> None:
        if setup.backend != "file":
            if Engine._store not in (None, setup.backend):
                read = f"and has read {Engine._store}://"
                raise SourceError(f"Run:ai's engine reads one kind of object store in a process, {read} in this one")
            Engine._store = setup.backend
        self._calls = _load()
        self._lifetime.enter_context(variables_set(setup.variables))
        try:
            self._streamer = self._calls.runai_start()
            if setup.credentials:
                self._calls.runai_set_credentials(self._streamer, self._calls.S3Credentials(**dict(setup.credentials)))
        except ValueError as error:
            raise SourceError(f"Run:ai's engine does not start: {error}") from error
        self._setup = setup

    def _answer(self) -> None:
        """Wait a moment for an answer, and pass it on."""
        try:
            answer = self._calls.runai_response(self._streamer, timeout_ms=_POLL_MS)
        except TimeoutError:
            return
        if answer is None:
            # Somebody else in this process has ended all requests. What is under way is waited for by ending.
            self._finish("all its requests were ended by another user of it in this process")
            return
        code, number, _, _, done = answer
        answered = self._flying.get(number)
        if answered is None:
            return
        if code != _SUCCESS:
            # The worse one counts.
            if answered.settled:
                answered.code = code
            answered.settled = answered.settled and code in _SETTLED
        if done:
            del self._flying[number]
            if not answered.settled:
                self._unsettled.append(answered)
            answered.end(self._failure(answered))

    def _failure(self, read: EngineRead) -> EngineError | None:
        if read.code == _SUCCESS:
            return None
        text = self._calls.runai_response_str(read.code)
        text = text.decode(errors="replace") if isinstance(text, bytes) else str(text)
        return EngineError(f"{text} (code {read.code})", read.code, settled=read.settled)

    def _finish(self, why: str = "it was ended") -> None:
        """End the engine. It waits for the requests under way, which may take as long as the other side likes."""
        streamer, self._streamer, self._setup = self._streamer, None, None
        try:
            if streamer is not None:
                self._calls.runai_end(streamer)
        finally:
            for read in self._flying.values():
                read.end(EngineError(why, _ENDED, settled=True))
            self._flying.clear()
            self._unsettled.clear()
            self._lifetime.close()

    def _end_all(self, failure: Exception) -> None:
        while True:
            read, self._next = self._next or self._take(wait=False), None
            if read is not None and read.claim():
                read.end(failure)
            elif read is None and self._reads.empty():
                return


# A load that is still open is closed after this, since what is registered last runs first.
atexit.register(Engine.end_at_exit)


def _load() -> Any:
    """The package's own binding of the engine. Importing it imports torch, which it depends on.

    Raises:
        MissingDependencyError: It is not installed, or a version without what is needed.
    """
    try:
        calls = import_module("runai_model_streamer.libstreamer.libstreamer")
    except (ImportError, OSError) as error:
        raise MissingDependencyError(f"Run:ai's Model Streamer cannot be imported ({error}): {_INSTALL}") from error
    for name, needed in _CALLS.items():
        call = getattr(calls, name, None)
        if call is None or not set(needed) <= set(inspect.signature(call).parameters):
            raise MissingDependencyError(f"this version of Run:ai's Model Streamer has no fitting {name}: {_INSTALL}")
    return calls
