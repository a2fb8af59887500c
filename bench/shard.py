"""Converting a checkpoint into a pre-sharded one, beside copying its files: rounds in turn, each into a new folder.

::

    python -m bench.shard [--size 4GB] [--tp 8] [--rounds 5] [--memory-bytes 256MiB] [--json FILE]

Each conversion is a process of its own, and says how long it took, from the call to its return, and how far its memory
went above what the interpreter has after ``import streamload``. A conversion is on the disk when it returns, so a copy
is measured both ways: as `shutil.copyfile` and ``cp`` leave it, and brought onto the disk as well.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from bench.datasets import Dataset, make
from bench.ranks import write_config
from bench.scenarios import GB, MEMORY_BYTES
from streamload.units import format_bytes, parse_bytes

__all__ = ["main"]

_CONVERSION = """
import json, sys, time
from pathlib import Path
import streamload

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
began = time.perf_counter()
made = streamload.shard(sys.argv[1], sys.argv[2], tp=int(sys.argv[3]), memory_bytes=int(sys.argv[4]))
seconds = time.perf_counter() - began
print(json.dumps({"seconds": seconds, "above_bytes": status("VmHWM") - before, "written_bytes": made.written_bytes}))
"""


def main() -> None:
    """Measure, and show the medians and their ratios."""
    parser = argparse.ArgumentParser(prog="python -m bench.shard", description="a conversion beside a copy")
    parser.add_argument("--size", type=parse_bytes, default=4 * GB)
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-bytes", type=parse_bytes, default=MEMORY_BYTES)
    parser.add_argument("--data", type=Path, default=Path("build/bench/data"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    dataset = make("llama", given.size, given.data)
    write_config(dataset)
    above: list[int] = []

    def convert(folder: Path) -> float:
        command = [sys.executable, "-c", _CONVERSION, dataset.bucket, folder / "made", given.tp, given.memory_bytes]
        done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True)
        found = json.loads(done.stdout)
        above.append(found["above_bytes"])
        return float(found["seconds"])

    ways: dict[str, Callable[[Path], float]] = {
        "shard": convert,
        "copyfile": partial(_copied, dataset, with_cp=False, sync=False),
        "copyfile, fsync": partial(_copied, dataset, with_cp=False, sync=True),
        "cp": partial(_copied, dataset, with_cp=True, sync=False),
        "cp, fsync": partial(_copied, dataset, with_cp=True, sync=True),
    }
    seconds = _measure(ways, given.rounds, given.data)
    _show(dataset, seconds, max(above), given.memory_bytes)
    if given.json is not None:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps({"seconds": seconds, "above_bytes": above}, indent=2) + "\n")


def _measure(ways: dict[str, Callable[[Path], float]], rounds: int, under: Path) -> dict[str, list[float]]:
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        # In another order each time: what one has left to be written to the disk slows the next one down.
        names = list(ways)[number % len(ways) :] + list(ways)[: number % len(ways)]
        for name in names:
            with tempfile.TemporaryDirectory(dir=under) as folder:
                os.sync()
                seconds[name].append(ways[name](Path(folder)))
    return seconds


def _copied(dataset: Dataset, folder: Path, *, with_cp: bool, sync: bool) -> float:
    began = time.perf_counter()
    for name in dataset.files:
        if with_cp:
            subprocess.run(["cp", dataset.bucket / name, folder / name], check=True)
        else:
            shutil.copyfile(dataset.bucket / name, folder / name)
        if sync:
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
    return time.perf_counter() - began


def _show(dataset: Dataset, seconds: dict[str, list[float]], above_bytes: int, memory_bytes: int) -> None:
    print(f"{format_bytes(dataset.tensor_bytes)} in {dataset.tensors} tensors")
    shard = statistics.median(seconds["shard"])
    for name, times in seconds.items():
        median = statistics.median(times)
        print(
            f"  {name:16} {median:7.3f} s ({min(times):.3f} to {max(times):.3f}), "
            f"{dataset.tensor_bytes / median / 1e9:5.2f} GB/s; shard has {median / shard:4.2f} x its speed"
        )
    limit = format_bytes(memory_bytes)
    print(f"  memory           {format_bytes(above_bytes)} above the interpreter, memory_bytes {limit}")


if __name__ == "__main__":
    main()
