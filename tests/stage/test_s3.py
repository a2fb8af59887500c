"""Staging from a real S3 server, behind a proxy that counts and spoils answers."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlsplit

import pytest

import streamload
from streamload.errors import ChecksumError, CredentialsError, TransientError
from streamload.pipeline import fetch
from streamload.pipeline.policy import RetryPolicy
from streamload.stage.names import unfinished_name
from tests.faultproxy import Fault, FaultProxy, Plan, run_fault_proxy
from tests.servers import S3Bucket
from tests.stage.models import FIRST, INDEX, PIECE, SECOND, same, source_of, total_bytes


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return source_of(tmp_path / "source")


@pytest.fixture
def bucket(s3_bucket: S3Bucket, source: Path) -> S3Bucket:
    """The source's files; the server keeps the CRC32 of each."""
    for path in source.iterdir():
        s3_bucket.put(f"m/{path.name}", path.read_bytes())
    return s3_bucket


class Proxied:
    """The server behind a proxy that counts the bytes of ranges that were asked for."""

    def __init__(self, bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        self._bucket, self._monkeypatch = bucket, monkeypatch
        self.asked = 0

    @contextmanager
    def spoiling(self, plan: Plan = lambda number, head: None) -> Iterator[FaultProxy]:
        target = urlsplit(self._bucket.server.endpoint)
        assert target.hostname is not None
        assert target.port is not None
        self.asked = 0

        def counting(number: int, head: bytes) -> Fault | None:
            found = re.search(rb"range: bytes=(\d+)-(\d+)", head, re.IGNORECASE)
            if found is not None:
                self.asked += int(found[2]) - int(found[1]) + 1
            return plan(number, head)

        with run_fault_proxy(target.hostname, target.port, counting) as proxy:
            self._monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
            yield proxy

    def stage(self, folder: Path, **options: object) -> streamload.Staged:
        given = {"read_bytes": PIECE, "memory_bytes": 1 << 20, **options}
        return streamload.stage_checkpoint(f"{self._bucket.uri}/m", folder, **given)  # type: ignore[arg-type]


@pytest.fixture
def proxied(bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> Proxied:
    # Every failure is told at once: the tests count, and do not wait.
    monkeypatch.setattr(fetch, "RetryPolicy", lambda: RetryPolicy(attempts=2, first_backoff_s=0.001))
    return Proxied(bucket, monkeypatch)


def test_verified_and_resumed(proxied: Proxied, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    index_bytes = (source / INDEX).stat().st_size

    # The last piece of the second shard never comes.
    def end(number: int, head: bytes) -> Fault | None:
        return Fault("reset") if SECOND.encode() in head and f"bytes={10 * PIECE}-".encode() in head else None

    with proxied.spoiling(end), pytest.raises(TransientError) as caught:
        proxied.stage(folder, concurrency=1)
    assert (caught.value.object, caught.value.attempts) == (SECOND, 2)
    assert (folder / FIRST).read_bytes() == (source / FIRST).read_bytes()
    assert not (folder / SECOND).exists()

    with proxied.spoiling():
        staged = proxied.stage(folder)
        # That piece, what is behind the shard in order, and the index once more.
        rest = (source / SECOND).stat().st_size - 10 * PIECE
        behind = sum((source / name).stat().st_size for name in (INDEX, "tokenizer.model"))
        assert proxied.asked == rest + behind + index_bytes
        assert staged.fetched_bytes == rest + behind
        assert same(source, folder)
        assert staged.verified == {"the store's CRC32 of the whole object": (source / SECOND).stat().st_size + behind}
        # And then it is one listing.
        again = proxied.stage(folder)
        assert (again.state, again.requests) == ("present", 1)
        assert again.first_request_s is not None


def test_a_bit_that_flipped_is_read_again(proxied: Proxied, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"

    def flip(number: int, head: bytes) -> Fault | None:
        at = b"bytes=0-" in head and FIRST.encode() in head
        return Fault("flip", passed_bytes=2000) if at else None

    with proxied.spoiling(flip), pytest.raises(ChecksumError, match="CRC32") as caught:
        proxied.stage(folder)
    assert caught.value.object == FIRST
    assert not {FIRST, "READY"} & set(os.listdir(folder))
    with proxied.spoiling():
        staged = proxied.stage(folder)
    assert staged.fetched_bytes >= (source / FIRST).stat().st_size
    assert same(source, folder)


@pytest.mark.parametrize("told", ["option", "variable", "as KServe does"])
def test_a_public_bucket(bucket: S3Bucket, clean_aws_env: pytest.MonkeyPatch, tmp_path: Path, told: str) -> None:
    statement = {"Effect": "Allow", "Principal": "*", "Action": "*", "Resource": f"arn:aws:s3:::{bucket.name}*"}
    bucket.client.delete_public_access_block(Bucket=bucket.name)
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    bucket.client.put_bucket_policy(Bucket=bucket.name, Policy=policy)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        clean_aws_env.delenv(name)
    with pytest.raises(CredentialsError):
        streamload.stage_checkpoint(f"{bucket.uri}/m", tmp_path / "folder")
    if told != "option":
        clean_aws_env.setenv("STREAMLOAD_S3_ANONYMOUS" if told == "variable" else "awsAnonymousCredential", "true")
        staged = streamload.stage_checkpoint(f"{bucket.uri}/m", tmp_path / "folder")
    else:
        staged = streamload.stage_checkpoint(f"{bucket.uri}/m", tmp_path / "folder", s3_anonymous=True)
    assert staged.state == "staged"


def test_out_of_reach(proxied: Proxied, source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    with proxied.spoiling():
        proxied.stage(folder)
    # The proxy is gone: nothing listens there.
    with pytest.raises(TransientError):
        proxied.stage(folder)
    staged = proxied.stage(folder, offline="fallback")
    assert (staged.state, staged.kept_bytes) == ("present", total_bytes(source))
    assert not (folder / unfinished_name(FIRST)).exists()
