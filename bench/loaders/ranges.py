"""Tensors from libraries that bring only bytes: what a careful user of such a library would write.

Neighbouring tensors are put together until there are 8 MiB, large ones are cut into ranges of 8 MiB, and the bytes go
straight to where they are wanted: into new memory, or into the parameter. As many ranges are on their way at once as
streamload has by default, and no more bytes are unfinished than the memory limit.
"""

from __future__ import annotations

import asyncio
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

from bench.loaders.base import (
    MIB,
    Job,
    Loader,
    Outcome,
    TensorEntry,
    Took,
    header_entries,
    header_size,
    now,
    tensors_in,
)

if TYPE_CHECKING:
    import torch

__all__ = [
    "CONCURRENCY",
    "HEAD_BYTES",
    "RANGE_BYTES",
    "Fetch",
    "RangedLoader",
    "Target",
    "Unit",
    "bytes_of",
    "units_of",
]

# S3's own advice is ranges of 8 to 16 MB; 16 of them take what a link of 10 Gbit/s brings.
RANGE_BYTES = 8 * MIB
CONCURRENCY = 16
# Nearly every file's header fits; a longer one takes a second request.
HEAD_BYTES = 1 * MIB

Fetch: TypeAlias = "Callable[[str, int, int], AsyncIterator[bytes | memoryview]]"
"""Brings an object's bytes from the second argument to before the third, in pieces."""


class Unit(NamedTuple):
    """Tensors that lie beside each other in one file, and are read together."""

    key: str
    start: int
    end: int
    entries: list[TensorEntry]

    @property
    def nbytes(self) -> int:
        return self.end - self.start


class Target:
    """Where a unit's bytes go: views that follow each other, without gaps."""

    def __init__(self, unit: Unit, views: Iterable[memoryview]) -> None:
        self._views = [view for view in views if len(view)]
        self._starts = []
        at = unit.start
        for view in self._views:
            self._starts.append(at)
            at += len(view)
        if at != unit.end:
            raise ValueError(f"{unit.key}: {at - unit.start} bytes of memory for {unit.nbytes}")

    def write(self, at: int, piece: bytes | memoryview) -> int:
        """Write what begins at byte ``at`` of the file; give back where it ends."""
        piece = memoryview(piece)
        number = bisect_right(self._starts, at) - 1
        while len(piece):
            view, offset = self._views[number], at - self._starts[number]
            nbytes = min(len(piece), len(view) - offset)
            view[offset : offset + nbytes] = piece[:nbytes]
            piece, at, number = piece[nbytes:], at + nbytes, number + 1
        return at


class RangedLoader(Loader):
    """A loader whose library answers ranges; a subclass connects to the store.

    Attributes:
        whole_answers: Whether the library holds a range's answer until it is complete, which takes memory, too.
    """

    whole_answers: ClassVar[bool] = False

    @abstractmethod
    def open(self, job: Job) -> AbstractAsyncContextManager[Fetch]:
        """Connect, and disconnect at the end."""

    def reason_not(self, job: Job) -> str | None:
        if not job.remote:
            return "reads from object stores only"
        if job.destination == "stage":
            return "stages no files"
        return self.missing()

    def imports(self) -> None:
        for module in ("torch", "numpy", "uvloop"):
            import_module(module)

    def drain(self, job: Job, took: Took) -> Outcome:
        run = _Run(job, None, took)
        return run.outcome(self)

    def params(self, job: Job, params: Mapping[str, torch.Tensor]) -> Outcome:
        run = _Run(job, params, None)
        return run.outcome(self)


