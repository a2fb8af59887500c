"""One suite for every sink: subclass `SinkConformance`, say how the sink is made, and let pytest collect it."""

from __future__ import annotations

import asyncio
import ctypes
import gc
import itertools
import json
import random
import struct
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from streamload.checkpoint import DTYPE_BITS, Catalog, ShardFile, TensorInfo
from streamload.errors import SourceError, UnsupportedDtypeError
from streamload.loan import Loan
from streamload.plan import (
    Batch,
    Experts,
    PackedShard,
    Placement,
    Plan,
    Ranks,
    Read,
    Replicate,
    Shard,
    plan_reads,
    slice_tensor,
)
from streamload.sinks.base import Delivery, Lease, Sink
from streamload.sinks.dtypes import torch_dtypes
from streamload.testing.loops import run_on_each_loop

if TYPE_CHECKING:
    import torch

__all__ = ["SinkConformance"]

T = TypeVar("T")

# A step that is not done by then never will be. No test waits so long unless it is about to fail.
_PATIENCE_S = 60.0

# How many turns of the event loop count as "nothing more happens by itself".
_QUIET_TURNS = 10

_KEY = "model.safetensors"


@dataclass(frozen=True, slots=True)
class _Checkpoint:
    """One safetensors file in memory."""

    content: bytes
    file: ShardFile

    def plan(
        self, read_bytes: int, *, gap_bytes: int = 0, leave_out: Sequence[str] = (), skip_bytes: int | None = None
    ) -> Plan:
        kept = tuple(tensor for tensor in self.file.tensors if tensor.name not in leave_out)
        file = ShardFile(self.file.key, self.file.size_bytes, self.file.header_bytes, kept)
        return plan_reads(Catalog((file,)), read_bytes=read_bytes, gap_bytes=gap_bytes, skip_bytes=skip_bytes)

    def fill(self, loan: Loan, read: Read) -> None:
        """What a source does with a loan."""
        _check_loan(loan, read)
        position = read.start
        passed = read.skipped_bytes > 0
        for number, view in enumerate(loan.views):
            if not (passed and loan.gaps is not None and loan.gaps[number]):
                view[:] = self.content[position : position + view.nbytes]
            position += view.nbytes

    def sliced(self, placement: Callable[[TensorInfo], Placement], ranks: Ranks) -> _Checkpoint:
        """The same file, of which a rank wants slices."""
        parts = [slice_tensor(tensor, placement(tensor), ranks, uneven="ceil") for tensor in self.file.tensors]
        tensors = tuple(sorted((part for part in parts if part is not None), key=lambda part: (part.start, part.end)))
        return _Checkpoint(self.content, replace(self.file, tensors=tensors))

    def bytes_of(self, tensor: TensorInfo) -> bytes:
        content = bytearray(tensor.nbytes)
        for file_start, tensor_start, nbytes in tensor.runs(tensor.start, tensor.end):
            content[tensor_start : tensor_start + nbytes] = self.content[file_start : file_start + nbytes]
        return bytes(content)


