"""Stages in processes that die, or stop, at the operation that they are told to; see `Dying`.

::

    python -m tests.stage.dying SOURCE PIECE_BYTES

It reads lines ``NUMBER FOLDER``: a forked process stages into that folder, and kills itself in the middle of its
NUMBERth change of the file system; 0: never. Answers with a line each: how many there were, or -1 where it was killed.
``-NUMBER FOLDER``: it stops there instead, holding its lock; the answer is its process id, and it is killed in the end.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from typing import Any

import streamload
import streamload.sources.local

_OPERATIONS = ("pwritev", "write", "fsync", "rename", "unlink", "ftruncate")


def _count(die_at: int, stop: bool, told: int) -> list[int]:
    """Have the calls that change something counted, and the one that is meant not survived."""
    count = [0]
    lock = threading.Lock()

    def counted(name: str, call: Any) -> Any:
        def instead(*arguments: Any, **more: Any) -> Any:
            # One after the other: what stops here stops all, and nothing is half done when it says so.
            with lock:
                count[0] += 1
                here = count[0] == die_at
                if here and stop:
                    write(told, b"stopped\n")
                    threading.Event().wait()
                if here:
                    if name == "pwritev":  # half of it has come as far as the file
                        fd, (data,), at = arguments
                        call(fd, (data[: len(data) // 2],), at)
                    if name == "write":
                        fd, data = arguments
                        call(fd, data[: len(data) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **more)

        return instead

    write = os.write
    for name in _OPERATIONS:
        setattr(os, name, counted(name, getattr(os, name)))
    return count


def _stage(source: str, piece_bytes: int, folder: str, number: int, told: int) -> None:
    count = _count(abs(number), number < 0, told)
    streamload.stage_checkpoint(source, folder, read_bytes=piece_bytes, memory_bytes=1 << 20)
    os.close(told)
    print(count[0], flush=True)


def main() -> None:
    """Serve."""
    source, piece_bytes = sys.argv[1], int(sys.argv[2])
    stopped: list[int] = []
    for line in sys.stdin:
        number, folder = line.rstrip("\n").split(" ", 1)
        ear, told = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(ear)
            try:
                _stage(source, piece_bytes, folder, int(number), told)
            finally:
                os._exit(0)
        os.close(told)
        heard = os.read(ear, 100)
        os.close(ear)
        if heard:
            stopped.append(child)
            print(child, flush=True)
            continue
        _, status = os.waitpid(child, 0)
        if os.WIFSIGNALED(status):
            print(-1, flush=True)
    for child in stopped:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


if __name__ == "__main__":
    main()
