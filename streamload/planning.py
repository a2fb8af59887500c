"""From a source and the options to a plan: what `open` and `inspect` have in common."""

from __future__ import annotations

from dataclasses import dataclass

from streamload.checkpoint import select
from streamload.options import LoadOptions
from streamload.pipeline.discover import ask_checksums, discover
from streamload.pipeline.fetch import Fetcher
from streamload.pipeline.verify import Verifier
from streamload.plan import LEAST_READ_BYTES, Plan, plan_reads
from streamload.report import Recorder
from streamload.sources import Source, SourceObject

__all__ = ["PlannedLoad", "effective_reads", "plan_load"]


@dataclass(frozen=True, slots=True)
class PlannedLoad:
    """What will be read, and how.

    Attributes:
        plan: The reads.
        objects: The shard files as the source knows them, by key.
        read_bytes: No read is larger.
        concurrency: How many are in flight.
        verifier: Checks what arrives.
    """

    plan: Plan
    objects: dict[str, SourceObject]
    verifier: Verifier
    read_bytes: int
    concurrency: int


async def plan_load(source: Source, fetcher: Fetcher, recorder: Recorder, options: LoadOptions) -> PlannedLoad:
    """Read the headers and decide what else to read.

    Args:
        source: Entered already.
        fetcher: Asks that source.
        recorder: Told of it.
        options: The load's.

    Raises:
        CheckpointError: The files do not make a checkpoint.
        SourceError: The source's.
    """
    recorder.source = source.scheme
    read_bytes, concurrency = effective_reads(source, options)
    verify = options.verify != "off"
    everything = not (options.include or options.exclude)
    found = await discover(fetcher, recorder, concurrency, keep_headers=verify, checksums=verify and everything)
    catalog = select(found.catalog, options.include, options.exclude)
    checksums = found.checksums
    if verify and not everything:
        # Only those that are read whole can be compared.
        tensors = {file.key: len(file.tensors) for file in found.catalog.files}
        whole = [found.objects[file.key] for file in catalog.files if len(file.tensors) == tensors[file.key]]
        checksums = await ask_checksums(fetcher, whole, concurrency)
    plan = plan_reads(catalog, read_bytes=read_bytes, gap_bytes=source.request_cost_bytes)
    recorder.planned(len(catalog.files), catalog.tensors, plan.tensor_bytes)
    verifier = Verifier(plan, checksums, found.headers, recorder, off=not verify)
    return PlannedLoad(plan, found.objects, verifier, read_bytes, concurrency)


def effective_reads(source: Source, options: LoadOptions) -> tuple[int, int]:
    """How large a read may be, in bytes, and how many are in flight: what the caller asked for, or the source's choice.

    Args:
        source: Opened or not.
        options: With ``memory_bytes`` filled in.
    """
    # Small tensors are read together, and a read of theirs must not be what fills the memory.
    assert options.memory_bytes is not None
    read_bytes = min(options.read_bytes or source.read_bytes, max(LEAST_READ_BYTES, options.memory_bytes // 4))
    return read_bytes, source.concurrency if options.concurrency == "auto" else options.concurrency
