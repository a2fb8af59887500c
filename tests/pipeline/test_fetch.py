"""Retries: what is tried again, from which byte, after which wait, and what the error says in the end."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamload.errors import AccessError, ObjectChangedError, SourceError, TransientError, TruncatedReadError
from streamload.loan import Loan
from streamload.pipeline.fetch import Fetcher
from streamload.pipeline.pace import Pace
from streamload.pipeline.policy import RetryPolicy
from streamload.report import Recorder
from streamload.sources.base import Source, SourceObject

CONTENT = bytes(range(256)) * 4
OBJECT = SourceObject("model.safetensors", len(CONTENT), "v1")


class ScriptedSource(Source):
    """A source whose reads end as a script says: an error, after that many bytes."""

    scheme: ClassVar[str] = "scripted"
    request_cost_bytes: ClassVar[int] = 0
    read_bytes: ClassVar[int] = 4096
    concurrency: ClassVar[int] = 1

    def __init__(self, script: list[SourceError]) -> None:
        super().__init__("scripted://user:secret@host/checkpoint")
        self.script = script
        self.asked: list[tuple[int, int]] = []
        self.quarantine = False

    async def list(self) -> list[SourceObject]:
        if self.script:
            raise self.script.pop(0)
        return [OBJECT]

    async def stat(self, key: str) -> SourceObject:
        return OBJECT

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        self.asked.append((start, end))
        error = self.script.pop(0) if self.script else None
        length = end - start if error is None else error.valid_bytes
        for view in loan.views:
            part = min(view.nbytes, length)
            view[:part] = CONTENT[start : start + part]
            start, length = start + part, length - part
        if error is not None:
            if self.quarantine:
                loan.quarantine()
            raise error

    async def aclose(self) -> None:
        pass


class Clock:
    """Notes how long was waited, without waiting."""

    def __init__(self) -> None:
        self.waits: list[float] = []

    async def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)


def fetcher(
    source: ScriptedSource,
    clock: Clock,
    jitter: Callable[[], float] = lambda: 0.5,
    policy: RetryPolicy | None = None,
) -> Fetcher:
    return Fetcher(source, Recorder(source.uri, "cpu", 1 << 20), sleep=clock.sleep, jitter=jitter, policy=policy)


def read(
    source: ScriptedSource, clock: Clock, start: int = 0, end: int = 1000, policy: RetryPolicy | None = None
) -> bytes:
    buffer = bytearray(end - start)
    views = [memoryview(buffer)[:100], memoryview(buffer)[100:]]
    asyncio.run(fetcher(source, clock, policy=policy).read(OBJECT, start, end, Loan(views)))
    return bytes(buffer)


@given(st.lists(st.integers(0, 150), max_size=5))
def test_a_retry_goes_on_from_the_byte_that_was_reached(reached: list[int]) -> None:
    source = ScriptedSource([TruncatedReadError("cut", valid_bytes=nbytes) for nbytes in reached])
    assert read(source, Clock()) == CONTENT[:1000]
    starts = [sum(reached[:attempt]) for attempt in range(len(reached) + 1)]
    assert [start for start, _ in source.asked] == starts
    assert {end for _, end in source.asked} == {1000}


def test_giving_up_names_where_and_how_often() -> None:
    source = ScriptedSource([TransientError("reset by peer") for _ in range(100)])
    with pytest.raises(TransientError) as caught:
        read(source, Clock(), 10, 400)
    error = caught.value
    assert (error.object, error.start, error.end, error.attempts) == ("model.safetensors", 10, 400, 6)
    assert str(error) == (
        "scripted://host/checkpoint, model.safetensors, bytes 10-400: reset by peer (after 6 attempts)"
    )
    assert len(source.asked) == 6


def test_attempts_that_get_further_are_not_failures_in_a_row() -> None:
    source = ScriptedSource([TruncatedReadError("cut", valid_bytes=50) for _ in range(15)])
    policy = RetryPolicy(progress_bytes=50)
    assert read(source, Clock(), policy=policy) == CONTENT[:1000]
    assert len(source.asked) == 16


def test_crumbs_do_not_count_as_getting_further() -> None:
    source = ScriptedSource([TruncatedReadError("cut", valid_bytes=1) for _ in range(500)])
    with pytest.raises(TruncatedReadError) as caught:
        read(source, Clock())
    assert caught.value.attempts == 6


@pytest.mark.parametrize("error", [AccessError("denied"), ObjectChangedError("changed"), SourceError("other")])
def test_what_is_not_retryable_ends_at_once(error: SourceError) -> None:
    source, clock = ScriptedSource([error]), Clock()
    with pytest.raises(type(error)) as caught:
        read(source, clock)
    assert caught.value.attempts == 1
    assert clock.waits == []


def test_waits_double_up_to_a_ceiling() -> None:
    clock = Clock()
    with pytest.raises(TransientError):
        read(ScriptedSource([TransientError("busy") for _ in range(9)]), clock)
    assert clock.waits == [0.25, 0.5, 1.0, 2.0, 4.0]


@given(st.integers(0, 60), st.floats(0, 1, exclude_max=True))
def test_a_wait_is_never_longer_than_the_ceiling(failures: int, jitter: float) -> None:
    policy = RetryPolicy(attempts=100)
    wait_s = policy.backoff_s(failures, TransientError("busy"), jitter)
    assert wait_s is not None
    assert 0 <= wait_s <= policy.longest_backoff_s


def test_quarantined_memory_is_not_filled_again() -> None:
    source = ScriptedSource([TransientError("hangs")])
    source.quarantine = True
    with pytest.raises(TransientError):
        read(source, Clock())
    assert len(source.asked) == 1


def test_asking_is_retried_too() -> None:
    source, clock = ScriptedSource([TransientError("busy"), TransientError("busy")]), Clock()
    assert asyncio.run(fetcher(source, clock).ask(source.list)) == [OBJECT]
    assert len(clock.waits) == 2


@pytest.mark.parametrize(("rate", "bottleneck"), [(100.0, "pace"), (1e9, "read"), (None, "read")])
def test_a_limit_on_the_rate_that_held_the_load_back_is_named(rate: float | None, bottleneck: str) -> None:
    """The time that the clock tells passes only in reads, a second each, and in waits."""
    now_s = 0.0

    class Slow(ScriptedSource):
        async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
            nonlocal now_s
            now_s += 1.0

    async def sleep(seconds: float) -> None:
        nonlocal now_s
        now_s += seconds

    async def body() -> None:
        recorder = Recorder("uri", "cpu", 1 << 20, clock=lambda: now_s)
        pace = None if rate is None else Pace(rate)
        fetcher = Fetcher(Slow([]), recorder, pace=pace, sleep=sleep, clock=lambda: now_s)
        for start in range(0, 1000, 500):
            with recorder.stage("read"):
                await fetcher.read(OBJECT, start, start + 500, Loan([memoryview(bytearray(500))]))
        report = recorder.report()
        assert report.stages["pace"] == (4.0 if rate == 100.0 else 0.0)
        assert report.bottleneck == bottleneck
        assert ("held back by   max_bytes_per_s" in str(report)) is (rate == 100.0)
        assert (", pace " in str(report)) is (rate == 100.0)

    asyncio.run(body())
