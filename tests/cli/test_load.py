"""``streamload load``."""

from __future__ import annotations

import json
import os
import pty
from pathlib import Path
from typing import Any

import pytest

from tests.cli.models import FIRST, SECOND, shard
from tests.cli.programs import TIMEOUT_S, Outcome, Program, program

pytestmark = pytest.mark.torch

_MIB = 1 << 20


def _trace(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    assert isinstance(found, dict)
    return found


def _lanes(found: dict[str, Any]) -> list[str]:
    return [row["args"]["name"] for row in found["traceEvents"] if row["name"] == "thread_name"]


class TestResult:
    def test_the_report(self, cli: Program, model: Path) -> None:
        found = cli("load", model)
        assert found.code == 0
        assert found.out.startswith(f"{model} -> cpu: done\n")
        assert "5 tensors, 40.1 KiB from 2 files" in found.out

    def test_one_of_each(self, cli: Program, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(shard({"only": ("U8", (1024,))}))
        found = cli("load", tmp_path, "--concurrency", "1")
        assert "  delivered      1 tensor, 1.0 KiB from 1 file in " in found.out
        assert "  at once        1 read\n" in found.out
        assert " 1 of 1 tensor taken, " in found.err

    def test_json(self, cli: Program, model: Path) -> None:
        found = cli("load", model, "--json")
        assert found.code == 0
        report = found.json
        assert (report["state"], report["error"]) == ("done", None)
        assert (report["files"], report["tensors"], report["nbytes"]) == (2, 5, 41020)
        assert report["total_bytes"] == report["nbytes"]

    def test_options_reach_the_load(self, cli: Program, model: Path) -> None:
        report = cli(
            *("load", model, "--json", "--include", "*.weight", "--exclude", "*.norm.*", "--memory-bytes", "2MiB"),
            *("--read-bytes", "4096", "--concurrency", "2", "--order", "file", "--verify", "off"),
        ).json
        assert (report["tensors"], report["nbytes"]) == (3, 40000)
        assert report["memory_bytes"] == 2 * _MIB
        assert report["reads"] == 5 + 3 + 3

    def test_a_rank_of_a_pre_sharded_checkpoint(self, cli: Program, tmp_path: Path) -> None:
        for rank in range(12):
            for part in range(2):
                content = shard({f"{part}.weight": ("U8", (100 * rank + part,))})
                (tmp_path / f"model-rank-{rank}-part-{part}.safetensors").write_bytes(content)
                (tmp_path / f"mine.{rank}.{part}.safetensors").write_bytes(content)
        for more in ((), ("--pattern", "mine.{tp_rank}.{part}.safetensors")):
            found = cli("load", tmp_path, "--json", "--rank", "11", "--world-size", "12", *more)
            assert (found.json["files"], found.json["nbytes"]) == (2, 2201)
        refused = cli("load", tmp_path, "--rank", "3", "--world-size", "4")
        assert refused.code == 1
        assert "made for more than 4 ranks" in refused.err

    def test_a_tensor_above_the_limit(self, cli: Program, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(shard({"large": ("U8", (2 * _MIB,))}))
        given = ("load", tmp_path, "--json", "--memory-bytes", "1MiB")
        assert cli(*given).json["raised_memory_bytes"] >= 2 * _MIB
        refused = cli(*given, "--strict-memory")
        assert refused.code == 1
        assert "strict_memory" in refused.error
        assert refused.json["state"] == "failed"

    def test_from_s3(self, cli: Program, model: Path, s3_bucket: Any) -> None:
        for path in model.iterdir():
            s3_bucket.put(f"llama/{path.name}", path.read_bytes())
        report = cli("load", f"{s3_bucket.uri}/llama", "--json").json
        assert (report["source"], report["tensors"], report["nbytes"]) == ("s3", 5, 41020)


class TestProgress:
    def test_log_lines_where_there_is_no_terminal(self, cli: Program, model: Path) -> None:
        lines = cli("load", model).err.splitlines()
        assert lines != []
        assert all(f" streamload.progress: {model}: " in line for line in lines)
        assert "40.1 KiB of 40.1 KiB (100%), 5 of 5 tensors taken" in lines[-1]
        assert sum("100%" in line for line in lines) == 1

    def test_quiet(self, cli: Program, model: Path) -> None:
        assert cli("load", model, "--quiet").err == ""

    def test_a_bar_on_a_terminal(self, model: Path) -> None:
        terminal, end = pty.openpty()
        with os.fdopen(end, "w") as stderr:
            environment = {"TERM": "xterm-256color", "COLUMNS": "100"}
            with program("load", model, "--json", environment=environment, stderr=stderr) as process:
                stderr.close()
                shown = _read_all(terminal)
                out, _ = process.communicate(timeout=TIMEOUT_S)
        assert process.returncode == 0
        assert json.loads(out)["state"] == "done"
        assert "━" in shown
        assert "5/5 tensors" in shown
        assert "streamload.progress" not in shown
        # What was hidden is shown again.
        assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")


def _read_all(terminal: int) -> str:
    """All that is written to a terminal until nobody has it open any more."""
    pieces: list[bytes] = []
    with os.fdopen(terminal, "rb", buffering=0) as master:
        while True:
            try:
                piece = master.read(4096)
            except OSError:  # EIO: the other end is closed
                piece = b""
            if not piece:
                return b"".join(pieces).decode()
            pieces.append(piece)


class TestTrace:
    def test_has_a_lane_for_each_that_works(self, cli: Program, model: Path, tmp_path: Path) -> None:
        path = tmp_path / "trace.json"
        assert cli("load", model, "--trace", path, "--read-bytes", "4096", "--concurrency", "2").code == 0
        found = _trace(path)
        assert _lanes(found)[:2] == ["engine", "consumer"]
        assert {"header 0", "header 1", "worker 0", "worker 1"} >= set(_lanes(found)[2:]) != set()
        spans = [row for row in found["traceEvents"] if row["ph"] == "X"]
        assert {row["cat"] for row in spans} == {"list", "header", "read", "consumer"}
        assert all(row["ts"] >= 0 and row["dur"] > 0 for row in spans)
        reads = [row["args"] for row in spans if row["cat"] == "read"]
        assert sum(row["bytes"] for row in reads) == 41020
        assert {row["object"] for row in reads} == {FIRST, SECOND}

    def test_of_a_load_that_failed(self, cli: Program, model: Path, tmp_path: Path) -> None:
        (model / SECOND).write_bytes((model / SECOND).read_bytes()[:-1])
        path = tmp_path / "trace.json"
        failed = cli("load", model, "--trace", path)
        assert failed.code == 1
        assert "cut short" in failed.error
        assert "worker 0" not in _lanes(_trace(path))
        assert _lanes(_trace(path))[0] == "engine"

    def test_a_place_where_it_cannot_go(self, cli: Program, model: Path, tmp_path: Path) -> None:
        for path, problem in [
            (tmp_path / "nowhere" / "trace.json", f"there is no directory {tmp_path / 'nowhere'}"),
            (tmp_path, "this is a directory"),
        ]:
            found = cli("load", model, "--trace", path)
            assert (found.code, found.out) == (2, "")
            assert found.err.count("\n") == 1
            assert str(path) in found.error
            assert problem in found.error

    def test_a_place_that_turns_out_to_be_full(self, cli: Program, model: Path) -> None:
        found = cli("load", model, "--json", "--trace", "/dev/full")
        assert found.code == 1
        assert found.json["state"] == "done"
        assert found.error == "--trace /dev/full: No space left on device"


class TestFailure:
    def test_the_report_comes_as_json_too(self, cli: Program, model: Path) -> None:
        (model / SECOND).unlink()
        found = cli("load", model, "--json")
        assert found.code == 1
        assert found.json["state"] == "failed"
        assert found.json["error"] == found.error
        assert found.json["tensors"] == 0

    def test_text_is_the_error_alone(self, cli: Program, model: Path) -> None:
        (model / SECOND).unlink()
        found = cli("load", model)
        assert (found.code, found.out) == (1, "")
        assert SECOND in found.error

    def test_a_device_that_does_not_exist(self, cli: Program, model: Path) -> None:
        found = cli("load", model, "--device", "cuda:99")
        assert (found.code, found.out) == (1, "")
        assert "device" in found.error

    @pytest.mark.parametrize("device", ["cuda:-1", "gpu", "mps", "foo"])
    def test_a_device_that_cannot_be(self, cli: Program, model: Path, device: str) -> None:
        found = cli("load", model, "--device", device)
        assert (found.code, found.out) == (2, "")
        assert found.error == f"device={device!r} is not cpu, cuda or cuda:N"

    def test_a_dtype_that_torch_lacks(self, cli: Program, tmp_path: Path) -> None:
        (tmp_path / "a.safetensors").write_bytes(shard({"model.odd": ("F6_E2M3", (4,))}))
        found = cli("load", tmp_path)
        assert (found.code, found.out) == (1, "")
        assert "model.odd" in found.error
        assert "F6_E2M3" in found.error

    def test_nothing_is_loaded_where_one_header_does_not_stand(self, cli: Program, model: Path) -> None:
        (model / FIRST).write_bytes(b"\xff" * 100)
        report = cli("load", model, "--json").json
        assert (report["tensors"], report["reads"], report["first_tensor_s"]) == (0, 0, None)

    def test_out_of_time(self, cli: Program, model: Path) -> None:
        found = cli("load", model, "--deadline-s", "1e-9")
        assert found.code == 1
        assert "deadline_s" in found.error


@pytest.mark.parametrize("wrong", [("--concurrency", "0"), ("--device", "foo"), ("--trace", "/"), ()])
def test_wrong_use_is_told_before_torch_is_imported(wrong: tuple[str, ...]) -> None:
    """It takes seconds."""
    find = "{'find_spec': lambda self, name, *_: os._exit(77) if name == 'torch' else None}"
    refuse = f"sys.meta_path.insert(0, type('', (), {find})())"
    code = f"import os, sys; {refuse}; from streamload.cli import main; sys.exit(main())"
    with program("load", "/nowhere" if wrong else "ftp://host/model", *wrong, python=("-c", code)) as process:
        found = Outcome(*_ended(process))
    assert (found.code, found.out) == (2, "")
    assert found.error


def test_without_torch(model: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from streamload.cli import main; sys.exit(main())"
    with program("load", model, python=("-c", code)) as process:
        found = Outcome(*_ended(process))
    assert (found.code, found.out) == (1, "")
    assert "pip install 'streamload[torch]'" in found.error


def _ended(process: Any) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=TIMEOUT_S)
    return process.returncode, out, err
