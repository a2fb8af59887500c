"""What happened, and how fast: counted while a load runs, frozen for who asks."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from streamload.errors import StreamloadError
from streamload.events import Event, EventKind, OnEvent, Progress
from streamload.units import format_bytes, format_count, format_seconds

__all__ = ["Recorder", "Report", "Stage", "State"]

Stage: TypeAlias = Literal["list", "headers", "read", "pace", "copy", "consumer"]
State: TypeAlias = Literal["running", "done", "failed", "closed"]

_logger = logging.getLogger("streamload.events")

_BOTTLENECKS: dict[Stage, str] = {
    "list": "listing the objects",
    "headers": "reading the headers",
    "read": "reading from the source",
    "pace": "max_bytes_per_s",
    "copy": "copying to the device",
    "consumer": "the consumer, which took tensors more slowly than they came",
}


@dataclass(frozen=True, slots=True)
class Report:
    """A load's account of itself; complete once ``state`` is no longer ``running``.

    Attributes:
        uri: What was loaded.
        source: The scheme of the source that served it.
        device: Where the tensors went.
        state: ``running``, ``done``, ``failed`` or ``closed`` (the consumer left before the end).
        error: The error's text, where it failed.
        files: Shard files.
        total_tensors: Tensors of the whole load.
        total_bytes: Their bytes.
        tensors: Tensors that the consumer took.
        nbytes: Their bytes.
        seconds: From the call to the last tensor (so far, while running).
        first_tensor_s: From the call to the first tensor; None before it.
        stages: Seconds during which each stage was at work. Stages overlap, so they add up to more than ``seconds``:
            ``list``, ``headers``, ``read`` (at least one read in flight), ``pace`` (at least one read waits because
            ``max_bytes_per_s`` is used up), ``copy`` (at least one copy to the device
            under way), ``consumer`` (no credit left while finished tensors wait to be taken).
        bottleneck: The stage that held the load back; None before anything was read.
        requests: Requests sent to the source.
        round_trips: How many requests were made one after another, each waiting for the one before, until a tensor's
            first bytes could come; without those that were made again.
        paths: Bytes by the way they came, where the source has more than one.
        reads: Ranged reads of tensor bytes that have ended.
        retries: Attempts that failed and were made again.
        concurrency: Reads in flight at most, at the end.
        most_concurrency: The most that this number was.
        hedged_bytes: Bytes of late reads that were asked for a second time.
        fetched_bytes: Bytes read from the source: tensors, headers, gaps.
        header_bytes: Bytes read to learn the headers, what a first guess brought beyond them included.
        memory_bytes: The limit.
        raised_memory_bytes: What a tensor larger than the limit raised it to; None where none did.
        peak_staged_bytes: The most memory that was in flight, staged, or finished and not yet taken.
        quarantined_bytes: Memory that had to be given up because something may still write into it.
        verified: Tensor bytes whose content was checked, by what checked it.
        unverified: Tensor bytes whose content nothing vouches for, by the reason.
    """

    uri: str
    source: str
    device: str
    state: State
    error: str | None
    files: int
    total_tensors: int
    total_bytes: int
    tensors: int
    nbytes: int
    seconds: float
    first_tensor_s: float | None
    stages: dict[Stage, float]
    bottleneck: Stage | None
    requests: int
    round_trips: int
    paths: dict[str, int]
    reads: int
    retries: int
    concurrency: int
    most_concurrency: int
    hedged_bytes: int
    fetched_bytes: int
    header_bytes: int
    memory_bytes: int
    raised_memory_bytes: int | None
    peak_staged_bytes: int
    quarantined_bytes: int
    verified: dict[str, int] = field(default_factory=dict)
    unverified: dict[str, int] = field(default_factory=dict)

    @property
    def gb_per_s(self) -> float:
        """Delivered bytes a second, in units of 10^9."""
        return self.nbytes / self.seconds / 1e9 if self.seconds else 0.0

    @property
    def read_amplification(self) -> float:
        """Fetched bytes over delivered bytes; one where nothing was delivered."""
        return self.fetched_bytes / self.nbytes if self.nbytes else 1.0

    @property
    def held_back_by(self) -> str | None:
        """The stage that held the load back, in words; None before anything was read."""
        return None if self.bottleneck is None else _BOTTLENECKS[self.bottleneck]

    def to_dict(self) -> dict[str, Any]:
        """All fields and the two ratios, ready for JSON."""
        return dataclasses.asdict(self) | {
            "gb_per_s": self.gb_per_s,
            "read_amplification": self.read_amplification,
        }

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def _lines(report: Report) -> Iterator[str]:
    yield f"{report.uri} -> {report.device}: {report.state}"
    if report.error:
        yield f"  error          {report.error}"
    whole = report.tensors == report.total_tensors
    tensors = ("" if whole else f"{report.tensors} of ") + format_count(report.total_tensors, "tensor")
    files = format_count(report.files, "file")
    yield (
        f"  delivered      {tensors}, {format_bytes(report.nbytes)} from {files} "
        f"in {format_seconds(report.seconds)} ({report.gb_per_s:.2f} GB/s)"
    )
    if report.first_tensor_s is not None:
        yield f"  first tensor   after {format_seconds(report.first_tensor_s)}"
    shown = {stage: seconds for stage, seconds in report.stages.items() if seconds or stage != "pace"}
    stages = ", ".join(f"{stage} {format_seconds(seconds)}" for stage, seconds in shown.items())
    yield f"  time at work   {stages}"
    if report.held_back_by is not None:
        yield f"  held back by   {report.held_back_by}"
    yield (
        f"  requests       {report.requests}, {report.retries} retried, {report.round_trips} in turn before data; "
        f"{format_bytes(report.fetched_bytes)} fetched, {report.read_amplification:.3f} x what was delivered"
    )
    if report.concurrency:
        found = f", {report.most_concurrency} at most" if report.most_concurrency != report.concurrency else ""
        yield f"  at once        {format_count(report.concurrency, 'read')}{found}"
    if report.hedged_bytes:
        yield f"  asked twice    {format_bytes(report.hedged_bytes)} of reads that were late"
    for path, nbytes in report.paths.items():
        yield f"  came           {format_bytes(nbytes)} {path}"
    limit = format_bytes(report.memory_bytes)
    if report.raised_memory_bytes is not None:
        limit += f", raised to {format_bytes(report.raised_memory_bytes)} for a tensor of that size"
    yield f"  memory         {format_bytes(report.peak_staged_bytes)} at most, limit {limit}"
    if report.quarantined_bytes:
        yield f"  quarantined    {format_bytes(report.quarantined_bytes)} that a read which hangs may still write into"
    checked = ", ".join(f"{format_bytes(nbytes)} by {what}" for what, nbytes in report.verified.items())
    if checked:
        yield f"  verified       {checked}"
    for reason, nbytes in report.unverified.items():
        yield f"  not verified   {format_bytes(nbytes)}: {reason}"


class _Stopwatch:
    """Seconds during which at least one of several overlapping spans was open."""

    __slots__ = ("_active", "_since", "seconds")

    def __init__(self) -> None:
        self.seconds = 0.0
        self._active = 0
        self._since = 0.0

    def start(self, now: float) -> None:
        if self._active == 0:
            self._since = now
        self._active += 1

    def stop(self, now: float) -> None:
        self._active -= 1
        if self._active == 0:
            self.seconds += now - self._since

    def read(self, now: float) -> float:
        return self.seconds + (now - self._since if self._active else 0.0)


class Recorder:
    """Counts while a load runs. The engine's thread writes all of it, but for what the consumer took.

    Its attributes are those of the report, and ``errors``: how many attempts failed and were made again, by the error's
    kind.

    Args:
        uri: What is loaded.
        device: Where the tensors go.
        memory_bytes: The limit.
        on_event: Told of each span when it has ended, on the thread where it did.
        clock: Seconds, from any origin.
    """

    def __init__(
        self,
        uri: str,
        device: str,
        memory_bytes: int,
        *,
        on_event: OnEvent | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.uri = uri
        self.device = device
        self.memory_bytes = memory_bytes
        self.source = ""
        self.files = 0
        self.total_tensors = 0
        self.total_bytes = 0
        self.tensors = 0
        self.nbytes = 0
        self.reads = 0
        self.retries = 0
        self.errors: Counter[str] = Counter()
        self.round_trips = 0
        self._count_requests: Callable[[], int] = int
        self.paths: dict[str, int] = {}
        self.fetched_bytes = 0
        self.header_bytes = 0
        self.arrived_bytes = 0
        self.hedged_bytes = 0
        self.concurrency = 0
        self.most_concurrency = 0
        self.raised_memory_bytes = 0
        self.peak_staged_bytes = 0
        self.quarantined_bytes = 0
        self._verified: Counter[str] = Counter()
        self._unverified: Counter[str] = Counter()
        self._on_event = on_event
        self._clock = clock
        self._began = clock()
        self._ended: float | None = None
        self._first_tensor: float | None = None
        self._state: State = "running"
        self._error: str | None = None
        self._stages: dict[Stage, _Stopwatch] = {
            "list": _Stopwatch(),
            "headers": _Stopwatch(),
            "read": _Stopwatch(),
            "pace": _Stopwatch(),
            "copy": _Stopwatch(),
            "consumer": _Stopwatch(),
        }

    def now(self) -> float:
        """Seconds since the load began."""
        return self._clock() - self._began

    def count_requests(self, count: Callable[[], int]) -> None:
        """Whom to ask how many requests were sent."""
        self._count_requests = count

    def planned(self, files: int, tensors: int, nbytes: int) -> None:
        """It is known what there is to load."""
        self.files = files
        self.total_tensors = tensors
        self.total_bytes = nbytes

    def start(self, stage: Stage) -> None:
        """A stage has something to do."""
        self._stages[stage].start(self.now())

    def stop(self, stage: Stage) -> None:
        """A stage has one thing less to do."""
        self._stages[stage].stop(self.now())

    @contextmanager
    def stage(self, stage: Stage) -> Iterator[None]:
        """A stage has something to do for as long as the block runs."""
        self.start(stage)
        try:
            yield
        finally:
            self.stop(stage)

    def event(
        self,
        kind: EventKind,
        lane: str,
        started_s: float,
        *,
        object: str | None = None,
        start: int | None = None,
        end: int | None = None,
        nbytes: int = 0,
        detail: str = "",
    ) -> None:
        """Tell that a span which began at `started_s` has ended now."""
        if self._on_event is not None:
            self._tell(Event(kind, lane, started_s, self.now() - started_s, object, start, end, nbytes, detail))

    def _tell(self, event: Event) -> None:
        if self._on_event is None:
            return
        try:
            self._on_event(event)
        except Exception:
            # A load does not die of its spectators; but what is broken is told once, and not asked again.
            self._on_event = None
            _logger.exception("on_event raised and will not be called again")

    def copied(self, started: float, ended: float, nbytes: int, detail: str) -> None:
        """A copy to the device has completed; copies are made one after another, and their spans do not overlap.

        Args:
            started: When it began, by the recorder's clock.
            ended: When it was known to be complete.
            nbytes: How much it moved.
            detail: What it was.
        """
        self._stages["copy"].seconds += ended - started
        self._tell(Event("copy", "copy stream", started - self._began, ended - started, nbytes=nbytes, detail=detail))

    def in_turn(self, requests: int) -> None:
        """So many requests, one after another, had to be over before anything else could go on."""
        self.round_trips += requests

    def retried(self, error: StreamloadError, lane: str) -> None:
        """An attempt failed and will be made again."""
        self.retries += 1
        self.errors[type(error).__name__] += 1
        _logger.info("retrying: %s", error)
        self.event("retry", lane, self.now(), object=error.object, start=error.start, end=error.end, detail=error.cause)

    def reading(self, concurrency: int) -> None:
        """So many reads may be in flight from now on."""
        self.concurrency = concurrency
        self.most_concurrency = max(self.most_concurrency, concurrency)

    def verified(self, nbytes: int, what: str) -> None:
        """So many tensor bytes were checked."""
        self._verified[what] += nbytes

    def unverified(self, nbytes: int, reason: str) -> None:
        """So many tensor bytes cannot be checked."""
        self._unverified[reason] += nbytes

    def vouched(self, what: str) -> None:
        """All bytes that nothing had vouched for were checked elsewhere."""
        nbytes = sum(self._unverified.values())
        self._unverified.clear()
        if nbytes:
            self._verified[what] += nbytes

    def took(self, nbytes: int) -> None:
        """The consumer took a tensor. Called on the consumer's thread."""
        if self._first_tensor is None:
            self._first_tensor = self.now()
        self.tensors += 1
        self.nbytes += nbytes

    def finish(self, state: State, error: BaseException | None = None) -> None:
        """The load has ended; the first call counts."""
        if self._ended is None:
            self._ended = self._clock()
            self._state = state
            self._error = None if error is None else str(error)

    def progress(self) -> Progress:
        """How far the load is."""
        return Progress(self.arrived_bytes, self.nbytes, self.total_bytes, self.tensors, self.total_tensors, self.now())

    def report(self) -> Report:
        """The account up to now."""
        end = self._clock() if self._ended is None else self._ended
        now = end - self._began
        stages = {stage: watch.read(now) for stage, watch in self._stages.items()}
        return Report(
            uri=self.uri,
            source=self.source,
            device=self.device,
            state=self._state,
            error=self._error,
            files=self.files,
            total_tensors=self.total_tensors,
            total_bytes=self.total_bytes,
            tensors=self.tensors,
            nbytes=self.nbytes,
            seconds=now,
            first_tensor_s=self._first_tensor,
            stages=stages,
            bottleneck=_bottleneck(stages),
            requests=self._count_requests(),
            round_trips=self.round_trips,
            paths=dict(self.paths),
            reads=self.reads,
            retries=self.retries,
            concurrency=self.concurrency,
            most_concurrency=self.most_concurrency,
            hedged_bytes=self.hedged_bytes,
            fetched_bytes=self.fetched_bytes,
            header_bytes=self.header_bytes,
            memory_bytes=self.memory_bytes,
            raised_memory_bytes=self.raised_memory_bytes or None,
            peak_staged_bytes=self.peak_staged_bytes,
            quarantined_bytes=self.quarantined_bytes,
            verified=dict(self._verified),
            unverified=dict(self._unverified),
        )


def _bottleneck(stages: dict[Stage, float]) -> Stage | None:
    """The stage that was alone responsible for the most time.

    Reads and copies go on while a slow consumer holds the credit, and reads go on while copies hold the staging memory;
    so a later stage's time is taken off the earlier one's. Reads go on while others wait for the pace, too.
    """
    alone = dict(stages)
    alone["pace"] = max(0.0, stages["pace"] - stages["consumer"])
    alone["copy"] = max(0.0, stages["copy"] - stages["consumer"])
    alone["read"] = max(0.0, stages["read"] - max(stages["pace"], stages["copy"], stages["consumer"]))
    stage = max(alone, key=lambda stage: alone[stage])
    return stage if alone[stage] > 0 else None
