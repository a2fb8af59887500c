"""One request, tried again where that is worth it, going on from the byte that was reached."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Awaitable, Callable
from typing import TypeVar

from streamload.errors import StreamloadError, TransientError
from streamload.loan import Loan
from streamload.pipeline.hedge import Hedger
from streamload.pipeline.pace import Pace
from streamload.pipeline.policy import RetryPolicy
from streamload.report import Recorder
from streamload.sources.base import Source, SourceObject

__all__ = ["Fetcher", "Sleep"]

T = TypeVar("T")
Sleep = Callable[[float], Awaitable[None]]


class Fetcher:
    """Asks a source, with retries.

    Args:
        source: Where the bytes come from.
        recorder: Told of each attempt that failed.
        policy: When to try again.
        sleep: How to wait between attempts; passed in so that a test's clock can stand still.
        jitter: Gives random numbers in [0, 1).
        clock: Seconds, from any origin.
        pace: How many bytes a second may be asked for; None: as many as come.
        hedger: What asks again where a read is late; None: nothing does.
        refused: Called when the server has asked for less, or not answered in time.
    """

    def __init__(
        self,
        source: Source,
        recorder: Recorder,
        *,
        policy: RetryPolicy | None = None,
        sleep: Sleep = asyncio.sleep,
        jitter: Callable[[], float] = random.random,
        clock: Callable[[], float] = time.monotonic,
        pace: Pace | None = None,
        hedger: Hedger | None = None,
        refused: Callable[[], None] = lambda: None,
    ) -> None:
        self.source = source
        self._recorder = recorder
        self._policy = policy or RetryPolicy()
        self._sleep = sleep
        self._jitter = jitter
        self._clock = clock
        self._pace = pace
        self._read = source.read if hedger is None else hedger.read
        self._refused = refused

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan, lane: str = "engine") -> None:
        """Fill the loan with a byte range of an object.

        Raises:
            StreamloadError: The source's, located and with the number of attempts.
        """
        attempts = failures = 0
        valid = 0
        while True:
            attempts += 1
            await self._keep_pace(end - start - valid)
            try:
                await self._read(object, start + valid, end, loan if attempts == 1 else loan.after(valid))
                return
            except StreamloadError as error:
                valid += error.valid_bytes
                failures = self._policy.failures(failures, error)
                # The range that the caller asked for, not the part of it that this attempt still lacked.
                error.start, error.end = start, end
                error.locate(uri=self.source.uri, object=object.key)
                await self._back_off(error, attempts, failures, loan, lane)

    async def ask(self, call: Callable[[], Awaitable[T]], *, key: str | None = None) -> T:
        """Make a request that brings no range: list, stat.

        Raises:
            StreamloadError: The source's, located and with the number of attempts.
        """
        attempts = 0
        while True:
            attempts += 1
            try:
                return await call()
            except StreamloadError as error:
                error.locate(uri=self.source.uri, object=key)
                await self._back_off(error, attempts, attempts, None, "engine")

    async def _keep_pace(self, nbytes: int) -> None:
        if self._pace is not None and (wait_s := self._pace.wait_s(self._clock(), nbytes)) > 0:
            with self._recorder.stage("pace"):
                await self._sleep(wait_s)

    async def _back_off(
        self, error: StreamloadError, attempts: int, failures: int, loan: Loan | None, lane: str
    ) -> None:
        """Wait for the next attempt, or raise the error where there is none."""
        wait_s = self._policy.backoff_s(failures, error, self._jitter())
        # Memory that the failed attempt may still write into must not be filled by another one.
        if wait_s is None or (loan is not None and loan.quarantined):
            raise error.locate(attempts=attempts)
        self._recorder.retried(error, lane)
        if isinstance(error, TransientError) and error.throttled:
            self._refused()
        await self._sleep(wait_s)
