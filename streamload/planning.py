"""From a source and the options to a plan: what `open` and `inspect` have in common."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from inspect import isawaitable
from typing import TypeAlias

from streamload.checkpoint import Catalog, ManifestFile, TensorInfo, select
from streamload.checksums import Sha256
from streamload.options import LoadOptions
from streamload.pipeline.discover import ask_checksums, ask_sha256s, discover, read_config
from streamload.pipeline.fetch import Fetcher
from streamload.pipeline.verify import Verifier
from streamload.plan import LEAST_READ_BYTES, Placements, Plan, plan_reads
from streamload.report import Recorder
from streamload.sources import Source, SourceObject, open_source

__all__ = ["Accept", "PlannedLoad", "effective_reads", "plan_catalog", "plan_load", "source_for"]

# Where many connections may bring more, smaller reads let as many work within little memory: two thirds faster from a
# store that gives each 100 MiB/s. Below the least size, waiting for first bytes costs more than that.
_READS_IN_MEMORY = 64
_LEAST_SHARED_READ_BYTES = 1 << 20

# Under a limit on the rate, a read is no longer than what may pass in this time.
_PACED_READ_S = 0.25

Accept: TypeAlias = Callable[[Catalog, Catalog], Catalog | Awaitable[Catalog]]
"""See `plan_load`."""


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
        manifests: What manifests say of the shard files, and
        headers: those files' headers, both by key, for what is planned later; empty where nothing is verified.
        every_rank: The plans of all ranks, where they were asked for.
    """

    plan: Plan
    objects: dict[str, SourceObject]
    verifier: Verifier
    read_bytes: int
    concurrency: int
    most_concurrency: int
    manifests: Mapping[str, ManifestFile]
    headers: Mapping[str, bytes]
    every_rank: tuple[Plan, ...] = ()


def source_for(uri: str, options: LoadOptions) -> Source:
    """Make the source that a URI and the options ask for; see `open_source`.

    Raises:
        OptionError: Nothing serves the URI.
    """
    concurrency = None if options.concurrency == "auto" else options.concurrency
    return open_source(uri, source=options.source, concurrency=concurrency, **options.for_source())


async def plan_load(
    source: Source,
    fetcher: Fetcher,
    recorder: Recorder,
    options: LoadOptions,
    *,
    accept: Accept | None = None,
    ask: Callable[[Catalog], Awaitable[Sequence[TensorInfo]]] | None = None,
    all_ranks: bool = False,
) -> PlannedLoad:
    """Read the headers and decide what else to read.

    Args:
        source: Entered already.
        fetcher: Asks that source.
        recorder: Told of it.
        options: The load's.
        accept: Given the tensors and slices that the options choose, and the whole tensors that these are of, says
            which are read, at once or later; what it raises ends the load.
        ask: Given the tensors that the options choose, waits until it is known which of them, or which slices of them,
            are wanted, and in which order.
        all_ranks: Whether the other ranks' plans are wanted too, where slices are.

    Raises:
        OptionError: It is not known how a tensor is shared out among the ranks.
        CheckpointError: The files do not make a checkpoint, or a manifest was written for others.
        ChecksumError: What was read of a file is not what its manifest says, or cannot be verified and has to be.
        SourceError: The source's.
    """
    recorder.source = source.scheme
    read_bytes, concurrency, most_concurrency = effective_reads(source, options)
    verify = options.verify != "off"
    everything = not (options.include or options.exclude) and options.rank is None
    found = await discover(
        fetcher,
        recorder,
        most_concurrency,
        keep_headers=verify,
        checksums=verify and everything,
        rank_files=options.rank_files,
    )
    # Files of one pipeline stage have other layers than those of the next one.
    stage = found.presharded and options.ranks is not None and options.ranks.pp_size > 1
    wanted = catalog = select(found.catalog, options.include, options.exclude, partial=stage)
    every: tuple[Plan, ...] = ()
    # A pre-sharded checkpoint holds this rank's tensors as they are needed.
    if options.ranks is not None and not found.presharded:
        placements = options.placements
        if not isinstance(placements, Placements):
            placements = Placements.from_config(await read_config(fetcher, recorder))
            recorder.in_turn(2)  # it is looked for, and read
        slice_for = partial(placements.slice, wanted, uneven=options.uneven, whole=found.catalog)
        catalog = slice_for(options.ranks)
        if all_ranks:
            every = tuple(plan_catalog(source, slice_for(ranks), read_bytes) for ranks in options.ranks_of_all())
    if accept is not None:
        accepted = accept(catalog, wanted)
        catalog = await accepted if isawaitable(accepted) else accepted
    asked: dict[str, int] | None = None
    if ask is not None:
        parts = await ask(catalog)
        asked = {part.name: place for place, part in enumerate(parts)}
        catalog = _only(catalog, {part.name: part for part in parts})
    checksums = found.checksums
    if verify and not everything:
        # Only those that are read whole can be compared.
        nbytes = {file.key: sum(tensor.nbytes for tensor in file.tensors) for file in found.catalog.files}
        whole = [
            found.objects[file.key]
            for file in catalog.files
            if sum(tensor.nbytes for tensor in file.tensors) == nbytes[file.key]
        ]
        checksums = await ask_checksums(fetcher, whole, most_concurrency)
        recorder.in_turn(source.checksum_trips if whole else 0)
    sha256s: dict[str, bytes | Sha256 | str] = {}
    if options.verify in ("require", "sha256"):
        # Where there is a checksum, nothing else is compared.
        unsummed = [found.objects[file.key] for file in catalog.files if isinstance(checksums.get(file.key), str)]
        before = source.requests
        sha256s = await ask_sha256s(fetcher, unsummed, most_concurrency)
        recorder.in_turn(1 if source.requests > before else 0)
    plan = plan_catalog(source, catalog, read_bytes, asked)
    recorder.in_turn(1 if plan.reads else 0)
    recorder.planned(len(catalog.files), catalog.tensors, plan.tensor_bytes)
    verifier = Verifier(
        plan,
        checksums,
        found.headers,
        recorder,
        manifests=found.manifests,
        sha256s=sha256s,
        off=not verify,
        required=options.verify == "require",
    )
    return PlannedLoad(
        plan,
        found.objects,
        verifier,
        read_bytes,
        concurrency,
        most_concurrency,
        manifests=found.manifests,
        headers=found.headers,
        every_rank=every,
    )


def plan_catalog(source: Source, catalog: Catalog, read_bytes: int, asked: Mapping[str, int] | None = None) -> Plan:
    """Decide how tensors are read from a source; see `plan_reads`."""
    return plan_reads(
        catalog,
        read_bytes=read_bytes,
        gap_bytes=source.request_cost_bytes,
        skip_bytes=source.skipped_gap_bytes,
        asked=asked,
    )


def _only(catalog: Catalog, parts: Mapping[str, TensorInfo]) -> Catalog:
    """These parts of tensors, each in its file."""
    files = []
    for file in catalog.files:
        tensors = tuple(parts[tensor.name] for tensor in file.tensors if tensor.name in parts)
        if tensors:
            files.append(replace(file, tensors=tensors))
    return Catalog(tuple(files))


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
