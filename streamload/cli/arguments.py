"""Arguments that several commands have: the options of a load."""

from __future__ import annotations

import argparse
from typing import Literal, cast

import streamload
from streamload.units import parse_bytes

__all__ = ["EXIT_CODES", "add_json", "add_loading", "add_reading", "add_uri", "options_of"]

EXIT_CODES = """\
exit codes:
  0    done
  1    failed; one line on stderr says why
  2    wrong use
  130  stopped by SIGINT (Ctrl-C)
  143  stopped by SIGTERM"""


def add_uri(parser: argparse.ArgumentParser, *, optional: bool = False) -> None:
    """Add the checkpoint's URI."""
    parser.add_argument(
        "uri",
        metavar="URI",
        nargs="?" if optional else None,
        help="a directory, a .safetensors file, s3://bucket/prefix or s3://bucket/key.safetensors; runai+s3://... and "
        "runai+file://..., gs:// and az:// are read by Run:ai's engine",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="write one JSON object to stdout, and nothing else")


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which tensors are read, and how."""
    group = _group(parser, "what is read, and how")
    group.add_argument(
        "--include", nargs="+", action="extend", metavar="GLOB", help="only tensors whose names match one of these"
    )
    group.add_argument(
        "--exclude", nargs="+", action="extend", metavar="GLOB", help="no tensors whose names match one of these"
    )
    group.add_argument("--read-bytes", type=_nbytes, metavar="N", help="how large a read should be, such as 8MiB")
    group.add_argument(
        "--max-bytes-per-s", type=_nbytes, metavar="N", help="take no more than this a second, such as 500MB"
    )
    group.add_argument("--concurrency", type=_concurrency, metavar="N", help="how many reads are in flight, or auto")
    group.add_argument("--source", metavar="NAME", help="what serves the URI, whatever its scheme: runai, for example")
    group.add_argument("--deadline-s", type=float, metavar="S", help="fail when not done after so many seconds")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where tensors go."""
    group = _group(parser, "where tensors go")
    group.add_argument("--device", metavar="DEVICE", help="cpu (the default), cuda, cuda:1")
    group.add_argument("--memory-bytes", type=_nbytes, metavar="N", help="the limit on bytes under way, such as 256MiB")
    group.add_argument(
        "--strict-memory",
        action=argparse.BooleanOptionalAction,
        help="fail at a tensor larger than --memory-bytes, instead of raising the limit for it",
    )
    group.add_argument(
        "--order", choices=("completion", "file"), help="hand tensors out as they are complete, or as they lie in files"
    )
    group.add_argument(
        "--verify", choices=("auto", "off"), help="check content against the checksums that the source keeps, or do not"
    )


def options_of(arguments: argparse.Namespace) -> streamload.Options:
    """The options that were given; what was not given is left to the environment and the defaults."""
    names = streamload.Options.__optional_keys__
    return cast("streamload.Options", {name: value for name, value in vars(arguments).items() if name in names})


def _group(parser: argparse.ArgumentParser, title: str) -> argparse._ArgumentGroup:
    # What was not given is then not there, rather than None: it does not stand before the environment.
    return parser.add_argument_group(title, argument_default=argparse.SUPPRESS)


def _nbytes(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _concurrency(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from error
