"""A load whose tensors are asked for by name, by who knows beforehand what it will ask for, and in which order.

::

    caller's thread                          engine's thread
    found.result() ◄─────────────────────── headers
    foresee(parts) ───────────────────────► plan, in the order of the parts; reads run ahead within memory_bytes
    take(name)     ◄─────────────────────── batches
    bring(part)    ───────────────────────► what was not foreseen: a plan of its own, read now
    finish()       ───────────────────────► the end, when all has come and was verified
"""

from __future__ import annotations

import asyncio
import logging
import math
import threading
from collections.abc import Container, Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from streamload.checkpoint import Catalog, TensorInfo
from streamload.errors import AccessError, ClosedError, CredentialsError, NotFoundError
from streamload.loader import Load
from streamload.options import LoadOptions
from streamload.pipeline.budget import Budget
from streamload.pipeline.concurrency import ConcurrencyTuner
from streamload.pipeline.discover import read_small
from streamload.pipeline.engine import first_error
from streamload.pipeline.fetch import Fetcher
from streamload.pipeline.handoff import Handoff
from streamload.pipeline.pace import Pace
from streamload.pipeline.run import Pipeline
from streamload.pipeline.verify import Verifier
from streamload.planning import PlannedLoad, plan_catalog, plan_load
from streamload.report import Report, State
from streamload.sources import Source

if TYPE_CHECKING:
    import torch

__all__ = ["AskedLoad"]

# Less than this is not worth being stingy with.
_LEAST_BROUGHT_BYTES = 1 << 20

_logger = logging.getLogger("streamload.sources")


