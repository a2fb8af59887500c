"""The program ``streamload``, from its first moment on.

Outside the package: importing that takes a tenth of a second, in which a signal would end in a traceback.
"""

from __future__ import annotations

import os
import signal
from types import FrameType

__all__ = ["main"]


def main() -> int:
    """Run the command line with the process's own arguments; the exit code is what `streamload.cli.main` returns."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _end)
    # The command line has handlers of its own while it runs; these are there again while the interpreter ends.
    from streamload.cli import main as run

    return run()


def _end(number: int, _frame: FrameType | None) -> None:
    """End as the command line does where it is stopped; there is nothing to be closed yet, or any more."""
    os.write(2, f"streamload: stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)
