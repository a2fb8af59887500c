"""A conversion in a process of its own, killed at a moment that a count decides: ``python -m tests.sharding``.

It takes a `Task` as JSON on stdin. A process that is not killed says on stdout what the conversion has returned.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import patch

if TYPE_CHECKING:
    from streamload.save import NewFile

__all__ = ["Task", "main", "run"]


@dataclass(frozen=True)
class Task:
    """What a process does.

    Attributes:
        src: The source.
        dest: The destination.
        options: Of `streamload.shard`.
        noted_bytes: How much is read between two entries of the journal.
        kill_at_bytes: After how many bytes written it is killed; None: it is not.
        kill_at_publish: At which file that is put under its name it is killed, counted from 1; None: it is not.
    """

    src: str
    dest: str
    options: dict[str, Any] = field(default_factory=dict)
    noted_bytes: int = 1 << 20
    kill_at_bytes: int | None = None
    kill_at_publish: int | None = None


def run(task: Task, environment: Mapping[str, str] | None = None) -> dict[str, Any] | None:
    """Run a task in a process of its own; what it says, or None where it was killed."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-m", "tests.sharding"],
        input=json.dumps(asdict(task)),
        cwd=Path(__file__).parent.parent,
        env={**os.environ, **(environment or {})},
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    if done.returncode == -signal.SIGKILL:
        return None
    assert done.returncode == 0
    said: dict[str, Any] = json.loads(done.stdout)
    return said


def main() -> None:
    """Carry out the task on stdin."""
    import streamload
    from streamload.save.local import LocalDestination, _LocalFile
    from streamload.save.s3 import S3Destination, _Upload

    task = Task(**json.load(sys.stdin))
    to_s3 = task.dest.startswith("s3://")
    folder: Any = S3Destination if to_s3 else LocalDestination
    file: Any = _Upload if to_s3 else _LocalFile
    write_all, publish = folder.write_all, file.publish
    written = published = 0

    async def counted_write_all(self: Any, pieces: Sequence[tuple[NewFile, memoryview]]) -> None:
        nonlocal written
        await write_all(self, pieces)
        written += sum(data.nbytes for _, data in pieces)
        if task.kill_at_bytes is not None and written >= task.kill_at_bytes:
            os.kill(os.getpid(), signal.SIGKILL)

    async def counted_publish(self: Any) -> None:
        nonlocal published
        await publish(self)
        # Not the journal.
        published += self.name.endswith(".safetensors")
        if task.kill_at_publish is not None and published >= task.kill_at_publish:
            os.kill(os.getpid(), signal.SIGKILL)

    with (
        patch("streamload.sharding._NOTED_BYTES", task.noted_bytes),
        patch.object(folder, "write_all", counted_write_all),
        patch.object(file, "publish", counted_publish),
    ):
        made = streamload.shard(task.src, task.dest, **task.options)
    print(json.dumps(made.to_dict()), flush=True)


if __name__ == "__main__":
    main()
