"""Onto a GPU: streamload beside page-locked copies of the same bytes. Run with ``python -m bench.gpu``.

The limit is the plainest code that moves as many bytes: one page-locked buffer, copied to the device again and again.
The checkpoint is the one of ``gpu-local``, warm in the page cache. This is for a machine that has little more than
torch; the whole table comes from ``python -m bench run gpu-local``. Seconds run from the call, imports and the device's
set-up done, to the last tensor's completion; the first round is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from bench import datasets, machine
from bench.loaders.base import MIB
from bench.scenarios import MEMORY_BYTES

_COPY_BYTES = 64 * MIB


def main() -> int:
    """Run the rounds, print the table; 1 where there is no GPU."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__.partition("\n")[0])
    parser.add_argument("--size", type=float, default=8.0, metavar="GB", help="of the checkpoint (default: 8)")
    parser.add_argument("--rounds", type=int, default=5, help="that are counted (default: 5)")
    parser.add_argument("--dir", type=Path, help="where to put the checkpoint (default: a temporary folder)")
    arguments = parser.parse_args()

    import torch

    if not torch.cuda.is_available():
        print("bench.gpu: torch sees no CUDA device", file=sys.stderr)
        return 1
    described = machine.describe()
    print(f"{described['cpu']}, {described['cores']} cores, torch {torch.__version__}, {torch.cuda.get_device_name()}")
    with tempfile.TemporaryDirectory(prefix="streamload-bench-", dir=arguments.dir) as name:
        dataset = datasets.make("llama", int(arguments.size * 1e9), Path(name))
        folder, size = dataset.bucket, dataset.size_bytes
        loaders: dict[str, Callable[[], None]] = {
            "page-locked copies": lambda: copy_page_locked(size),
            "streamload": lambda: stream_to_gpu(folder),
        }
        seconds: dict[str, list[float]] = {loader: [] for loader in loaders}
        for number in range(arguments.rounds + 1):
            for loader, run in loaders.items():
                torch.cuda.synchronize()
                began = time.perf_counter()
                run()
                torch.cuda.synchronize()
                if number:
                    seconds[loader].append(time.perf_counter() - began)
    limit = statistics.median(seconds["page-locked copies"])
    for loader, runs in seconds.items():
        median = statistics.median(runs)
        print(
            f"  {loader:20}{median:8.3f} s ({min(runs):.3f} to {max(runs):.3f}){size / median / 1e9:8.2f} GB/s"
            f"{limit / median:8.2f} of the limit"
        )
    return 0


def copy_page_locked(nbytes: int) -> None:
    """Copy so many bytes from one page-locked buffer to one on the device."""
    import torch

    host = torch.empty(_COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(_COPY_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(-(-nbytes // _COPY_BYTES)):
        device.copy_(host, non_blocking=True)


def stream_to_gpu(folder: Path) -> None:
    """Stream the checkpoint to the device, every tensor dropped."""
    import streamload

    with streamload.stream(folder, device="cuda", memory_bytes=MEMORY_BYTES) as stream:
        for _ in stream:
            pass


if __name__ == "__main__":
    sys.exit(main())
