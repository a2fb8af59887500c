"""``streamload stage`` as a program: what a pod sees of it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import streamload
from streamload.cli import container
from tests.cli.programs import TIMEOUT_S, Program, program
from tests.stage.models import names, same, source_of, total_bytes


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return source_of(tmp_path / "source")


class TestUse:
    def test_the_arguments_of_a_storage_initializer(self, cli: Program, source: Path, tmp_path: Path) -> None:
        other = source_of(tmp_path / "other", seed=7)
        done = cli("stage", source, tmp_path / "a", f"file://{other}", tmp_path / "b")
        assert done.code == 0
        assert same(source, tmp_path / "a")
        assert same(other, tmp_path / "b")
        assert [json.loads(line)["files"] for line in done.out.splitlines()] == [6, 6]
        again = cli("stage", source, tmp_path / "a", "--log", "text", "--quiet")
        assert (again.code, again.err) == (0, "")
        assert "all of it is there" in again.out

    def test_the_environment_alone(
        self, cli: Program, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for name, value in {
            "STAGE_URI": str(source),
            "STAGE_DIR": str(tmp_path / "folder"),
            "STAGE_INCLUDE": "*.json,tokenizer*",
            "STAGE_EXCLUDE": "*.index.json",
            "STAGE_LOG": "text",
            "MEMORY_BYTES": "2MiB",
        }.items():
            monkeypatch.setenv(f"STREAMLOAD_{name}", value)
        assert cli("stage").code == 0
        assert names(tmp_path / "folder") == {"config.json", "tokenizer.model", "READY"}
        # What is given counts more.
        assert cli("stage", source, tmp_path / "more", "--include", "*.json").code == 0
        assert names(tmp_path / "more") == {"config.json", "READY"}

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            ((), "say what to stage"),
            (("a",), "neither a folder to stage into nor a cache"),
            (("a", "b", "c"), "3 places are no pairs"),
            (("gopher://a", "b"), "nothing serves"),
            (("a", "s3://b/c"), "no folder of this machine"),
            (("a", "b", "--keep-bytes", "1GB"), "without a cache"),
        ],
    )
    def test_wrong_use(self, cli: Program, tmp_path: Path, arguments: tuple[str, ...], said: str) -> None:
        done = cli("stage", *arguments, "--log", "text", "--termination-log", tmp_path / "words")
        assert done.code == 2
        assert said in done.error
        assert (tmp_path / "words").read_text() == done.error

    def test_lines_of_json(self, cli: Program, source: Path, tmp_path: Path) -> None:
        done = cli("stage", source, tmp_path / "folder", "--log", "json")
        lines = [json.loads(line) for line in done.err.splitlines()]
        assert {line["level"] for line in lines} == {"info"}
        assert sum(line.get("nbytes", 0) for line in lines) == total_bytes(source)
        assert lines[-1]["read_bytes"] == lines[-1]["total_bytes"] == total_bytes(source)
        assert done.json["state"] == "staged"
        failed = cli("stage", tmp_path / "missing", tmp_path / "folder", "--log", "json")
        assert json.loads(failed.err.splitlines()[-1])["level"] == "error"

    def test_the_help_says_it(self, cli: Program) -> None:
        shown = cli("stage", "--help").out
        for word in ("STREAMLOAD_STAGE_URI", "exit codes:", "--on-conflict", "--keep-bytes", "KServe"):
            assert word in shown


class TestLastWords:
    def test_a_wrong_uri(self, cli: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        words = tmp_path / "termination-log"
        monkeypatch.setattr(container, "_TERMINATION_LOG", str(words))
        assert cli("stage", tmp_path / "missing", tmp_path / "folder").code == 1
        assert not words.exists()  # nothing that nobody looks at is made
        words.touch()
        assert cli("stage", tmp_path / "missing", tmp_path / "folder").code == 1
        (line,) = words.read_text().splitlines()
        assert str(tmp_path / "missing") in line
        assert "No such file" in line

    @pytest.mark.parametrize("told", ["argument", "variable", "default"])
    def test_arguments_without_meaning(
        self, cli: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, told: str
    ) -> None:
        words = tmp_path / "words"
        given: list[object] = ["s3://key:secret@models/llama", "--keep-bytes", "plenty"]
        if told == "argument":
            given = ["--termination-log", words, *given]
        elif told == "variable":
            monkeypatch.setenv("STREAMLOAD_STAGE_TERMINATION_LOG", str(words))
        else:
            monkeypatch.setattr(container, "_TERMINATION_LOG", str(words))
            words.touch()
        assert cli("stage", *given).code == 2
        (line,) = words.read_text().splitlines()
        assert "--keep-bytes: 'plenty' is not a number of bytes" in line
        done = cli("stage", "a", "b", "--no-such-option", *given[:-2])
        (line,) = words.read_text().splitlines()
        assert done.err.splitlines()[-1] == f"streamload: error: {line}"
        assert "unrecognized arguments: --no-such-option" in line
        assert "secret" not in line

    def test_a_missing_file_name_is_told_elsewhere(
        self, cli: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        words = tmp_path / "words"
        monkeypatch.setenv("STREAMLOAD_STAGE_TERMINATION_LOG", str(words))
        assert cli("stage", "a", "b", "--termination-log").code == 2
        assert words.read_text() == "argument --termination-log: expected one argument"

    def test_no_credential(self, cli: Program, tmp_path: Path) -> None:
        words = tmp_path / "words"
        done = cli("stage", "s3://AKIAIOSFODNN7EXAMPLE:wJalr/EXAMPLEKEY@models/llama", "x", "--termination-log", words)
        assert done.code == 2
        for text in (words.read_text(), done.err, done.out):
            assert "wJalr" not in text
            assert "EXAMPLEKEY" not in text

    def test_one_that_cannot_be_written_changes_nothing(self, cli: Program, tmp_path: Path) -> None:
        done = cli("stage", tmp_path / "missing", "x", "--termination-log", tmp_path, "--log", "text")
        assert done.code == 1
        assert "cannot be written" in done.err
        assert "No such file" in done.err


def test_sigterm(clean_aws_env: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(TIMEOUT_S)
        environment = {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{silent.getsockname()[1]}",
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
        }
        words = tmp_path / "words"
        command = ("stage", "s3://bucket/model", tmp_path / "folder", "--termination-log", words)
        with program(*command, environment=environment) as process:
            connection, _ = silent.accept()
            with connection:
                process.send_signal(signal.SIGTERM)
                _, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + signal.SIGTERM
    assert json.loads(err.splitlines()[-1])["message"] == "stopped by SIGTERM"
    assert words.read_text() == "stopped by SIGTERM; what has landed is kept"


def test_sigterm_in_the_middle(source: Path, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    # So slow that it cannot be through when it is told to stop.
    slowly = ("--max-bytes-per-s", "64KB", "--read-bytes", "64KiB", "--concurrency", 1)
    with program("stage", source, folder, *slowly) as process:
        assert process.stderr is not None
        while "config.json is whole" not in (line := process.stderr.readline()):
            assert line
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 128 + signal.SIGTERM
    assert (folder / "config.json").exists()
    assert not (folder / "READY").exists()
    staged = streamload.stage_checkpoint(source, folder)
    assert same(source, folder)
    assert staged.fetched_bytes <= staged.nbytes - len("{}")


def test_a_file_that_may_not_grow(source: Path, tmp_path: Path) -> None:
    """A quota, as the system has one everywhere: the process may not write beyond 200 KiB of a file."""
    folder, words = tmp_path / "folder", tmp_path / "words"
    command = f'ulimit -f 400; exec "$0" -m streamload stage {source} {folder} --termination-log {words}'
    done = subprocess.run(["sh", "-c", command, sys.executable], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 1
    assert "EFBIG" in words.read_text()
    assert "Traceback" not in done.stderr
    assert "READY" not in os.listdir(folder)


def test_no_torch(source: Path, tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from streamload.cli import main; "
        f"code = main(['stage', {str(source)!r}, {str(tmp_path / 'folder')!r}]); "
        "late = [name for name in ('aiobotocore', 'botocore', 'numpy', 'rich', 'safetensors') if name in sys.modules]; "
        "sys.exit(code or len(late))"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, timeout=TIMEOUT_S)
    assert (done.returncode, same(source, tmp_path / "folder")) == (0, True)
