"""Stages, begins again where that has failed, and knows how far it is: what a sidecar does, apart from who asks it."""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

from streamload.deadlines import deadline
from streamload.errors import OptionError, SourceError, StreamloadError
from streamload.options import LoadOptions
from streamload.progress import watch
from streamload.sources.sidecar_protocol import error_to_json
from streamload.stage import Staged, Stager

__all__ = ["STATES", "Sidecar", "SidecarState"]

_logger = logging.getLogger("streamload.service")

SidecarState: TypeAlias = Literal["staging", "staged", "failed", "cancelled", "stopping"]
STATES: tuple[SidecarState, ...] = ("staging", "staged", "failed", "cancelled", "stopping")

# As the kubelet does with a container that has failed.
_FIRST_PAUSE_S = 10.0
_LONGEST_PAUSE_S = 300.0


class Sidecar:
    """Stages one checkpoint; used on one event loop.

    Args:
        make: Makes what stages, anew for each attempt.
        folder: The socket's folder, which all that is staged lies in.
        reading: ``progress`` and ``deadline_s`` of these are for each attempt.
        drain_s: How long reads that are under way may take to land in the end.
        began_s: When the process began, by `time.monotonic`.
        pause_s: How long to wait after the first attempt that failed, before another one.

    Attributes:
        state: ``staging``; ``staged``: all is there and verified; ``failed``: another attempt follows after a pause,
            or when somebody asks for it; ``cancelled``: only then; ``stopping``: the process is about to end.
        error: Why it failed; None while it has not.
        waiting: How many ask for what is not there yet.
        answered: How many were told where to find a range.
        ready_s: How long it took from the process's begin until all was staged; None before.
    """

    def __init__(
        self,
        make: Callable[[], Stager],
        folder: str,
        reading: LoadOptions,
        *,
        drain_s: float,
        began_s: float,
        pause_s: float = _FIRST_PAUSE_S,
    ) -> None:
        self._make = make
        self._folder = os.path.realpath(folder)
        self._reading = reading
        self._drain_s = drain_s
        self._began_s = began_s
        self._pause_s = pause_s
        self._stager = make()
        self._attempt: asyncio.Task[Staged] | None = None
        self._attempts = 0
        self._asked = asyncio.Event()
        self._changed = asyncio.Event()
        self._cancelling = False
        self._closing = False  # an attempt is over, and what it has opened is not closed yet
        self._earlier: Counter[str] = Counter()
        self._earlier_errors: Counter[str] = Counter()
        self._failures: Counter[str] = Counter()
        self.state: SidecarState = "staging"
        self.error: StreamloadError | None = None
        self.waiting = 0
        self.answered = 0
        self.ready_s: float | None = None

    async def run(self) -> None:
        """Stage, and keep what is staged, until this is cancelled: then reads that are under way may land.

        What has landed is kept for the next process.
        """
        staging = asyncio.create_task(self._keep_staging(), name="staging")
        try:
            await asyncio.wait({staging})
        finally:
            await self._drain(staging)
            await self._stager.aclose()
        staging.result()  # it ends by itself only where something is wrong with it

    async def _drain(self, staging: asyncio.Task[None]) -> None:
        self._set("stopping")
        attempt = self._attempt
        if attempt is not None and self._stager.stop():
            _logger.info("%s: waiting for the reads that are under way", self._stager.uri)
            await asyncio.wait({attempt}, timeout=self._drain_s)
        staging.cancel()
        await asyncio.wait({staging})

    async def _keep_staging(self) -> None:
        pause_s = self._pause_s
        while True:
            # Before it can fail: who asks for another attempt may be faster than we are here.
            self._asked.clear()
            staged = await self._try()
            if self.state == "stopping":
                # An attempt that was cancelled before, or failed, has taken the cancellation that was for us.
                return
            if staged:
                break
            try:
                async with asyncio.timeout(pause_s if self.state == "failed" else None):
                    await self._asked.wait()
                pause_s = self._pause_s
            except TimeoutError:
                pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
            self._begin_again()
        await asyncio.Event().wait()

    async def _try(self) -> bool:
        """One attempt; whether all is staged."""
        self._attempts += 1
        self._cancelling = False
        self._attempt = asyncio.create_task(self._stage(), name=f"attempt {self._attempts}")
        state: SidecarState = "staged"
        try:
            staged = await self._attempt
        except asyncio.CancelledError:
            if not self._cancelling:
                raise
            _logger.info("%s: staging was cancelled; what has landed is kept", self._stager.uri)
            state = "cancelled"
        except StreamloadError as error:
            if self.state == "stopping":
                return False
            if self._cancelling:
                _logger.info("%s: staging was cancelled, and failed meanwhile: %s", self._stager.uri, error)
                state = "cancelled"
            else:
                self.error = error
                self._failures[type(error).__name__] += 1
                _logger.error("staging failed, what has landed is kept: %s", error)
                state = "failed"
        else:
            self._cancelling = False  # it came too late
            self.ready_s = time.monotonic() - self._began_s
            fields = {"files": staged.files, "nbytes": staged.nbytes, "ready_s": round(self.ready_s, 3)}
            fields |= {"fetched_bytes": staged.fetched_bytes, "requests": staged.requests, "retries": staged.retries}
            _logger.info("%s: all is staged into %s", staged.uri, staged.folder, extra={"fields": fields})
        finally:
            self._attempt = None
            self._closing = True
        # Who reads needs none of its threads and connections any more, nor does the next attempt.
        await (self._stager.settle() if state == "staged" else self._stager.aclose())
        self._closing = False
        if self.state != "stopping":
            self._set(state)
        return state == "staged"

    async def _stage(self) -> Staged:
        stager, recorder = self._stager, self._stager.recorder

        def how_far() -> str:
            return f"{recorder.arrived_bytes} of {recorder.total_bytes} bytes are there"

        try:
            await stager.__aenter__()
            async with watch(self._reading.progress, recorder), deadline(self._reading.deadline_s, how_far):
                return await stager.run()
        except BaseException as error:
            # Of a deadline, only we know that it was one.
            stager.fail(self.ended() if self._cancelling else error)
            raise

    def _begin_again(self) -> None:
        report = self._stager.recorder.report()
        self._earlier.update(
            fetched_bytes=report.fetched_bytes,
            requests=report.requests,
            retries=report.retries,
            hedged_bytes=report.hedged_bytes,
        )
        self._earlier_errors.update(self._stager.recorder.errors)
        self._stager = self._make()
        self.error = None
        self._set("staging")

    def _set(self, state: SidecarState) -> None:
        self.state = state
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    # For who asks.

    async def start(self) -> None:
        """Begin another attempt where the last one has failed or was cancelled."""
        if self._closing:
            await self._changed.wait()
        if self.state in ("failed", "cancelled"):
            changed = self._changed
            self._asked.set()
            await changed.wait()

    async def cancel(self) -> None:
        """End the attempt that is under way; what has landed is kept. Where there is none, nothing changes."""
        if self._attempt is not None and self.state == "staging":
            self._cancelling = True
            changed = self._changed
            self._attempt.cancel()
            await changed.wait()

    async def changed(self, timeout_s: float) -> None:
        """Wait until the state is another one, for at most so many seconds."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._changed.wait()
        except TimeoutError:
            return

    def stager(self) -> Stager:
        """What knows what has landed.

        Raises:
            StreamloadError: Nothing more will: why.
        """
        if self.state == "failed" and self.error is not None:
            raise self.error.with_traceback(None)  # or it would hold on to all requests that it was raised for
        if self.state == "cancelled":
            raise self.ended()
        return self._stager

    def ended(self) -> StreamloadError:
        """What to tell who waits for an attempt that was cancelled."""
        return SourceError("staging was cancelled", uri=self._stager.uri)

    @property
    def was_cancelled(self) -> bool:
        """Whether the attempt was, that is or was under way."""
        return self._cancelling

    def relative(self, path: str) -> str:
        """A path as who asks knows it: relative to the socket's folder.

        Raises:
            OptionError: It does not lie there.
        """
        folder, name = os.path.split(path)
        found = os.path.relpath(os.path.join(os.path.realpath(folder), name), self._folder)
        if found == os.pardir or found.startswith(os.pardir + os.sep):
            raise OptionError(f"{path} does not lie in the socket's folder, {self._folder}: nobody could find it there")
        return found

    def status(self) -> dict[str, Any]:
        """How far it is, ready for JSON."""
        recorder = self._stager.recorder
        report = recorder.report()
        read_s = report.stages["read"]
        errors = self._earlier_errors + recorder.errors + self._failures
        return {
            "state": self.state,
            "uri": self._stager.uri,
            "error": None if self.error is None else error_to_json(self.error),
            "attempts": self._attempts,
            "files": report.files,
            "total_bytes": report.total_bytes,
            "landed_bytes": recorder.arrived_bytes,
            "fetched_bytes": self._earlier["fetched_bytes"] + report.fetched_bytes,
            "bytes_per_s": report.fetched_bytes / read_s if read_s else 0.0,
            "requests": self._earlier["requests"] + report.requests,
            "retries": self._earlier["retries"] + report.retries,
            "hedged_bytes": self._earlier["hedged_bytes"] + report.hedged_bytes,
            "errors": dict(errors),
            "memory_bytes": report.memory_bytes,
            "peak_memory_bytes": report.peak_staged_bytes,
            "concurrency": report.concurrency,
            "waiting": self.waiting,
            "answered": self.answered,
            "seconds": time.monotonic() - self._began_s,
            "ready_s": self.ready_s,
            "verified": report.verified,
            "unverified": report.unverified,
        }
