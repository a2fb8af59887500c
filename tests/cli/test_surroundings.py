"""What surrounds the commands: streams that are closed, names that a terminal would act on, keys in a URI."""

from __future__ import annotations

import logging
import subprocess
import sys
from pathlib import Path

import pytest

from streamload.cli import console
from tests.cli.programs import TIMEOUT_S, Program


@pytest.mark.parametrize(("closed", "code"), [("<&-", 0), (">&-", 1), ("2>&-", 0), ("<&- 2>&-", 0)])
def test_a_standard_stream_that_is_closed(model: Path, closed: str, code: int) -> None:
    """Libuv would end the process with SIGABRT; a library must not do that to whoever uses it."""
    command = f'exec "$0" -m streamload inspect "$1" {closed}'
    found = subprocess.run(
        ["sh", "-c", command, sys.executable, str(model)], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert found.returncode == code, found.stderr
    assert "Traceback" not in found.stderr
    assert ("5 tensors" in found.stdout) == (code == 0)


def test_nothing_in_a_log_line_reaches_the_terminal_raw(capsys: pytest.CaptureFixture[str]) -> None:
    with console.log_lines(quiet=False):
        logging.getLogger("streamload.events").info("retrying: %s", "a\x1b[31m\x07.safetensors")
    shown = capsys.readouterr().err
    assert "\x1b" not in shown
    assert "a\\x1b[31m\\x07.safetensors" in shown


def test_keys_in_a_uri_are_refused_and_not_shown(cli: Program) -> None:
    found = cli("load", "s3://AKIAIOSFODNN7EXAMPLE:wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY@models/llama", "--quiet")
    assert found.code == 2
    for secret in ("AKIA", "wJalr", "K7MDENG", "EXAMPLEKEY"):
        assert secret not in found.err + found.out
