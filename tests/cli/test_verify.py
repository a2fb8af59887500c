"""``streamload manifest`` and ``streamload verify``; they need no torch."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.models import FIRST, SECOND
from tests.cli.programs import Program

MANIFEST = "streamload-manifest.json"


def test_write_and_verify(cli: Program, model: Path) -> None:
    written = cli("manifest", model, "--quiet")
    assert written.code == 0
    assert written.out.startswith(f"{model}: {MANIFEST} tells of 2 files, 5 tensors, 5 blocks (")
    assert written.err == ""
    found = cli("verify", model, "--quiet")
    assert found.code == 0
    assert found.out.splitlines()[0] == f"{model}: 2 files, ok"


def test_json(cli: Program, model: Path) -> None:
    written = cli("manifest", model, "--json").json
    assert (written["manifest"], written["files"], written["tensors"]) == (MANIFEST, 2, 5)
    found = cli("verify", model, "--json").json
    assert found["ok"] is True
    assert [file["key"] for file in found["files"]] == [FIRST, SECOND]


def test_what_is_wrong_is_named(cli: Program, model: Path) -> None:
    cli("manifest", model)
    content = bytearray((model / FIRST).read_bytes())
    content[-1] ^= 1
    (model / FIRST).write_bytes(content)
    found = cli("verify", model, "--quiet")
    assert found.code == 1
    assert found.out.splitlines()[0] == f"{model}: 2 files, 1 bad block"
    assert "model.norm.weight" in found.out
    assert "model.embed.weight" not in found.out
    assert cli("verify", model, "--json").json["files"][0]["bad"][0]["tensors"] == ["model.norm.weight"]


def test_what_could_not_be_verified_is_a_failure_and_told(cli: Program, model: Path) -> None:
    found = cli("verify", model, "--quiet")
    assert found.code == 1
    assert "not all of it could be verified" in found.out
    assert "there is no manifest" in found.out


def test_another_place(cli: Program, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "m.json"
    assert cli("manifest", model, "--output", output, "--memory-bytes", "1MiB").code == 0
    assert not (model / MANIFEST).exists()
    assert cli("verify", model, "--manifest", output, "--memory-bytes", "1MiB").code == 0


@pytest.mark.parametrize("command", ["manifest", "verify"])
def test_errors(cli: Program, tmp_path: Path, command: str) -> None:
    found = cli(command, tmp_path / "none")
    assert found.code == 1
    assert "none" in found.error
    assert cli(command, tmp_path, "--memory-bytes", "1").code == 2
    help_ = cli(command, "--help")
    assert help_.code == 0
    assert "exit codes:" in help_.out
    assert max(map(len, help_.out.splitlines())) <= 80
