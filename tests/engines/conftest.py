"""Every rank is a process of torchrun's that runs all tests in the same order; this makes them one process group.

vLLM reads the environment once, so what it is to find there is set before any test imports it.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import HealthCheck, settings

from streamload.testing.s3server import run_ministack

# Time is no criterion: machines are shared.
settings.register_profile("streamload", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("streamload")

_ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    # Of the plugins this one, and no processes beside torchrun's.
    "VLLM_PLUGINS": "streamload",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # Ranks run wherever the kernel puts them.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}


_ASSETS = tempfile.TemporaryDirectory()

# They start processes of their own, with as many ranks as they need.
collect_ignore = [] if os.environ["WORLD_SIZE"] == "1" else ["test_vllm_processes.py"]


def pytest_configure() -> None:
    os.environ.update(_ENVIRONMENT)
    # Each rank its own: they would write the same files.
    os.environ["VLLM_ASSETS_CACHE"] = _ASSETS.name
    dist.init_process_group("gloo")


def pytest_unconfigure() -> None:
    _ASSETS.cleanup()
    if dist.is_initialized():  # vLLM's engines take it along when they end
        dist.destroy_process_group()


@pytest.fixture(scope="session")
def bucket(request: pytest.FixtureRequest) -> Iterator[str]:
    """An S3 bucket's name, the same one on every rank, in a server that rank 0 runs; the environment names it."""
    with contextlib.ExitStack() as stack:
        told: list[dict[str, str] | None] = [None]
        if dist.get_rank() == 0:
            server = stack.enter_context(run_ministack())
            with server.client() as client:
                client.create_bucket(Bucket="models")
            told = [server.environment]
        dist.broadcast_object_list(told)
        assert told[0] is not None
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in told[0].items():
            patch.setenv(name, value)
        yield "models"
        if not request.session.testsfailed:  # else torchrun ends the others, who may never come here
            dist.barrier()  # the server is there until all are done with it


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A folder of this test's, the same one on every rank, and empty."""
    paths = [tmp_path]
    dist.broadcast_object_list(paths)
    return paths[0]
