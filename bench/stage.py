"""Staging beside the plainest ways to move the same bytes: from S3 on loopback onto a volume in memory and onto a disk.

In turns, each in a process of its own:

- ``two threads``: blocking ``recv_into`` on two threads, written to the same volume; nothing verified, nothing made
  durable, and no interpreter's start in its time;
- ``dd``: zeros to the same disk, ``fdatasync`` included;
- ``stage``: ``streamload stage`` with 64 MiB, everything verified and made durable: reading and writing only, from the
  call on (the import of the S3 client included), and the whole process.

::

    python -m bench.stage --size-bytes 2000000000 --rounds 5

It needs nginx, see bench/origin.py.
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
from pathlib import Path
from typing import Any

from bench import origin
from bench.datasets import Dataset, make
from bench.loaders.base import MIB, Job
from bench.loaders.limit import Limit

_MEMORY_BYTES = 64 * MIB


def main() -> None:
    """Measure, and say what was found."""
    parser = argparse.ArgumentParser(prog="python -m bench.stage", description=__doc__)
    parser.add_argument("--size-bytes", type=int, default=2_000_000_000, help="of the checkpoint")
    parser.add_argument("--rounds", type=int, default=5, help="of each")
    parser.add_argument("--data", type=Path, default=Path("build/bench/data"), help="where the checkpoint is kept")
    parser.add_argument("--memory-dir", type=Path, default=Path("/dev/shm"), help="a folder on a tmpfs")
    parser.add_argument("--disk-dir", type=Path, help="a folder on a disk (default: beside the checkpoint)")
    parser.add_argument("--limit", nargs=2, metavar=("JOB", "HOW"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.limit:
        _move(json.loads(given.limit[0]), given.limit[1])
        return
    dataset = make("llama", given.size_bytes, given.data)
    with origin.serve(dataset.folder, variant="http") as served:
        for name, folder in (("memory", given.memory_dir), ("disk", given.disk_dir or given.data)):
            _measure(name, folder, dataset, served, given.rounds)


def _measure(name: str, folder: Path, dataset: Dataset, served: origin.Origin, rounds: int) -> None:
    found: dict[str, list[float]] = {}
    firsts: list[float] = []
    peak = 0
    for number in range(rounds + 1):
        round_found: dict[str, float] = {}
        if name == "disk":
            round_found["origin to nowhere"] = _limit(dataset, served, None)
            round_found["dd"] = _dd(folder, dataset.size_bytes)
        else:
            with tempfile.TemporaryDirectory(dir=folder) as target:
                round_found["two threads"] = _limit(dataset, served, target)
        with tempfile.TemporaryDirectory(dir=folder) as target:
            said, whole = _stage(dataset, served, Path(target) / "model")
        moving = said["phases"]["read"] + said["phases"]["finish"]
        round_found |= {"stage: reading": moving, "stage": said["seconds"], "stage: whole process": whole}
        if number:  # the first round warms up
            for way, each in round_found.items():
                found.setdefault(way, []).append(each)
            firsts.append(said["first_request_s"])
            peak = max(peak, said["peak_rss_bytes"])
    medians = {way: statistics.median(seconds) for way, seconds in found.items()}
    slowest = max(median for way, median in medians.items() if not way.startswith("stage"))
    print(f"onto a volume in memory, {folder}" if name == "memory" else f"onto a disk, {folder}")
    for way, median in medians.items():
        low, high = min(found[way]), max(found[way])
        rate = dataset.size_bytes / median / 1e9
        share = f"  {slowest / median:4.2f} x the rate" if way.startswith("stage") else ""
        print(f"  {way:21} {median:6.2f} s ({low:.2f} to {high:.2f})  {rate:5.2f} GB/s{share}")
    print(f"  first request after   {statistics.median(firsts):6.2f} s; peak {peak / MIB:.0f} MiB", flush=True)


def _stage(dataset: Dataset, served: origin.Origin, target: Path) -> tuple[dict[str, Any], float]:
    """What it said, and the seconds of the whole process."""
    command = [
        *served.command_prefix,
        sys.executable,
        "-m",
        "streamload",
        "stage",
        f"s3://{served.bucket}",
        str(target),
    ]
    command += ["--memory-bytes", str(_MEMORY_BYTES), "--quiet", "--json"]
    began = time.perf_counter()
    done = subprocess.run(command, env=os.environ | served.environ, stdout=subprocess.PIPE, check=True)
    whole = time.perf_counter() - began
    said: dict[str, Any] = json.loads(done.stdout)
    if sum(said["verified"].values()) < dataset.size_bytes:
        raise RuntimeError(f"not all was staged and verified: {said}")
    return said, whole


def _limit(dataset: Dataset, served: origin.Origin, target: str | None) -> float:
    job = {"files": dataset.files, "sizes": dataset.sizes, "endpoint": served.endpoint_url, "target": target}
    job["uri"] = f"s3://{served.bucket}"
    command = [*served.command_prefix, sys.executable, "-m", "bench.stage", "--limit", json.dumps(job)]
    command.append("drain" if target is None else "stage")
    done = subprocess.run(command, env=os.environ | served.environ, stdout=subprocess.PIPE, check=True)
    return float(done.stdout)


def _move(fields: dict[str, object], how: str) -> None:
    """In a process of its own: the limit's seconds."""
    job = Job(scenario="stage", destination="stage", memory_bytes=0, device="cpu", **fields)  # type: ignore[arg-type]
    limit = Limit()
    limit.imports()
    began = time.perf_counter()
    outcome = limit.stage(job) if how == "stage" else limit.drain(job, lambda *_: None)
    print(outcome.last - began)


def _dd(folder: Path, nbytes: int) -> float:
    if shutil.which("dd") is None:
        raise RuntimeError("there is no dd here")
    with tempfile.TemporaryDirectory(dir=folder) as target:
        began = time.perf_counter()
        command = ["dd", "if=/dev/zero", f"of={target}/zeros", "bs=8M", f"count={nbytes >> 23}", "conv=fdatasync"]
        subprocess.run(command, check=True, capture_output=True)
        return time.perf_counter() - began


if __name__ == "__main__":
    main()
