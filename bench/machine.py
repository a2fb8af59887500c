"""What was measured on, so that a number can be read, and compared only with its like."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from bench.loaders import NAMES, loader_named
from bench.loaders.base import Job

_PACKAGES = (
    *("streamload", "torch", "safetensors", "runai-model-streamer", "runai-model-streamer-s3", "fastsafetensors"),
    *("obstore", "aiobotocore", "botocore", "s3torchconnector", "s3torchconnectorclient", "tensorizer"),
    *("instanttensor", "uvloop", "awscrt", "aiohttp", "httptools"),
)
_ROOT = Path(__file__).resolve().parent.parent


def describe() -> dict[str, Any]:
    """Processor, memory, kernel, network, versions; the same for the same machine and code."""
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(),
        "congestion_control": _first_line("/proc/sys/net/ipv4/tcp_congestion_control"),
        "transparent_hugepages": _first_line("/sys/kernel/mm/transparent_hugepage/enabled"),
        "python": platform.python_version(),
        "gpu": gpu()[0],
        "versions": {package: found for package in _PACKAGES if (found := _version(package)) is not None},
        "code": _digest(),
    }


def tuning(job: Job) -> dict[str, dict[str, str]]:
    """What each loader's process is given above its defaults."""
    return {name: environ for name in NAMES if (environ := loader_named(name).environ(job))}


def gpu() -> tuple[str | None, str]:
    """The GPU's name, or None and why there is none; asked in a process of its own, since torch stays resident."""
    if not Path("/proc/driver/nvidia").exists() and not Path("/dev/nvidia0").exists():
        return None, "there is no GPU"
    code = "import torch; print(torch.cuda.get_device_name() if torch.cuda.is_available() else '')"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=False)
    name = done.stdout.strip()
    return (name, "") if name else (None, "torch sees no CUDA device")


def fingerprint(machine: dict[str, Any]) -> str:
    """Changes with anything that makes two runs incomparable."""
    return hashlib.sha256(json.dumps(machine, sort_keys=True).encode()).hexdigest()[:16]


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def _first_line(path: str) -> str | None:
    try:
        return Path(path).read_text().splitlines()[0]
    except (OSError, IndexError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _digest() -> str:
    """Of streamload's and the benchmarks' sources."""
    digest = hashlib.sha256()
    for folder in ("streamload", "bench"):
        for path in sorted((_ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(_ROOT).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]
