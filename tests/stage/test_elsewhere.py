"""Staging from a web server, which lists nothing, and from the Hub, which keeps SHA-256 and no other checksum."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from aiohttp import web

import streamload
from streamload.errors import ChecksumError
from streamload.pipeline.verify import BY_SHA256
from tests.httpserver import FileServer, run_server
from tests.hubserver import Hub, sha256
from tests.stage.models import FIRST, INDEX, SECOND, STAGED, names, shard_of, source_of


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return source_of(tmp_path / "source")


@pytest.fixture
def server(source: Path, clean_aws_env: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """Serves the checkpoint."""
    server = FileServer()
    for file in source.iterdir():
        server.put(f"/llama/{file.name}", file.read_bytes())
    with run_server(server):
        yield server


class TestAWebServer:
    @pytest.mark.parametrize("missing", [404, 403])
    def test_what_lies_beside_the_weights_is_looked_for_by_name(
        self, server: FileServer, source: Path, tmp_path: Path, missing: int
    ) -> None:
        async def answer(request: web.Request) -> web.StreamResponse | None:
            there = request.path in server.files
            return None if there else web.Response(status=missing)

        server.instead = answer
        staged = streamload.stage_checkpoint(f"{server.origin}/llama", tmp_path / "folder", include=[])
        # Nobody would guess the name of the other one.
        assert names(tmp_path / "folder") == STAGED - {"empty.txt"} | {"READY"}
        assert all(
            (tmp_path / "folder" / name).read_bytes() == (source / name).read_bytes() for name in (FIRST, SECOND)
        )
        assert staged.files == len(STAGED) - 1
        again = streamload.stage_checkpoint(f"{server.origin}/llama", tmp_path / "folder")
        assert again.state == "present"

    def test_without_weights(self, server: FileServer, tmp_path: Path) -> None:
        """As for an engine whose weights come by another way."""
        streamload.stage_checkpoint(f"{server.origin}/llama", tmp_path / "folder", exclude=["*.safetensors"])
        assert names(tmp_path / "folder") == {INDEX, "config.json", "tokenizer.model", "READY"}

    def test_a_single_file_of_a_folder_comes_with_what_lies_beside_it(self, server: FileServer, tmp_path: Path) -> None:
        server.put("/single/model.safetensors", shard_of("x", 1000, 1))
        server.put("/single/config.json", b"{}")
        server.put("/single/notes.txt", b"mine")
        streamload.stage_checkpoint(f"{server.origin}/single", tmp_path / "folder")
        assert names(tmp_path / "folder") == {"model.safetensors", "config.json", "READY"}
        # Named outright, without a wildcard, others are looked for as well.
        streamload.stage_checkpoint(f"{server.origin}/single", tmp_path / "notes", include=["notes.txt"])
        assert names(tmp_path / "notes") == {"notes.txt", "READY"}

    def test_a_named_file_comes_alone(self, server: FileServer, tmp_path: Path) -> None:
        streamload.stage_checkpoint(f"{server.origin}/llama/{FIRST}", tmp_path / "folder")
        assert names(tmp_path / "folder") == {FIRST, "READY"}
        assert not any("config" in seen.path for seen in server.seen)


class TestTheHub:
    @pytest.fixture
    def model(self, hub: Hub, source: Path) -> Hub:
        hub.repositories["org/model"].commit({name: (source / name).read_bytes() for name in STAGED})
        return hub

    @pytest.mark.parametrize("verify", ["auto", "require", "sha256"])
    def test_weights_are_compared_with_its_sha256(self, model: Hub, source: Path, tmp_path: Path, verify: str) -> None:
        staged = streamload.stage_checkpoint("hf://org/model", tmp_path / "folder", verify=verify)  # type: ignore[arg-type]
        weights = sum((source / name).stat().st_size for name in (FIRST, SECOND))
        assert staged.verified[f"the store's {BY_SHA256}"] >= weights
        assert names(tmp_path / "folder") == {*STAGED, "READY"}

    def test_one_wrong_bit(self, model: Hub, source: Path, tmp_path: Path) -> None:
        content = (source / SECOND).read_bytes()

        async def spoiled(request: web.Request) -> web.StreamResponse | None:
            if request.path[1:] != sha256(content):
                return await model.answer_store(request)
            model.store.put(request.path, content[:-1] + bytes([content[-1] ^ 1]))
            return None

        answer, model.store.instead = model.store.instead, spoiled
        with pytest.raises(ChecksumError, match=f"the store's is {sha256(content)}") as caught:
            streamload.stage_checkpoint("hf://org/model", tmp_path / "folder")
        assert caught.value.object == SECOND
        assert not {SECOND, "READY"} & names(tmp_path / "folder")
        model.store.instead = answer
        staged = streamload.stage_checkpoint("hf://org/model", tmp_path / "folder")
        assert staged.fetched_bytes >= len(content)
        assert (tmp_path / "folder" / SECOND).read_bytes() == content
