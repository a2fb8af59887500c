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
from streamload.sources import RunaiSettings, Source, SourceObject, open_source

__all__ = ["PlannedLoad", "effective_reads", "plan_load", "source_for"]

# Where many connections may bring more, smaller reads let as many work within little memory: two thirds faster from a
# store that gives each 100 MiB/s. Below the least size, waiting for first bytes costs more than that.
_READS_IN_MEMORY = 64
_LEAST_SHARED_READ_BYTES = 1 << 20

# Under a limit on the rate, a read is no longer than what may pass in this time.
_PACED_READ_S = 0.25


@dataclass(frozen=True, slots=True)
class PlannedLoad:
    """What will be read, and how.

    Attributes:
        plan: The reads.
        objects: The shard files as the source knows them, by key.
        read_bytes: No read is larger.
        concurrency: How many are in flight to begin with.
        most_concurrency: How many there may be.
        verifier: Checks what arrives.
    """

    plan: Plan
    objects: dict[str, SourceObject]
    verifier: Verifier
    read_bytes: int
    concurrency: int
    most_concurrency: int


def source_for(uri: str, options: LoadOptions) -> Source:
    """Make the source that a URI and the options ask for; see `open_source`.

    Raises:
        OptionError: Nothing serves the URI.
    """
    return open_source(
        uri,
        source=options.source,
        concurrency=None if options.concurrency == "auto" else options.concurrency,
        runai=RunaiSettings(
            options.runai_chunk_bytes, options.runai_request_timeout_s, options.runai_virtual_addressing
        ),
    )


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
    read_bytes, concurrency, most_concurrency = effective_reads(source, options)
    verify = options.verify != "off"
    everything = not (options.include or options.exclude)
    found = await discover(fetcher, recorder, most_concurrency, keep_headers=verify, checksums=verify and everything)
    catalog = select(found.catalog, options.include, options.exclude)
    checksums = found.checksums
    if verify and not everything:
        # Only those that are read whole can be compared.
        tensors = {file.key: len(file.tensors) for file in found.catalog.files}
        whole = [found.objects[file.key] for file in catalog.files if len(file.tensors) == tensors[file.key]]
        checksums = await ask_checksums(fetcher, whole, most_concurrency)
    plan = plan_reads(catalog, read_bytes=read_bytes, gap_bytes=source.request_cost_bytes)
    recorder.planned(len(catalog.files), catalog.tensors, plan.tensor_bytes)
    verifier = Verifier(plan, checksums, found.headers, recorder, off=not verify)
    return PlannedLoad(plan, found.objects, verifier, read_bytes, concurrency, most_concurrency)


def effective_reads(source: Source, options: LoadOptions) -> tuple[int, int, int]:
    """How large a read may be, in bytes, how many are in flight to begin with, and how many there may be.

    It is what the caller asked for, or the source's choice.

    Args:
        source: Opened or not.
        options: With ``memory_bytes`` filled in.
    """
    # Small tensors are read together, and a read of theirs must not be what fills the memory.
    assert options.memory_bytes is not None
    read_bytes = min(
        options.read_bytes or _preferred_read_bytes(source, options.memory_bytes),
        max(LEAST_READ_BYTES, options.memory_bytes // 4),
    )
    if options.max_bytes_per_s is not None:
        # A read takes the link's whole rate while it lasts: smaller ones keep closer to the one that is allowed.
        read_bytes = min(read_bytes, max(LEAST_READ_BYTES, int(options.max_bytes_per_s * _PACED_READ_S)))
    if options.concurrency != "auto":
        return read_bytes, options.concurrency, options.concurrency
    # A quarter of the memory is for what has arrived and was not taken yet: more reads would only wait for it.
    most = min(source.most_concurrency or source.concurrency, max(1, 3 * options.memory_bytes // (4 * read_bytes)))
    return read_bytes, source.concurrency, max(source.concurrency, most)


def _preferred_read_bytes(source: Source, memory_bytes: int) -> int:
    if source.most_concurrency is None:
        return source.read_bytes
    return min(source.read_bytes, max(_LEAST_SHARED_READ_BYTES, memory_bytes // _READS_IN_MEMORY))
