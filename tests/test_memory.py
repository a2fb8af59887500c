"""How much memory a load takes, measured from outside: the process's peak of resident memory."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

MIB = 1 << 20
MEMORY_BYTES = 48 * MIB

# What may come on top of the limit: threads' stacks, lists of tensors, and the tensor that the consumer holds.
SLACK_BYTES = 64 * MIB


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """400 MiB in tensors of 16 MiB, 3 MiB, 100 kB and 1 kB."""
    folder = tmp_path_factory.mktemp("memory")
    for file in range(4):
        tensors = {f"{file}.large.{number}": torch.full((16 * MIB,), number, dtype=torch.uint8) for number in range(4)}
        tensors |= {f"{file}.middle.{number}": torch.full((3 * MIB,), 1, dtype=torch.uint8) for number in range(9)}
        tensors |= {f"{file}.small.{number}": torch.full((100_000,), 2, dtype=torch.uint8) for number in range(90)}
        tensors |= {f"{file}.tiny.{number}": torch.full((1000,), 3, dtype=torch.uint8) for number in range(900)}
        save_file(tensors, folder / f"model-{file}.safetensors")
    return folder


def measure(script: str, checkpoint: Path) -> dict[str, int]:
    """Run a script that fills `found`, with `rss()` and `peak()` at hand; what it has found, in bytes."""
    prelude = """
        import gc, json, sys, warnings
        from pathlib import Path
        warnings.simplefilter("ignore")
        import torch
        import streamload

        def status(field):
            for line in Path("/proc/self/status").read_text().splitlines():
                if line.startswith(field + ":"):
                    return int(line.split()[1]) * 1024

        rss = lambda: status("VmRSS")
        peak = lambda: status("VmHWM")
        folder, limit = sys.argv[1], int(sys.argv[2])
        for _ in streamload.stream(folder, memory_bytes=limit, include=["0.tiny.*"]):
            pass  # what is imported and allocated once
        Path("/proc/self/clear_refs").write_text("5")
        before = rss()
        found = {}
    """
    program = textwrap.dedent(prelude) + textwrap.dedent(script) + "\nprint(json.dumps(found))"
    done = subprocess.run(
        [sys.executable, "-c", program, str(checkpoint), str(MEMORY_BYTES)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    found: dict[str, int] = json.loads(done.stdout)
    return found


@pytest.mark.parametrize("concurrency", [1, 4, 16])
def test_a_stream_stays_within_its_limit(checkpoint: Path, concurrency: int) -> None:
    found = measure(
        f"""
        with streamload.stream(folder, memory_bytes=limit, concurrency={concurrency}) as stream:
            for name, tensor in stream:
                pass
        found["above"] = peak() - before
        found["staged"] = stream.report.peak_staged_bytes
        """,
        checkpoint,
    )
    assert found["staged"] <= MEMORY_BYTES
    assert found["above"] <= MEMORY_BYTES + SLACK_BYTES


def test_a_consumer_that_stops_taking_stops_the_load(checkpoint: Path) -> None:
    found = measure(
        """
        import threading
        blocked = threading.Event()
        def look(now):
            if stream is not None and stream.report.stages["consumer"] > 0:
                blocked.set()
        stream = None
        stream = streamload.stream(folder, memory_bytes=limit, progress=look)
        assert blocked.wait(60)
        found["above"] = peak() - before
        found["read"] = stream.report.fetched_bytes
        stream.close()
        """,
        checkpoint,
    )
    assert found["read"] < 2 * MEMORY_BYTES
    assert found["above"] <= MEMORY_BYTES + SLACK_BYTES


@pytest.mark.parametrize("every", [1, 2, 10, 101])
def test_kept_tensors_hold_little_more_than_themselves(checkpoint: Path, every: int) -> None:
    found = measure(
        f"""
        kept = []
        with streamload.stream(folder, memory_bytes=limit) as stream:
            for number, (name, tensor) in enumerate(stream):
                if number % {every} == 0:
                    kept.append(tensor)
        del name, tensor
        gc.collect()
        found["held"] = rss() - before
        found["kept"] = sum(tensor.nbytes for tensor in kept)
        found["peak"] = peak() - before
        """,
        checkpoint,
    )
    assert found["held"] <= 1.25 * found["kept"] + 16 * MIB
    assert found["peak"] <= 1.25 * found["kept"] + MEMORY_BYTES + SLACK_BYTES


def test_tensors_dropped_after_the_load_go_back_to_the_system(checkpoint: Path) -> None:
    found = measure(
        """
        tensors = streamload.load(folder, memory_bytes=limit)
        kept = tensors["2.large.1"]
        del tensors
        gc.collect()
        found["held"] = rss() - before
        found["kept"] = kept.nbytes
        """,
        checkpoint,
    )
    assert found["held"] <= 1.25 * found["kept"] + 16 * MIB
