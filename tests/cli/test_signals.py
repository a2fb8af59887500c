"""SIGINT and SIGTERM, while a server is silent; and a second one while the first is being obeyed."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from streamload.cli.signals import Signals, Stopped
from tests.cli.programs import TIMEOUT_S, Outcome, program

_BOTH = (signal.SIGINT, signal.SIGTERM)


@pytest.fixture
def silent() -> Iterator[socket.socket]:
    """A server that accepts connections and never says anything."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(TIMEOUT_S)
        yield server


@pytest.fixture
def silent_env(silent: socket.socket, clean_aws_env: pytest.MonkeyPatch) -> None:
    """S3 is the silent server."""
    clean_aws_env.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{silent.getsockname()[1]}")
    clean_aws_env.setenv("AWS_ACCESS_KEY_ID", "key")
    clean_aws_env.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    clean_aws_env.setenv("AWS_DEFAULT_REGION", "us-east-1")


def _stop(silent: socket.socket, command: tuple[str, ...], *signals: signal.Signals) -> Outcome:
    """Run a command, and send it signals once it waits for the server's answer."""
    with program(*command, "s3://bucket/model") as process:
        connection, _ = silent.accept()
        with connection:
            for each in signals:
                process.send_signal(each)
            out, err = process.communicate(timeout=TIMEOUT_S)
    # The program was its session's and its group's leader: without it, nothing of the group may be left.
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)
    return Outcome(process.returncode, out, err)


@pytest.mark.usefixtures("silent_env")
class TestStalled:
    @pytest.mark.parametrize(
        ("command", "number"),
        [
            ("inspect", signal.SIGINT),
            ("inspect", signal.SIGTERM),
            pytest.param("load", signal.SIGINT, marks=pytest.mark.torch),
            ("doctor", signal.SIGTERM),
        ],
    )
    def test_ends_in_good_order(self, silent: socket.socket, command: str, number: signal.Signals) -> None:
        stopped = _stop(silent, (command,), number)
        assert stopped.code == 128 + number
        lines = [line for line in stopped.err.splitlines() if "streamload.progress" not in line]
        assert lines == [f"streamload: stopped by {number.name}"]
        assert stopped.out == ""

    def test_the_same_signal_twice(self, silent: socket.socket) -> None:
        stopped = _stop(silent, ("inspect",), signal.SIGTERM, signal.SIGTERM, signal.SIGINT)
        # Which of two signals sent at once is handled first is the kernel's choice, and then Python's.
        assert stopped.code in (130, 143)
        assert "Traceback" not in stopped.err

    @pytest.mark.torch
    def test_the_report_says_that_it_was_closed(self, silent: socket.socket, tmp_path: Path) -> None:
        trace = tmp_path / "trace.json"
        stopped = _stop(silent, ("load", "--quiet", "--json", f"--trace={trace}"), signal.SIGTERM)
        assert stopped.code == 143
        assert (stopped.json["state"], stopped.json["error"], stopped.json["requests"]) == ("closed", None, 1)
        assert trace.is_file()


@pytest.mark.parametrize("number", _BOTH)
@pytest.mark.parametrize("module", ["streamload", "streamload.cli", "aiobotocore"])
def test_a_signal_while_the_program_is_still_being_imported(number: signal.Signals, module: str, model: Path) -> None:
    """It comes when the first thing in `module` is looked for; nothing there imports aiobotocore."""
    find = f"{{'find_spec': lambda self, name, *_: os.kill(os.getpid(), {number}) if name == {module!r} else None}}"
    signal_then = f"sys.meta_path.insert(0, type('', (), {find})())"
    code = f"import os, sys; {signal_then}; from streamload_command import main; sys.exit(main())"
    with program("inspect", model, python=("-c", code)) as process:
        out, err = process.communicate(timeout=TIMEOUT_S)
    if module == "aiobotocore":
        assert (process.returncode, err) == (0, "")
    else:
        assert (process.returncode, out, err) == (128 + number, "", f"streamload: stopped by {number.name}\n")


@contextmanager
def _restored() -> Iterator[None]:
    """Put the handlers back, whatever the block does to them."""
    before = {number: signal.getsignal(number) for number in _BOTH}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class TestSignals:
    def test_the_first_one_is_raised(self) -> None:
        signals = Signals()
        with pytest.raises(Stopped), _restored(), signals:
            signal.raise_signal(signal.SIGTERM)
        assert (signals.number, signals.name) == (signal.SIGTERM, "SIGTERM")

    def test_or_calls_what_was_asked_for(self) -> None:
        calls: list[str] = []
        signals = Signals()
        with _restored(), signals:
            with signals.calling(lambda: calls.append("called")):
                signal.raise_signal(signal.SIGINT)
                signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        assert calls == ["called"]
        assert signals.name == "SIGINT"

    def test_raises_again_after_the_block(self) -> None:
        with _restored(), Signals() as signals:
            with signals.calling(lambda: None):
                pass
            with pytest.raises(Stopped):
                signal.raise_signal(signal.SIGINT)

    def test_impatience_ends_the_process(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now, exits = [10.0], list[int]()
        monkeypatch.setattr("streamload.cli.signals.time.monotonic", lambda: now[0])
        monkeypatch.setattr(os, "_exit", exits.append)
        with _restored(), Signals() as signals:
            with signals.calling(lambda: None):
                signal.raise_signal(signal.SIGTERM)
            now[0] = 10.9
            signal.raise_signal(signal.SIGTERM)
            assert exits == []
            now[0] = 11.1
            signal.raise_signal(signal.SIGINT)
        assert exits == [143]

    def test_leaves_the_handlers_as_they_were(self) -> None:
        before = [signal.getsignal(number) for number in _BOTH]
        with Signals() as signals:
            assert [signal.getsignal(number) for number in _BOTH] != before
        assert [signal.getsignal(number) for number in _BOTH] == before
        assert (signals.number, signals.name) == (None, "")

    def test_handles_signals_to_the_end_once_there_was_one(self) -> None:
        with _restored():
            with Signals() as signals, signals.calling(lambda: None):
                signal.raise_signal(signal.SIGTERM)
            # Nothing that comes now prints a traceback or ends the process with another code.
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
