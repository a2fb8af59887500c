"""Local files, warm: streamload beside the plainest code that moves the same bytes. Run with ``python -m bench.local``.

Three scenarios, each measured in processes of their own, in turn, the first round not counted:

- ``drain``: a checkpoint whose largest tensor has 64 MiB is streamed with memory_bytes=256 MiB, every tensor dropped;
  beside it, two threads of `os.preadv` into a reused ring of 256 MiB. Also: peak resident memory above the process that
  has imported torch and streamload.
- ``large``: the same with one tensor of 1 GiB among them.
- ``small``: 50,000 tensors of 4 KiB, loaded; beside it, safetensors' `load_file` and a copy of each tensor.

Seconds run from the call, imports done, to the last tensor.
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

MIB = 1 << 20
MEMORY_BYTES = 256 * MIB
LIMIT_READ_BYTES = 8 * MIB


def main() -> None:
    """Make the checkpoints, run the rounds, print the table."""
    parser = argparse.ArgumentParser(prog="python -m bench.local", description=__doc__.partition("\n")[0])
    parser.add_argument("scenarios", nargs="*", metavar="SCENARIO", help=f"of {', '.join(SCENARIOS)}; default: all")
    parser.add_argument("--size", type=float, default=4.0, metavar="GB", help="of the checkpoint (default: 4)")
    parser.add_argument("--rounds", type=int, default=7, help="that are counted (default: 7)")
    parser.add_argument("--dir", type=Path, help="where to put the checkpoints (default: a temporary folder)")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        print(json.dumps(measure(arguments.measure[0], Path(arguments.measure[1]))))
        return
    unknown = set(arguments.scenarios) - set(SCENARIOS)
    if unknown:
        parser.error(f"no such scenario: {', '.join(sorted(unknown))}")
    print(describe_machine())
    for scenario in arguments.scenarios or SCENARIOS:
        with tempfile.TemporaryDirectory(prefix="streamload-bench-", dir=arguments.dir) as folder:
            make, loaders = SCENARIOS[scenario]
            make(Path(folder), int(arguments.size * 1e9))
            os.sync()  # what is still written to the disk while others read would be what is measured
            report(scenario, run_rounds(loaders, Path(folder), arguments.rounds), Path(folder))


def describe_machine() -> str:
    """One line that says what was measured on."""
    import torch

    model = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        platform.machine(),
    )
    return (
        f"{model}, {os.cpu_count()} cores, Linux {platform.release()}, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


# The checkpoints


def make_drain(folder: Path, size_bytes: int) -> None:
    """Layers like an 8B Llama's, cut so that the largest tensor has 64 MiB, two to a file."""
    write_layers(folder, size_bytes, first={})


def make_large(folder: Path, size_bytes: int) -> None:
    """The same, and an embedding of 1 GiB in the first file."""
    import torch

    embedding = torch.empty(131_072, 4096, dtype=torch.bfloat16)
    flat = embedding.view(-1).view(torch.int64)
    flat.copy_(torch.arange(flat.numel()))
    write_layers(folder, size_bytes, first={"model.embed_tokens.weight": embedding})


def make_small(folder: Path, size_bytes: int) -> None:
    """50,000 tensors of 4 KiB in one file."""
    import torch
    from safetensors.torch import save_file

    content = torch.arange(50_000 * 1024, dtype=torch.int32).view(torch.float32).view(50_000, 32, 32)
    save_file(
        {f"model.experts.{number}.weight": tensor for number, tensor in enumerate(content)},
        folder / "model.safetensors",
    )


