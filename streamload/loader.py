"""Puts the parts together: open, stream, load."""

from __future__ import annotations

import asyncio
import os
import weakref
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, Unpack, cast

from streamload.checkpoint import Catalog
from streamload.deadlines import deadline
from streamload.errors import ClosedError, StreamloadError
from streamload.options import LoadOptions, Options, resolve
from streamload.pipeline.budget import Budget
from streamload.pipeline.concurrency import ConcurrencyTuner
from streamload.pipeline.engine import Engine, first_error
from streamload.pipeline.fetch import Fetcher
from streamload.pipeline.handoff import Finished, Handoff
from streamload.pipeline.hedge import HedgePolicy, Hedger
from streamload.pipeline.pace import Pace
from streamload.pipeline.run import Pipeline
from streamload.plan import Plan
from streamload.planning import Accept, PlannedLoad, plan_load, source_for
from streamload.progress import watch
from streamload.report import Recorder, Report, State
from streamload.sinks import MakeSink, NamedTensor, Sink, sink_for
from streamload.sources import Source
from streamload.uris import scrub_uri

if TYPE_CHECKING:
    import torch

__all__ = ["AsyncStream", "Load", "Stream", "load", "open", "open_stream", "resolve_options", "stream"]


def open(uri: str | os.PathLike[str], **options: Unpack[Options]) -> AsyncStream:
    """Open a checkpoint for an ``async with`` and ``async for``.

    ::

        async with streamload.open("s3://models/llama", device="cuda:0") as stream:
            async for name, tensor in stream:
                ...

    The load runs on a thread of its own: a consumer that blocks its event loop does not stop the network.

    Args:
        uri: A directory, a ``.safetensors`` file, ``s3://bucket/prefix``, ``hf://org/model``, ``https://host/folder``,
            or a file in one of these; with ``runai+`` before the scheme, read by Run:ai's engine where that can.
        **options: The fields of `LoadOptions`.

    Raises:
        OptionError: An option has no meaning.
        DeviceError: The device does not exist.
        MissingDependencyError: torch is not installed.
    """
    return AsyncStream(Load(os.fspath(uri), resolve_options(options)))


def stream(uri: str | os.PathLike[str], **options: Unpack[Options]) -> Stream:
    """Stream a checkpoint's tensors to synchronous code: in a script, in a notebook, in a thread.

    ::

        for name, tensor in streamload.stream("/models/llama"):
            ...

    The load begins at once, and ends when the iteration does: at its end, at an error, when the stream is closed, or
    when nothing refers to it any more.

    Args:
        uri: As for `open`.
        **options: The fields of `LoadOptions`.

    Returns:
        An iterator of names and tensors, and a context manager; its ``report`` says what happened.

    Raises:
        StreamloadError: Bad options, or no checkpoint there. Later errors are raised by the iteration.
    """
    return open_stream(os.fspath(uri), resolve_options(options))


def open_stream(uri: str, options: LoadOptions, *, accept: Accept | None = None) -> Stream:
    """What `stream` does.

    Args:
        uri: As for `open`.
        options: Resolved ones.
        accept: As for `plan_load`.

    Raises:
        StreamloadError: As `stream`.
    """
    load = Load(uri, options, accept=accept)
    try:
        load.start()
        load.opened.result()
    except BaseException:
        load.close()
        # The error's traceback knows this frame, and the load knows the error.
        del load
        raise
    return Stream(load)


def load(uri: str | os.PathLike[str], **options: Unpack[Options]) -> dict[str, torch.Tensor]:
    """Load a whole checkpoint.

    Args:
        uri: As for `open`.
        **options: The fields of `LoadOptions`.

    Returns:
        Every tensor by its name, in the order in which they arrived.

    Raises:
        StreamloadError: Whatever went wrong; nothing of the checkpoint is handed out then.
    """
    with stream(uri, **options) as tensors:
        return dict(tensors)


def resolve_options(options: Options) -> LoadOptions:
    """What was given, what the environment says, and the defaults.

    Raises:
        OptionError: An option has no meaning.
    """
    return resolve(cast("dict[str, Any]", options))[0]


