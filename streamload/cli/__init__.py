"""The command line: ``streamload inspect``, ``load``, ``shard``, ``stage``, ``serve``, ``manifest``, and more."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn, Protocol

import streamload
from streamload.cli import arguments, console, container, doctor, inspect, load, manifest, serve, shard, stage, verify
from streamload.cli.signals import Signals, Stopped

__all__ = ["main"]


class _Command(Protocol):
    """What the module of a command has."""

    SUMMARY: str

    def configure(self, parser: argparse.ArgumentParser) -> None: ...

    def run(self, given: argparse.Namespace, signals: Signals) -> int: ...


_COMMANDS: dict[str, _Command] = {
    "inspect": inspect,
    "load": load,
    "shard": shard,
    "stage": stage,
    "serve": serve,
    "manifest": manifest,
    "verify": verify,
    "doctor": doctor,
}

_EXAMPLES = """\
examples:
  streamload inspect s3://models/llama
  streamload load s3://models/llama --device cuda:0
  streamload shard s3://models/llama /scratch/llama-tp8 --tp 8
  streamload stage s3://models/llama /mnt/models
  streamload doctor s3://models/llama"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: The arguments without the program's name; the process's own by default.

    Returns:
        The exit code: 0 done, 1 failed, 2 wrong use, 130 stopped by SIGINT, 143 stopped by SIGTERM.
    """
    signals = Signals()
    console.speak_json(False)
    try:
        with signals:
            code = _run(argv, signals)
    except Stopped:
        code = 0
    if signals.number is not None:
        console.complain(f"stopped by {signals.name}")
        return 128 + signals.number
    return code


def _run(argv: Sequence[str] | None, signals: Signals) -> int:
    argv = sys.argv[1:] if argv is None else argv
    try:
        given = _parser().parse_args(argv)
    except _WrongUse as wrong:
        if argv[:1] in (["stage"], ["serve"]):
            container.leave_last_words(argv, str(wrong))
        wrong.parser.print_usage(sys.stderr)
        console.complain(f"error: {wrong}", program=wrong.parser.prog)
        return 2
    except SystemExit as end:  # argparse has said what there is to say
        console.flush()
        return end.code if isinstance(end.code, int) else 2
    command = _COMMANDS[given.command]
    try:
        with console.log_lines(quiet=getattr(given, "quiet", False)):
            return command.run(given, signals)
    except streamload.StreamloadError as error:
        console.complain(f"error: {error}")
        if getattr(given, "json", False) and not getattr(given, "reported", False):
            console.emit_failure(error)
        return 2 if isinstance(error, streamload.OptionError) else 1


class _WrongUse(Exception):
    """Arguments without meaning; its text says why, without credentials: they may have come in a URI."""

    def __init__(self, parser: argparse.ArgumentParser, message: str) -> None:
        super().__init__(str(streamload.OptionError(message)))
        self.parser = parser


class _Parser(argparse.ArgumentParser):
    """Leaves it to `_run` to say what is wrong, which may have to be said in more than one place."""

    def error(self, message: str) -> NoReturn:
        raise _WrongUse(self, message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="streamload",
        description="Streams safetensors checkpoints from object stores, the Hub, web servers and disks\n"
        "into host or GPU memory.",
        epilog=f"{_EXAMPLES}\n\n{arguments.EXIT_CODES}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"streamload {streamload.__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, title="commands")
    for name, command in _COMMANDS.items():
        command.configure(
            commands.add_parser(
                name,
                help=command.SUMMARY,
                formatter_class=argparse.RawDescriptionHelpFormatter,
                allow_abbrev=False,
            )
        )
    return parser
