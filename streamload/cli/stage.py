"""``streamload stage``: copy a checkpoint's files onto a volume, as an init container does."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Iterator
from typing import Any, cast

import streamload
from streamload.cli import arguments, console, container
from streamload.cli.signals import Signals
from streamload.units import format_bytes, format_count, format_seconds

__all__ = ["SUMMARY", "configure", "run"]

SUMMARY = "copy a checkpoint's files onto a volume, verified and marked as whole: the init hook"

_DESCRIPTION = """\
Copies weights, config and tokenizer from any source into a folder: read in
ranges and written in place, compared with what the store or a manifest says,
made durable, renamed; last a marker, READY. Run again it finds that all is
there, in a moment; interrupted anywhere, it goes on from what has landed. Of
several that stage the same into the same folder, one works and the others wait
for it. Takes the arguments of KServe's storage initializer as they are. Needs
no torch. Every option but --quiet and --json can come from the environment."""

_EXAMPLES = """\
examples:
  streamload stage s3://models/llama /mnt/models
  streamload stage s3://models/llama /mnt/models --include '*.json' 'tokenizer*'
  streamload stage s3://models/llama /mnt/models s3://models/lora /mnt/lora
  streamload stage s3://models/llama /models/llama --cache /models/cache --keep-bytes 500GB
  STREAMLOAD_STAGE_URI=s3://models/llama STREAMLOAD_STAGE_DIR=/mnt/models streamload stage"""

_EXIT_CODES = arguments.EXIT_CODES.replace(
    "  0    done\n  1    failed; one line on stderr says why",
    "  0    all of it is there, whole\n"
    "  1    failed; one line on stderr, and in the termination log, says why. What\n"
    "       has landed is kept: run it again, and it goes on from there",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.usage = "streamload stage URI DIR [URI DIR ...] [options]"
    parser.description = _DESCRIPTION
    parser.epilog = f"{_EXAMPLES}\n\n{_EXIT_CODES}"
    parser.add_argument(
        "places",
        metavar="URI DIR",
        nargs="*",
        help="what to stage, and where to; several pairs are staged one after the other",
    )
    arguments.add_json(parser)
    container.add_logs(parser)
    arguments.add_staging(parser)
    arguments.add_whole(parser)


def run(given: argparse.Namespace, signals: Signals) -> int:
    """Run the command.

    Raises:
        StreamloadError: It could not be staged.
    """
    told = container.told()
    with container.last_words(given, told, signals):
        as_json = container.choose_log(given, told)
        names = streamload.StageArguments.__optional_keys__
        options = cast("Any", {name: value for name, value in vars(given).items() if name in names})
        options["progress"] = not given.quiet
        for uri, folder in _pairs(given.places, told):
            staged = streamload.stage_checkpoint(uri, folder, **options)
            if as_json or given.json:
                console.emit_json(dataclasses.asdict(staged) | {"gb_per_s": staged.gb_per_s})
            else:
                console.emit("\n".join(map(console.printable, _lines(staged))))
    return 0


def _pairs(places: list[str], told: dict[str, Any]) -> list[tuple[str, str | None]]:
    """What goes where; the folder may be missing where there is a cache.

    Raises:
        OptionError: They are no pairs.
    """
    if not places:
        places = [told[name] for name in ("uri", "dir") if name in told]
        if "uri" not in told:
            raise streamload.OptionError("say what to stage, and where to: streamload stage URI DIR")
    elif len(places) == 1 and "dir" in told:
        places = [*places, told["dir"]]
    if len(places) == 1:
        return [(places[0], None)]
    if len(places) % 2:
        raise streamload.OptionError(f"{len(places)} places are no pairs of a URI and a folder")
    return list(zip(places[::2], places[1::2], strict=True))


def _lines(staged: streamload.Staged) -> Iterator[str]:
    if staged.state == "present":
        yield f"{staged.uri} -> {staged.folder}: all of it is there"
    else:
        yield f"{staged.uri} -> {staged.folder}: staged"
    yield (
        f"  files          {format_count(staged.files, 'file')}, {format_bytes(staged.nbytes)}; "
        f"{format_bytes(staged.kept_bytes)} were there already"
    )
    if staged.fetched_bytes:
        yield f"  read           {format_bytes(staged.fetched_bytes)} ({staged.gb_per_s:.2f} GB/s, made durable)"
    phases = ", ".join(f"{phase} {format_seconds(seconds)}" for phase, seconds in staged.phases.items())
    first = staged.first_request_s
    start = "" if first is None else f"; the first request {format_seconds(first)} after the process began"
    yield f"  time           {phases}{start}"
    if staged.requests:
        yield f"  requests       {staged.requests}, {staged.retries} retried; {staged.concurrency} at once"
    for what, nbytes in staged.verified.items():
        yield f"  verified       {format_bytes(nbytes)} by {what}"
    for reason, nbytes in staged.unverified.items():
        yield f"  not verified   {format_bytes(nbytes)}: {reason}"
