"""Late reads that are asked for again.

Invariants: a read that returns has the right bytes; a read that has ended, however it did, leaves no task, no credit
and nothing that still writes; what is asked for again stays within its share of the load.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable
from typing import ClassVar

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamload.checksums import RunningChecksum
from streamload.errors import AccessError, ChecksumError, SourceError, TransientError
from streamload.loan import Loan
from streamload.pipeline import hedge
from streamload.pipeline.budget import Budget
from streamload.pipeline.hedge import HedgePolicy, Hedger
from streamload.report import Recorder
from streamload.sources.base import Source, SourceObject
from streamload.testing import run_on_each_loop


@pytest.fixture(autouse=True)
def _quick_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hedge, "_LOOK_S", 0.001)


CONTENT = bytes((index * 7 + index // 251) % 256 for index in range(1000))
OBJECT = SourceObject("model.safetensors", len(CONTENT), "v1")


class SteppedSource(Source):
    """Each read waits to be told how many bytes to bring next, and how to end."""

    scheme: ClassVar[str] = "stepped"
    request_cost_bytes: ClassVar[int] = 0
    read_bytes: ClassVar[int] = 1000
    concurrency: ClassVar[int] = 1

    def __init__(self, *, telling: bool = True) -> None:
        super().__init__("stepped://host/checkpoint")
        self.telling = telling
        self.reads: list[SteppedRead] = []
        self.writing = 0
        self.at_end: Callable[[], Awaitable[None]] | None = None

    async def list(self) -> list[SourceObject]:
        return [OBJECT]

    async def stat(self, key: str) -> SourceObject:
        return OBJECT

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        read = SteppedRead(start, end)
        self.reads.append(read)
        self.writing += 1
        try:
            while True:
                step = await read.steps.get()
                if isinstance(step, SourceError):
                    raise step
                for view in loan.views_after(read.filled):
                    piece = view[: max(0, min(step, view.nbytes))]
                    piece[:] = CONTENT[start + read.filled : start + read.filled + piece.nbytes]
                    read.filled += piece.nbytes
                    step -= piece.nbytes
                    if self.telling and piece.nbytes:
                        loan.landed(piece)
                if read.filled == end - start:
                    if self.at_end is not None:
                        await self.at_end()
                    return
        finally:
            self.writing -= 1

    async def aclose(self) -> None:
        pass


class SteppedRead:
    def __init__(self, start: int, end: int) -> None:
        self.start, self.end, self.filled = start, end, 0
        self.steps: asyncio.Queue[int | SourceError] = asyncio.Queue()


class Case:
    """One read of all of the content, late from the first moment on."""

    def __init__(self, *, telling: bool = True, memory_bytes: int = 10_000, total_bytes: int = 100_000) -> None:
        self.source = SteppedSource(telling=telling)
        self.budget = Budget(memory_bytes)
        self.recorder = Recorder("stepped://host/checkpoint", "cpu", memory_bytes)
        self.recorder.total_bytes = total_bytes
        self.now_s = 0.0
        # The pauses between two looks at the clock are real ones.
        policy = HedgePolicy(least_siblings=0, least_s=0.001)
        self.hedger = Hedger(self.source, self.budget, self.recorder, policy=policy, clock=lambda: self.now_s)
        self.hedger.observe(0.0)
        self.memory = bytearray(len(CONTENT))
        self.loan = Loan([memoryview(self.memory)[:300], memoryview(self.memory)[300:]])
        self.loan.checksum = RunningChecksum("CRC32C")
        self.reading: asyncio.Task[None]

    async def begin(self, *, first_brings: int = 0, second: bool = True) -> None:
        self.reading = asyncio.create_task(self.hedger.read(OBJECT, 0, len(CONTENT), self.loan))
        await until(lambda: len(self.source.reads) == 1)
        self.source.reads[0].steps.put_nowait(first_brings)
        await until(lambda: self.source.reads[0].filled == first_brings)
        self.now_s = 10.0
        if second:
            await until(lambda: len(self.source.reads) == 2)

    async def end(self) -> None:
        """Wait for the read, whatever becomes of it, and see that nothing is left."""
        try:
            await self.reading
        finally:
            assert self.source.writing == 0, "something still writes"
            assert self.budget.outstanding_bytes == 0, "credit is lost"
            assert asyncio.all_tasks() == {asyncio.current_task()}, "a task is left"

    def check(self) -> None:
        assert self.memory == CONTENT
        whole = RunningChecksum("CRC32C")
        whole.add(memoryview(CONTENT))
        assert self.loan.checksum is not None
        assert (self.loan.checksum.value, self.loan.checksum.nbytes) in (
            (whole.value, whole.nbytes),
            (0, 0),  # of a source that does not tell what landed, and was first
        )


async def until(condition: Callable[[], bool]) -> None:
    """Turn the loop until something is so; `run_on_each_loop` ends what never is."""
    while not condition():  # noqa: ASYNC110 -- what is waited for knows nothing of events
        await asyncio.sleep(0)


@pytest.mark.parametrize("telling", [True, False])
@pytest.mark.parametrize("before", [0, 1, 299, 300, 999])
@pytest.mark.parametrize("meanwhile", [0, 1, 250])
def test_the_second_read_is_first(telling: bool, before: int, meanwhile: int) -> None:
    async def body() -> None:
        case = Case(telling=telling)
        await case.begin(first_brings=before)
        first, second = case.source.reads
        had = before if telling else 0
        assert (second.start, second.end) == (had, 1000)
        brought = min(meanwhile, 999 - before)
        first.steps.put_nowait(brought)
        await until(lambda: first.filled == before + brought)
        second.steps.put_nowait(1000)
        await case.end()
        case.check()
        assert case.recorder.hedged_bytes == 1000 - had

    run_on_each_loop(body)


def test_what_a_source_finds_out_when_all_has_landed_counts() -> None:
    """However late that is: as one that sums up a file, and compares it, before its last read ends."""

    async def body() -> None:
        case = Case()
        found_out = asyncio.Event()

        async def compare() -> None:
            await found_out.wait()
            raise ChecksumError("it is something else")

        case.source.at_end = compare
        await case.begin(first_brings=1000, second=False)
        for _ in range(20):
            await asyncio.sleep(0)
        found_out.set()
        with pytest.raises(ChecksumError):
            await case.end()
        assert len(case.source.reads) == 1

    run_on_each_loop(body)


@pytest.mark.parametrize("meanwhile", [0, 1, 500])
def test_the_first_read_is_first(meanwhile: int) -> None:
    async def body() -> None:
        case = Case()
        await case.begin(first_brings=100)
        first, second = case.source.reads
        second.steps.put_nowait(meanwhile)
        first.steps.put_nowait(900)
        await case.end()
        case.check()

    run_on_each_loop(body)


def test_both_are_first() -> None:
    async def body() -> None:
        case = Case()
        await case.begin(first_brings=100)
        for read in case.source.reads:
            read.steps.put_nowait(900)
        await case.end()
        case.check()

    run_on_each_loop(body)


def test_a_second_read_that_fails_changes_nothing_and_is_not_repeated() -> None:
    async def body() -> None:
        case = Case()
        await case.begin(first_brings=100)
        case.source.reads[1].steps.put_nowait(TransientError("reset"))
        await until(lambda: case.source.writing == 1)
        case.now_s = 100.0
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(case.source.reads) == 2
        case.source.reads[0].steps.put_nowait(900)
        await case.end()
        case.check()

    run_on_each_loop(body)


def test_the_second_read_saves_a_first_one_that_fails() -> None:
    async def body() -> None:
        case = Case()
        await case.begin(first_brings=100)
        case.source.reads[0].steps.put_nowait(TransientError("reset"))
        await until(lambda: case.source.writing == 1)
        case.source.reads[1].steps.put_nowait(900)
        await case.end()
        case.check()

    run_on_each_loop(body)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_where_both_fail_the_first_ones_error_counts(order: tuple[int, int]) -> None:
    async def body() -> None:
        case = Case()
        await case.begin(first_brings=100)
        errors = [TransientError("the first", valid_bytes=100), AccessError("the second")]
        for number in order:
            case.source.reads[number].steps.put_nowait(errors[number])
        with pytest.raises(TransientError, match="the first") as caught:
            await case.end()
        assert caught.value.valid_bytes == 100

    run_on_each_loop(body)


@pytest.mark.parametrize("twice", [False, True])
@pytest.mark.parametrize("second", [False, True])
def test_cancelled_it_leaves_nothing(second: bool, twice: bool) -> None:
    async def body() -> None:
        case = Case()
        await case.begin(first_brings=100, second=second)
        case.reading.cancel()
        if twice:
            await asyncio.sleep(0)
            case.reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await case.end()
        assert bytes(case.memory[100:]) == bytes(900)

    run_on_each_loop(body)


@pytest.mark.parametrize("telling", [True, False])
@pytest.mark.parametrize("before", [0, 1, 299, 300, 999])
def test_without_credit_the_first_read_is_given_up_and_asked_for_again(telling: bool, before: int) -> None:
    """Into the same memory, from the byte that it reached; three times."""

    async def body() -> None:
        case = Case(telling=telling, memory_bytes=1000)
        await case.budget.acquire(1000)
        await case.begin(first_brings=before)
        _, again = case.source.reads
        had = before if telling else 0
        assert (again.start, again.end) == (had, 1000)
        assert case.source.writing == 1, "the first one has ended"
        case.now_s = 100.0
        await until(lambda: len(case.source.reads) == 3)
        case.now_s = 1000.0
        await until(lambda: len(case.source.reads) == 4)
        case.now_s = 10_000.0
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(case.source.reads) == 4
        assert case.source.writing == 1
        for read in case.source.reads:
            read.steps.put_nowait(1000)
        case.budget.give_back(1000)
        await case.end()
        case.check()
        assert case.recorder.hedged_bytes == 3 * (1000 - had)

    run_on_each_loop(body)


def test_a_second_read_that_is_late_too_is_given_up_for_a_third() -> None:
    async def body() -> None:
        case = Case()
        await case.begin(first_brings=100)
        case.now_s = 1000.0
        await until(lambda: len(case.source.reads) == 3)
        assert case.source.writing == 2
        assert (case.source.reads[2].start, case.source.reads[2].end) == (100, 1000)
        case.source.reads[1].steps.put_nowait(900)
        case.source.reads[2].steps.put_nowait(900)
        await case.end()
        case.check()

    run_on_each_loop(body)


def test_an_error_of_a_read_that_was_asked_for_again_counts_from_its_beginning() -> None:
    async def body() -> None:
        case = Case(memory_bytes=1000)
        await case.budget.acquire(1000)
        await case.begin(first_brings=300)
        case.source.reads[1].steps.put_nowait(200)
        case.source.reads[1].steps.put_nowait(TransientError("cut", valid_bytes=200))
        case.budget.give_back(1000)
        with pytest.raises(TransientError) as caught:
            await case.end()
        assert caught.value.valid_bytes == 500
        assert case.memory[:500] == CONTENT[:500]

    run_on_each_loop(body)


def test_a_read_that_may_still_write_is_not_asked_for_again() -> None:
    async def body() -> None:
        case = Case(memory_bytes=1000)
        await case.budget.acquire(1000)
        await case.begin(first_brings=300, second=False)
        case.loan.quarantine()
        case.budget.give_back(1000)
        await case.budget.acquire(1000)
        with pytest.raises(TransientError, match="may still write"):
            await case.reading
        assert len(case.source.reads) == 1
        case.budget.give_back(1000)

    run_on_each_loop(body)


def test_while_nothing_is_known_a_silent_read_is_late_and_one_that_brings_something_is_not() -> None:
    async def body() -> None:
        await one(0, reads=2)
        await one(1, reads=1)

    async def one(brings: int, *, reads: int) -> None:
        case = Case()
        case.hedger._late_s = None
        await case.begin(first_brings=brings, second=False)
        await until(lambda: len(case.source.reads) == reads)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(case.source.reads) == reads
        case.source.reads[0].steps.put_nowait(1000)
        await case.end()

    run_on_each_loop(body)


def test_no_more_than_a_share_of_the_load_is_asked_for_again() -> None:
    async def body() -> None:
        case = Case(total_bytes=19_000)  # 5 % of it are 950 bytes
        await case.begin(second=False)
        for _ in range(20):
            await asyncio.sleep(0)
        assert len(case.source.reads) == 1
        case.source.reads[0].steps.put_nowait(1000)
        await case.end()
        assert case.recorder.hedged_bytes == 0

    run_on_each_loop(body)


def test_late_is_much_later_than_the_others() -> None:
    policy = HedgePolicy()
    assert policy.late_s(deque([0.1] * 15)) is None
    assert policy.late_s(deque([0.1] * 16)) == pytest.approx(0.3)
    # A few that were late themselves do not make lateness usual.
    assert policy.late_s(deque([0.1] * 18 + [3.0] * 2)) == pytest.approx(0.3)
    assert policy.late_s(deque([0.001] * 50)) == 0.2


@given(st.lists(st.floats(0.001, 10), min_size=16, max_size=128))
def test_no_more_than_a_tenth_of_the_reads_are_late(seconds: list[float]) -> None:
    late_s = HedgePolicy().late_s(deque(seconds))
    assert late_s is not None
    assert sum(each > late_s for each in seconds) <= 0.1 * len(seconds) + 1