class SinkConformance:
    """What every sink must do.

    Override `make_sink`, and where the sink gives back memory that can be counted, `check_given_back`. The tests are
    synchronous and need no plugin: each runs its coroutine on asyncio's own event loop and on uvloop's, both in debug
    mode, with a sink of its own, and fails if a task or a thread is left over.
    """

    # Whether credit stands for the tensors' memory; not so for a sink into tensors that are there already.
    counts_tensors: ClassVar[bool] = True

    def make_sink(self, *, read_bytes: int, concurrency: int) -> Sink[Any]:
        """Make a sink for plans of this read size, which can lend for so many reads at a time at least."""
        raise NotImplementedError

    def idle(self, sink: Sink[Any]) -> None:
        """Called again and again while the test waits and nothing happens by itself: let something late happen now."""

    def check_given_back(self, sink: Sink[Any]) -> None:
        """Called when a sink is closed and all its tensors are garbage, and nothing was quarantined: is all back?"""

    # What arrives.

    def test_every_dtype_arrives_as_it_is(self) -> None:
        shapes: list[tuple[int, ...]] = [(2, 3, 4), (0,), (3, 0, 2), (35_000, 2), (), (1,)]
        described: list[tuple[str, str, tuple[int, ...]]] = []
        for dtype in torch_dtypes():
            for number, shape in enumerate(shapes[:4] if dtype == "F4" else shapes):
                # A single byte in front of each, so that nothing is aligned in the file.
                described += [(f"{dtype}.{number}.odd", "U8", (1,)), (f"{dtype}.{number}", dtype, shape)]
        checkpoint = _checkpoint(described)
        for read_bytes in (64 << 10, 4 << 20):
            self._load(checkpoint, checkpoint.plan(read_bytes), read_bytes)

    def test_values_are_those_of_the_reference(self) -> None:
        import torch
        from safetensors.torch import load_file

        described = [
            ("name with spaces", "BF16", (17, 3)),
            ("ünïcode/✓", "F32", (5,)),
            ("flags", "BOOL", (11,)),
            ("empty", "F16", (0, 4)),
            ("scalar", "I64", ()),
            ("large", "F32", (300, 301)),
            ("", "U8", (3,)),
        ]
        checkpoint = _checkpoint(described)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / _KEY
            path.write_bytes(checkpoint.content)
            reference = load_file(path)

        def check(loaded: dict[str, torch.Tensor]) -> None:
            assert loaded.keys() == reference.keys()
            for name, expected in reference.items():
                # Not a number is not equal to itself: bits are compared.
                assert loaded[name].dtype == expected.dtype, name
                assert loaded[name].shape == expected.shape, name
                assert torch.equal(_bits(loaded[name]).cpu(), _bits(expected)), name

        self._load(checkpoint, checkpoint.plan(32 << 10), 32 << 10, check=check)

    def test_tensors_are_plain_ones(self) -> None:
        def check(loaded: dict[str, torch.Tensor]) -> None:
            for name, tensor in loaded.items():
                assert tensor.is_contiguous(), name
                assert tensor.data_ptr() % 16 == 0, name
                assert tensor.is_leaf, name
                assert not tensor.requires_grad, name

        checkpoint = _mixed()
        self._load(checkpoint, checkpoint.plan(1 << 20), 1 << 20, check=check)

    def test_tensors_come_in_the_order_of_the_batch(self) -> None:
        checkpoint = _mixed()

        async def main() -> None:
            async with self._open(64 << 10) as sink:
                for batch in checkpoint.plan(64 << 10).batches:
                    delivery = await self._carry(sink, checkpoint, batch)
                    assert [name for name, _ in delivery.tensors()] == [tensor.name for tensor in batch.tensors]

        _on_each_loop(main)

    def test_gaps_are_read_and_dropped(self) -> None:
        checkpoint = _mixed()
        names = [tensor.name for tensor in checkpoint.file.tensors]
        for leave_out in (names[::2], names[1::2], names[::3]):
            plan = checkpoint.plan(2 << 20, gap_bytes=1 << 20, leave_out=leave_out)
            assert plan.gap_bytes, "the test means to read gaps"
            self._load(checkpoint, plan, 2 << 20, check=partial(self._check_values, checkpoint, left_out=leave_out))

    def test_slices_arrive_however_they_are_read(self) -> None:
        checkpoint = _checkpoint(
            [
                ("small", "BF16", (12, 20)),
                ("rows", "BF16", (60, 4000)),
                ("wide", "F32", (6, 100_000)),
                ("bias", "F32", (96,)),
                ("packed", "F16", (4, 90, 30)),
                ("tiny", "U8", (12, 12)),
                ("experts", "F32", (6, 10, 600)),
                ("empty", "F32", (0, 6)),
                ("whole", "F32", (300, 300)),
            ]
        )
        placements: dict[str, Placement] = {
            "bias": Replicate(),
            "packed": PackedShard(-2, 3),
            "experts": Experts((4, 5, 1), Shard(-1)),
            "whole": Replicate(),
        }
        for ranks in (Ranks(tp_rank=1, tp_size=3), Ranks(tp_rank=7, tp_size=8)):
            sliced = checkpoint.sliced(lambda tensor: placements.get(tensor.name, Shard(-1)), ranks)
            for read_bytes, gap_bytes, skip_bytes in (
                (64 << 10, 4096, None),
                (64 << 10, 4096, 0),
                (64 << 10, 0, None),
                (4 << 20, 1 << 20, None),
                (4 << 20, 1 << 20, 100),
            ):
                plan = sliced.plan(read_bytes, gap_bytes=gap_bytes, skip_bytes=skip_bytes)
                assert any(batch.sliced for batch in plan.batches), "the test means to have slices"
                self._load(sliced, plan, read_bytes, concurrency=3)

    def test_cancelled_and_failed_reads_of_slices_leave_nothing(self) -> None:
        rows = _checkpoint([("small", "U8", (30, 40)), ("large", "BF16", (60, 4000)), ("bias", "U8", (7,))])
        sliced = rows.sliced(
            lambda tensor: Shard(-1) if len(tensor.shape) > 1 else Replicate(), Ranks(tp_rank=1, tp_size=2)
        )
        for skip_bytes in (None, 0):
            plan = sliced.plan(128 << 10, gap_bytes=4096, skip_bytes=skip_bytes)
            with _quick_collection():
                for failing in range(plan.reads):
                    self._check_failure(sliced, plan, failing)

    def test_many_tiny_tensors_share_a_read(self) -> None:
        checkpoint = _checkpoint([(f"scale.{number}", "F32", ()) for number in range(2_000)])
        plan = checkpoint.plan(8 << 10)
        assert len(plan.batches) == 1, "the test means to have them in one read"
        self._load(checkpoint, plan, 8 << 10)

    def test_the_order_of_things_does_not_matter(self) -> None:
        checkpoint = _mixed()
        for seed, concurrency in itertools.product(range(3), (1, 2, 5)):
            plan = checkpoint.plan(64 << 10, gap_bytes=4 << 10)
            self._load(checkpoint, plan, 64 << 10, concurrency=concurrency, seed=seed)

    # Who owns it.

    def test_kept_tensors_stay_as_they_are(self) -> None:
        checkpoint, other = _mixed(), _mixed(seed=1)

        async def main() -> list[dict[str, torch.Tensor]]:
            kept = []
            async with self._open(64 << 10) as sink:
                for content in (checkpoint, other, checkpoint):
                    kept.append(await self._carry_all(sink, content, content.plan(64 << 10)))
                    self._check_values(checkpoint, kept[0])
            return kept

        for kept in _on_each_loop(main):
            gc.collect()
            for content, tensors in zip((checkpoint, other, checkpoint), kept, strict=True):
                self._check_values(content, tensors)

    def test_tensors_may_be_written(self) -> None:
        checkpoint = _mixed()

        async def main() -> None:
            async with self._open(64 << 10) as sink:
                loaded = await self._carry_all(sink, checkpoint, checkpoint.plan(64 << 10))
                names = list(loaded)
                for name in names[::2]:
                    _bits(loaded[name]).fill_(0x55)
                again = await self._carry_all(sink, checkpoint, checkpoint.plan(64 << 10))
                self._check_values(checkpoint, again)
                self._check_values(checkpoint, {name: loaded[name] for name in names[1::2]}, left_out=names[::2])
                for name in names[::2]:
                    assert bool((_bits(loaded[name]) == 0x55).all()), name

        _on_each_loop(main)

    def test_dropped_deliveries_are_no_loss(self) -> None:
        checkpoint = _mixed()

        async def main() -> None:
            async with self._open(64 << 10) as sink:
                for number, batch in enumerate(checkpoint.plan(64 << 10).batches):
                    delivery = await self._carry(sink, checkpoint, batch)
                    if number % 2:
                        next(delivery.tensors())
                    del delivery
                self._check_values(checkpoint, await self._carry_all(sink, checkpoint, checkpoint.plan(64 << 10)))

        _on_each_loop(main)

    # What is lent.

    def test_loans_do_not_overlap(self) -> None:
        checkpoint = _mixed()

        async def main() -> None:
            async with self._open(64 << 10, concurrency=4) as sink:
                reads = _reads(sink, checkpoint.plan(64 << 10, gap_bytes=4 << 10))
                loans = []
                for lease, read in itertools.islice(reads, 4):
                    loan = await self._soon(sink, sink.lend(lease, read))
                    _check_loan(loan, read)
                    loans.append((lease, read, loan))
                spans = sorted(span for _, _, loan in loans for span in _spans(loan))
                for (_, end), (start, _) in itertools.pairwise(spans):
                    assert end <= start, "two views share memory"
                for lease, read, loan in loans:
                    sink.failed(lease, read, loan)

        _on_each_loop(main)

    def test_credit_covers_the_tensors(self) -> None:
        checkpoint = _mixed()

        async def main() -> None:
            async with self._open(64 << 10) as sink:
                for batch in checkpoint.plan(64 << 10).batches:
                    assert sink.credit_bytes(batch) >= (batch.nbytes if self.counts_tensors else 0)
                (empty,) = _checkpoint([("empty", "F32", (0, 7))]).plan(64 << 10).batches
                assert sink.credit_bytes(empty) == 0

        _on_each_loop(main)

    def test_dtypes_without_equivalent_are_refused(self) -> None:
        async def main() -> None:
            async with self._open(64 << 10) as sink:
                sink.check(_mixed().plan(64 << 10).catalog)
                tensor = TensorInfo("six bits", "F6_E2M3", (4,), 64, 67)
                refused: UnsupportedDtypeError | None = None
                try:
                    sink.check(Catalog((ShardFile(_KEY, 67, 64, (tensor,)),)))
                except UnsupportedDtypeError as error:
                    refused = error
                assert refused is not None, "a dtype that torch does not have was accepted"
                assert "six bits" in str(refused)
                assert refused.object == _KEY

        _on_each_loop(main)

    # What goes wrong.

    def test_a_failed_read_can_be_made_again(self) -> None:
        checkpoint = _mixed()

        async def main() -> dict[str, torch.Tensor]:
            tensors: dict[str, torch.Tensor] = {}
            async with self._open(64 << 10) as sink:
                for batch in checkpoint.plan(64 << 10).batches:
                    lease = sink.begin(batch, 0)
                    for read in batch.reads:
                        loan = await self._soon(sink, sink.lend(lease, read))
                        for view in loan.views:
                            view[:] = bytes([0x66]) * view.nbytes
                        sink.failed(lease, read, loan)
                        loan = await self._soon(sink, sink.lend(lease, read))
                        checkpoint.fill(loan, read)
                        sink.landed(lease, read, loan)
                    tensors.update((await self._soon(sink, sink.finish(lease))).tensors())
            return tensors

        for tensors in _on_each_loop(main):
            self._check_values(checkpoint, tensors)

    def test_a_failure_at_any_read_leaves_nothing(self) -> None:
        checkpoint = _mixed()
        plan = checkpoint.plan(128 << 10)
        with _quick_collection():
            for failing in range(plan.reads):
                self._check_failure(checkpoint, plan, failing)

    def test_cancellation_at_any_moment_leaves_nothing(self) -> None:
        checkpoint = _mixed()
        plan = checkpoint.plan(128 << 10)

        async def main(turns: int) -> bool:
            sink = self.make_sink(read_bytes=128 << 10, concurrency=2)
            try:
                task = asyncio.create_task(self._carry_all(sink, checkpoint, plan, concurrency=3, idle=False))
                for _ in range(turns):
                    await asyncio.sleep(0)
                    self.idle(sink)
                whole = task.done()
                task.cancel()
                await asyncio.wait([task])
                if not task.cancelled():
                    self._check_values(checkpoint, task.result())
                del task
                assert sink.quarantined_bytes == 0
            finally:
                await self._soon(sink, sink.aclose())
            gc.collect()
            self.check_given_back(sink)
            return whole

        # Every moment at first, when most differs from one to the next; then every so often, until the load is done.
        turns = 0
        with _quick_collection():
            while not all(_on_each_loop(partial(main, turns))):
                turns += 1 + turns // 8

    def test_quarantined_memory_is_never_used_again(self) -> None:
        checkpoint = _mixed()

        async def main() -> tuple[Loan, dict[str, torch.Tensor]]:
            sink = self.make_sink(read_bytes=64 << 10, concurrency=4)
            try:
                assert sink.quarantined_bytes == 0
                lease, read = next(_reads(sink, checkpoint.plan(64 << 10)))
                hung = await self._soon(sink, sink.lend(lease, read))
                hung.quarantine()
                sink.failed(lease, read, hung)
                del lease
                gc.collect()
                assert sink.quarantined_bytes >= read.nbytes
                tensors = await self._carry_all(sink, checkpoint, checkpoint.plan(64 << 10), avoid=hung)
                _scribble(hung)
                self._check_values(checkpoint, tensors)
                _scribble(hung)
                more = await self._carry_all(sink, checkpoint, checkpoint.plan(64 << 10), avoid=hung)
            finally:
                await self._soon(sink, sink.aclose())
            assert sink.quarantined_bytes >= hung.nbytes
            return hung, more

        for hung, tensors in _on_each_loop(main):
            gc.collect()
            # The sink is gone, and the memory is still there.
            _scribble(hung)
            self._check_values(checkpoint, tensors)

    def test_closing_twice_or_unused_is_fine(self) -> None:
        checkpoint = _mixed()

        async def main() -> None:
            for used in (False, True):
                sink = self.make_sink(read_bytes=64 << 10, concurrency=2)
                if used:
                    await self._carry_all(sink, checkpoint, checkpoint.plan(64 << 10))
                await self._soon(sink, sink.aclose())
                await self._soon(sink, sink.aclose())
                gc.collect()
                self.check_given_back(sink)

        _on_each_loop(main)

    # How it is driven.

    def _check_failure(self, checkpoint: _Checkpoint, plan: Plan, failing: int) -> None:
        errors: list[BaseExceptionGroup[SourceError]] = []

        async def main() -> None:
            sink = self.make_sink(read_bytes=128 << 10, concurrency=2)
            try:
                await self._carry_all(sink, checkpoint, plan, concurrency=3, fail_read=failing)
            except* SourceError as group:
                # Whoever keeps the error keeps the frames that it came through, but no memory of the sink's.
                errors.append(group)
            finally:
                await self._soon(sink, sink.aclose())
            assert errors, "the failed read was not noticed"
            assert sink.quarantined_bytes == 0
            gc.collect()
            self.check_given_back(sink)
            errors.clear()

        _on_each_loop(main)

    def _load(
        self,
        checkpoint: _Checkpoint,
        plan: Plan,
        read_bytes: int,
        *,
        check: Callable[[dict[str, torch.Tensor]], None] | None = None,
        concurrency: int = 2,
        seed: int = 0,
    ) -> None:
        """Load with a sink that is then closed, and check what came: by default, its values."""

        async def main() -> dict[str, torch.Tensor]:
            async with self._open(read_bytes, concurrency=concurrency) as sink:
                return await self._carry_all(sink, checkpoint, plan, concurrency=concurrency, seed=seed)

        for loaded in _on_each_loop(main):
            if check is None:
                self._check_values(checkpoint, loaded)
            else:
                check(loaded)

    @asynccontextmanager
    async def _open(self, read_bytes: int, *, concurrency: int = 2) -> AsyncIterator[Sink[Any]]:
        sink = self.make_sink(read_bytes=read_bytes, concurrency=concurrency)
        try:
            yield sink
        finally:
            await self._soon(sink, sink.aclose())

    async def _carry(self, sink: Sink[Any], checkpoint: _Checkpoint, batch: Batch) -> Delivery:
        """Take one batch through the sink, one read after the other."""
        lease = sink.begin(batch, 0)
        for read in batch.reads:
            loan = await self._soon(sink, sink.lend(lease, read))
            checkpoint.fill(loan, read)
            sink.landed(lease, read, loan)
        return await self._soon(sink, sink.finish(lease))

    async def _carry_all(
        self,
        sink: Sink[Any],
        checkpoint: _Checkpoint,
        plan: Plan,
        *,
        concurrency: int = 2,
        seed: int = 0,
        fail_read: int | None = None,
        avoid: Loan | None = None,
        idle: bool = True,
    ) -> dict[str, torch.Tensor]:
        """Take a plan through the sink, the way the pipeline does, with reads ending in any order."""
        carrier = _Carrier(sink, checkpoint, random.Random(seed), fail_read, avoid)
        carry = carrier.carry(plan, concurrency)
        return await (self._soon(sink, carry) if idle else carry)

    async def _soon(self, sink: Sink[Any], step: Awaitable[T]) -> T:
        """Wait for a step, and let late things happen whenever nothing else does."""

        async def nudge() -> None:
            for turn in itertools.count(1):
                await asyncio.sleep(0)
                if turn % _QUIET_TURNS == 0:
                    self.idle(sink)

        nudging = asyncio.create_task(nudge())
        try:
            async with asyncio.timeout(_PATIENCE_S):
                return await step
        finally:
            nudging.cancel()
            await asyncio.wait([nudging])

    def _check_values(
        self, checkpoint: _Checkpoint, loaded: dict[str, torch.Tensor], *, left_out: Sequence[str] = ()
    ) -> None:
        expected = {tensor.name: tensor for tensor in checkpoint.file.tensors if tensor.name not in left_out}
        assert loaded.keys() == expected.keys()
        for name, info in expected.items():
            tensor = loaded[name]
            shape = info.shape if info.dtype != "F4" else (*info.shape[:-1], info.shape[-1] // 2)
            assert tensor.dtype == torch_dtypes()[info.dtype], name
            assert tuple(tensor.shape) == shape, name
            assert _holds(tensor, checkpoint.bytes_of(info)), f"{name} has wrong values"


class _Carrier:
    """The pipeline in small: a few workers that read, and a task that finishes each batch."""

    def __init__(
        self, sink: Sink[Any], checkpoint: _Checkpoint, chance: random.Random, fail_read: int | None, avoid: Loan | None
    ) -> None:
        self._sink = sink
        self._checkpoint = checkpoint
        self._chance = chance
        self._fail_read = fail_read
        self._avoided = [] if avoid is None else _spans(avoid)
        self._number = 0
        self._tensors: dict[str, torch.Tensor] = {}

    async def carry(self, plan: Plan, concurrency: int) -> dict[str, torch.Tensor]:
        batches = iter(plan.batches)
        try:
            async with asyncio.TaskGroup() as group:
                # Never all at once: the credit that the pipeline would take has a limit too.
                for _ in range(concurrency):
                    group.create_task(self._work(batches))
        except BaseException:
            # As little as a lease is one of these to be kept by the error's traceback.
            self._tensors.clear()
            raise
        return self._tensors

    async def _work(self, batches: Iterator[Batch]) -> None:
        for batch in batches:
            await self._pause()
            self._sink.credit_bytes(batch)
            delivery = await self._carry(batch)
            try:
                await self._pause()
                self._tensors.update(delivery.tensors())
            finally:
                del delivery

    async def _carry(self, batch: Batch) -> Delivery:
        lease = self._sink.begin(batch, 0)
        reads = list(batch.reads)
        self._chance.shuffle(reads)
        try:
            async with asyncio.TaskGroup() as group:
                for read in reads:
                    group.create_task(self._read(lease, read))
            return await self._sink.finish(lease)
        except BaseException:
            self._sink.abandon(lease)
            raise

    async def _read(self, lease: Lease, read: Read) -> None:
        sink = self._sink
        loan = await sink.lend(lease, read)
        try:
            for start, end in _spans(loan):
                assert not any(start < other_end and other_start < end for other_start, other_end in self._avoided)
            await self._pause()
            self._checkpoint.fill(loan, read)
            await self._pause()
            number, self._number = self._number, self._number + 1
            if number == self._fail_read:
                raise SourceError("made to fail", object=_KEY, start=read.start, end=read.end)
        except BaseException:
            sink.failed(lease, read, loan)
            raise
        sink.landed(lease, read, loan)

    async def _pause(self) -> None:
        for _ in range(self._chance.randrange(3)):
            await asyncio.sleep(0)


def _on_each_loop(main: Callable[[], Coroutine[Any, Any, T]]) -> list[T]:
    """What `main` returns on each of the loops."""
    results: list[T] = []

    async def body() -> None:
        results.append(await main())

    run_on_each_loop(body)
    return results


def _checkpoint(described: Sequence[tuple[str, str, tuple[int, ...]]], *, seed: int = 0) -> _Checkpoint:
    """A file with such tensors, of random bytes; its data begins at an odd position."""
    chance = random.Random(seed)
    header: dict[str, object] = {}
    data = bytearray()
    spans = []
    for name, dtype, shape in described:
        elements = 1
        for length in shape:
            elements *= length
        nbytes, rest = divmod(elements * DTYPE_BITS[dtype], 8)
        assert rest == 0, f"{name} does not fill its last byte"
        content = chance.randbytes(nbytes)
        if dtype == "BOOL":
            content = bytes(byte & 1 for byte in content)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + nbytes]}
        spans.append((name, dtype, shape, len(data), len(data) + nbytes))
        data += content
    text = json.dumps(header).encode()
    text += b" " * (1 - len(text) % 2)
    head = struct.pack("<Q", len(text)) + text
    tensors = tuple(
        TensorInfo(name, dtype, shape, len(head) + start, len(head) + end) for name, dtype, shape, start, end in spans
    )
    content = head + bytes(data)
    return _Checkpoint(content, ShardFile(_KEY, len(content), len(head), tensors))


