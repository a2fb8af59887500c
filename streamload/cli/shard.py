"""``streamload shard``: convert a checkpoint into one whose files are one rank's each."""

from __future__ import annotations

import argparse

import streamload
from streamload.cli import arguments, console
from streamload.cli.signals import Signals
from streamload.units import format_bytes, format_count, format_seconds

__all__ = ["SUMMARY", "configure", "run"]

SUMMARY = "convert a checkpoint into a pre-sharded one: each rank's slices in files of its own"

_DESCRIPTION = """\
Reads an ordinary checkpoint once and writes each rank's slices into files of
its own, called as vLLM's sharded_state calls them, with a manifest for each
rank, and copies of config, tokenizer and what else is no weight. Nothing is
under its name before everything is complete. What was interrupted goes on
where it was when the same command is run again; what is done stays as it is.
Memory is bounded by --memory-bytes. Needs no torch."""

_EXAMPLES = """\
examples:
  streamload shard /models/llama /models/llama-tp8 --tp 8
  streamload shard s3://models/llama s3://models/llama-tp8 --tp 8 --max-file-bytes 2GiB
  streamload shard s3://models/llama /scratch/llama --tp 4 --pp 2 --memory-bytes 512MiB
  streamload shard /models/mixtral /models/mixtral-ep8 --tp 8 --expert-parallel
  streamload shard /models/own /models/own-tp2 --tp 2 --tp-plan plan.json
  streamload load /models/llama-tp8 --rank 3 --world-size 8     (what comes of it)"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.usage = "streamload shard SRC DEST --tp N [options]"
    parser.description = _DESCRIPTION
    parser.epilog = f"{_EXAMPLES}\n\n{arguments.EXIT_CODES}"
    parser.add_argument("src", metavar="SRC", help="a directory, a .safetensors file, or s3://bucket/prefix")
    parser.add_argument(
        "dest", metavar="DEST", help="a directory, or s3://bucket/prefix, with no other checkpoint in it"
    )
    arguments.add_json(parser)
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    arguments.add_sharding(parser)
    arguments.add_whole(parser)


def run(given: argparse.Namespace, signals: Signals) -> int:
    """Run the command.

    Raises:
        StreamloadError: The checkpoint cannot be converted.
    """
    options = arguments.options_of(given)
    options["progress"] = not given.quiet
    limit = {"max_file_bytes": given.max_file_bytes} if "max_file_bytes" in given else {}
    made = streamload.shard(given.src, given.dest, tp=given.tp, pp=given.pp, **limit, **options)
    if given.json:
        console.emit_json(made.to_dict())
    else:
        console.emit("\n".join(map(console.printable, _lines(made))))
    return 0


def _lines(made: streamload.ShardedCheckpoint) -> list[str]:
    lines = [
        f"{made.uri} -> {made.destination}: {format_count(made.ranks, 'rank')}",
        f"  written        {format_count(len(made.files), 'file')}, {format_bytes(made.written_bytes)}, "
        f"{format_count(len(made.copied), 'other file')} copied",
        f"  read           {format_count(made.tensors, 'tensor')}, {format_bytes(made.nbytes - made.resumed_bytes)} "
        f"in {format_seconds(made.seconds)}",
    ]
    if made.resumed_bytes:
        done = "all of it" if made.resumed_bytes == made.nbytes else format_bytes(made.resumed_bytes)
        lines.append(f"  done before    {done}")
    lines += [f"  verified       {format_bytes(nbytes)} by {what}" for what, nbytes in made.verified.items()]
    lines += [f"  not verified   {format_bytes(nbytes)}: {why}" for why, nbytes in made.unverified.items()]
    return lines
