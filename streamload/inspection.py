"""What lies under a URI, and how it would be read; without reading it."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, replace
from typing import Any, Unpack, cast

from streamload.deadlines import deadline
from streamload.errors import StreamloadError
from streamload.options import Options, resolve
from streamload.pipeline.engine import run_in_thread
from streamload.pipeline.fetch import Fetcher
from streamload.plan import Batch, Plan, Read
from streamload.planning import plan_load, source_for
from streamload.report import Recorder
from streamload.uris import scrub_uri

__all__ = ["Inspection", "RankPlan", "inspect", "read_tensors"]


@dataclass(frozen=True, slots=True)
class RankPlan:
    """What one rank would read.

    Attributes:
        reads: How many reads.
        nbytes: What it keeps: its tensors' and slices' bytes.
        fetched_bytes: What it asks the source for, headers left out.
    """

    reads: int
    nbytes: int
    fetched_bytes: int

    @property
    def read_amplification(self) -> float:
        """Fetched bytes over kept bytes; one where nothing is kept."""
        return self.fetched_bytes / self.nbytes if self.nbytes else 1.0

    def to_dict(self) -> dict[str, Any]:
        """All of it, ready for JSON."""
        return {
            "reads": self.reads,
            "bytes": self.nbytes,
            "fetched_bytes": self.fetched_bytes,
            "read_amplification": self.read_amplification,
        }


@dataclass(frozen=True, slots=True)
class Inspection:
    """A checkpoint, seen from outside.

    Attributes:
        uri: What was inspected.
        plan: How it would be read with the options given; ``plan.catalog`` has the tensors.
        read_bytes: No read is larger.
        concurrency: How many reads would be in flight to begin with.
        most_concurrency: How many there would be where more of them bring more.
        requests: How many requests it took to find out.
        ranks: What each rank of the world would read, in order; empty where no rank was given.
    """

    uri: str
    plan: Plan
    read_bytes: int
    concurrency: int
    most_concurrency: int
    requests: int
    ranks: tuple[RankPlan, ...] = ()

    @property
    def all_ranks(self) -> RankPlan:
        """The ranks' sums."""
        return RankPlan(
            reads=sum(rank.reads for rank in self.ranks),
            nbytes=sum(rank.nbytes for rank in self.ranks),
            fetched_bytes=sum(rank.fetched_bytes for rank in self.ranks),
        )

    def bytes_by_dtype(self) -> dict[str, tuple[int, int]]:
        """For each dtype, the most bytes first: how many tensors, and their bytes."""
        tensors: Counter[str] = Counter()
        nbytes: Counter[str] = Counter()
        for file in self.plan.catalog.files:
            for tensor in file.tensors:
                tensors[tensor.dtype] += 1
                nbytes[tensor.dtype] += tensor.nbytes
        return {dtype: (tensors[dtype], size) for dtype, size in nbytes.most_common()}

    def to_dict(self, *, plan: bool = False) -> dict[str, Any]:
        """Everything, ready for JSON.

        Args:
            plan: Whether to list the reads as well.
        """
        catalog = self.plan.catalog
        found: dict[str, Any] = {
            "uri": self.uri,
            "tensors": catalog.tensors,
            "bytes": self.plan.tensor_bytes,
            "dtypes": {
                dtype: {"tensors": count, "bytes": size} for dtype, (count, size) in self.bytes_by_dtype().items()
            },
            "files": [
                {
                    "name": file.key,
                    "bytes": file.size_bytes,
                    "header_bytes": file.header_bytes,
                    "metadata": dict(file.metadata),
                    "tensors": [
                        {
                            "name": tensor.name,
                            "dtype": tensor.dtype,
                            "shape": list(tensor.shape),
                            "start": tensor.start,
                            "end": tensor.end,
                        }
                        for tensor in file.tensors
                    ],
                }
                for file in catalog.files
            ],
        }
        if plan:
            found["plan"] = {
                "read_bytes": self.read_bytes,
                "concurrency": self.concurrency,
                "most_concurrency": self.most_concurrency,
                **_rank_plan(self.plan).to_dict(),
                "gap_bytes": self.plan.gap_bytes,
                "reads": [
                    {
                        "file": catalog.files[batch.file].key,
                        "start": read.start,
                        "end": read.end,
                        "fetched_bytes": read.fetched_bytes,
                        "tensors": read_tensors(batch, read),
                    }
                    for batch in self.plan.batches
                    for read in batch.reads
                ],
            }
            if self.ranks:
                found["plan"]["ranks"] = [rank.to_dict() for rank in self.ranks]
                found["plan"]["all_ranks"] = self.all_ranks.to_dict()
        return found


def read_tensors(batch: Batch, read: Read) -> list[str]:
    """The names of the tensors of which a read brings something, in the order in which they begin in it."""
    return list(dict.fromkeys(batch.tensors[piece.tensor].name for piece in read.pieces))


def _rank_plan(plan: Plan) -> RankPlan:
    return RankPlan(plan.reads, plan.tensor_bytes, plan.tensor_bytes + plan.gap_bytes)


def inspect(uri: str | os.PathLike[str], **options: Unpack[Options]) -> Inspection:
    """Read a checkpoint's headers, check them, and plan a load; needs no torch.

    Args:
        uri: As for `streamload.open`.
        **options: The fields of `LoadOptions`; those about tensors' destination have no effect.

    Raises:
        StreamloadError: Bad options, or no valid checkpoint there.
    """
    # Checksums are of no use where nothing is read.
    resolved = replace(resolve(cast("dict[str, Any]", options))[0], verify="off")
    assert resolved.memory_bytes is not None
    name = os.fspath(uri)
    opened = source_for(name, resolved)
    recorder = Recorder(scrub_uri(name), "none", resolved.memory_bytes, on_event=resolved.on_event)

    async def look() -> Inspection:
        async with opened as source, deadline(resolved.deadline_s, lambda: "the headers were not all read"):
            planned = await plan_load(source, Fetcher(source, recorder), recorder, resolved, all_ranks=True)
        return Inspection(
            uri=recorder.uri,
            plan=planned.plan,
            read_bytes=planned.read_bytes,
            concurrency=planned.concurrency,
            most_concurrency=planned.most_concurrency,
            requests=source.requests,
            ranks=tuple(map(_rank_plan, planned.every_rank)),
        )

    try:
        return run_in_thread(look)
    except StreamloadError as error:
        raise error.locate(uri=recorder.uri) from error.__cause__