class Load:
    """One load: the engine's thread on one side, the consumer on the other.

    Args:
        uri: What is loaded.
        options: Resolved ones.
        device: Where tensors go, in words; None: to the options' device.
        make_sink: Makes what takes them there; None: what the device needs.
        accept: As for `plan_load`.
    """

    def __init__(
        self,
        uri: str,
        options: LoadOptions,
        *,
        device: str | None = None,
        make_sink: MakeSink | None = None,
        accept: Accept | None = None,
    ) -> None:
        assert options.memory_bytes is not None
        self.uri = scrub_uri(uri)
        self.options = options
        self._accept = accept
        self._interruption: BaseException | None = None
        #: Of what is read, by the objects' keys, where a version means the same on every machine.
        self.versions: dict[str, str] = {}
        self.handoff = Handoff(in_order=options.order == "file")
        self.opened: Future[Plan] = Future()
        self.opened.set_running_or_notify_cancel()  # whoever waits for it and is cancelled must not cancel it
        self.engine = Engine(self._main)
        self.engine.finished.add_done_callback(self._engine_ended)
        self._source = source_for(uri, options)
        # Here, on the caller's thread: a CUDA device takes the caller's current stream.
        self._make_sink = make_sink or sink_for(options.device, lambda *copy: self.recorder.copied(*copy))
        # The load's clock starts here: torch is imported by now.
        self.recorder = Recorder(self.uri, device or options.device, options.memory_bytes, on_event=options.on_event)

    def start(self) -> None:
        self.engine.start()

    def interrupt(self, error: BaseException) -> None:
        """End the load with this error, without waiting; where it has ended, nothing changes. From any thread."""
        self._interruption = error
        self.engine.cancel()

    def close(self) -> None:
        """Cancel whatever is under way, and wait until nothing of it is left."""
        self.engine.cancel()
        self.engine.join()

    def _engine_ended(self, finished: Future[None]) -> None:
        """The engine's thread is about to end: whoever waits must not wait for ever, whatever happened."""
        error = finished.exception() or ClosedError("the stream was closed", uri=self.uri)
        self._end(error, "closed" if isinstance(error, ClosedError) else "failed")

    async def _main(self) -> None:
        try:
            if self._interruption is not None:  # which came before there was anything to cancel
                raise self._interruption
            await self._run()
        except asyncio.CancelledError:
            if self._interruption is not None:
                self._end(self._interruption, "failed")
            else:
                self._end(ClosedError("the stream was closed", uri=self.uri), "closed")
        except BaseException as raised:
            cause = first_error(raised)
            if isinstance(cause, StreamloadError):
                cause.locate(uri=self.uri)
            self._end(cause, "failed")
        else:
            self.recorder.finish("done")
            self.handoff.end()

    def _end(self, error: BaseException, state: State) -> None:
        """The load has ended before everything was delivered; where it has ended already, nothing changes."""
        self.recorder.finish(state, error if state == "failed" else None)
        if not self.opened.done():
            self.opened.set_exception(error)
        self.handoff.end(error)

    async def _run(self) -> None:
        recorder = self.recorder
        assert self.options.memory_bytes is not None
        async with self._source as source, watch(self.options.progress, recorder):
            recorder.count_requests(lambda: source.requests)
            recorder.paths = source.paths
            pace = None if self.options.max_bytes_per_s is None else Pace(self.options.max_bytes_per_s)
            try:
                # Not around what closes the source: that has limits of its own, and must not be cut off.
                async with deadline(self.options.deadline_s, self._how_far):
                    budget = Budget(self.options.memory_bytes)
                    # Headers are compared with headers: how long they take says nothing about large reads.
                    headers = Hedger(source, budget, recorder, policy=HedgePolicy(least_siblings=3), pace=pace)
                    fetcher = Fetcher(source, recorder, pace=pace, hedger=headers if source.hedged else None)
                    planned = await self._plan(source, fetcher)
                    if source.shared_versions:
                        self.versions = {key: object.version for key, object in planned.objects.items()}
                    await self._flow(planned, budget, pace)
            finally:
                self.engine.ignore_cancel()

    async def _plan(self, source: Source, fetcher: Fetcher) -> PlannedLoad:
        return await plan_load(source, fetcher, self.recorder, self.options, accept=self._accept)

    def _how_far(self) -> str:
        recorder = self.recorder
        return (
            f"{recorder.tensors} of {recorder.total_tensors} tensors were taken, {recorder.arrived_bytes} of "
            f"{recorder.total_bytes} bytes had arrived"
        )

    async def _flow(self, planned: PlannedLoad, budget: Budget, pace: Pace | None) -> None:
        options, recorder, source = self.options, self.recorder, self._source
        assert options.memory_bytes is not None
        tuner = ConcurrencyTuner(planned.concurrency, most=planned.most_concurrency)
        hedger = Hedger(source, budget, recorder, pace=pace) if source.hedged else None
        sink = self._sink_for(planned)
        try:
            sink.check(planned.plan.catalog)
            pipeline = Pipeline(
                planned.plan,
                planned.objects,
                fetcher=Fetcher(source, recorder, pace=pace, hedger=hedger, refused=tuner.refused),
                sink=sink,
                budget=budget,
                handoff=self.handoff,
                recorder=recorder,
                verifier=planned.verifier,
                post=self.engine.post,
                tuner=tuner,
                strict=options.strict_memory,
            )
            self.opened.set_result(planned.plan)
            await pipeline.run()
            vouched = await source.conclude()
            keys = [file.key for file in planned.plan.catalog.files]
            if keys and all(key in vouched for key in keys):
                recorder.vouched(" and ".join(dict.fromkeys(vouched[key] for key in keys)))
        finally:
            self.engine.ignore_cancel()
            await sink.aclose()
            recorder.quarantined_bytes = sink.quarantined_bytes

    def _sink_for(self, planned: PlannedLoad, enough_bytes: int | None = None) -> Sink[Any]:
        """Make the sink; of the memory limit it gets no more than is enough."""
        limit_bytes = self.options.memory_bytes
        assert limit_bytes is not None
        return self._make_sink(
            memory_bytes=limit_bytes if enough_bytes is None else min(limit_bytes, enough_bytes),
            read_bytes=planned.read_bytes,
            # Page-locked memory takes long to get, so not for as many reads as there may be at the very most.
            concurrency=min(planned.most_concurrency, 2 * planned.concurrency),
            congruence_bytes=self._source.congruence_bytes,
        )


