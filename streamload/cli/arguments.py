"""Arguments that several commands have: the options of a load."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Literal, cast

import streamload
from streamload.units import parse_bytes

__all__ = [
    "EXIT_CODES",
    "add_hub",
    "add_json",
    "add_loading",
    "add_memory",
    "add_reading",
    "add_serving",
    "add_sharding",
    "add_staging",
    "add_uri",
    "add_whole",
    "options_of",
]

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
        help="a directory, s3://bucket/prefix, hf://org/model or https://host/folder; or one file in these; "
        "runai+s3://..., runai+file://..., gs:// and az:// are read by Run:ai's engine",
    )


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="write one JSON object to stdout, and nothing else")


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which tensors are read, and how."""
    group = _group(parser, "what is read, and how")
    _add_globs(group)
    _add_reads(group)
    _add_ranks(parser)


def add_whole(parser: argparse.ArgumentParser) -> None:
    """Add the options that say how a checkpoint is read of which all is read."""
    group = _group(parser, "how it is read")
    _add_memory(group)
    _add_reads(group)


def _add_globs(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--include", nargs="+", action="extend", metavar="GLOB", help="only tensors whose names match one of these"
    )
    group.add_argument(
        "--exclude", nargs="+", action="extend", metavar="GLOB", help="no tensors whose names match one of these"
    )


def _add_verify(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--verify",
        choices=("auto", "off", "require", "sha256"),
        help="check content against a manifest and the source's checksums, do not, fail where something has neither, "
        "or compare the SHA-256 that the Hub or S3 keeps, too",
    )


