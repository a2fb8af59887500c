"""Serve a checkpoint from an S3 server on this machine, stream it back, compare every tensor: ``make demo``.

Nothing outside this machine is asked for anything, and nothing stays behind: the server and the temporary folder end
with the program, however it ends.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import NoReturn

import torch
from safetensors import safe_open

import streamload
from examples.demo.bucket import upload
from examples.demo.sample import LlamaShape, write_checkpoint
from streamload.testing.s3server import run_ministack

_BUCKET = "streamload-demo"
_PREFIX = "sample-llama"
_STAGES = 5
_SMALL = LlamaShape(hidden=64, intermediate=176, heads=4, kv_heads=2, layers=2, vocabulary=1000)


def main() -> int:
    """Run the demo.

    Returns:
        The exit code: 0 where every tensor came back as it was written, 1 otherwise.
    """
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--small", action="store_true", help="a checkpoint of less than a MiB instead of 512")
    arguments = parser.parse_args()
    _end_on_signals()
    _show_log_lines()
    try:
        identical = _demo(_SMALL if arguments.small else LlamaShape())
    except streamload.StreamloadError as error:
        print(f"\nThe demo failed: {error}", file=sys.stderr)
        return 1
    return 0 if identical else 1


def _demo(shape: LlamaShape) -> bool:
    with contextlib.ExitStack() as cleanup:
        _headline(1, "Write a sample checkpoint")
        folder = Path(cleanup.enter_context(tempfile.TemporaryDirectory(prefix="streamload-demo-")))
        nbytes = write_checkpoint(folder, shape)
        files = sorted(folder.glob("*.safetensors"))
        _say(f"a Llama of {nbytes / (1 << 20):.1f} MiB in {len(files)} files, in {folder}")

        _headline(2, "Start an S3 server that checks credentials")
        server = cleanup.enter_context(run_ministack())
        cleanup.enter_context(_only(server.environment))
        _say(server.endpoint)

        uri = f"s3://{_BUCKET}/{_PREFIX}"
        _headline(3, "Upload")
        upload(server, sorted(folder.iterdir()), bucket=_BUCKET, prefix=_PREFIX)
        _say(uri)

        _headline(4, "Stream it back")
        tensors, report = _stream(uri)
        _say(f"{len(tensors)} tensors")

        _headline(5, "Compare each with what safetensors reads from the files")
        identical = _compare(tensors, files)
        print(f"\n{report}", flush=True)
    return identical


def _stream(uri: str) -> tuple[dict[str, torch.Tensor], streamload.Report]:
    """Stream and keep everything; a program that uses each tensor as it comes needs far less memory."""
    with streamload.stream(uri, device="cpu", progress=True) as stream:
        tensors = dict(stream)
    return tensors, stream.report


def _compare(tensors: Mapping[str, torch.Tensor], files: list[Path]) -> bool:
    """Whether `tensors` are what `files` hold: the same names, dtypes, shapes and bits."""
    unexpected = set(tensors)
    wrong: list[str] = []
    for path in files:
        with safe_open(path, framework="pt") as file:
            for name in sorted(file.keys()):
                unexpected.discard(name)
                if name not in tensors or not _same_bits(tensors[name], file.get_tensor(name)):
                    wrong.append(name)
    for name in wrong:
        _say(f"missing or different: {name}")
    for name in sorted(unexpected):
        _say(f"not in the files: {name}")
    identical = not wrong and not unexpected
    if identical:
        _say(f"all {len(tensors)} are identical, bit for bit")
    return identical


def _same_bits(left: torch.Tensor, right: torch.Tensor) -> bool:
    # As bytes, because as numbers a NaN differs from itself.
    return (
        left.dtype == right.dtype
        and left.shape == right.shape
        and torch.equal(left.view(torch.uint8), right.view(torch.uint8))
    )


@contextlib.contextmanager
def _only(environment: Mapping[str, str]) -> Iterator[None]:
    """Point everything that speaks S3 in this process at one server, past any profile, role or proxy of the user's."""
    before = dict(os.environ)
    for name in before:
        if name.startswith("AWS_") or name.lower().endswith("_proxy"):
            del os.environ[name]
    os.environ.update(environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _end_on_signals() -> None:
    """Let Ctrl-C and SIGTERM unwind the program, once: a second signal must not break off the cleaning up."""

    def end(number: int, _frame: FrameType | None) -> NoReturn:
        for each in (signal.SIGINT, signal.SIGTERM):
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for each in (signal.SIGINT, signal.SIGTERM):
        signal.signal(each, end)


def _show_log_lines() -> None:
    """Where there is no terminal to draw a bar on, the library's progress is log lines: show them."""
    if sys.stderr.isatty():
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("      %(message)s"))
    logger = logging.getLogger("streamload")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)


def _headline(number: int, text: str) -> None:
    print(f"\n[{number}/{_STAGES}] {text}", flush=True)


def _say(text: str) -> None:
    print(f"      {text}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
