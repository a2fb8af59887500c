"""What verifying against a manifest costs: the drain of a warm local checkpoint, with one and without, in turns.

::

    python -m bench.manifest --gib 2 --rounds 15
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import torch

import streamload
from streamload.options import Verify

__all__ = ["main"]


def main() -> None:
    """Measure and print: seconds and GB/s of each, and the ratio of the medians."""
    parser = argparse.ArgumentParser(prog="python -m bench.manifest", description=__doc__)
    parser.add_argument("--gib", type=float, default=1.0, help="how large the checkpoint is")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tensor-kib", type=int, default=32 << 10, help="how large each tensor is")
    parser.add_argument("--folder", type=Path, help="where to put it; by default a temporary folder")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as name:
        count = max(1, int(given.gib * (1 << 20)) // given.tensor_kib)
        one = torch.randint(0, 255, (given.tensor_kib << 10,), dtype=torch.uint8)
        began = time.perf_counter()
        streamload.save_sharded({f"t{number}": one.clone() for number in range(count)}, name, max_file_bytes=None)
        print(f"saved in {time.perf_counter() - began:.2f} s", flush=True)
        _compare(name, given.rounds)


def _compare(uri: str, rounds: int) -> None:
    seconds: dict[Verify, list[float]] = {"off": [], "require": []}
    nbytes = 0
    for number in range(rounds + 1):
        order: tuple[Verify, ...] = ("off", "require") if number % 2 else ("require", "off")
        for verify in order:
            began = time.perf_counter()
            with streamload.stream(uri, verify=verify, memory_bytes=256 << 20) as stream:
                for _ in stream:
                    pass
            if number:  # the first round warms up
                seconds[verify].append(time.perf_counter() - began)
            nbytes = stream.report.nbytes
    medians = {verify: statistics.median(times) for verify, times in seconds.items()}
    for verify, median in medians.items():
        print(f"verify={verify}: {median:.3f} s, {nbytes / median / 1e9:.2f} GB/s (best {min(seconds[verify]):.3f} s)")
    print(f"with a manifest, {medians['require'] / medians['off']:.3f} x the time")


if __name__ == "__main__":
    main()
