"""What the command line takes, and what it says to what it does not."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Protocol

import pytest

import streamload
from streamload.cli import arguments, doctor, inspect, load, main
from streamload.cli.console import printable
from tests.cli.programs import TIMEOUT_S, Program, program


class _Command(Protocol):
    def configure(self, parser: argparse.ArgumentParser) -> None: ...


def _options(command: _Command, *given: str) -> streamload.Options:
    parser = argparse.ArgumentParser()
    command.configure(parser)
    return arguments.options_of(parser.parse_args(["s3://bucket", *given]))


class TestOptions:
    @pytest.mark.parametrize("command", [load, doctor])
    def test_all_of_a_load(self, command: _Command) -> None:
        given = (
            "--device cuda:1 --memory-bytes 256MiB --strict-memory --read-bytes 8M --concurrency 12 --order file "
            "--deadline-s 2.5 --verify off --s3-anonymous --include a b --include c --exclude d"
        )
        assert _options(command, *given.split()) == streamload.Options(
            device="cuda:1",
            memory_bytes=256 << 20,
            strict_memory=True,
            read_bytes=8 << 20,
            concurrency=12,
            order="file",
            deadline_s=2.5,
            verify="off",
            s3_anonymous=True,
            include=["a", "b", "c"],
            exclude=["d"],
        )

    @pytest.mark.parametrize("command", [inspect, load, doctor])
    def test_what_is_not_given_is_left_to_the_environment(self, command: _Command) -> None:
        assert _options(command) == {}

    def test_the_environment_can_be_overruled(self) -> None:
        assert _options(load, "--no-strict-memory", "--concurrency", "auto") == {
            "strict_memory": False,
            "concurrency": "auto",
        }


class TestWrongUse:
    @pytest.mark.parametrize(
        ("given", "problem"),
        [
            ((), "required: COMMAND"),
            (("stream",), "invalid choice"),
            (("inspect",), "required: URI"),
            (("load",), "required: URI"),
            (("load", "x", "y"), "unrecognized arguments: y"),
            (("load", "x", "--conc", "3"), "unrecognized arguments"),
            (("load", "x", "--memory-bytes", "lots"), "--memory-bytes: 'lots' is not a number of bytes such as"),
            (("load", "x", "--read-bytes", "-1"), "--read-bytes"),
            (("load", "x", "--concurrency", "many"), "--concurrency: 'many' is neither a number nor auto"),
            (("load", "x", "--order", "random"), "--order: invalid choice"),
            (("load", "x", "--deadline-s", "soon"), "--deadline-s"),
            (("inspect", "x", "--device", "cpu"), "unrecognized arguments: --device cpu"),
        ],
    )
    def test_is_told_by_argparse(self, cli: Program, given: tuple[str, ...], problem: str) -> None:
        found = cli(*given)
        assert (found.code, found.out) == (2, "")
        assert problem in found.err
        assert "usage: streamload" in found.err

    @pytest.mark.parametrize(
        ("given", "problem"),
        [
            (("inspect", "gs://bucket/model"), "gs://bucket/model: nothing serves the scheme 'gs'"),
            (("inspect", "s3://"), "an S3 URI is s3://bucket"),
            (("inspect", ""), "a path is missing"),
            (("inspect", "file://host/model"), "cannot name another machine"),
            (("inspect", "/", "--read-bytes", "1"), "read_bytes=1 is not"),
            (("inspect", "/", "--concurrency", "0"), "concurrency=0 is not"),
            (("inspect", "/", "--deadline-s", "nan"), "deadline_s=nan is not"),
            (("doctor", "--memory-bytes", "1"), "memory_bytes=1 is not"),
            (("doctor", "gs://bucket"), "nothing serves the scheme 'gs'"),
        ],
    )
    def test_is_told_in_one_line(self, cli: Program, given: tuple[str, ...], problem: str) -> None:
        found = cli(*given)
        assert (found.code, found.out) == (2, "")
        assert problem in found.error

    def test_in_the_environment(self, cli: Program, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("STREAMLOAD_CONCURRENCY", "many")
        found = cli("inspect", "/")
        assert found.code == 2
        assert found.error.startswith("STREAMLOAD_CONCURRENCY='many': ")

    def test_misspelt_in_the_environment(self, cli: Program, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("STREAMLOAD_CONCURRENCYY", "many")
        found = cli("inspect", model)
        assert found.code == 0
        assert "STREAMLOAD_CONCURRENCYY is no option, and is ignored: is STREAMLOAD_CONCURRENCY meant?" in found.err


class TestHelp:
    @pytest.mark.parametrize("given", [["--help"], ["inspect", "-h"], ["load", "-h"], ["doctor", "-h"]])
    def test_has_examples_and_exit_codes(self, cli: Program, given: list[str]) -> None:
        found = cli(*given)
        assert (found.code, found.err) == (0, "")
        assert "examples:\n  streamload " in found.out
        assert "  143  stopped by SIGTERM" in found.out

    def test_load_says_what_it_is_for(self, cli: Program) -> None:
        assert "drops every tensor" in cli("load", "--help").out

    def test_version(self, cli: Program) -> None:
        found = cli("--version")
        assert (found.code, found.out) == (0, f"streamload {streamload.__version__}\n")


class TestProgram:
    def test_as_a_module(self) -> None:
        with program("--version") as process:
            out, err = process.communicate(timeout=TIMEOUT_S)
        assert (process.returncode, out, err) == (0, f"streamload {streamload.__version__}\n", "")

    def test_a_mistake_of_ours_is_not_dressed_up(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def broken(uri: str) -> None:
            raise RuntimeError("a bug")

        monkeypatch.setattr(streamload, "inspect", broken)
        with pytest.raises(RuntimeError, match="a bug"):
            main(["inspect", "x"])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.weight ü 漢", "model.weight ü 漢"),
        ("two\nlines\r", r"two\nlines\r"),
        ("\x1b[2J\x00\x9b", r"\x1b[2J\x00\x9b"),
        ("a\udcffb", r"a\udcffb"),
        ("\u202egnp", r"\u202egnp"),
        ("back\\slash", "back\\slash"),
    ],
)
def test_printable(text: str, shown: str) -> None:
    assert printable(text) == shown
