"""Loads from the Hub: equal tensors, SHA-256, the cache, and the variables that the ecosystem knows."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from aiohttp import web

import streamload
from streamload.errors import ChecksumError, IndexFileError
from streamload.pipeline.verify import BY_SHA256
from tests.checkpoints import read_with_safetensors, same_tensor, varied_tensors, write_sharded
from tests.httpserver import cut
from tests.hubserver import Hub, sha256

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharded(tmp_path_factory.mktemp("hub"), varied_tensors())


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, torch.Tensor]:
    return read_with_safetensors(folder)


@pytest.fixture
def model(hub: Hub, folder: Path) -> Hub:
    """The Hub, with the checkpoint and the same weights once more, as many repositories have them."""
    files: dict[str, bytes | None] = {file.name: file.read_bytes() for file in folder.iterdir()}
    hub.repositories["org/model"].commit(files | {"original/consolidated.safetensors": b"", "config.json": b"{}"})
    return hub


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(same_tensor(found[name], expected[name]) for name in found)


def test_a_model_and_its_report(model: Hub, expected: dict[str, torch.Tensor]) -> None:
    with streamload.stream("hf://org/model", read_bytes=100_000) as stream:
        check(dict(stream), expected)
    report = stream.report
    assert report.source == "hf"
    assert list(report.paths) == ["from the socket into place"]
    assert report.verified == {}
    # The revision; the index; for each of three files its address, its header and its reads.
    assert report.requests == 1 + 1 + 3 + 3 + report.reads


@pytest.mark.parametrize("memory_bytes", [None, 1 << 20])
def test_sha256_of_all_that_comes_in_any_order(
    model: Hub, expected: dict[str, torch.Tensor], memory_bytes: int | None
) -> None:
    with streamload.stream("hf://org/model", verify="sha256", read_bytes=20_000, memory_bytes=memory_bytes) as stream:
        check(dict(stream), expected)
    assert stream.report.verified == {BY_SHA256: stream.report.total_bytes}
    check(streamload.load("hf://org/model", verify="require"), expected)


def test_sha256_finds_one_wrong_bit(model: Hub) -> None:
    repository = model.repositories["org/model"]
    content = repository.commits[repository.refs["main"]][SHARD]

    async def spoiled(request: web.Request) -> web.StreamResponse | None:
        if request.path[1:] != sha256(content):
            return await model.answer_store(request)
        model.store.put(request.path, content[:-1] + bytes([content[-1] ^ 1]))
        return None

    model.store.instead = spoiled
    with pytest.raises(ChecksumError, match=f"has the SHA-256 .* is {sha256(content)}") as caught:
        streamload.load("hf://org/model", verify="sha256")
    assert caught.value.object == SHARD
    # Who does not ask for it does not get it.
    streamload.load("hf://org/model")


def test_a_part_of_a_file_has_no_sha256(model: Hub) -> None:
    with streamload.stream("hf://org/model", verify="sha256", include=["model.layers.*"]) as stream:
        assert len(dict(stream)) == 18
    assert stream.report.verified == {}


@pytest.mark.parametrize("cached", [False, True])
def test_a_file_with_a_gap_has_no_sha256_and_the_others_have(
    model: Hub, folder: Path, expected: dict[str, torch.Tensor], cached: bool
) -> None:
    """A gap that is read through from the network is passed over in a file."""
    if cached:
        streamload.load("hf://org/model", cache=True)
    with streamload.stream("hf://org/model", verify="sha256", exclude=["model.layers.2.mlp.up_proj.weight"]) as stream:
        assert len(dict(stream)) == len(expected) - 1
    report = stream.report
    of_shard = streamload.inspect(folder / SHARD).plan.tensor_bytes
    assert report.verified == {BY_SHA256: sum(tensor.nbytes for tensor in expected.values()) - of_shard}


def test_into_the_cache_and_from_it(model: Hub, expected: dict[str, torch.Tensor], tmp_path: Path) -> None:
    """With answers that break off, from the byte that was reached."""
    broken, repository = 0, model.repositories["org/model"]

    async def spoil(request: web.Request) -> web.StreamResponse | None:
        nonlocal broken
        if broken == 3:
            return await model.answer_store(request)
        broken += 1
        whole = next(
            content
            for content in model.repositories["org/model"].commits[repository.refs["main"]].values()
            if sha256(content) == request.path[1:]
        )
        return await cut(request, whole, {}, after=70_000)

    model.store.instead = spoil
    check(streamload.load("hf://org/model", cache=True, download_dir=tmp_path / "own"), expected)
    assert broken == 3
    model.store.seen.clear()
    with streamload.stream("hf://org/model", download_dir=tmp_path / "own", verify="sha256") as stream:
        check(dict(stream), expected)
    assert model.store.seen == []
    assert list(stream.report.paths) == ["from the cache"]
    assert stream.report.verified == {BY_SHA256: stream.report.total_bytes}


def test_patterns_leave_files_out_that_the_index_names(model: Hub) -> None:
    with pytest.raises(IndexFileError, match=SHARD):
        streamload.load("hf://org/model", ignore_patterns=["*-00002-*"])


def test_the_variables_that_all_of_the_hubs_tools_know(model: Hub, folder: Path, tmp_path: Path) -> None:
    """In a process of its own: huggingface_hub reads most of them when it is imported."""
    repository = model.repositories["org/model"]
    repository.private, repository.gated = True, True
    repository.members = model.tokens = {"hf_secret"}
    environment = {
        **os.environ,
        "HF_ENDPOINT": model.endpoint,
        "HF_TOKEN": "hf_secret",
        "HF_HOME": str(tmp_path / "home"),
        "HF_HUB_CACHE": str(tmp_path / "cache"),
    }

    def run(command: str, *options: str, code: int = 0, **more: str) -> dict[str, Any]:
        done = subprocess.run(
            [sys.executable, "-m", "streamload", command, "hf://org/model", "--json", *options],
            env=environment | more,
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )
        assert done.returncode == code, done.stderr
        assert "hf_secret" not in done.stdout + done.stderr
        found: dict[str, Any] = json.loads(done.stdout or "{}")
        return found

    local = streamload.inspect(folder).to_dict()
    run("inspect", HF_TOKEN="", code=1)
    loaded = run("load", "--cache", "--verify", "sha256", "--quiet")
    assert loaded["state"] == "done"
    assert loaded["verified"] == {BY_SHA256: local["bytes"]}
    offline = run("inspect", HF_HUB_OFFLINE="1", HF_ENDPOINT="http://127.0.0.1:1")
    assert offline["files"] == local["files"]
    assert (tmp_path / "cache/models--org--model/refs/main").read_text() == repository.refs["main"]
