"""What one rank of several reads of an ordinary checkpoint, beside reading whole tensors.

::

    python -m bench.ranks [--size 8GB] [--world-size 4] [--rounds 5] [--json FILE]

Local files, warm and cold, a drain of one rank's slices in three ways, alternating: as planned, with gaps passed over;
with every gap read (``through``); and whole tensors (``whole``), which is what a loader does that knows no ranks. For
an object store, what the plan asks for.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import streamload
from bench.datasets import Dataset, drop_from_page_cache, make
from bench.scenarios import GB, MEMORY_BYTES
from streamload.plan import plan_reads
from streamload.sources.local import LocalSource
from streamload.sources.s3 import S3Source
from streamload.units import format_bytes, parse_bytes

_ROWS = ("o_proj", "down_proj")


def main() -> None:
    """Make the checkpoint, measure, and show."""
    parser = argparse.ArgumentParser(description="one rank of several, beside whole tensors")
    parser.add_argument("--size", type=parse_bytes, default=8 * GB)
    parser.add_argument("--world-size", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--data", type=Path, default=Path("build/bench/data"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    dataset = make("llama", given.size, given.data)
    write_config(dataset)
    found = {
        "tensor_bytes": dataset.tensor_bytes,
        "world_size": given.world_size,
        "requested": {
            "local": _requested(dataset, given.world_size, LocalSource),
            "s3": _requested(dataset, given.world_size, S3Source),
        },
        "seconds": {place: _measure(dataset, given.world_size, given.rounds, place) for place in ("warm", "cold")},
    }
    _show(found)
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps(found, indent=2) + "\n")


def write_config(dataset: Dataset) -> None:
    """The config.json of the model whose shapes the data set has."""
    found = streamload.inspect(dataset.bucket)
    shapes = {tensor.name: tensor.shape for file in found.plan.catalog.files for tensor in file.tensors}
    hidden = shapes["model.norm.weight"][0]
    config = {
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": sum(name.endswith("o_proj.weight") for name in shapes),
        "num_attention_heads": hidden // 128,
        "num_key_value_heads": hidden // 512,
    }
    (dataset.bucket / "config.json").write_text(json.dumps(config))


def _requested(
    dataset: Dataset, world_size: int, source: type[LocalSource] | type[S3Source]
) -> list[dict[str, int | float]]:
    """What each rank keeps and asks for, by what the source says its reads cost."""
    whole = streamload.inspect(dataset.bucket).plan.catalog
    placements = streamload.Placements.from_config(json.loads((dataset.bucket / "config.json").read_text()))
    found: list[dict[str, int | float]] = []
    for rank in range(world_size):
        plan = plan_reads(
            placements.slice(whole, streamload.Ranks(tp_rank=rank, tp_size=world_size)),
            read_bytes=source.read_bytes,
            gap_bytes=source.request_cost_bytes,
            skip_bytes=source.skipped_gap_bytes,
        )
        kept, asked = plan.tensor_bytes, plan.tensor_bytes + plan.gap_bytes
        columns = sum(
            read.gap_bytes
            for batch in plan.batches
            if not any(row in tensor.name for tensor in batch.tensors for row in _ROWS)
            for read in batch.reads
        )
        found.append(
            {
                "reads": plan.reads,
                "kept_bytes": kept,
                "requested_bytes": asked,
                "beyond_column_slices_bytes": columns,
                "of_kept": asked / kept,
                "of_checkpoint": asked / whole.nbytes,
            }
        )
    return found


def _measure(dataset: Dataset, world_size: int, rounds: int, place: str) -> dict[str, list[float]] | str:
    ways: dict[str, Callable[[], int]] = {
        "slices": lambda: _drain(dataset, rank=1, world_size=world_size),
        "through": lambda: _drain_through(dataset, world_size),
        "whole": lambda: _drain(dataset),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, drain in ways.items():
            if place == "cold":
                reason = _drop(dataset)
                if reason is not None:
                    return reason
            began = time.perf_counter()
            drain()
            if number or place == "cold":  # the first warm one brings the files into memory
                seconds[name].append(time.perf_counter() - began)
    return seconds


def _drop(dataset: Dataset) -> str | None:
    """Drop the files from memory; what the kernel still reads ahead stays until it has come."""
    reason: str | None = None
    for _ in range(20):
        time.sleep(0.15)
        reason = drop_from_page_cache(dataset.folder)
        if reason is None:
            break
    return reason


def _drain(dataset: Dataset, **options: Any) -> int:
    tensors = 0
    for _ in streamload.stream(dataset.bucket, memory_bytes=MEMORY_BYTES, **options):
        tensors += 1
    return tensors


def _drain_through(dataset: Dataset, world_size: int) -> int:
    """The same slices from a source that reads every gap."""
    skipped = LocalSource.skipped_gap_bytes
    LocalSource.skipped_gap_bytes = None
    try:
        return _drain(dataset, rank=1, world_size=world_size)
    finally:
        LocalSource.skipped_gap_bytes = skipped


def _show(found: dict[str, Any]) -> None:
    print(f"{format_bytes(found['tensor_bytes'])}, {found['world_size']} ranks")
    for place, ranks in found["requested"].items():
        for number, rank in enumerate(ranks):
            print(
                f"  {place:5} rank {number}: keeps {format_bytes(rank['kept_bytes'])}, asks for "
                f"{format_bytes(rank['requested_bytes'])} in {rank['reads']} reads: {rank['of_kept']:.3f} x what it "
                f"keeps, {rank['of_checkpoint']:.3f} x the checkpoint; "
                f"{format_bytes(rank['beyond_column_slices_bytes'])} beyond the slices that are not row-parallel"
            )
    for place, seconds in found["seconds"].items():
        if isinstance(seconds, str):
            print(f"  {place}: {seconds}")
            continue
        for name, times in seconds.items():
            print(f"  {place} {name:8} {statistics.median(times):.3f} s (best {min(times):.3f}, {len(times)} rounds)")


if __name__ == "__main__":
    main()
