"""Ways to run the command line: in this process, and as a program of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import pytest

from streamload.cli import main

__all__ = ["TIMEOUT_S", "Outcome", "Program", "program"]

# What a test waits for a program at most: it takes a few seconds on a busy machine.
TIMEOUT_S = 60.0

_ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it wrote."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """What stdout holds: one JSON object on one line, and nothing else."""
        assert self.out.count("\n") == 1
        found = json.loads(self.out)
        assert isinstance(found, dict)
        return found

    @property
    def error(self) -> str:
        """The one line that says what is wrong."""
        assert "Traceback" not in self.err
        (line,) = [line for line in self.err.splitlines() if " streamload." not in line]
        assert line.startswith("streamload: error: ")
        return line.removeprefix("streamload: error: ")


class Program:
    """Runs commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def __call__(self, *arguments: object) -> Outcome:
        code = main([str(argument) for argument in arguments])
        out, err = self._capsys.readouterr()
        return Outcome(code, out, err)


@contextmanager
def program(
    *arguments: object,
    environment: Mapping[str, str] | None = None,
    stdout: int | IO[str] = subprocess.PIPE,
    stderr: int | IO[str] = subprocess.PIPE,
    python: tuple[str, ...] = ("-m", "streamload"),
) -> Iterator[subprocess.Popen[str]]:
    """Run a command as a program of its own, in a session of its own; killed if it is still there at the end."""
    with subprocess.Popen(
        [sys.executable, "-W", "error", *python, *map(str, arguments)],
        cwd=_ROOT,
        env=os.environ | dict(environment or {}),
        stdin=subprocess.DEVNULL,
        stdout=stdout,
        stderr=stderr,
        text=True,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()
