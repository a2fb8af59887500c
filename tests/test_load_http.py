"""Loads from a real HTTP server: equal tensors, counted requests, faults on the way."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from aiohttp import web

import streamload
from streamload.checkpoint import MANIFEST_NAME
from streamload.errors import ObjectChangedError
from streamload.pipeline.verify import BY_MANIFEST
from tests.checkpoints import read_with_safetensors, same_tensor, varied_tensors, write_sharded
from tests.cli.programs import Program
from tests.httpserver import FileServer, cut, run_server

NAME = "model-00002-of-00003.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharded(tmp_path_factory.mktemp("http"), varied_tensors())


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, torch.Tensor]:
    return read_with_safetensors(folder)


@pytest.fixture
def server(folder: Path, clean_aws_env: pytest.MonkeyPatch) -> Iterator[FileServer]:
    """Serves the checkpoint."""
    server = FileServer()
    for file in folder.iterdir():
        server.put(f"/llama/{file.name}", file.read_bytes())
    with run_server(server):
        yield server


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(same_tensor(found[name], expected[name]) for name in found)


def test_a_folder_and_its_report(server: FileServer, expected: dict[str, torch.Tensor]) -> None:
    uri = f"http://user:secret@{server.origin.removeprefix('http://')}/llama?sig=secret"
    with streamload.stream(uri, read_bytes=100_000, http_headers={"X-Token": "secret"}) as stream:
        check(dict(stream), expected)
    report = stream.report
    assert "secret" not in str(report) + str(report.to_dict())
    assert report.source == "http"
    # The index, its size before; for each of three files its size, its header and its reads; a manifest is looked for.
    assert report.requests == len(server.seen) == 2 + 3 * 2 + report.reads + 1
    assert {seen.query for seen in server.seen} == {"sig=secret"}
    assert {seen.headers["x-token"] for seen in server.seen} == {"secret"}
    assert list(report.paths) == ["from the socket into place"]
    assert report.verified == {}
    assert sum(report.unverified.values()) == report.total_bytes


def test_a_manifest_beside_it_is_found(server: FileServer, folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    streamload.write_manifest(copy)
    server.put(f"/llama/{MANIFEST_NAME}", (copy / MANIFEST_NAME).read_bytes())
    with streamload.stream(f"{server.origin}/llama", verify="require") as stream:
        assert dict(stream)
    assert stream.report.verified == {BY_MANIFEST: stream.report.total_bytes}


def test_small_files_from_a_server_that_ignores_ranges(server: FileServer, expected: dict[str, torch.Tensor]) -> None:
    server.ranges = False
    check(streamload.load(f"{server.origin}/llama"), expected)
    assert {seen.status for seen in server.seen} == {200, 404}


def test_one_file(server: FileServer, folder: Path) -> None:
    check(streamload.load(f"{server.origin}/llama/{NAME}"), streamload.load(folder / NAME))


def test_answers_that_break_off_are_gone_on_with(server: FileServer, expected: dict[str, torch.Tensor]) -> None:
    """Some after less than they have, some after all of it; whoever is late meanwhile may be asked for again."""
    broken = 0

    async def spoil(request: web.Request) -> web.StreamResponse | None:
        nonlocal broken
        if broken == 3 or request.path.endswith(".json") or request.headers["Range"] == "bytes=0-0":
            return None
        broken += 1
        file = server.files[request.path]
        return await cut(request, file.content, {"ETag": f'"{file.tag}"'}, after=70_000)

    server.instead = spoil
    with streamload.stream(f"{server.origin}/llama") as stream:
        check(dict(stream), expected)
    assert broken == 3
    assert stream.report.retries


def test_an_object_that_changes_in_the_middle_ends_the_load(server: FileServer) -> None:
    async def change(request: web.Request) -> web.StreamResponse | None:
        if request.headers["Range"].startswith("bytes=0-"):
            return None
        server.put(f"/llama/{NAME}", server.files[f"/llama/{NAME}"].content[:-1] + b"!")
        server.instead = None
        return None

    server.instead = change
    with pytest.raises(ObjectChangedError, match=NAME):
        streamload.load(f"{server.origin}/llama", read_bytes=100_000)


def test_the_command_line(server: FileServer, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = Program(capsys)
    found, local = cli("load", f"{server.origin}/llama", "--json").json, cli("load", folder, "--json").json
    assert found["state"] == "done"
    assert all(found[name] == local[name] for name in ("tensors", "nbytes", "files"))
    told = cli("doctor", f"{server.origin}/llama").out
    assert "ranges" in told
    assert "honoured" in told
