"""gs://, against an emulator: our listing with Google's client, the reads with Run:ai's engine."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

import streamload
from streamload.errors import CredentialsError, NotFoundError, ObjectChangedError
from streamload.loan import Loan
from streamload.sources import Source, SourceObject, open_source
from streamload.sources.runai import RunaiBlobSource
from streamload.testing import SourceConformance
from tests.checkpoints import read_with_safetensors, same_tensor, varied_tensors, write_sharded
from tests.cloud.emulators import run_gcs
from tests.servers import Answer, serve

pytestmark = pytest.mark.cloud


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with run_gcs() as port:
        yield f"http://127.0.0.1:{port}"


@pytest.fixture
def bucket(endpoint: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A new bucket, and the environment in which everybody finds it."""
    anonymous = import_module("google.auth.credentials").AnonymousCredentials()
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", endpoint)
    monkeypatch.setenv("CLOUD_STORAGE_EMULATOR_ENDPOINT", endpoint)
    monkeypatch.setenv("RUNAI_STREAMER_GCS_USE_ANONYMOUS_CREDENTIALS", "true")
    client = import_module("google.cloud.storage").Client(project="tests", credentials=anonymous)
    yield client.create_bucket(f"bucket-{uuid.uuid4().hex}")
    client.close()


class TestGs(SourceConformance):
    @pytest.fixture(autouse=True)
    def _store(self, bucket: Any) -> None:
        self.bucket = bucket

    def open(self) -> Source:
        source = open_source(f"gs://{self.bucket.name}/models/llama 3/")
        assert isinstance(source, RunaiBlobSource)
        # All but those into thousands of views are the engine's. The emulator takes no notice of conditions, so it
        # cannot show that our own reads are refused where the object has changed; see below.
        source._small_view_bytes = 4
        return source

    def put(self, key: str, content: bytes) -> None:
        self.bucket.blob(f"models/llama 3/{key}").upload_from_string(content)

    def remove(self, key: str) -> None:
        self.bucket.blob(f"models/llama 3/{key}").delete()


def test_a_load(bucket: Any, tmp_path: Path) -> None:
    folder = write_sharded(tmp_path / "model", varied_tensors())
    for file in folder.iterdir():
        bucket.blob(f"llama/{file.name}").upload_from_filename(str(file))
    with streamload.stream(f"gs://{bucket.name}/llama", read_bytes=1 << 20) as stream:
        found = dict(stream)
    expected = read_with_safetensors(folder)
    assert found.keys() == expected.keys()
    assert all(same_tensor(found[name], expected[name]) for name in expected)
    assert stream.report.paths["by Run:ai's engine"] > 0
    assert stream.report.verified == {"CRC32C of the whole object": stream.report.total_bytes}


def test_our_own_reads_are_of_one_generation(bucket: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scenario() -> None:
        async with serve(Answer(412, then="close")) as server:
            monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.endpoint)
            async with open_source("gs://bucket/llama") as source:
                object = SourceObject("model.safetensors", 100, "17")
                with pytest.raises(ObjectChangedError, match="the store answered 412"):
                    await source.read(object, 10, 20, Loan([memoryview(bytearray(10))]))
            (head,) = [head for head in server.requests if "alt=media" in head]
            assert "ifGenerationMatch=17" in head
            assert "\r\nrange: bytes=10-19\r\n" in head.lower()

    asyncio.run(scenario())


def test_a_bucket_that_is_not_there(bucket: Any) -> None:
    with pytest.raises(NotFoundError, match="the store answered 404 NotFound"):
        streamload.inspect(f"gs://{bucket.name}-not/llama")


def test_no_credentials(bucket: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("RUNAI_STREAMER_GCS_USE_ANONYMOUS_CREDENTIALS")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "none.json"))

    async def scenario() -> None:
        async with open_source(f"gs://{bucket.name}/llama") as source:
            with pytest.raises(CredentialsError, match="no credentials for Google Cloud"):
                await source.list()

    asyncio.run(scenario())
