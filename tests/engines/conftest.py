"""Every rank is a process of torchrun's that runs all tests in the same order; this makes them one process group.

vLLM reads the environment once, so what it is to find there is set before any test imports it.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, settings

# Time is no criterion: machines are shared.
settings.register_profile("streamload", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("streamload")

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    # No plugins, and no processes beside torchrun's.
    "VLLM_PLUGINS": "",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Ranks run wherever the kernel puts them.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Each another: ranks that find no common shared memory go by gloo, and sleep while they wait instead of spinning.
    "VLLM_DIST_IDENT": os.environ["RANK"],
}


def pytest_configure() -> None:
    os.environ.update(_ENVIRONMENT)
    dist.init_process_group("gloo")


def pytest_unconfigure() -> None:
    if dist.is_initialized():  # vLLM's engines take it along when they end
        dist.destroy_process_group()


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder of this test's, the same one on every rank, and empty."""
    paths = [tmp_path]
    dist.broadcast_object_list(paths)
    return paths[0]
