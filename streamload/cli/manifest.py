"""``streamload manifest``: write the checksums that loads verify against."""

from __future__ import annotations

import argparse
from dataclasses import asdict

import streamload
from streamload.cli import arguments, console
from streamload.cli.signals import Signals
from streamload.units import format_bytes, format_count

__all__ = ["SUMMARY", "configure", "run"]

SUMMARY = "write a checkpoint's manifest: checksums of small blocks, which loads verify against"

_DESCRIPTION = """\
Reads all of a checkpoint and writes the checksums of its blocks beside it, as
streamload-manifest.json. Loads find it there, and compare every block before
they hand out its tensor, also where they read a part of a file only. Where the
store keeps a checksum that what was read does not match, nothing is written.
Needs no torch."""

_EXAMPLES = """\
examples:
  streamload manifest /models/llama
  streamload manifest s3://models/llama --memory-bytes 512MiB
  streamload manifest s3://public/llama --output llama-manifest.json"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.usage = "streamload manifest URI [options]"
    parser.description = _DESCRIPTION
    parser.epilog = f"{_EXAMPLES}\n\n{arguments.EXIT_CODES}"
    arguments.add_uri(parser)
    parser.add_argument("--output", metavar="FILE", help="write it to this file, not beside the weights")
    arguments.add_json(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    arguments.add_whole(parser)


def run(given: argparse.Namespace, signals: Signals) -> int:
    """Run the command.

    Raises:
        StreamloadError: The checkpoint cannot be read, or the manifest not be written.
    """
    options = arguments.options_of(given)
    options["progress"] = not given.quiet
    written = streamload.write_manifest(given.uri, output=given.output, **options)
    if given.json:
        console.emit_json(asdict(written))
    else:
        console.emit(
            console.printable(
                f"{written.uri}: {written.manifest} tells of {format_count(written.files, 'file')}, "
                f"{format_count(written.tensors, 'tensor')}, {format_count(written.blocks, 'block')} "
                f"({format_bytes(written.nbytes)} read, {format_bytes(written.size_bytes)} written)"
            )
        )
    return 0