class AskedLoad(Load):
    """Reads ahead in the order in which its consumer will ask, and hands out by name.

    What has arrived and was not asked for yet counts against ``memory_bytes``. A consumer that leaves something out and
    goes on in another order than it said must not wait for ever: what it has left behind does not count any more, and
    waits beside the limit.

    Args:
        uri: What is loaded.
        options: Resolved ones.
        files: Small files beside the weights that are wanted as well.
        optional: Those of them that count as not there where the source refuses them, which many a store does where
            there is none.

    Attributes:
        texts: Their content; of one that is not there, None.
        found: The tensors that can be asked for.
    """

    def __init__(
        self, uri: str, options: LoadOptions, *, files: Sequence[str] = (), optional: Container[str] = ()
    ) -> None:
        super().__init__(uri, options)
        self.texts: Future[dict[str, bytes | None]] = _promise()
        self.found: Future[Catalog] = _promise()
        self._failure: BaseException | None = None
        self._files = files
        self._optional = optional
        self._foreseen: Future[Sequence[TensorInfo]] = _promise()
        # One thread at a time takes what has come; the others wait for it here.
        self._lock = threading.Lock()
        self._arrived: dict[str, torch.Tensor] = {}
        self._batch_of: dict[str, int] | None = None  # of what was not asked for yet
        self._left: dict[int, int] = {}  # of the batches that have come: how many tensors were not asked for
        self._credit: dict[int, int] = {}  # what is still to be given back for them
        self._floor: float = 0  # whoever asked for something of this batch will not ask for anything before it
        self._planned: PlannedLoad | None = None
        self._pace: Pace | None = None
        self._bringing: asyncio.TaskGroup | None = None
        self._brought: set[asyncio.Task[None]] = set()
        self._released = asyncio.Event()

    def foresee(self, parts: Sequence[TensorInfo]) -> None:
        """Say which tensors, or slices of them, will be asked for, and in which order; the first call counts."""
        with self._lock:
            if not self._foreseen.done():
                self._foreseen.set_result(parts)

    def take(self, name: str) -> torch.Tensor:
        """A tensor that was foreseen, once; waits for it.

        Raises:
            KeyError: It was not foreseen, or taken already.
            StreamloadError: The load's error.
        """
        plan = self.opened.result()
        with self._lock:
            if self._batch_of is None:
                self._batch_of = {tensor.name: batch.index for batch in plan.batches for tensor in batch.tensors}
            batch = self._batch_of.pop(name)
            self._overtake(batch)
            while name not in self._arrived:
                if not self._receive():
                    raise ClosedError(f"the load ended without tensor {name!r}", uri=self.uri)
            tensor = self._arrived.pop(name)
            self._left[batch] -= 1
            if not self._left[batch]:
                self._acknowledge(batch)
            self.recorder.took(tensor.nbytes)
        return tensor

    def bring(self, part: TensorInfo) -> torch.Tensor:
        """Read a tensor, or a slice of one, that was not foreseen.

        Raises:
            StreamloadError: The load's error.
        """
        self.opened.result()
        handoff = Handoff(in_order=False)
        self.engine.post(self._begin, part, handoff)
        # Where the engine has ended, the call above reaches nobody.
        self.engine.finished.add_done_callback(lambda _: handoff.end(self._closed()))
        while (finished := handoff.take()) is None:
            handoff.changed().result()
        ((_, tensor),) = finished.delivery.tensors()
        handoff.acknowledge(taken_bytes=finished.credit_bytes, released_bytes=finished.credit_bytes, batches=1)
        with self._lock:
            self.recorder.took(tensor.nbytes)
        return tensor

    def finish(self) -> Report:
        """Nothing will be asked for any more: wait until all that was foreseen has come and was verified.

        Raises:
            StreamloadError: The load's error.
        """
        self.foresee(())
        self.engine.post(self._released.set)
        with self._lock:
            self._overtake(math.inf)
            while self._receive():
                self._arrived.clear()
        self.engine.join()
        return self.recorder.report()

    def why(self, error: BaseException) -> BaseException:
        """What ended the load, for who was told only that it has ended: the first who asked was told why."""
        failure, self._failure = self._failure, None
        return failure if failure is not None and isinstance(error, ClosedError) else error

    def close(self) -> None:
        self.engine.post(self._release)
        super().close()
        self._arrived.clear()

    def _receive(self) -> bool:
        """Take the next batch that has come, waiting for it; whether there was one."""
        while (finished := self.handoff.take()) is None:
            if self.handoff.ended:
                return False
            self.handoff.changed().result()
        self._credit[finished.index] = finished.credit_bytes
        self._left[finished.index] = finished.tensors
        self._arrived.update(finished.delivery.tensors())
        if finished.index < self._floor:
            self._acknowledge(finished.index)
        return True

    def _overtake(self, batch: float) -> None:
        """Something of this batch is asked for: what lies here of those before it does not hold the reads up."""
        self._floor = max(self._floor, batch)
        for index in [index for index in self._credit if index < self._floor]:
            self._acknowledge(index)

    def _acknowledge(self, batch: int) -> None:
        credit_bytes = self._credit.pop(batch, None)
        if credit_bytes is not None:
            self.handoff.acknowledge(taken_bytes=credit_bytes, released_bytes=credit_bytes, batches=1)

    def _end(self, error: BaseException, state: State) -> None:
        if state == "failed" and self._failure is None:
            self._failure = error
        super()._end(error, state)
        for future in (self.texts, self.found):
            if not future.done():
                future.set_exception(error)

    async def _plan(self, source: Source, fetcher: Fetcher) -> PlannedLoad:
        async with asyncio.TaskGroup() as group:
            group.create_task(self._read_texts(fetcher))
            planning = group.create_task(plan_load(source, fetcher, self.recorder, self.options, ask=self._ask))
        return planning.result()

    async def _read_texts(self, fetcher: Fetcher) -> None:
        async def read(key: str) -> bytes | None:
            try:
                return await read_small(fetcher, self.recorder, key)
            except NotFoundError:
                return None
            except CredentialsError:  # which concerns everything
                raise
            except AccessError as error:
                if key not in self._optional:
                    raise
                _logger.warning("%s, %s counts as not there: %s", self.uri, key, error.cause)
                return None

        async with asyncio.TaskGroup() as group:
            tasks = {key: group.create_task(read(key)) for key in self._files}
        self.texts.set_result({key: task.result() for key, task in tasks.items()})

    async def _ask(self, catalog: Catalog) -> Sequence[TensorInfo]:
        self.found.set_result(catalog)
        return await asyncio.wrap_future(self._foreseen)

    async def _flow(self, planned: PlannedLoad, budget: Budget, pace: Pace | None) -> None:
        self._planned, self._pace = planned, pace
        async with asyncio.TaskGroup() as self._bringing:
            await super()._flow(planned, budget, pace)
            # From here on nothing is cancelled by the engine's own means; `close` releases it.
            await self._released.wait()

    def _release(self) -> None:
        self._released.set()
        for task in self._brought:
            task.cancel()

    def _closed(self) -> ClosedError:
        return ClosedError("the stream was closed", uri=self.uri)

    def _begin(self, part: TensorInfo, handoff: Handoff) -> None:
        assert self._bringing is not None
        bring = self._bring(part, handoff)
        try:
            task = self._bringing.create_task(bring)
        except RuntimeError:  # it is ending, or has ended
            bring.close()
            handoff.end(self._closed())
            return
        self._brought.add(task)
        task.add_done_callback(self._brought.discard)

    async def _bring(self, part: TensorInfo, handoff: Handoff) -> None:
        planned, source, recorder, options = self._planned, self._source, self.recorder, self.options
        assert planned is not None
        assert options.memory_bytes is not None
        file = next(file for file in self.found.result().files if any(part.name == t.name for t in file.tensors))
        plan = plan_catalog(source, Catalog((replace(file, tensors=(part,)),)), planned.read_bytes)
        recorder.planned(recorder.files, recorder.total_tensors + 1, recorder.total_bytes + plan.tensor_bytes)
        error: BaseException = self._closed()
        # Many of these may be under way at once, each of them small.
        sink = self._sink_for(planned, max(_LEAST_BROUGHT_BYTES, 2 * part.nbytes))
        try:
            sink.check(plan.catalog)
            tuner = ConcurrencyTuner(planned.concurrency, most=planned.most_concurrency)
            off, required = options.verify == "off", options.verify == "require"
            pipeline = Pipeline(
                plan,
                planned.objects,
                fetcher=Fetcher(source, recorder, pace=self._pace, refused=tuner.refused),
                sink=sink,
                budget=Budget(options.memory_bytes),
                handoff=handoff,
                recorder=recorder,
                verifier=Verifier(
                    plan, {}, planned.headers, recorder, manifests=planned.manifests, off=off, required=required
                ),
                post=self.engine.post,
                tuner=tuner,
                strict=options.strict_memory,
            )
            await pipeline.run()
        except Exception as raised:
            error = first_error(raised)
            raise
        finally:
            handoff.end(error)
            await sink.aclose()


def _promise() -> Future[Any]:
    future: Future[Any] = Future()
    future.set_running_or_notify_cancel()  # whoever waits for it and is cancelled must not cancel it
    return future