def _mixed(*, seed: int = 0) -> _Checkpoint:
    """Tensors of all sizes, large and small in turn, some of them empty."""
    described: list[tuple[str, str, tuple[int, ...]]] = [("first.empty", "F32", (0,))]
    for layer in range(2):
        described += [
            (f"{layer}.norm", "BF16", (128,)),
            (f"{layer}.scale", "F32", ()),
            (f"{layer}.up", "BF16", (300, 500)),
            (f"{layer}.bias", "F16", (333,)),
            (f"{layer}.empty", "F32", (2, 0)),
            (f"{layer}.down", "F8_E4M3", (700, 401)),
            (f"{layer}.small", "F32", (20, 50)),
            (f"{layer}.odd", "U8", (1001,)),
        ]
    return _checkpoint(described, seed=seed)


def _reads(sink: Sink[Any], plan: Plan) -> Iterator[tuple[Lease, Read]]:
    for batch in plan.batches:
        lease = sink.begin(batch, 0)
        for read in batch.reads:
            yield lease, read


def _check_loan(loan: Loan, read: Read) -> None:
    assert loan.nbytes == read.nbytes, "a loan is as long as the read"
    for view in loan.views:
        assert view.nbytes, "no view is empty"
        assert not view.readonly, "every view can be written"
        assert view.ndim == 1, "every view has one dimension"
        assert view.itemsize == 1, "every view is of bytes"


def _spans(loan: Loan) -> list[tuple[int, int]]:
    """The addresses of a loan's views."""
    starts = [ctypes.addressof(ctypes.c_ubyte.from_buffer(view)) for view in loan.views]
    return [(start, start + view.nbytes) for start, view in zip(starts, loan.views, strict=True)]


@contextmanager
def _quick_collection() -> Iterator[None]:
    """Let `gc.collect` look only at what is made from here on, and not at all of torch each time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _scribble(loan: Loan) -> None:
    """What a read that hung does at the worst moment."""
    for view in loan.views:
        view[:] = bytes([0x77]) * view.nbytes


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory as bytes."""
    import torch

    return tensor.view(-1).view(torch.uint8) if tensor.numel() else tensor.new_empty(0, dtype=torch.uint8)


def _holds(tensor: torch.Tensor, content: bytes) -> bool:
    import torch

    if not content:
        return tensor.numel() == 0
    return torch.equal(_bits(tensor).cpu(), torch.frombuffer(bytearray(content), dtype=torch.uint8))
