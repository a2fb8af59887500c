"""The pipeline under sources that fail, hang or are cancelled at every single operation."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load as load_bytes
from safetensors.torch import save

from streamload.checksums import Checksum, PartChecksums, RunningChecksum
from streamload.errors import AccessError, ChecksumError, ObjectChangedError, TransientError
from streamload.loan import Loan
from streamload.options import LoadOptions
from streamload.pipeline.budget import Budget
from streamload.pipeline.concurrency import ConcurrencyTuner
from streamload.pipeline.engine import first_error, new_event_loop
from streamload.pipeline.fetch import Fetcher
from streamload.pipeline.handoff import Handoff
from streamload.pipeline.run import Pipeline
from streamload.planning import plan_load
from streamload.report import Recorder
from streamload.sinks.host import HostSink
from streamload.sources.base import Source, SourceObject
from streamload.sources.memory import MemorySource
from streamload.testing import FaultSource
from tests.checkpoints import same_tensor, varied_tensors

MEMORY_BYTES = 1 << 20
LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "uvloop": new_event_loop,
    "asyncio": asyncio.new_event_loop,
}


def objects() -> dict[str, bytes]:
    tensors = varied_tensors(large_bytes=1 << 19)
    names = sorted(tensors)
    return {
        f"model-{number}.safetensors": save({name: tensors[name] for name in names[number::2]}) for number in range(2)
    }


CONTENT = objects()
EXPECTED = {name: tensor for content in CONTENT.values() for name, tensor in load_bytes(content).items()}


async def no_sleep(seconds: float) -> None:
    await asyncio.sleep(0)


async def no_wait() -> None:
    pass


class Run:
    """One load on the loop that calls, its consumer included, with everything in view."""

    def __init__(
        self,
        source: Source,
        *,
        memory_bytes: int = MEMORY_BYTES,
        order: str = "completion",
        before_consuming: Callable[[], Awaitable[None]] = no_wait,
    ) -> None:
        self._before_consuming = before_consuming
        self.source = source
        self.options = LoadOptions(memory_bytes=memory_bytes, read_bytes=30_000, concurrency=3)
        self.recorder = Recorder(source.uri, "cpu", memory_bytes)
        self.budget = Budget(memory_bytes)
        self.handoff = Handoff(in_order=order == "file")
        self.tensors: dict[str, torch.Tensor] = {}

    async def run(self) -> None:
        """Load; raises what the pipeline raises, and checks what must hold whatever happens."""
        before = asyncio.all_tasks()
        try:
            async with asyncio.TaskGroup() as group:
                consumer = group.create_task(self._consume())
                try:
                    async with self.source:
                        await self._load()
                finally:
                    self.handoff.end()
                await consumer
        finally:
            assert asyncio.all_tasks() == before, "a task is left"
            assert self.budget.outstanding_bytes == 0, "credit is lost"
            assert self.budget.peak_bytes <= max(self.budget.limit_bytes, self.budget.raised_bytes)
            for name, tensor in self.tensors.items():
                assert same_tensor(tensor, EXPECTED[name])

    async def _load(self) -> None:
        fetcher = Fetcher(self.source, self.recorder, sleep=no_sleep)
        planned = await plan_load(self.source, fetcher, self.recorder, self.options)
        sink = HostSink(self.budget.limit_bytes)
        sink.check(planned.plan.catalog)
        pipeline = Pipeline(
            planned.plan,
            planned.objects,
            fetcher=fetcher,
            sink=sink,
            budget=self.budget,
            handoff=self.handoff,
            recorder=self.recorder,
            verifier=planned.verifier,
            post=self._post,
            tuner=ConcurrencyTuner(planned.concurrency, most=planned.most_concurrency),
        )
        try:
            await pipeline.run()
        finally:
            await sink.aclose()

    def _post(self, callback: Callable[[], object]) -> None:
        asyncio.get_running_loop().call_soon(callback)

    async def _consume(self) -> None:
        await self._before_consuming()
        while not self.handoff.ended:
            batch = self.handoff.take()
            if batch is None:
                await asyncio.wrap_future(self.handoff.changed())
                continue
            for name, tensor in batch.delivery.tensors():
                assert name not in self.tensors, "a tensor came twice"
                self.tensors[name] = tensor
            self.handoff.acknowledge(taken_bytes=batch.credit_bytes, released_bytes=batch.credit_bytes, batches=1)


def run(scenario: Callable[[], Awaitable[None]], loop: str = "asyncio") -> None:
    async def main() -> None:
        await scenario()

    with asyncio.Runner(loop_factory=LOOPS[loop], debug=loop == "asyncio") as runner:
        runner.run(main())


def operations_of_a_load() -> int:
    source = FaultSource(MemorySource(CONTENT))
    run(Run(source).run)
    return source.operations


OPERATIONS = operations_of_a_load()


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("order", ["completion", "file"])
def test_everything_arrives(loop: str, order: str) -> None:
    load = Run(MemorySource(CONTENT), order=order)
    run(load.run, loop)
    assert load.tensors.keys() == EXPECTED.keys()
    assert load.budget.outstanding_bytes == 0
    assert load.recorder.report().verified == {"CRC64NVME of the whole object": load.recorder.total_bytes}


def test_there_are_enough_operations_to_be_worth_it() -> None:
    assert OPERATIONS > 30


@pytest.mark.parametrize("k", range(1, OPERATIONS + 1))
def test_the_first_error_at_any_operation_ends_the_load_with_it(k: int) -> None:
    source = FaultSource(MemorySource(CONTENT), fail_at=k, error=lambda: ObjectChangedError("replaced"))
    load = Run(source)
    with pytest.raises(BaseExceptionGroup) as caught:
        run(load.run)
    error = first_error(caught.value)
    assert isinstance(error, ObjectChangedError)
    assert error.uri == source.uri
    assert source.closed
    assert source.running == 0


@pytest.mark.parametrize("k", range(1, OPERATIONS + 1))
def test_an_operation_that_fails_once_is_made_again(k: int) -> None:
    load = Run(FaultSource(MemorySource(CONTENT), fail_at=k, let_through_bytes=1000))
    run(load.run)
    assert load.tensors.keys() == EXPECTED.keys()
    assert load.recorder.report().retries == 1


@pytest.mark.parametrize("loop", LOOPS)
@pytest.mark.parametrize("k", range(1, OPERATIONS + 1, 3))
def test_cancelled_at_any_operation_nothing_is_left(k: int, loop: str) -> None:
    source = FaultSource(MemorySource(CONTENT), fail_at=k, times=None, block=True)
    load = Run(source)

    async def scenario() -> None:
        task = asyncio.create_task(load.run())
        await asyncio.wrap_future(source.blocked)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    run(scenario, loop)
    assert source.closed
    assert source.running == 0


def test_giving_up_after_the_last_attempt_raises_the_transient_error() -> None:
    load = Run(FaultSource(MemorySource(CONTENT), fail_at=4, times=None))
    with pytest.raises(BaseExceptionGroup) as caught:
        run(load.run)
    error = first_error(caught.value)
    assert isinstance(error, TransientError)
    assert error.attempts == 6


def test_a_consumer_that_takes_nothing_stops_the_network() -> None:
    """With all credit out, no further operation begins until the consumer takes something."""
    source = FaultSource(MemorySource(CONTENT))
    seen: list[int] = []

    async def idle() -> None:
        # However often the loop turns, nothing more is read.
        for _ in range(3):
            for _ in range(200):
                await asyncio.sleep(0)
            seen.append(source.operations)

    load = Run(source, before_consuming=idle)
    run(load.run)
    assert seen[1] == seen[2] < OPERATIONS
    assert load.tensors.keys() == EXPECTED.keys()


class CancellingSource(MemorySource):
    """Waits for something of its own that somebody has cancelled."""

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        if object.key.startswith("model-1") and end == object.size_bytes:
            raise asyncio.CancelledError
        await super().read(object, start, end, loan)


def test_a_read_that_ends_as_cancelled_is_not_taken_for_done() -> None:
    load = Run(CancellingSource(CONTENT))
    with pytest.raises(BaseExceptionGroup) as caught:
        run(load.run)
    assert "nobody here has asked for that" in str(first_error(caught.value))
    assert load.tensors.keys() < EXPECTED.keys()


class SecretiveSource(MemorySource):
    """Does not tell its checksums."""

    async def checksum(self, object: SourceObject) -> Checksum | PartChecksums | None:
        raise AccessError("not for you")


def test_a_checksum_that_cannot_be_had_is_said_and_does_not_end_the_load() -> None:
    load = Run(SecretiveSource(CONTENT))
    run(load.run)
    assert load.tensors.keys() == EXPECTED.keys()
    assert load.recorder.report().unverified == {
        "its checksum could not be had: not for you": load.recorder.total_bytes
    }


class FlippedSource(MemorySource):
    """Flips one bit of one object's last byte on its way."""

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        await super().read(object, start, end, loan)
        if object.key.startswith("model-1") and end == object.size_bytes:
            loan.views[-1][-1] ^= 4