@dataclass
class _Run:
    """One load."""

    job: Job
    params: Mapping[str, torch.Tensor] | None
    took: Took | None
    nbytes: int = 0
    last: float = 0.0
    slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(CONCURRENCY))

    def outcome(self, loader: RangedLoader) -> Outcome:
        import uvloop

        uvloop.run(self.load(loader))
        return Outcome(self.nbytes, self.last)

    async def load(self, loader: RangedLoader) -> None:
        answers = CONCURRENCY * RANGE_BYTES if loader.whole_answers else 0
        budget = _Budget(max(RANGE_BYTES, self.job.memory_bytes - answers))
        async with loader.open(self.job) as fetch:
            files = zip(self.job.files, self.job.sizes, strict=True)
            entries = await asyncio.gather(*[self.read_header(fetch, key, size) for key, size in files])
            async with asyncio.TaskGroup() as tasks:
                for key, of_file in zip(self.job.files, entries, strict=True):
                    for unit in units_of(key, of_file):
                        await budget.take(unit.nbytes)
                        tasks.create_task(self.load_unit(fetch, unit, budget))

    async def read_header(self, fetch: Fetch, key: str, size: int) -> list[TensorEntry]:
        head = bytearray()
        end = min(HEAD_BYTES, size)
        while len(head) < end:
            async with self.slots:
                async for piece in fetch(key, len(head), end):
                    head += piece
            end = max(end, header_size(memoryview(head)))
        return header_entries(memoryview(head))

    async def load_unit(self, fetch: Fetch, unit: Unit, budget: _Budget) -> None:
        import torch

        params = [self.params[entry.name] for entry in unit.entries] if self.params is not None else []
        # Into the parameters themselves where the processor can write there.
        direct = bool(params) and self.job.device == "cpu" and all(param.is_contiguous() for param in params)
        whole = memoryview(b"") if direct else bytes_of(torch.empty(unit.nbytes, dtype=torch.uint8))
        target = Target(unit, map(bytes_of, params) if direct else [whole])
        async with asyncio.TaskGroup() as tasks:
            for start in range(unit.start, unit.end, RANGE_BYTES):
                tasks.create_task(self.load_range(fetch, unit.key, start, min(start + RANGE_BYTES, unit.end), target))
        if direct:
            self.nbytes += unit.nbytes
        else:
            for (name, tensor), entry in zip(tensors_in(whole, unit.entries, unit.start), unit.entries, strict=True):
                if self.params is not None:
                    self.params[name].copy_(tensor)
                elif self.took is not None:
                    self.took(name, tensor if self.job.device == "cpu" else tensor.to(self.job.device))
                self.nbytes += entry.end - entry.start
        self.last = now()
        await budget.give(unit.nbytes)

    async def load_range(self, fetch: Fetch, key: str, start: int, end: int, target: Target) -> None:
        async with self.slots:
            at = start
            async for piece in fetch(key, start, end):
                at = target.write(at, piece)
        if at != end:
            raise RuntimeError(f"{key}: {at - start} bytes came of {end - start}")


class _Budget:
    """Bytes that may be unfinished."""

    def __init__(self, nbytes: int) -> None:
        self._all = self._left = nbytes
        self._changed = asyncio.Condition()

    async def take(self, nbytes: int) -> None:
        async with self._changed:
            # What is larger than all of it goes alone.
            await self._changed.wait_for(lambda: self._left >= min(nbytes, self._all))
            self._left -= nbytes

    async def give(self, nbytes: int) -> None:
        async with self._changed:
            self._left += nbytes
            self._changed.notify_all()


def units_of(key: str, entries: Iterable[TensorEntry]) -> list[Unit]:
    """A file's tensors, neighbours together until there are at least `RANGE_BYTES`."""
    units: list[Unit] = []
    for entry in entries:
        if not units or units[-1].nbytes >= RANGE_BYTES:
            units.append(Unit(key, entry.start, entry.end, [entry]))
        else:
            units[-1].entries.append(entry)
            units[-1] = units[-1]._replace(end=entry.end)
    return units


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The memory of a contiguous tensor on the CPU, writable."""
    import torch

    array: Any = tensor.detach().view(-1).view(torch.uint8).numpy()
    return memoryview(array)
