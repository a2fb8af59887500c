"""Every source passes the one suite."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from streamload.sources import Source, open_source
from streamload.sources.memory import MemorySource
from streamload.testing import FaultSource, SourceConformance
from tests.httpserver import FileServer, run_server
from tests.hubserver import Hub
from tests.servers import S3Bucket


class TestMemory(SourceConformance):
    @pytest.fixture(autouse=True)
    def _store(self) -> None:
        self.objects: dict[str, bytes] = {}

    def open(self) -> Source:
        return MemorySource(self.objects)

    def put(self, key: str, content: bytes) -> None:
        self.objects[key] = content

    def remove(self, key: str) -> None:
        del self.objects[key]


class TestFaultlessFaults(TestMemory):
    """The wrapper that spoils operations adds nothing of its own where it spoils none."""

    def open(self) -> Source:
        return FaultSource(super().open())


class TestLocalFolder(SourceConformance):
    @pytest.fixture(autouse=True)
    def _store(self, tmp_path: Path) -> None:
        self.folder = tmp_path

    def open(self) -> Source:
        return open_source(str(self.folder))

    def put(self, key: str, content: bytes) -> None:
        path = self.folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        # As good tools do it: under another name first. The old file's inode is in use until the new one is there.
        beside = self.folder / "beside"
        beside.write_bytes(content)
        os.replace(beside, path)

    def remove(self, key: str) -> None:
        (self.folder / key).unlink()


class TestLocalFolderOneThread(TestLocalFolder):
    def open(self) -> Source:
        return open_source(f"file://{self.folder}", concurrency=1)


class TestLocalFolderOfLinks(TestLocalFolder):
    """As the Hub's cache lies on disk: names that link to files elsewhere."""

    def put(self, key: str, content: bytes) -> None:
        blobs = self.folder.parent / f"{self.folder.name}-blobs"
        blobs.mkdir(exist_ok=True)
        blob = blobs / str(len(list(blobs.iterdir())))
        blob.write_bytes(content)
        link = self.folder / key
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        link.symlink_to(blob)


class TestS3(SourceConformance):
    @pytest.fixture(autouse=True)
    def _store(self, s3_bucket: S3Bucket) -> None:
        self.bucket = s3_bucket
        self.prefix = "models/llama 3/"

    def open(self) -> Source:
        return open_source(f"{self.bucket.uri}/{self.prefix}")

    def put(self, key: str, content: bytes) -> None:
        self.bucket.put(self.prefix + key, content)

    def remove(self, key: str) -> None:
        self.bucket.remove(self.prefix + key)


class TestHttp(SourceConformance):
    @pytest.fixture(autouse=True)
    def _store(self) -> Iterator[None]:
        with run_server(FileServer()) as self.server:
            yield

    def open(self) -> Source:
        return open_source(f"{self.server.origin}/{quote('models/llama 3')}/")

    def put(self, key: str, content: bytes) -> None:
        self.server.put(f"/models/llama 3/{key}", content)

    def remove(self, key: str) -> None:
        del self.server.files[f"/models/llama 3/{key}"]


class TestHttpWithDatesOnly(TestHttp):
    """A server that gives no ETag: its clock tells versions apart."""

    @pytest.fixture(autouse=True)
    def _store(self) -> Iterator[None]:
        self.clock_s = 1_700_000_000.0
        with run_server(FileServer(tags="weak", conditions=False)) as self.server:
            yield

    def put(self, key: str, content: bytes) -> None:
        self.clock_s += 1.0
        self.server.put(f"/models/llama 3/{key}", content, modified_s=self.clock_s)


class TestHttpWithoutRanges(TestHttp):
    """A server that answers with the whole object: what is small enough is taken out of it."""

    @pytest.fixture(autouse=True)
    def _store(self) -> Iterator[None]:
        with run_server(FileServer(ranges=False)) as self.server:
            yield


class TestHub(SourceConformance):
    """A folder of a revision whose name has slashes."""

    keeps_versions = True

    @pytest.fixture(autouse=True)
    def _store(self, hub: Hub) -> None:
        self.repository = hub.repositories["org/model"]
        self.repository.commit({}, "refs/pr/1")

    def open(self) -> Source:
        return open_source("hf://org/model@refs/pr/1/a folder/")

    def put(self, key: str, content: bytes) -> None:
        self.repository.commit({f"a folder/{key}": content}, "refs/pr/1")

    def remove(self, key: str) -> None:
        self.repository.commit({f"a folder/{key}": None}, "refs/pr/1")


class TestHubIntoItsCache(SourceConformance):
    """What one read puts there, the next one takes from there."""

    keeps_versions = True

    @pytest.fixture(autouse=True)
    def _store(self, hub: Hub) -> None:
        self.repository = hub.repositories["org/model"]
        self.repository.commit({})

    def open(self) -> Source:
        return open_source("hf://org/model", cache=True)

    def put(self, key: str, content: bytes) -> None:
        self.repository.commit({key: content})

    def remove(self, key: str) -> None:
        self.repository.commit({key: None})
