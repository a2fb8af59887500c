"""``streamload doctor``; what it finds is the concern of the tests of `streamload.doctor`."""

from __future__ import annotations

from pathlib import Path

import pytest

import streamload
from streamload import Diagnosis, Finding
from tests.cli.programs import Program


def _finding(monkeypatch: pytest.MonkeyPatch, **given: bool) -> None:
    diagnosis = Diagnosis(tuple(Finding("host", name, "value\x1b[2J", ok=ok) for name, ok in given.items()))
    monkeypatch.setattr(streamload, "doctor", lambda uri, **options: diagnosis)


def test_in_order(cli: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    _finding(monkeypatch, memory=True)
    found = cli("doctor")
    assert (found.code, found.err) == (0, "")
    assert found.out == "host\n  memory  value\\x1b[2J\n\neverything is in order\n"


def test_something_is_wrong(cli: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    _finding(monkeypatch, memory=True, proxy=False)
    found = cli("doctor", "s3://bucket")
    assert (found.code, found.err) == (1, "")
    assert "! proxy " in found.out
    assert found.out.endswith("! needs attention: 1 of 2\n")


@pytest.mark.parametrize("ok", [True, False])
def test_json(cli: Program, monkeypatch: pytest.MonkeyPatch, ok: bool) -> None:
    _finding(monkeypatch, memory=ok)
    found = cli("doctor", "--json")
    assert (found.code, found.err) == (0 if ok else 1, "")
    assert found.json["ok"] is ok
    assert found.json["findings"][0]["name"] == "memory"


def test_a_checkpoint_that_is_not_there(cli: Program, tmp_path: Path) -> None:
    found = cli("doctor", tmp_path, "--json", "--concurrency", "3")
    assert (found.code, found.err) == (1, "")
    wrong = [each for each in found.json["findings"] if each["topic"] == "checkpoint"]
    assert [each["name"] for each in wrong] == [str(tmp_path)]
    assert {"topic": "options", "name": "concurrency", "value": "3", "note": "argument", "ok": True} in found.json[
        "findings"
    ]