def _add_reads(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--read-bytes", type=_nbytes, metavar="N", help="how large a read should be, such as 8MiB")
    group.add_argument(
        "--max-bytes-per-s", type=_nbytes, metavar="N", help="take no more than this a second, such as 500MB"
    )
    group.add_argument("--concurrency", type=_number_or_auto, metavar="N", help="how many reads are in flight, or auto")
    group.add_argument("--source", metavar="NAME", help="what serves the URI, whatever its scheme: runai, for example")
    group.add_argument(
        "--s3-anonymous", action=argparse.BooleanOptionalAction, help="ask S3 without credentials, for a public bucket"
    )
    group.add_argument("--deadline-s", type=float, metavar="S", help="fail when not done after so many seconds")


def _add_ranks(parser: argparse.ArgumentParser) -> None:
    group = _group(parser, "one rank of several")
    group.add_argument(
        "--rank",
        type=_number_or_auto,
        metavar="N",
        help="read only what this rank needs; auto: as torchrun says (RANK, WORLD_SIZE)",
    )
    group.add_argument("--world-size", type=int, metavar="N", help="how many ranks there are")
    group.add_argument(
        "--pp-size", type=int, metavar="N", help="so many pipeline stages have a range of the layers each (default 1)"
    )
    _add_placements(group)
    group.add_argument(
        "--pattern",
        metavar="NAME",
        help="what the files of a pre-sharded checkpoint are called, over {rank}, {tp_rank}, {pp_rank} and {part}; "
        "vLLM's names if not given",
    )


def add_sharding(parser: argparse.ArgumentParser) -> None:
    """Add the options that say what a checkpoint is converted to."""
    group = _group(parser, "what is made")
    group.add_argument("--tp", type=int, required=True, metavar="N", help="how many ranks share each layer")
    group.add_argument("--pp", type=int, default=1, metavar="N", help="how many pipeline stages there are (default 1)")
    group.add_argument(
        "--max-file-bytes",
        type=_nbytes,
        metavar="N",
        help="how many bytes of tensors a file may hold, such as 2GiB (default 5GiB)",
    )
    _add_placements(group)
    group.add_argument(
        "--pattern",
        metavar="NAME",
        help="what the files are called, over {rank}, {tp_rank}, {pp_rank} and {part}; vLLM's names if not given",
    )
    _add_globs(group)
    _add_verify(group)


def _add_placements(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--expert-parallel",
        action=argparse.BooleanOptionalAction,
        help="share experts out whole among the ranks of a stage",
    )
    group.add_argument(
        "--tp-plan",
        dest="placements",
        type=_tp_plan,
        metavar="FILE",
        help="a transformers tp_plan in JSON; without it, the model's config.json says how it is shared out",
    )
    group.add_argument(
        "--uneven", choices=("error", "ceil"), help="what to do where a size is not a multiple of the number of ranks"
    )


def add_hub(parser: argparse.ArgumentParser) -> None:
    """Add the options for what lies on the Hub."""
    group = _group(parser, "of a repository on the Hub (hf://)")
    group.add_argument("--revision", metavar="NAME", help="a branch, a tag or a commit")
    group.add_argument(
        "--allow-patterns", nargs="+", action="extend", metavar="GLOB", help="only files whose paths match one of these"
    )
    group.add_argument(
        "--ignore-patterns", nargs="+", action="extend", metavar="GLOB", help="no files whose paths match one of these"
    )
    group.add_argument("--download-dir", metavar="DIR", help="the cache's folder, in place of the usual one")
    group.add_argument(
        "--cache", action="store_true", help="put files that are read whole into the cache, for others to find"
    )


def add_memory(parser: argparse.ArgumentParser) -> None:
    """Add ``--memory-bytes`` by itself, for what plans a load and makes none: reads are smaller where memory is."""
    _add_memory(_group(parser, "how much memory"))


def _add_memory(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--memory-bytes", type=_nbytes, metavar="N", help="the limit on bytes under way, such as 256MiB")


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the options that say where tensors go."""
    group = _group(parser, "where tensors go")
    group.add_argument("--device", metavar="DEVICE", help="cpu (the default), cuda, cuda:1")
    _add_memory(group)
    group.add_argument(
        "--strict-memory",
        action=argparse.BooleanOptionalAction,
        help="fail at a tensor larger than --memory-bytes, instead of raising the limit for it",
    )
    group.add_argument(
        "--order", choices=("completion", "file"), help="hand tensors out as they are complete, or as they lie in files"
    )
    _add_verify(group)


def add_serving(parser: argparse.ArgumentParser) -> None:
    """Add the options that say who may ask a sidecar, and where."""
    group = _group(parser, "where it is asked")
    group.add_argument(
        "--socket",
        metavar="PATH",
        help="the Unix socket, in DIR or in a folder above it (default DIR/streamload.sock)",
    )
    group.add_argument(
        "--socket-mode", type=_mode, metavar="MODE", help="who may ask, as the socket's mode in octal (default 666)"
    )
    group.add_argument("--socket-group", metavar="GROUP", help="the group that the socket belongs to")
    group.add_argument(
        "--port", type=int, metavar="N", help="show state and metrics on this TCP port; 0: any (default: on none)"
    )
    group.add_argument("--host", metavar="ADDRESS", help="the port's address (default: all of the machine's)")
    group.add_argument(
        "--drain-s", type=float, metavar="S", help="on SIGTERM, wait so long for reads under way (default 10)"
    )


def add_staging(parser: argparse.ArgumentParser) -> None:
    """Add the options that say which files are staged, and what may be in their way."""
    group = _group(parser, "what is staged")
    group.add_argument(
        "--include", nargs="+", action="extend", metavar="GLOB", help="only files whose names match one of these"
    )
    group.add_argument(
        "--exclude", nargs="+", action="extend", metavar="GLOB", help="no files whose names match one of these"
    )
    group.add_argument(
        "--verify",
        choices=("auto", "off", "require", "sha256"),
        help="compare with a manifest and the source's checksums, do not, fail where weights have neither, or compare "
        "the SHA-256 that the Hub or S3 keeps, too",
    )
    group.add_argument(
        "--on-conflict",
        choices=("refuse", "replace"),
        help="what to do with a file in the way that was not staged there, or was changed since (default refuse)",
    )
    group.add_argument(
        "--offline",
        choices=("no", "fallback", "only"),
        help="whether a complete copy counts where the source cannot be reached; only: it is not asked (default no)",
    )
    group = _group(parser, "versions side by side")
    group.add_argument(
        "--cache", metavar="DIR", help="stage into this folder, and make DIR a link to the version in it"
    )
    group.add_argument(
        "--keep-bytes", type=_nbytes, metavar="N", help="remove versions that were not used for long, beyond so much"
    )
    group.add_argument(
        "--keep-s", type=float, metavar="S", help="none that was used less than so many seconds ago (default 3600)"
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


def _mode(text: str) -> int:
    try:
        return int(text, 8)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no mode in octal digits") from error


def _tp_plan(path: str) -> dict[str, str]:
    try:
        plan = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{path}: not JSON: {error}") from error
    if not isinstance(plan, dict) or not all(isinstance(style, str) for style in plan.values()):
        raise argparse.ArgumentTypeError(f"{path}: not an object of names and styles")
    return plan


def _number_or_auto(text: str) -> int | Literal["auto"]:
    if text == "auto":
        return "auto"
    try:
        return int(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is neither a number nor auto") from error
