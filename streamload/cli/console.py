"""What the commands write: results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO

import streamload

__all__ = ["complain", "emit", "emit_failure", "emit_json", "flush", "log_lines", "printable", "speak_json"]

# Whether lines on stderr are JSON objects, for who collects them.
_json = False


def emit(text: str) -> None:
    """Write a result to stdout. A reader that has gone away (``| head``) ends nothing: it has what it wanted.

    Raises:
        StreamloadError: stdout cannot be written to.
    """
    out = sys.stdout
    if out is None:  # it was closed before this program began
        raise streamload.StreamloadError("stdout is closed")
    encoding = out.encoding or "utf-8"
    # A name that the terminal cannot show is no reason to show nothing.
    shown = text.encode(encoding, "backslashreplace").decode(encoding)
    try:
        out.write(f"{shown}\n")
        out.flush()
    except BrokenPipeError:
        _silence(out)
    except OSError as error:
        _silence(out)
        raise streamload.StreamloadError(f"stdout cannot be written to: {error.strerror}") from error


def emit_json(result: dict[str, Any]) -> None:
    """Write a result to stdout as one line of JSON."""
    emit(json.dumps(result))


def emit_failure(error: streamload.StreamloadError) -> None:
    """Write an error to stdout as one line of JSON, in the place of a result that there is none of."""
    where = {name: getattr(error, name) for name in ("uri", "object", "start", "end", "attempts", "cause")}
    with suppress(streamload.StreamloadError):  # that stdout cannot be written to may be the error itself
        emit_json({"error": str(error), "kind": type(error).__name__, **where})


def flush() -> None:
    """Write out what somebody else has put into stdout's buffer."""
    if sys.stdout is None:
        return
    try:
        sys.stdout.flush()
    except OSError:
        _silence(sys.stdout)


def speak_json(yes: bool) -> None:
    """Write lines to stderr as JSON objects from now on, or as text."""
    global _json
    _json = yes


def complain(text: str, *, program: str = "streamload") -> None:
    """Write one line to stderr."""
    line = _json_line("error", text) if _json else f"{program}: {printable(text)}"
    try:
        print(line, file=sys.stderr, flush=True)
    except OSError:
        _silence(sys.stderr)


def printable(text: str) -> str:
    """`text` on one line and without anything that a terminal would act on.

    Names come from files that anybody can have made.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else ascii(letter)[1:-1] for letter in text)


@contextmanager
def log_lines(*, quiet: bool) -> Iterator[None]:
    """Show the library's log on stderr for as long as the block runs.

    Args:
        quiet: Only what is wrong, no progress.
    """
    logger = logging.getLogger("streamload")
    handler, level = _StderrHandler(), logger.level
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    # What these warn of comes back as an error of ours; without a handler Python prints it, tracebacks included.
    for foreign in ("botocore", "aiobotocore"):
        logging.getLogger(foreign).addHandler(logging.NullHandler())
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _StderrHandler(logging.Handler):
    """Writes to what stderr is at the moment: while a progress bar is shown, lines go above it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            if _json:
                fields = getattr(record, "fields", {})
                print(_json_line(record.levelname.lower(), record.getMessage(), **fields), file=sys.stderr, flush=True)
                return
            # Line by line: a traceback has several.
            text = "\n".join(map(printable, self.format(record).split("\n")))
            print(text, file=sys.stderr, flush=True)
        except Exception:
            self.handleError(record)


def _json_line(level: str, text: str, **fields: object) -> str:
    now = time.time()
    moment = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
    return json.dumps({"time": moment, "level": level, "message": text, **fields})


def _silence(stream: TextIO) -> None:
    """Lead a stream nowhere, so that the interpreter's last flush does not fail on what is still in its buffer."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, stream.fileno())
    os.close(devnull)
