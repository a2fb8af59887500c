"""The flow of bytes: credit is taken in plan order, workers read, finished batches go to the consumer.

::

    plan ─► next read, in a worker's turn: credit, sink.begin ─► sink.lend, read, sink.landed
                                                                   │ last read of a batch
                                                       sink.finish ▼
                                                                handoff ─► consumer ── receipts, credit back

All of it runs on the engine's loop, in one TaskGroup: the first error cancels everything.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from streamload.errors import MemoryLimitError, SourceError
from streamload.loan import Loan
from streamload.pipeline.budget import Budget
from streamload.pipeline.concurrency import ConcurrencyTuner
from streamload.pipeline.fetch import Fetcher
from streamload.pipeline.handoff import Finished, Handoff
from streamload.pipeline.verify import Verifier
from streamload.plan import Batch, Plan, Read
from streamload.report import Recorder
from streamload.sinks.base import Lease, Sink
from streamload.sources.base import SourceObject

__all__ = ["Pipeline"]


class _OpenBatch:
    """A batch that has credit and memory, and reads still to come."""

    __slots__ = ("batch", "credit_bytes", "lease", "pending")

    def __init__(self, batch: Batch, lease: Lease, credit_bytes: int) -> None:
        self.batch = batch
        self.lease = lease
        self.credit_bytes = credit_bytes
        self.pending = len(batch.reads)


class Pipeline:
    """Carries out one plan.

    Args:
        plan: What to read.
        objects: The shard files as the source knows them, by key.
        fetcher: Reads, with retries.
        sink: Lends the memory and makes the tensors.
        budget: The credit.
        handoff: Where finished batches go.
        recorder: What is told of it all.
        verifier: Checks what arrives.
        post: Calls a function on the engine's loop, from the consumer's thread.
        tuner: Says how many reads are in flight at most.
        strict: Whether a tensor that is larger than the budget is an error.
    """

    def __init__(
        self,
        plan: Plan,
        objects: Mapping[str, SourceObject],
        *,
        fetcher: Fetcher,
        sink: Sink[Any],
        budget: Budget,
        handoff: Handoff,
        recorder: Recorder,
        verifier: Verifier,
        post: Callable[[Callable[[], object]], None],
        tuner: ConcurrencyTuner,
        strict: bool = False,
    ) -> None:
        self._plan = plan
        self._objects = [objects[file.key] for file in plan.catalog.files]
        self._fetcher = fetcher
        self._sink = sink
        self._budget = budget
        self._handoff = handoff
        self._recorder = recorder
        self._verifier = verifier
        self._strict = strict
        self._post = post
        self._tuner = tuner
        self._free_lanes = list(range(tuner.most))
        self._all_begun = plan.reads == 0 and not plan.batches
        self._batches = iter(plan.batches)
        self._reads: deque[tuple[_OpenBatch, Read]] = deque()  # of the batch that was begun last
        self._turn = asyncio.Lock()
        self._workers = 0
        self._loans: set[Loan] = set()  # of reads that are under way
        self._read_bytes = 0  # by those that have ended
        self._open: set[_OpenBatch] = set()
        self._untaken = 0
        self._untaken_bytes = 0
        # Nothing can go on before the consumer has done something.
        self._starved = False
        self._consumer_watched = False
        self._all_taken = asyncio.Event()

    async def run(self) -> None:
        """Read everything and wait until the consumer has taken it.

        Whatever happens, when this returns or raises no task is left, and all credit that the consumer does not hold is
        back.

        Raises:
            MemoryLimitError: The limit is strict, and smaller than a tensor.
            SourceError: The source or the sink has cancelled what it was asked for.
            BaseExceptionGroup: The TaskGroup's, the first error first.
        """
        if self._strict:
            self._refuse_large()
        try:
            async with asyncio.TaskGroup() as group:
                self._staff(group)
            if self._open or not self._all_begun:
                # A task that ends as cancelled ends a TaskGroup's block without an error, whoever has cancelled it.
                raise SourceError("a read was cancelled, and nobody here has asked for that")
            self._starved = True
            self._settle()
            while self._untaken:
                self._all_taken.clear()
                await self._all_taken.wait()
        finally:
            # What has failed or was cancelled is not handed out any more, finished or not.
            self._starved = False
            self._settle()
            self._budget.give_back(self._untaken_bytes + sum(open_batch.credit_bytes for open_batch in self._open))
            for open_batch in self._open:
                self._sink.abandon(open_batch.lease)
            self._open.clear()

    def _settle(self) -> None:
        """Book what the consumer has taken and let go of.

        Done when it matters, and only then: to be told of each tensor would wake this thread as often as all its reads.
        """
        receipts = self._handoff.receipts(self._heard if self._starved else None)
        if receipts.taken_bytes:
            self._untaken_bytes -= receipts.taken_bytes
            self._budget.taken(receipts.taken_bytes)
        if receipts.released_bytes:
            self._budget.release(receipts.released_bytes)
        self._untaken -= receipts.batches
        if self._untaken == 0:
            self._all_taken.set()
        self._watch_consumer()

    def _heard(self) -> None:
        """Called on the consumer's thread when there are receipts."""
        self._post(self._settle)

    def _refuse_large(self) -> None:
        """With a strict limit: find the tensor that would raise it, before anything is read."""
        for batch in self._plan.batches:
            credit_bytes = self._sink.credit_bytes(batch)
            if credit_bytes > self._budget.limit_bytes:
                largest = max(batch.tensors, key=lambda tensor: tensor.nbytes)
                raise MemoryLimitError(
                    f"tensor {largest.name!r} needs {credit_bytes} bytes, more than "
                    f"memory_bytes={self._budget.limit_bytes}, and strict_memory is set",
                    object=self._plan.catalog.files[batch.file].key,
                    start=largest.start,
                    end=largest.end,
                )

    def _staff(self, group: asyncio.TaskGroup) -> None:
        """Have as many workers as reads may be in flight; those who are too many leave by themselves."""
        self._recorder.reading(self._tuner.target)
        while not self._all_begun and self._workers < min(self._tuner.target, self._plan.reads or 1):
            lane = heapq.heappop(self._free_lanes)
            self._workers += 1
            group.create_task(self._work(group, lane), name=f"worker {lane}")

    async def _work(self, group: asyncio.TaskGroup, lane: int) -> None:
        while self._workers <= self._tuner.target and (item := await self._next(group)) is not None:
            open_batch, read = item
            await self._read(open_batch, read, f"worker {lane}")
            open_batch.pending -= 1
            if open_batch.pending == 0:
                # In a task of its own: a copy to the device that is still under way must not keep this worker.
                group.create_task(self._deliver(open_batch))
            self._tuner.read_ended(self._recorder.now(), self._landed_bytes())
            self._staff(group)
        self._workers -= 1
        heapq.heappush(self._free_lanes, lane)

    async def _next(self, group: asyncio.TaskGroup) -> tuple[_OpenBatch, Read] | None:
        """The next read of the plan, or None at its end.

        A batch is begun when a worker asks for its first read and not before: memory set aside early is memory touched
        for the first time, which costs far more than the microseconds that the worker waits.
        """
        # Held while its holder waits for credit: who comes later must not overtake the plan. A holder that is cancelled
        # lets go, and takes nothing with it.
        async with self._turn:
            while not self._reads:
                batch = next(self._batches, None)
                if batch is None:
                    self._all_begun = True
                    return None
                open_batch = await self._begin(batch)
                self._reads.extend((open_batch, read) for read in batch.reads)
                if not batch.reads:
                    group.create_task(self._deliver(open_batch))
            return self._reads.popleft()

    async def _begin(self, batch: Batch) -> _OpenBatch:
        """Get a batch's credit, then its memory."""
        credit_bytes = self._sink.credit_bytes(batch)
        await self._acquire(batch, credit_bytes)
        # From here to the batch's place in `_open` nothing is awaited: no cancellation can lose the credit.
        try:
            lease = self._sink.begin(batch, self._budget.spare_bytes)
        except BaseException:
            self._budget.give_back(credit_bytes)
            raise
        open_batch = _OpenBatch(batch, lease, credit_bytes)
        self._open.add(open_batch)
        return open_batch

    async def _acquire(self, batch: Batch, credit_bytes: int) -> None:
        budget, recorder = self._budget, self._recorder
        raised_before = budget.raised_bytes
        self._settle()
        if not budget.fits(credit_bytes):
            self._starved = True
            self._settle()
            await budget.acquire(credit_bytes)
            self._starved = False
            self._watch_consumer()
            # How fast bytes came meanwhile says nothing about the source.
            self._tuner.begin(recorder.now(), self._landed_bytes())
        else:
            await budget.acquire(credit_bytes)
        # One load may have several budgets, each for a pipeline of its own.
        recorder.peak_staged_bytes = max(recorder.peak_staged_bytes, budget.peak_bytes)
        if budget.raised_bytes > raised_before:
            recorder.raised_memory_bytes = budget.raised_bytes
            file = self._plan.catalog.files[batch.file]
            recorder.event(
                "limit",
                "engine",
                recorder.now(),
                object=file.key,
                start=batch.tensors[0].start,
                end=batch.tensors[-1].end,
                nbytes=credit_bytes,
                detail=f"more than memory_bytes={budget.limit_bytes}: it goes alone",
            )

    async def _read(self, open_batch: _OpenBatch, read: Read, lane: str) -> None:
        sink, recorder = self._sink, self._recorder
        object = self._objects[open_batch.batch.file]
        loan = await sink.lend(open_batch.lease, read)
        started_s = recorder.now()
        recorder.start("read")
        try:
            self._loans.add(loan)
            summed_up = not open_batch.batch.sliced
            if summed_up:
                loan.checksum = self._verifier.running(object.key, read.start)
            await self._fetcher.read(object, read.start, read.end, loan, lane)
            if summed_up:
                self._verifier.add(object.key, read.start, loan)
            await self._verifier.digest(object.key, read.start, loan)
        except BaseException:
            sink.failed(open_batch.lease, read, loan)
            recorder.quarantined_bytes = sink.quarantined_bytes
            raise
        finally:
            self._loans.discard(loan)
            recorder.stop("read")
        recorder.reads += 1
        self._read_bytes += read.nbytes
        recorder.fetched_bytes += read.fetched_bytes
        recorder.arrived_bytes += read.piece_bytes
        nbytes = read.fetched_bytes
        recorder.event("read", lane, started_s, object=object.key, start=read.start, end=read.end, nbytes=nbytes)
        sink.landed(open_batch.lease, read, loan)

    def _landed_bytes(self) -> int:
        """How many bytes are in place, those of reads that are still under way included.

        Added up when it is asked for: each loan's own count has one writer, which may be another thread.
        """
        return self._read_bytes + sum(loan.landed_bytes for loan in self._loans)

    async def _deliver(self, open_batch: _OpenBatch) -> None:
        delivery = await self._sink.finish(open_batch.lease)
        batch = open_batch.batch
        self._open.remove(open_batch)
        self._untaken += 1
        self._untaken_bytes += open_batch.credit_bytes
        self._handoff.put(Finished(batch.index, delivery, len(batch.tensors), batch.nbytes, open_batch.credit_bytes))
        self._watch_consumer()

    def _watch_consumer(self) -> None:
        """Count the time in which nothing can go on, only because finished tensors wait to be taken."""
        waiting = self._starved and self._untaken > 0
        if waiting != self._consumer_watched:
            self._consumer_watched = waiting
            if waiting:
                self._recorder.start("consumer")
            else:
                self._recorder.stop("consumer")