def test_a_flipped_bit_is_caught_by_the_objects_checksum() -> None:
    load = Run(FlippedSource(CONTENT))
    with pytest.raises(BaseExceptionGroup) as caught:
        run(load.run)
    error = first_error(caught.value)
    assert isinstance(error, ChecksumError)
    assert error.object == "model-1.safetensors"
    assert "CRC64NVME" in error.cause


class PartedSource(FlippedSource):
    """Keeps the checksums of parts that have nothing to do with reads or tensors."""

    def __init__(self, part_bytes: int, *, flipped: bool) -> None:
        super().__init__(CONTENT)
        self.part_bytes = part_bytes
        self.flipped = flipped

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        source = FlippedSource if self.flipped else MemorySource
        await source.read(self, object, start, end, loan)

    async def checksum(self, object: SourceObject) -> PartChecksums:
        content = CONTENT[object.key]
        ends = (*range(self.part_bytes, len(content), self.part_bytes), len(content))
        sums = RunningChecksum("CRC32C", ends)
        sums.add(memoryview(content))
        return PartChecksums("CRC32C", ends, tuple(value for _, value in sums.sums()))


PART_BYTES = [5, 4096, 29_999, 30_000, 100_003, 1 << 19, 1 << 30]


@pytest.mark.parametrize("part_bytes", PART_BYTES)
def test_uploaded_parts_are_verified_whatever_their_size(part_bytes: int) -> None:
    load = Run(PartedSource(part_bytes, flipped=False))
    run(load.run)
    assert load.recorder.report().verified == {"CRC32C of each uploaded part": load.recorder.total_bytes}


@pytest.mark.parametrize("part_bytes", PART_BYTES)
def test_a_flipped_bit_is_found_in_its_part(part_bytes: int) -> None:
    load = Run(PartedSource(part_bytes, flipped=True))
    with pytest.raises(BaseExceptionGroup) as caught:
        run(load.run)
    error = first_error(caught.value)
    assert isinstance(error, ChecksumError)
    size = len(CONTENT["model-1.safetensors"])
    assert error.object == "model-1.safetensors"
    assert (error.start, error.end) == ((size - 1) // part_bytes * part_bytes, size)


class QuarantineSource(MemorySource):
    """One read never lets go of its memory."""

    scheme: ClassVar[str] = "hanging"

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        if end == object.size_bytes:
            loan.quarantine()
            raise TransientError("the kernel holds it")
        await super().read(object, start, end, loan)


def test_quarantined_memory_is_counted_and_never_lent_again() -> None:
    load = Run(QuarantineSource(CONTENT))
    with pytest.raises(BaseExceptionGroup):
        run(load.run)
    assert load.recorder.report().quarantined_bytes > 0
