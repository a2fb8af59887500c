"""What the commands that run in a container have in common: their logs, and their last words."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import streamload
from streamload.cli import console
from streamload.cli.signals import Signals, Stopped
from streamload.options import from_environment

__all__ = ["add_logs", "choose_log", "last_words", "leave_last_words", "told"]

# Where the kubelet looks for a container's last words, and how many it reads.
_TERMINATION_LOG = "/dev/termination-log"
_TERMINATION_BYTES = 4096

_FROM_ENVIRONMENT: dict[str, Callable[[str], Any]] = {
    "uri": str,
    "dir": str,
    "log": str.strip,
    "termination_log": str,
}
_LOGS = ("auto", "text", "json")


def add_logs(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where to say what."""
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    parser.add_argument(
        "--log", choices=_LOGS, help="lines of text, or of JSON; auto, the default: JSON unless stderr is a terminal"
    )
    parser.add_argument(
        "--termination-log",
        metavar="FILE",
        help=f"write the cause of a failure there, in one line; by default {_TERMINATION_LOG}, where it is",
    )


def told() -> dict[str, Any]:
    """What the environment says of what is staged, where to, and where to say so.

    Raises:
        OptionError: A text without meaning.
    """
    return from_environment(_FROM_ENVIRONMENT, prefix="STAGE_")


def choose_log(given: argparse.Namespace, told: dict[str, Any]) -> bool:
    """Have log lines be text or JSON, as was asked for; whether they are JSON.

    Raises:
        OptionError: What was asked for is neither.
    """
    log = given.log or told.get("log", "auto")
    if log not in _LOGS:
        raise streamload.OptionError(f"log={log!r} is not one of: {', '.join(_LOGS)}")
    is_terminal = sys.stderr is not None and sys.stderr.isatty()
    as_json: bool = log == "json" or (log == "auto" and not is_terminal)
    console.speak_json(as_json)
    return as_json


@contextmanager
def last_words(given: argparse.Namespace, told: dict[str, Any], signals: Signals) -> Iterator[None]:
    """Write the cause of a failure to the termination log; whatever is wrong with that log changes nothing."""
    try:
        yield
    except (streamload.StreamloadError, Stopped) as error:
        text = f"stopped by {signals.name}; what has landed is kept" if isinstance(error, Stopped) else str(error)
        _write_last_words(given.termination_log or told.get("termination_log"), text)
        raise


def leave_last_words(argv: Sequence[str], text: str) -> None:
    """Write to the termination log why a command's arguments make no sense.

    Args:
        argv: All arguments; whatever else is wrong with them, they may say where that log is.
        text: Why, in one line.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument("--termination-log")
    path = None
    with suppress(argparse.ArgumentError):
        path = finder.parse_known_args(argv)[0].termination_log
    _write_last_words(path or told().get("termination_log"), text)


def _write_last_words(path: str | None, text: str) -> None:
    where = path if path is not None else _TERMINATION_LOG
    # By default it is only written to, never made: elsewhere than in a pod nobody looks for it.
    if path is not None or os.path.isfile(where):
        try:
            with open(where, "wb") as file:
                file.write(console.printable(text).encode("utf-8", "backslashreplace")[:_TERMINATION_BYTES])
        except OSError as problem:
            console.complain(f"the termination log {where} cannot be written: {problem.strerror}")