class _Consumer:
    """Takes finished batches and makes their tensors, one at a time, on the consumer's thread."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._batch: Finished | None = None
        self._tensors: Iterator[NamedTensor] = iter(())
        self._left = 0
        self._began_s = 0.0
        self.batches = 0
        self._broken: str | None = None
        # Credit of the batch before the current one: its last tensor may still be bound to the consumer's variable.
        self._lingering_bytes = 0

    def step(self) -> NamedTensor | None:
        """The next tensor; None where there is none yet, or none any more (see `ended`).

        Raises:
            StreamloadError: The load's error.
            BaseException: What making a tensor raised, a KeyboardInterrupt perhaps. The load is over then: what was
                being made is lost, and a stream that went on would seem whole and not be.
        """
        if self._broken is not None:
            raise ClosedError(f"the stream ended when a tensor could not be handed out: {self._broken}")
        try:
            return self._step()
        except StreamloadError:
            raise
        except BaseException as error:
            self._broken = f"{type(error).__name__} {error}".strip()
            self.close()
            self._load.engine.cancel()
            raise

    def _step(self) -> NamedTensor | None:
        # The consumer asks again, so it has bound the last tensor in place of the one before.
        taken_bytes = finished = 0
        released_bytes, self._lingering_bytes = self._lingering_bytes, 0
        if self._batch is not None and self._left == 0:
            self._leave(self._batch)
        if self._batch is None and (batch := self._load.handoff.take()) is not None:
            self._batch, self._left = batch, batch.tensors
            self._tensors = batch.delivery.tensors()
            self._began_s = self._load.recorder.now()
            self.batches += 1
            taken_bytes = batch.credit_bytes
        item = None
        if self._batch is not None:
            item = next(self._tensors)
            self._left -= 1
            finished = 1 if self._left == 0 else 0
            self._load.recorder.took(item[1].nbytes)
        if taken_bytes or released_bytes or finished:
            self._load.handoff.acknowledge(taken_bytes=taken_bytes, released_bytes=released_bytes, batches=finished)
        return item

    @property
    def ended(self) -> bool:
        return self._load.handoff.ended

    def close(self) -> None:
        """Let go of what was taken and not handed out."""
        self._tensors = iter(())
        self._batch = None

    def _leave(self, batch: Finished) -> None:
        self._lingering_bytes = batch.credit_bytes
        self._load.recorder.event("consumer", "consumer", self._began_s, nbytes=batch.tensor_bytes)
        self.close()


class _BaseStream:
    """What the synchronous and the asynchronous stream have in common."""

    def __init__(self, load: Load) -> None:
        self._load = load
        self._consumer = _Consumer(load)
        self._process = os.getpid()
        # The engine knows the load but not the stream, so a stream that nobody refers to is garbage: that cancels it.
        # It holds the engine weakly, since the registry of finalizers is a root: through the load, its error and that
        # error's traceback it would keep the stream itself.
        weakref.finalize(self, _cancel, weakref.ref(load.engine))

    @property
    def report(self) -> Report:
        """What has happened so far; complete once the stream has ended."""
        return self._load.recorder.report()

    @property
    def catalog(self) -> Catalog:
        """The tensors that will come, by shard file.

        Raises:
            ClosedError: The stream was not opened yet.
        """
        if not self._load.opened.done():
            raise ClosedError("the stream is not open yet", uri=self._load.uri)
        return self._load.opened.result().catalog

    def _check_process(self) -> None:
        if self._process != os.getpid():
            raise ClosedError("the stream was opened before this process was forked: open one here", uri=self._load.uri)

    def __repr__(self) -> str:
        report = self.report
        return f"<{type(self).__name__} {report.uri} {report.state}, {report.tensors}/{report.total_tensors} tensors>"


def _cancel(engine: weakref.ref[Engine]) -> None:
    found = engine()
    if found is not None:
        found.cancel()


class Stream(_BaseStream):
    """A checkpoint's tensors for synchronous code; made by `stream`.

    An iterator over ``(name, tensor)`` and a context manager. Every tensor comes once, whole, and is the caller's own.
    """

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> NamedTensor:
        self._check_process()
        while True:
            item = self._consumer.step()
            if item is not None:
                return item
            if self._consumer.ended:
                self._load.engine.join()
                raise StopIteration
            self._load.handoff.changed().result()

    def close(self) -> None:
        """End the load, wherever it is; nothing of it is left when this returns. May be called twice."""
        if self._process == os.getpid():
            self._consumer.close()
            self._load.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class AsyncStream(_BaseStream):
    """A checkpoint's tensors for asynchronous code; made by `open`.

    An async context manager, and within it an async iterator over ``(name, tensor)``. Every tensor comes once, whole,
    and is the caller's own. Cancelling a wait for the next tensor loses nothing.
    """

    def __init__(self, load: Load) -> None:
        super().__init__(load)
        self._turned = 0

    async def __aenter__(self) -> Self:
        self._check_process()
        if self._load.engine.started:
            raise ClosedError("a stream is opened once: make another one", uri=self._load.uri)
        try:
            self._load.start()
            await asyncio.wrap_future(self._load.opened)
        except BaseException:
            await self.aclose()
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    def __aiter__(self) -> AsyncIterator[NamedTensor]:
        return self

    async def __anext__(self) -> NamedTensor:
        self._check_process()
        if not self._load.engine.started:
            raise ClosedError("open the stream first: async with streamload.open(...)", uri=self._load.uri)
        while True:
            if self._turned != self._consumer.batches:
                # Where tensors are always at hand, nothing else lets the caller's loop turn.
                self._turned = self._consumer.batches
                await asyncio.sleep(0)
            item = self._consumer.step()
            if item is not None:
                return item
            if self._consumer.ended:
                raise StopAsyncIteration
            await asyncio.wrap_future(self._load.handoff.changed())

    async def aclose(self) -> None:
        """End the load, wherever it is; nothing of it is left when this returns. May be called twice.

        Cancelled while it waits, the load still ends, in the background.
        """
        if self._process != os.getpid() or not self._load.engine.started:
            return
        self._consumer.close()
        self._load.engine.cancel()
        await asyncio.wrap_future(self._load.engine.finished)
        # The thread has only its last instructions before it.
        self._load.engine.join()
