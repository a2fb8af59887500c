"""``streamload verify``: whether a checkpoint is what its manifest, or its store, says."""

from __future__ import annotations

import argparse

import streamload
from streamload.cli import arguments, console
from streamload.cli.signals import Signals

__all__ = ["SUMMARY", "configure", "run"]

SUMMARY = "compare a checkpoint with its manifest, or with the checksums that its store keeps"

_DESCRIPTION = """\
Reads all of a checkpoint and compares it with its manifest; a file that no
manifest tells of, with the checksums that its store keeps. Names every block
that is wrong, and its tensors, and what could not be verified, and why. Needs
no torch."""

_EXAMPLES = """\
examples:
  streamload verify /models/llama
  streamload verify s3://models/llama --json | jq '.files[].bad[]'
  streamload verify /models/llama --manifest llama-manifest.json"""

_EXIT_CODES = arguments.EXIT_CODES.replace(
    "  0    done\n  1    failed; one line on stderr says why",
    "  0    all of it was verified, and is as it should be\n"
    "  1    something is wrong or could not be verified; or it failed, and one line\n"
    "       on stderr says why",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.usage = "streamload verify URI [options]"
    parser.description = _DESCRIPTION
    parser.epilog = f"{_EXAMPLES}\n\n{_EXIT_CODES}"
    arguments.add_uri(parser)
    parser.add_argument("--manifest", metavar="FILE", help="compare with this manifest, not with what lies beside")
    arguments.add_json(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    arguments.add_whole(parser)


def run(given: argparse.Namespace, signals: Signals) -> int:
    """Run the command; the exit code is 1 where something is wrong or could not be verified.

    Raises:
        StreamloadError: There is nothing that could be verified.
    """
    options = arguments.options_of(given)
    options["progress"] = not given.quiet
    found = streamload.verify(given.uri, manifest=given.manifest, **options)
    if given.json:
        console.emit_json(found.to_dict())
    else:
        console.emit("\n".join(map(console.printable, str(found).splitlines())))
    return 0 if found.ok else 1
