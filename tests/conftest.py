"""Fixtures for all tests: an S3 server, a bucket in it, and the environment that points at it."""

from __future__ import annotations

import os
import signal
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from huggingface_hub import close_session, constants
from hypothesis import HealthCheck, settings

from streamload.testing.s3server import S3Server, run_ministack
from tests.faultproxy import FaultProxy, run_fault_proxy
from tests.hubserver import Hub, Repository, run_hub
from tests.servers import S3Bucket

# Time is no criterion: machines are shared.
settings.register_profile("streamload", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("streamload")


def pytest_configure() -> None:
    # A shell has what it starts in the background ignore it, and so would all that is started from here.
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def s3_server() -> Iterator[S3Server]:
    """A real S3 server that checks credentials."""
    with run_ministack() as server:
        yield server


@pytest.fixture(scope="session")
def s3_client(s3_server: S3Server) -> Iterator[Any]:
    """A client for filling buckets, made once: making one takes longer than most tests."""
    with s3_server.client() as client:
        yield client


@pytest.fixture(scope="session")
def engine_proxy(s3_server: S3Server) -> Iterator[FaultProxy]:
    """What stands between Run:ai's engine, which asks as if it asked a proxy, and a server that does not understand."""
    where = urlsplit(s3_server.endpoint)
    assert where.hostname is not None
    assert where.port is not None
    with run_fault_proxy(where.hostname, where.port, lambda number, head: None) as proxy:
        yield proxy


@pytest.fixture
def clean_aws_env(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """No credentials, no endpoint, no proxy: nothing of what the machine's user has set."""
    for name in os.environ:
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", os.devnull)
    return monkeypatch


@pytest.fixture
def aws_env(s3_server: S3Server, clean_aws_env: pytest.MonkeyPatch) -> S3Server:
    """The environment of this test points at the S3 server."""
    for name, value in s3_server.environment.items():
        clean_aws_env.setenv(name, value)
    return s3_server


@pytest.fixture
def s3_bucket(aws_env: S3Server, s3_client: Any) -> S3Bucket:
    """A new, empty bucket, and the environment to read it."""
    name = f"bucket-{uuid.uuid4().hex}"
    s3_client.create_bucket(Bucket=name)
    return S3Bucket(aws_env, name, s3_client)


@pytest.fixture
def hub(tmp_path: Path, clean_aws_env: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A Hub of its own with the repository ``org/model`` in it, an empty cache, and no token."""
    for name in os.environ:
        if name.startswith(("HF_", "HUGGING_FACE_", "HUGGINGFACE_")):
            clean_aws_env.delenv(name)
    # What huggingface_hub has read from the environment when it was imported.
    clean_aws_env.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    clean_aws_env.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    clean_aws_env.setattr(constants, "HF_HUB_OFFLINE", False)
    # What it asks the Hub for on its own account, and notes down in the user's home.
    clean_aws_env.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "agent-harnesses.json"))
    with run_hub() as hub:
        hub.repositories["org/model"] = Repository()
        clean_aws_env.setattr(constants, "ENDPOINT", hub.endpoint)
        template = hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
        clean_aws_env.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub
        close_session()
