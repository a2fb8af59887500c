"""One rank of several, each a process of its own that loads into tensors: ``python -m tests.ranks`` with JSON on stdin.

It says on stdout, a JSON object a line, what it is about to do and how its loads ended.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any
from unittest.mock import patch

__all__ = ["Task", "main"]


@dataclass(frozen=True)
class Task:
    """What a rank does.

    Attributes:
        rank: Which it is.
        size: How many there are.
        port: Of the store; 0: this rank holds it, and says which port it has.
        folder: A pre-sharded checkpoint.
        loads: How many loads it makes.
        extra_name: Whether its model has a tensor that the checkpoint lacks.
        fail_at: The operation of its source that fails; 0: none.
        block_at: The operation of its source at which it waits for a line on stdin, and says so; 0: none.
    """

    rank: int
    size: int
    port: int
    folder: str
    loads: int = 1
    extra_name: bool = False
    fail_at: int = 0
    block_at: int = 0

    def to_json(self) -> str:
        return json.dumps(asdict(self))


def main() -> None:
    import torch
    import torch.distributed as dist
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    # Before the ranks meet: what is imported later lets one of them be far behind.
    from streamload import load_into, peers
    from streamload.errors import AccessError
    from streamload.sources.local import LocalSource
    from streamload.testing import FaultSource

    task = Task(**json.loads(sys.stdin.readline()))
    timeout = timedelta(minutes=30)  # nobody waits so long: a test that needs it fails
    store = TCPStore("127.0.0.1", task.port, is_master=task.port == 0, wait_for_workers=False, timeout=timeout)
    _say(at="store", port=store.port)
    dist.init_process_group("gloo", store=store, rank=task.rank, world_size=task.size, timeout=timeout)

    def open_source(uri: str, **_: object) -> FaultSource:
        source = FaultSource(
            LocalSource(uri),
            fail_at=task.fail_at or task.block_at,
            times=None,
            block=bool(task.block_at),
            error=lambda: AccessError(f"spoiled for rank {task.rank}"),
        )

        def wait() -> None:
            source.blocked.result()
            _say(at="blocked")
            sys.stdin.readline()
            source.release()

        threading.Thread(target=wait, daemon=True).start()
        return source

    finish = peers.Peers.finish

    def say_and_finish(self: peers.Peers, timeout_s: float | None = None, **versions: Any) -> None:
        _say(at="finishing")
        finish(self, timeout_s, **versions)

    for _ in range(task.loads):
        into = {"weight": torch.zeros(300, 300), "rank": torch.tensor(-1)}
        if task.extra_name:
            into["extra"] = torch.zeros(1)
        try:
            with (
                patch("streamload.planning.open_source", open_source),
                patch("streamload.peers.Peers.finish", say_and_finish),
            ):
                load_into(into, task.folder, rank=task.rank, world_size=task.size)
        except Exception as error:
            _say(at="failed", kind=type(error).__name__, text=str(error), rank=getattr(error, "rank", None))
        else:
            _say(at="loaded", ranks=[int(into["rank"]), *sorted(set(into["weight"].int().view(-1).tolist()))])
    left = [thread.name for thread in threading.enumerate() if thread.name.startswith("streamload")]
    _say(at="end", left=left)
    # Not by way of the process group's own end, which would wait for ranks that are gone.
    os._exit(0)


def _say(**what: Any) -> None:
    print(json.dumps(what), flush=True)


if __name__ == "__main__":
    main()
