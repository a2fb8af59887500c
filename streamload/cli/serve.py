"""``streamload serve``: stage a checkpoint for an engine that reads it meanwhile, as a sidecar does."""

from __future__ import annotations

import argparse
from typing import Any, cast

import streamload
from streamload.cli import arguments, container
from streamload.cli.signals import Signals

__all__ = ["SUMMARY", "configure", "run"]

SUMMARY = "stage a checkpoint, and let an engine read what has landed meanwhile: the sidecar"

_DESCRIPTION = """\
Stages a checkpoint into a folder, as `streamload stage` does, beginning at
once, and says on a Unix socket what has landed. An engine that loads
sidecar:///DIR/streamload.sock reads that from the folder, waits for the rest,
which is brought first, and returns when all that it has read was verified.
Over TCP, for the kubelet and Prometheus: /startupz, /healthz, /readyz and
/metrics. Ends on SIGTERM, and begun again goes on from what has landed. Every
option but --quiet can come from the environment."""

_EXAMPLES = """\
examples:
  streamload serve s3://models/llama /models --port 8080
  streamload serve s3://models/llama /models/llama --socket /models/streamload.sock
  STREAMLOAD_STAGE_URI=s3://models/llama STREAMLOAD_STAGE_DIR=/models STREAMLOAD_SERVE_PORT=8080 streamload serve"""

_EXIT_CODES = arguments.EXIT_CODES.replace("  0    done\n", "").replace(
    "  1    failed; one line on stderr says why",
    "  1    the socket or the port cannot be opened; one line on stderr, and in the\n"
    "       termination log, says why. Staging that fails ends nothing: it is begun\n"
    "       again, after a pause or when an engine asks",
)


def configure(parser: argparse.ArgumentParser) -> None:
    """Say what the command takes."""
    parser.usage = "streamload serve URI DIR [options]"
    parser.description = _DESCRIPTION
    parser.epilog = f"{_EXAMPLES}\n\n{_EXIT_CODES}"
    parser.add_argument("places", metavar="URI DIR", nargs="*", help="what to stage, and where to")
    container.add_logs(parser)
    arguments.add_serving(parser)
    arguments.add_staging(parser)
    arguments.add_whole(parser)


def run(given: argparse.Namespace, signals: Signals) -> int:
    """Run the command.

    Raises:
        StreamloadError: It cannot be served.
    """
    told = container.told()
    with container.last_words(given, told, signals):
        container.choose_log(given, told)
        uri, folder = _place(given.places, told)
        names = streamload.ServeArguments.__optional_keys__
        options = cast("Any", {name: value for name, value in vars(given).items() if name in names})
        options["progress"] = not given.quiet
        streamload.serve_checkpoint(uri, folder, **options)
    return 0


def _place(places: list[str], told: dict[str, Any]) -> tuple[str, str | None]:
    """What goes where; the folder may be missing where there is a cache.

    Raises:
        OptionError: It is not said, or too much is.
    """
    if len(places) > 2:
        raise streamload.OptionError(f"{len(places)} places are no pair of a URI and a folder: a sidecar serves one")
    uri = places[0] if places else told.get("uri")
    if uri is None:
        raise streamload.OptionError("say what to stage, and where to: streamload serve URI DIR")
    return uri, places[1] if len(places) == 2 else told.get("dir")
