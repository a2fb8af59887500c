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
from streamload.plan import Plan
from streamload.planning import plan_load, source_for
from streamload.report import Recorder
from streamload.uris import scrub_uri

__all__ = ["Inspection", "inspect"]


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
    """

    uri: str
    plan: Plan
    read_bytes: int
    concurrency: int
    most_concurrency: int
    requests: int

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
                "gap_bytes": self.plan.gap_bytes,
                "reads": [
                    {
                        "file": catalog.files[batch.file].key,
                        "start": read.start,
                        "end": read.end,
                        "tensors": [batch.tensors[piece.tensor].name for piece in read.pieces],
                    }
                    for batch in self.plan.batches
                    for read in batch.reads
                ],
            }
        return found


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
            planned = await plan_load(source, Fetcher(source, recorder), recorder, resolved)
        return Inspection(
            uri=recorder.uri,
            plan=planned.plan,
            read_bytes=planned.read_bytes,
            concurrency=planned.concurrency,
            most_concurrency=planned.most_concurrency,
            requests=source.requests,
        )

    try:
        return run_in_thread(look)
    except StreamloadError as error:
        raise error.locate(uri=recorder.uri) from error.__cause__
