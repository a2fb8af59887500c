"""A read that is much slower than its siblings is asked for a second time, on another connection."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from streamload.errors import StreamloadError, TransientError
from streamload.loan import Loan
from streamload.pipeline.budget import Budget
from streamload.pipeline.pace import Pace
from streamload.report import Recorder
from streamload.sources.base import Source, SourceObject

__all__ = ["HedgePolicy", "Hedger"]

# How often a read that is under way is looked at, before it is known how long reads take.
_LOOK_S = 0.1


# After so many reads it is decided anew which are late: ranking all siblings after each costs more than it tells.
_OBSERVED_ANEW = 8

# Where one answer in a hundred is late, so is the second one, now and then, and hardly ever a third. More of them would
# be a burden on a server in trouble.
_TRIES = 3


@dataclass(frozen=True, slots=True)
class HedgePolicy:
    """When a read is much slower than its siblings, and what asking again may cost.

    Source: J. Dean and L. A. Barroso, "The Tail at Scale", Communications of the ACM 56 (2), 2013.

    Attributes:
        quantile: The siblings that are compared with are those that took no longer than this share of them.
        factor: A read is late when it takes so many times as long as they.
        least_s: No read is late before.
        least_siblings: With fewer there is nothing to compare with.
        siblings: Only so many of the last ones count: how long reads take changes with the load on link and server.
        silent_s: While there is nothing to compare with, a read is late when not a byte has come for so long. S3 sends
            the first one within a tenth of that nearly always.
        share: Of the load's bytes, no more than this is asked for again.
    """

    quantile: float = 0.9
    factor: float = 3.0
    least_s: float = 0.2
    least_siblings: int = 16
    siblings: int = 128
    silent_s: float = 1.0
    share: float = 0.05

    def late_s(self, seconds: deque[float]) -> float | None:
        """After how long a read is late; None where that cannot be said yet.

        Args:
            seconds: How long the last reads took.
        """
        if len(seconds) < self.least_siblings:
            return None
        ranked = sorted(seconds)
        return max(self.least_s, self.factor * ranked[int(self.quantile * (len(ranked) - 1))])

    def affordable(self, nbytes: int, hedged_bytes: int, total_bytes: int) -> bool:
        """Whether so many more bytes may be asked for again, after `hedged_bytes` of a load of `total_bytes`."""
        return hedged_bytes + nbytes <= self.share * total_bytes


class Hedger:
    """Reads from a source; where that takes too long, once more beside it, into memory of its own.

    Whichever is whole first counts. The other one is cancelled and waited for before the read ends: nothing writes any
    more when this returns or raises. A second try that fails changes nothing. Where there is no credit for memory of
    its own, the first one is given up instead and asked for again from the byte that it reached.

    Args:
        source: Where the bytes come from.
        budget: Where the credit for the memory comes from; it is never waited for.
        recorder: Told what was asked for twice.
        policy: When.
        pace: What counts all bytes that are asked for.
        clock: Seconds, from any origin.
    """

    def __init__(
        self,
        source: Source,
        budget: Budget,
        recorder: Recorder,
        *,
        policy: HedgePolicy | None = None,
        pace: Pace | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._budget = budget
        self._recorder = recorder
        self._policy = policy or HedgePolicy()
        self._pace = pace
        self._clock = clock
        self._seconds: deque[float] = deque(maxlen=self._policy.siblings)
        self._late_s: float | None = None
        self._observed = 0

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        """Fill the loan, as `Source.read` does and with its promises and errors."""
        began_s = asked_s = self._clock()
        had, rest = 0, loan  # what was in place when the first read was asked for anew, and what was not
        tries = 0
        first = asyncio.create_task(self._source.read(object, start, end, loan))
        try:
            while not first.done():
                left_s = self._left_s(asked_s, loan)
                if tries == _TRIES or loan.landed_bytes == loan.nbytes:
                    # Where all is in place, what the source does with it yet is no matter of being late.
                    await asyncio.wait({first})
                elif left_s > 0:
                    await asyncio.wait({first}, timeout=left_s)
                elif not self._affordable(loan):
                    await asyncio.wait({first}, timeout=_LOOK_S)
                elif loan.nbytes - loan.landed_bytes <= self._budget.spare_bytes:
                    tries += 1
                    won = await self._read_again(first, object, start + had, end, rest)
                    if won:
                        return
                    if won is False:
                        asked_s = self._clock()
                else:
                    tries += 1
                    await _end(first)
                    if not _failed(first):
                        break
                    had = self._given_up(loan)
                    rest = loan.after(had)
                    asked_s = self._clock()
                    first = asyncio.create_task(self._source.read(object, start + had, end, rest))
        finally:
            await _end(first)
        try:
            first.result()
        except StreamloadError as error:
            error.valid_bytes += had
            raise
        self.observe(self._clock() - began_s)

    def _left_s(self, asked_s: float, loan: Loan) -> float:
        """How long to wait before it is looked at again; nothing or less: the read is late."""
        late_s = self._late_s
        if late_s is not None:
            return asked_s + late_s - self._clock()
        if loan.landed_bytes:
            return _LOOK_S
        return min(_LOOK_S, asked_s + self._policy.silent_s - self._clock())

    def _given_up(self, loan: Loan) -> int:
        """A first read was ended, to be asked for again; what of it counts."""
        if loan.quarantined:
            raise TransientError("a read that was given up may still write into its memory")
        had = loan.landed_bytes
        self._recorder.hedged_bytes += loan.nbytes - had
        if self._pace is not None:
            self._pace.wait_s(self._clock(), loan.nbytes - had)  # those who come later wait for it
        return had

    def observe(self, seconds: float) -> None:
        """A read has taken so long: what later ones are compared with."""
        self._seconds.append(seconds)
        self._observed += 1
        if self._late_s is None or self._observed % _OBSERVED_ANEW == 0:
            self._late_s = self._policy.late_s(self._seconds)

    def _affordable(self, loan: Loan) -> bool:
        recorder = self._recorder
        nbytes = loan.nbytes - loan.landed_bytes
        return self._policy.affordable(nbytes, recorder.hedged_bytes, recorder.total_bytes)

    async def _read_again(
        self, first: asyncio.Task[None], object: SourceObject, start: int, end: int, loan: Loan
    ) -> bool | None:
        """Ask for what is still missing.

        Returns:
            Whether that has filled the loan, otherwise it is for the first read to do; None where it is late, too.
        """
        had = loan.landed_bytes
        nbytes = loan.nbytes - had
        budget, recorder = self._budget, self._recorder
        began_s = recorder.now()
        try:
            memory = memoryview(bytearray(nbytes))
        except MemoryError:
            return False
        await budget.acquire(nbytes)  # there is enough: this does not wait
        second: asyncio.Task[None] | None = None
        try:
            lent = Loan([memory])
            recorder.hedged_bytes += nbytes
            if self._pace is not None:
                self._pace.wait_s(self._clock(), nbytes)  # those who come later wait for it
            second = asyncio.create_task(self._source.read(object, start + had, end, lent))
            asked_s = self._clock()
            while not (first.done() or second.done()):
                left_s = self._left_s(asked_s, lent)
                if left_s <= 0:
                    return None  # it is given up, and there is a third
                await asyncio.wait({first, second}, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
            if first.done() and _failed(first):
                await asyncio.wait({second})
            if not second.done() or _failed(second):
                return False
            await _end(first)
            if loan.quarantined:
                raise TransientError("a read that was given up may still write into its memory")
            won = _failed(first)
            if won:
                _fill(loan, memory, had)
            recorder.event(
                "hedge",
                "hedge",
                began_s,
                object=object.key,
                start=start + had,
                end=end,
                nbytes=nbytes,
                detail="the second was first" if won else "the first was first",
            )
            return won
        finally:
            try:
                if second is not None:
                    await _end(second)
            finally:
                budget.give_back(nbytes)


def _fill(loan: Loan, memory: memoryview, had: int) -> None:
    """Copy what the first read still lacks, which may be less than what it lacked when it was asked for again."""
    reached = loan.landed_bytes
    for view in loan.views_after(reached):
        piece = memory[reached - had : reached - had + view.nbytes]
        view[:] = piece
        loan.landed(view)
        reached += view.nbytes


def _failed(task: asyncio.Task[None]) -> bool:
    """Whether it ended without having done its work."""
    return task.cancelled() or task.exception() is not None


async def _end(task: asyncio.Task[None]) -> None:
    """Cancel a task and wait until it has ended, however often the waiting is cancelled meanwhile."""
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        task.cancel()
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError as error:
            cancelled = error
    if not task.cancelled():
        task.exception()  # it was looked at: asyncio need not complain
    if cancelled is not None:
        raise cancelled
