"""The demo, with a small checkpoint: what it says, how it ends, and that nothing of it stays behind."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.torch

_ROOT = Path(__file__).parent.parent
_UPLOADING = "[3/5]"


@contextlib.contextmanager
def _demo(temporary: Path) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-W", "error", "-m", "examples.demo", "--small"],
        cwd=_ROOT,
        env=os.environ | {"TMPDIR": str(temporary)},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _server_is_gone(output: str) -> bool:
    found = re.search(r"http://127\.0\.0\.1:(\d+)", output)
    assert found is not None, output
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", int(found[1]))) != 0


def test_every_tensor_comes_back(tmp_path: Path) -> None:
    with _demo(tmp_path) as demo:
        output, _ = demo.communicate(timeout=120)
    assert demo.returncode == 0, output
    assert "all 21 are identical, bit for bit" in output
    assert re.search(r"s3://streamload-demo/sample-llama -> cpu: done", output)
    assert _server_is_gone(output)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("each", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_it_cleanly(tmp_path: Path, each: signal.Signals) -> None:
    with _demo(tmp_path) as demo:
        assert demo.stdout is not None
        output = ""
        for line in demo.stdout:
            output += line
            if _UPLOADING in line:
                demo.send_signal(each)
                break
        rest, _ = demo.communicate(timeout=120)
    assert demo.returncode == 128 + each, output + rest
    assert "Traceback" not in rest
    assert _server_is_gone(output)
    assert list(tmp_path.iterdir()) == []
