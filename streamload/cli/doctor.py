"""``streamload doctor``: what a person needs to know when a load is slow or refused."""

from __future__ import annotations

import argparse

import streamload
from streamload.cli import arguments, console
from streamload.cli.signals import Signals

__all__ = ["SUMMARY", "configure", "run"]

SUMMARY = "show the effective options, versions, limits and credentials, and what is wrong with them"

_DESCRIPTION = """\
Shows what a load with these options would use and where each option comes
from: versions, devices, the memory and the limits of this container, the
proxy, and for a URI the endpoint, the kind of the credentials (never a
secret), the clock's offset to the server, and whether the checkpoint can be
read. Lines that begin with ! need attention."""

_EXAMPLES = """\
examples:
  streamload doctor
  streamload doctor s3://models/llama --device cuda:0
  streamload doctor s3://models/llama --json | jq '.findings[] | select(.ok | not)'"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.usage = "streamload doctor [URI] [options]"
    parser.description = _DESCRIPTION
    parser.epilog = f"{_EXAMPLES}\n\n{arguments.EXIT_CODES}"
    arguments.add_uri(parser, optional=True)
    arguments.add_json(parser)
    arguments.add_loading(parser)
    arguments.add_reading(parser)
    arguments.add_hub(parser)


def run(given: argparse.Namespace, signals: Signals) -> int:
    """Run the command; the exit code is 1 where something needs attention."""
    diagnosis = streamload.doctor(given.uri, **arguments.options_of(given))
    if given.json:
        console.emit_json(diagnosis.to_dict())
    else:
        console.emit("\n".join(map(console.printable, str(diagnosis).splitlines())))
    return 0 if diagnosis.ok else 1
