"""``streamload load``: stream a checkpoint and drop its tensors."""

from __future__ import annotations

import argparse
import asyncio
import os
from pathlib import Path

import streamload
from streamload.cli import arguments, console
from streamload.cli.signals import Signals

__all__ = ["SUMMARY", "configure", "run"]

SUMMARY = "stream a checkpoint and drop its tensors: a load test, or a warm-up"

_DESCRIPTION = """\
Streams a checkpoint as a program would, drops every tensor, and reports how
fast it was and what held it back. Use it to test a load, or to bring files
into the page cache. Shows a progress bar on a terminal, and writes a log line
every few seconds elsewhere. Needs torch."""

_EXAMPLES = """\
examples:
  streamload load s3://models/llama --device cuda:0
  streamload load /models/llama --memory-bytes 256MiB --concurrency 8
  streamload load s3://models/llama --rank 0 --world-size 8
  streamload load s3://models/llama-tp8 --rank 3 --world-size 8
  streamload load s3://models/llama --trace load.json   (opens in ui.perfetto.dev)
  streamload load s3://models/llama --quiet --json | jq .gb_per_s"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.usage = "streamload load URI [options]"
    parser.description = _DESCRIPTION
    parser.epilog = f"{_EXAMPLES}\n\n{arguments.EXIT_CODES}"
    arguments.add_uri(parser)
    arguments.add_json(parser)
    parser.add_argument("--trace", metavar="FILE", help="write a Chrome trace, of a load that fails too")
    parser.add_argument("--quiet", action="store_true", help="show no progress")
    arguments.add_loading(parser)
    arguments.add_reading(parser)
    arguments.add_hub(parser)


def run(given: argparse.Namespace, signals: Signals) -> int:
    """Run the command.

    Raises:
        StreamloadError: The load failed.
    """
    options = arguments.options_of(given)
    options["progress"] = not given.quiet
    trace = None
    if given.trace is not None:
        _check_trace(Path(given.trace))
        options["on_event"] = trace = streamload.Trace()
    load = _Load(signals)
    try:
        asyncio.run(load.run(given.uri, options))
    finally:
        traced = True
        if load.report is not None:
            given.reported = True
            _show(load.report, as_json=given.json)
            traced = trace is None or _write(trace, given.trace)
    return 0 if traced else 1


class _Load:
    """One load, whose tensors nobody wants; its report is there whether it succeeds or fails."""

    def __init__(self, signals: Signals) -> None:
        self.report: streamload.Report | None = None
        self._signals = signals

    async def run(self, uri: str, options: streamload.Options) -> None:
        """Stream everything; where a signal comes, end early and without an error.

        Raises:
            StreamloadError: The load failed.
        """
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        consuming = True

        def stop() -> None:
            # On the loop, hence never while `consuming` changes: closing must not be cancelled.
            if consuming:
                task.cancel()

        stream = streamload.open(uri, **options)
        try:
            with self._signals.calling(lambda: loop.call_soon_threadsafe(stop)):
                async with stream:
                    try:
                        async for _ in stream:
                            # While tensors keep coming, the loop does not get its turn to run `stop`.
                            if self._signals.number is not None:
                                break
                    finally:
                        consuming = False
        except asyncio.CancelledError:
            if self._signals.number is None:
                raise
        finally:
            self.report = stream.report


def _show(report: streamload.Report, *, as_json: bool) -> None:
    if as_json:
        console.emit_json(report.to_dict())
    elif report.state == "done":
        console.emit("\n".join(map(console.printable, str(report).splitlines())))


def _check_trace(path: Path) -> None:
    """Refuse a place for the trace now, rather than when everything has been loaded."""
    if path.is_dir():
        raise streamload.OptionError(f"--trace {path}: this is a directory")
    if not path.parent.is_dir():
        raise streamload.OptionError(f"--trace {path}: there is no directory {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise streamload.OptionError(f"--trace {path}: it cannot be written to")


def _write(trace: streamload.Trace, path: str) -> bool:
    """Whether the trace could be written. Says so where not, and raises nothing: the load's own error matters more."""
    try:
        trace.write(path)
    except OSError as error:
        console.complain(f"error: --trace {path}: {error.strerror}")
        return False
    return True