def write_layers(folder: Path, size_bytes: int, first: dict[str, Any]) -> None:
    """Write whole files of two layers each until there are so many bytes."""
    import torch
    from safetensors.torch import save_file

    hidden = 4096
    shapes = {
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (hidden // 4, hidden),
        "self_attn.v_proj": (hidden // 4, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (2 * hidden, hidden),
        "mlp.up_proj": (2 * hidden, hidden),
        "mlp.down_proj": (hidden, 2 * hidden),
    }
    layer = written = 0
    tensors = dict(first)
    while written < size_bytes:
        for _ in range(2):
            for name, shape in shapes.items():
                tensors[f"model.layers.{layer}.{name}.weight"] = torch.full(shape, layer + 1, dtype=torch.bfloat16)
            layer += 1
        save_file(tensors, folder / f"model-{layer:05d}.safetensors")
        written += sum(tensor.nbytes for tensor in tensors.values())
        tensors = {}


# The loaders; each says how many tensor bytes it has moved.


def two_threads_of_preadv(folder: Path) -> dict[str, Any]:
    """The limit: the files' bytes, 8 MiB at a time, round and round in one ring."""
    ring = memoryview(mmap.mmap(-1, MEMORY_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    files = {path: os.open(path, os.O_RDONLY) for path in sorted(folder.glob("*.safetensors"))}
    lock = threading.Lock()

    def ranges() -> Iterator[tuple[int, int, int]]:
        for path, file in files.items():
            size = path.stat().st_size
            for start in range(0, size, LIMIT_READ_BYTES):
                yield file, start, min(LIMIT_READ_BYTES, size - start)

    todo = enumerate(ranges())

    def work() -> None:
        while True:
            with lock:
                place, (file, start, nbytes) = next(todo, (0, (-1, 0, 0)))
            if file < 0:
                return
            at = place * LIMIT_READ_BYTES % MEMORY_BYTES
            done = 0
            while done < nbytes:
                done += os.preadv(file, [ring[at + done : at + nbytes]], start + done)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    last = time.perf_counter()
    for file in files.values():
        os.close(file)
    return {"last": last}


def streamload_drain(folder: Path) -> dict[str, Any]:
    """Every tensor is produced, touched nowhere, dropped."""
    import streamload

    nbytes = 0
    last = 0.0
    with streamload.stream(folder, memory_bytes=MEMORY_BYTES) as stream:
        for _, tensor in stream:
            nbytes += tensor.nbytes
            last = time.perf_counter()
    report = stream.report
    assert nbytes == report.total_bytes
    return {"last": last, "report": report.to_dict()}


def streamload_load(folder: Path) -> dict[str, Any]:
    """Every tensor is kept."""
    import streamload

    tensors = streamload.load(folder, memory_bytes=MEMORY_BYTES)
    return {"tensors": len(tensors)}


def safetensors_load_and_copy(folder: Path) -> dict[str, Any]:
    """What safetensors loads maps the file; a copy of each tensor makes it the caller's own."""
    from safetensors.torch import load_file

    tensors: dict[str, Any] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors |= {name: tensor.clone() for name, tensor in load_file(path).items()}
    return {"tensors": len(tensors)}


LOADERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    "2 threads of preadv": two_threads_of_preadv,
    "streamload": streamload_drain,
    "streamload load": streamload_load,
    "safetensors + copy": safetensors_load_and_copy,
}
SCENARIOS: dict[str, tuple[Callable[[Path, int], None], tuple[str, str]]] = {
    "drain": (make_drain, ("2 threads of preadv", "streamload")),
    "large": (make_large, ("2 threads of preadv", "streamload")),
    "small": (make_small, ("safetensors + copy", "streamload load")),
}


# Measuring


def run_rounds(loaders: tuple[str, str], folder: Path, rounds: int) -> dict[str, list[dict[str, Any]]]:
    """Run the loaders in turn, each time in a process of its own; the first round only warms the page cache."""
    found: dict[str, list[dict[str, Any]]] = {loader: [] for loader in loaders}
    for number in range(rounds + 1):
        for loader in loaders:
            command = [sys.executable, "-m", "bench.local", "--measure", loader, str(folder)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
            if number:
                found[loader].append(json.loads(done.stdout))
    return found


def measure(loader: str, folder: Path) -> dict[str, Any]:
    """One run of one loader in this process."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Imports are not what is measured.
        for name in ("torch", "uvloop", "streamload", "streamload.sinks.host", "streamload.sources.local"):
            import_module(name)
    before_bytes = peak_bytes(reset=True)
    usage = resource.getrusage(resource.RUSAGE_SELF)
    began = time.perf_counter()
    found = LOADERS[loader](folder)
    # To the last tensor; what is given back after it is not counted, on either side.
    seconds = found.pop("last", time.perf_counter()) - began
    after = resource.getrusage(resource.RUSAGE_SELF)
    return found | {
        "seconds": seconds,
        "cpu_s": after.ru_utime + after.ru_stime - usage.ru_utime - usage.ru_stime,
        "above_imports_bytes": peak_bytes() - before_bytes,
    }


def peak_bytes(*, reset: bool = False) -> int:
    """The process's peak of resident memory, VmHWM; the peak so far is forgotten first where asked."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel shows no VmHWM")


def report(scenario: str, found: dict[str, list[dict[str, Any]]], folder: Path) -> None:
    """Print a table: seconds as median, least and most; the ratio of the first loader's median to each."""
    size = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    print(f"\n{scenario}: {size / 1e9:.2f} GB, {len(next(iter(found.values())))} rounds")
    print(
        f"  {'':22}{'seconds':>9}{'least':>8}{'most':>8}{'GB/s':>8}{'CPU-s/GB':>10}"
        f"{'above imports':>15}{'speed ratio':>13}"
    )
    first = statistics.median(run["seconds"] for run in next(iter(found.values())))
    for loader, runs in found.items():
        seconds = [run["seconds"] for run in runs]
        median = statistics.median(seconds)
        cpu = statistics.median(run["cpu_s"] for run in runs)
        peak = max(run["above_imports_bytes"] for run in runs)
        print(
            f"  {loader:22}{median:9.3f}{min(seconds):8.3f}{max(seconds):8.3f}{size / median / 1e9:8.2f}"
            f"{cpu / size * 1e9:10.2f}{peak / MIB:11.0f} MiB{first / median:13.2f}"
        )
    pairs = zip(*found.values(), strict=True)
    ratios = sorted(first["seconds"] / second["seconds"] for first, second in pairs)
    print(f"  ratio round by round: median {statistics.median(ratios):.2f}, {ratios[0]:.2f} to {ratios[-1]:.2f}")
    last = next(reversed(found.values()))[-1].get("report")
    if last is not None:
        raised = last["raised_memory_bytes"]
        limit = f"{last['memory_bytes'] / MIB:.0f} MiB" + (f", raised to {raised / MIB:.0f} MiB" if raised else "")
        print(f"  memory limit {limit}; staged at most {last['peak_staged_bytes'] / MIB:.0f} MiB")


if __name__ == "__main__":
    main()
