"""Run:ai's engine as a source passes the one suite, over files and over S3."""

from __future__ import annotations

import pytest

from streamload.sources import Source
from streamload.sources.local import LocalSource
from streamload.sources.runai import RunaiFileSource, RunaiObjectSource
from streamload.sources.s3 import S3Source
from tests.faultproxy import FaultProxy
from tests.servers import S3Bucket
from tests.sources import test_conformance

# It depends on torch itself.
pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def _files_are_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test has just written is in the page cache, where our own source would read it."""
    monkeypatch.setenv("RUNAI_STREAMER_FS_STRATEGY", "io_uring_direct,libaio_direct,sync_buffered")


class TestRunaiFiles(test_conformance.TestLocalFolder):
    """With every read made by the engine, the smallest too."""

    def open(self) -> Source:
        return RunaiFileSource(str(self.folder), LocalSource(str(self.folder)), small_view_bytes=1)


class TestRunaiS3(test_conformance.TestS3):
    """With nearly every read made by the engine: not those into thousands of views, a request each."""

    @pytest.fixture(autouse=True)
    def _proxy(self, s3_bucket: S3Bucket, engine_proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{engine_proxy.port}")

    def open(self) -> Source:
        uri = f"{self.bucket.uri}/{self.prefix}"
        return RunaiObjectSource(f"runai+{uri}", S3Source(uri), small_view_bytes=1000)
