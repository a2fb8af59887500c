"""``streamload inspect``: what lies under a URI, and how it would be read."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import streamload
from streamload.cli import arguments, console
from streamload.cli.signals import Signals
from streamload.cli.tables import table, terminal_width
from streamload.units import format_bytes, format_count, format_range

__all__ = ["SUMMARY", "configure", "run"]

SUMMARY = "show a checkpoint's files, tensors and dtypes, and how it would be read"

_EXAMPLES = """\
examples:
  streamload inspect /models/llama
  streamload inspect s3://models/llama --include 'model.layers.0.*' --plan
  streamload inspect s3://models/llama --rank 1 --world-size 4 --plan
  streamload inspect s3://models/llama --json | jq .dtypes"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.usage = "streamload inspect URI [options]"
    parser.description = "Reads the headers only, and checks them. Needs no torch."
    parser.epilog = f"{_EXAMPLES}\n\n{arguments.EXIT_CODES}"
    arguments.add_uri(parser)
    parser.add_argument("--plan", action="store_true", help="show the reads that a load would make")
    arguments.add_json(parser)
    arguments.add_reading(parser)
    arguments.add_hub(parser)
    arguments.add_memory(parser)


def run(given: argparse.Namespace, signals: Signals) -> int:
    """Run the command.

    Raises:
        StreamloadError: There is no valid checkpoint there.
    """
    found = streamload.inspect(given.uri, **arguments.options_of(given))
    if given.json:
        console.emit_json(found.to_dict(plan=given.plan))
        return 0
    width = terminal_width()
    blocks = [_title(found), *_files(found.plan.catalog, width), _dtypes(found)]
    if given.plan:
        blocks += _plan(found, width)
        if found.ranks:
            blocks.append(_ranks(found))
    console.emit("\n\n".join(blocks))
    return 0


def _title(found: streamload.Inspection) -> str:
    catalog = found.plan.catalog
    files, tensors = format_count(len(catalog.files), "file"), format_count(catalog.tensors, "tensor")
    return (
        f"{console.printable(found.uri)}: {files}, {tensors}, {format_bytes(found.plan.tensor_bytes)} "
        f"({format_count(found.requests, 'request')} to find out)"
    )


def _files(catalog: streamload.Catalog, width: int | None) -> Iterator[str]:
    for file in catalog.files:
        rows = [
            (tensor.name, tensor.dtype, str(list(tensor.shape)), format_bytes(tensor.nbytes)) for tensor in file.tensors
        ]
        title = f"{console.printable(file.key)}: {format_bytes(file.size_bytes)}, {format_count(len(rows), 'tensor')}"
        if rows:
            title += "\n" + table(("tensor", "dtype", "shape", "size"), rows, right=(3,), indent="  ", width=width)
        yield title


def _dtypes(found: streamload.Inspection) -> str:
    rows = [(dtype, str(count), format_bytes(nbytes)) for dtype, (count, nbytes) in found.bytes_by_dtype().items()]
    return table(("dtype", "tensors", "size"), rows, right=(1, 2))


def _plan(found: streamload.Inspection, width: int | None) -> Iterator[str]:
    plan = found.plan
    at_once = format_range(found.concurrency, found.most_concurrency)
    yield (
        f"plan: {format_count(plan.reads, 'read')} of at most {format_bytes(found.read_bytes)}, {at_once} in "
        f"flight; {format_bytes(plan.tensor_bytes)} of tensors and {format_bytes(plan.gap_bytes)} of gaps between them"
    )
    for number, file in enumerate(plan.catalog.files):
        rows = [
            (
                str(read.start),
                str(read.end),
                format_bytes(read.fetched_bytes),
                format_bytes(read.gap_bytes),
                _names(batch, at),
            )
            for batch in plan.batches
            if batch.file == number
            for at, read in enumerate(batch.reads)
        ]
        title = f"{console.printable(file.key)}: {format_count(len(rows), 'read')}"
        if rows:
            headings = ("start", "end", "size", "gaps", "tensors")
            title += "\n" + table(headings, rows, right=(0, 1, 2, 3), fold=4, indent="  ", width=width)
        yield title


def _ranks(found: streamload.Inspection) -> str:
    """What each rank would read, and all of them together."""
    rows = [
        (name, str(rank.reads), format_bytes(rank.nbytes), format_bytes(rank.fetched_bytes), _times(rank))
        for name, rank in (*((str(number), rank) for number, rank in enumerate(found.ranks)), ("all", found.all_ranks))
    ]
    return table(("rank", "reads", "keeps", "asks for", "amplification"), rows, right=(0, 1, 2, 3, 4))


def _times(rank: streamload.RankPlan) -> str:
    return f"{rank.read_amplification:.3f}"


def _names(batch: streamload.Batch, at: int) -> str:
    """The tensors in one of a batch's reads."""
    names: Sequence[str] = list(dict.fromkeys(batch.tensors[piece.tensor].name for piece in batch.reads[at].pieces))
    if len(batch.reads) > 1:
        return f"{names[0]}, part {at + 1} of {len(batch.reads)}"
    return names[0] if len(names) == 1 else f"{len(names)}: {names[0]} to {names[-1]}"
