"""A pre-sharded rank into parameters that are there, beside the plain stream of the same bytes: rounds in turn, warm.

``python -m bench.presharded`` prints both medians and their ratio, the bytes compared first.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import streamload
from bench.datasets import make
from bench.loaders.base import MIB
from streamload.checkpoint import RankFiles

_MEMORY_BYTES = 256 * MIB


def main() -> None:
    """Measure, and say what was found."""
    parser = argparse.ArgumentParser(prog="python -m bench.presharded", description=__doc__)
    parser.add_argument("--size-bytes", type=int, default=2_000_000_000, help="of the rank's files")
    parser.add_argument("--rounds", type=int, default=9, help="of each")
    parser.add_argument("--data", type=Path, default=Path("build/bench/data"), help="where the checkpoint is kept")
    given = parser.parse_args()
    dataset = make("llama", given.size_bytes, given.data)
    with tempfile.TemporaryDirectory(dir=dataset.folder) as folder:
        for part, file in enumerate(dataset.files):
            (Path(folder) / RankFiles(1, 2).name(part)).hardlink_to(dataset.bucket / file)
        _measure(folder, given.rounds, dataset.tensor_bytes)


def _measure(folder: str, rounds: int, nbytes: int) -> None:
    params: dict[str, torch.Tensor] = {}

    def drain() -> None:
        for _ in streamload.stream(folder, rank=1, world_size=2, memory_bytes=_MEMORY_BYTES):
            pass

    def copy() -> None:
        for name, tensor in streamload.stream(folder, rank=1, world_size=2, memory_bytes=_MEMORY_BYTES):
            params[name].copy_(tensor)

    def into() -> None:
        streamload.load_into(params, folder, rank=1, world_size=2, memory_bytes=_MEMORY_BYTES)

    # Every page of the files and of the parameters is resident from here on.
    expected = streamload.load(folder, rank=1, world_size=2)
    params |= {name: torch.full_like(tensor, 1) for name, tensor in expected.items()}
    into()
    for name, tensor in expected.items():
        assert torch.equal(params[name].view(torch.uint8), tensor.view(torch.uint8)), name
    del expected, tensor
    ways: dict[str, Callable[[], None]] = {"drain": drain, "stream and copy_": copy, "load_into": into}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(found) for name, found in seconds.items()}
    for name, median in medians.items():
        low, high = min(seconds[name]), max(seconds[name])
        ratio = median / medians["drain"]
        rate = nbytes / median / 1e9
        print(f"{name:17} {median:6.3f} s ({low:.3f} to {high:.3f})  {rate:5.2f} GB/s  {ratio:4.2f} x drain")


if __name__ == "__main__":
    main()
