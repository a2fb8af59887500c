"""The S3 server for tests and demonstrations."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
from botocore import exceptions

from streamload.errors import MissingDependencyError
from streamload.testing import s3server
from streamload.testing.s3server import S3Server, run_ministack

_KILLED = """
import os, signal
from streamload.testing.s3server import run_ministack
with run_ministack() as server:
    print(server.endpoint, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def _answers(server: S3Server) -> bool:
    with server.client() as client:
        try:
            client.list_buckets()
        except exceptions.ConnectionError:
            return False
    return True


def test_it_ends_with_its_context() -> None:
    with run_ministack() as server:
        assert _answers(server)
        assert server.endpoint.startswith("http://127.0.0.1:")
    assert not _answers(server)


def test_it_ends_with_its_process() -> None:
    ended = subprocess.run([sys.executable, "-c", _KILLED], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == -signal.SIGKILL
    assert not _answers(S3Server(ended.stdout.strip(), "key", "secret"))


def test_it_checks_credentials(s3_server: S3Server) -> None:
    wrong = S3Server(s3_server.endpoint, s3_server.access_key, "wrong")
    with wrong.client() as client, pytest.raises(exceptions.ClientError, match="SignatureDoesNotMatch"):
        client.list_buckets()
    assert s3_server.secret_key not in repr(s3_server)


def test_the_users_own_settings_do_not_matter(s3_server: S3Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_PROFILE", "no-such-profile")
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert _answers(s3_server)


def test_its_environment_names_it_and_no_files(s3_server: S3Server) -> None:
    environment = s3_server.environment
    assert environment["AWS_ENDPOINT_URL"] == s3_server.endpoint
    assert environment["AWS_CONFIG_FILE"] == environment["AWS_SHARED_CREDENTIALS_FILE"] == os.devnull


def test_it_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3server, "find_spec", lambda _: None)
    with pytest.raises(MissingDependencyError, match="ministack"), run_ministack():
        pass


def test_it_says_why_it_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(s3server, "_START", "raise SystemExit('no room')")
    with pytest.raises(RuntimeError, match="ended with exit code 1: no room"), run_ministack():
        pass
