"""From a pod's start to its weights in place, with a sidecar: beside the longer of the engine's start and the download.

In turns:

- ``download``: ``streamload serve`` alone, from the process's start until all is staged on a volume in memory;
- ``engine``: a stand-in alone, which imports torch and streamload, makes its model's tensors, and is done with its
  start after a fixed time, as one that compiles and initialises;
- ``pod``: both, as a pod has them: the engine's container is started when the sidecar's startup probe succeeds. Until
  ``load_into`` has returned;
- ``pod, no probe``: both at once, as a pod has them whose sidecar has no startup probe: the engine finds the socket as
  soon as it is there.

::

    python -m bench.serve --size-bytes 2000000000 --start-s 10 --rounds 5

The longer of the first two is what no sidecar can beat. It needs nginx, see bench/origin.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from bench import origin
from bench.datasets import Dataset, make
from bench.loaders.base import MIB

_MEMORY_BYTES = 64 * MIB
_PORT = 18080
# As often as a kubelet could look at most is once a second: what is measured here is not its patience.
_LOOK_AGAIN_S = 0.01


def main() -> None:
    """Measure, and say what was found."""
    parser = argparse.ArgumentParser(prog="python -m bench.serve", description=__doc__)
    parser.add_argument("--size-bytes", type=int, default=2_000_000_000, help="of the checkpoint")
    parser.add_argument(
        "--start-s", type=float, nargs="+", default=[2.0, 10.0], help="how long the engine's start takes"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each")
    parser.add_argument("--variant", default="capped", help="of the origin; capped: 100 MiB/s for each connection")
    parser.add_argument("--data", type=Path, default=Path("build/bench/data"), help="where the checkpoint is kept")
    parser.add_argument("--memory-dir", type=Path, default=Path("/dev/shm"), help="a folder on a tmpfs")
    parser.add_argument("--port", type=int, default=_PORT, help="a free one, for the startup probe")
    parser.add_argument("--engine", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.engine:
        _be_engine(json.loads(given.engine))
        return
    dataset = make("llama", given.size_bytes, given.data)
    with origin.serve(dataset.folder, variant=given.variant) as served:
        for start_s in given.start_s:
            _measure(given, dataset, served, start_s)


def _measure(given: argparse.Namespace, dataset: Dataset, served: origin.Origin, start_s: float) -> None:
    ways = ("download", "engine", "pod", "pod: load_into alone", "pod, no probe")
    found: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(given.rounds + 1):
        with _volume(given) as volume, _sidecar(given, served, volume) as (process, _):
            download = _until_staged(process)
        engine = _engine(dataset, served, start_s, None)["started_s"]
        with _volume(given) as volume, _probe(given, served) as probe, _sidecar(given, served, volume) as (_, began):
            probe.wait()
            said = _engine(dataset, served, start_s, volume)
            pod = time.perf_counter() - began
        with _volume(given) as volume, _sidecar(given, served, volume) as (_, began):
            _engine(dataset, served, start_s, volume)
            unprobed = time.perf_counter() - began
        if number:  # the first round warms up
            for way, seconds in zip(found, (download, engine, pod, said["loaded_s"], unprobed), strict=True):
                found[way].append(seconds)
    medians = {way: statistics.median(seconds) for way, seconds in found.items()}
    bound = max(medians["download"], medians["engine"])
    print(f"{dataset.size_bytes / 1e9:.2f} GB, an engine that starts in {start_s:g} s")
    for way, median in medians.items():
        print(f"  {way:21} {median:6.2f} s ({min(found[way]):.2f} to {max(found[way]):.2f})")
    for way in ("pod", "pod, no probe"):
        print(f"  {way} takes {medians[way] / bound:.2f} x the longer one", flush=True)


@contextmanager
def _volume(given: argparse.Namespace) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=given.memory_dir) as folder:
        yield Path(folder)


@contextmanager
def _sidecar(
    given: argparse.Namespace, served: origin.Origin, volume: Path
) -> Iterator[tuple[subprocess.Popen[str], float]]:
    command = [*served.command_prefix, sys.executable, "-m", "streamload", "serve", f"s3://{served.bucket}"]
    command += [str(volume), "--memory-bytes", str(_MEMORY_BYTES), "--port", str(given.port), "--log", "json"]
    began = time.perf_counter()
    process = subprocess.Popen(command, env=os.environ | served.environ, stderr=subprocess.PIPE, text=True)
    try:
        yield process, began
    finally:
        process.terminate()
        process.communicate()


def _until_staged(process: subprocess.Popen[str]) -> float:
    """The seconds from its start, by its own account."""
    assert process.stderr is not None
    for line in process.stderr:
        said = json.loads(line)
        if said["level"] == "error":
            raise RuntimeError(said["message"])
        if "ready_s" in said:
            return float(said["ready_s"])
    raise RuntimeError("the sidecar has ended")


@contextmanager
def _probe(given: argparse.Namespace, served: origin.Origin) -> Iterator[subprocess.Popen[bytes]]:
    """A startup probe, in the origin's network, in which the sidecar is; ends when it has succeeded."""
    code = (
        "import socket, sys, time\n"
        "print(flush=True)\n"
        "while True:\n"
        "    try:\n"
        f"        with socket.create_connection(('127.0.0.1', {given.port})) as connection:\n"
        "            connection.sendall(b'GET /startupz HTTP/1.0\\r\\n\\r\\n')\n"
        "            sys.exit(not connection.recv(100).startswith(b'HTTP/1.0 200'))\n"
        f"    except OSError: time.sleep({_LOOK_AGAIN_S})\n"
    )
    process = subprocess.Popen([*served.command_prefix, sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.readline()  # the kubelet runs already
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def _engine(dataset: Dataset, served: origin.Origin, start_s: float, volume: Path | None) -> dict[str, Any]:
    uri = None if volume is None else f"sidecar://{volume}/streamload.sock"
    job = json.dumps({"folder": str(dataset.folder), "files": dataset.files, "start_s": start_s, "uri": uri})
    command = [sys.executable, "-m", "bench.serve", "--engine", job]
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    said: dict[str, Any] = json.loads(done.stdout)
    # All of the process, but for what it has loaded.
    return said | {"started_s": time.perf_counter() - began - said["loaded_s"]}


def _be_engine(job: dict[str, Any]) -> None:
    """In a process of its own: start, and load where there is something to load from."""
    began = time.perf_counter()
    import torch
    from safetensors import safe_open

    from streamload import load_into

    model: dict[str, torch.Tensor] = {}
    for name in job["files"]:
        with safe_open(_found(job["folder"], name), framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - it is no mapping
                piece = file.get_slice(key)
                dtype = getattr(torch, {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[piece.get_dtype()])
                model[key] = torch.zeros(piece.get_shape(), dtype=dtype)
    time.sleep(max(0.0, job["start_s"] - (time.perf_counter() - began)))
    started = time.perf_counter()
    if job["uri"] is not None:
        report = load_into(model, job["uri"])
        if report.nbytes < sum(tensor.nbytes for tensor in model.values()):
            raise RuntimeError(f"not all was loaded: {report}")
    print(json.dumps({"loaded_s": time.perf_counter() - started}))


def _found(folder: str, name: str) -> str:
    return str(next(Path(folder).rglob(name)))


if __name__ == "__main__":
    main()
