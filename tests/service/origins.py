"""A web server that a sidecar stages from, and that holds answers back until it is told to let go."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from aiohttp import web

from tests.cli.programs import TIMEOUT_S
from tests.httpserver import FileServer, run_server
from tests.stage.models import FIRST, SECOND, source_of

__all__ = ["Origin", "origin_of", "random_ranges"]

Hold = Callable[[str, int], bool]
"""Given a file's name and a range's first byte, says whether the answer is held back."""


class Origin:
    """Serves a folder's files.

    Attributes:
        uri: What to stage.
        files: What is served, by name.
        server: The server.
    """

    def __init__(self, server: FileServer, folder: Path) -> None:
        self.server = server
        self.uri = f"{server.origin}/model/"
        self._hold: Hold | None = None
        self._held: list[tuple[asyncio.AbstractEventLoop, asyncio.Event]] = []
        self._count = threading.Semaphore(0)
        self._lock = threading.Lock()
        for path in sorted(folder.iterdir()):
            server.put(f"/model/{path.name}", path.read_bytes())
        server.instead = self._instead

    def hold(self, hold: Hold) -> None:
        """Hold answers back from now on."""
        self._hold = hold

    def until_held(self, count: int = 1) -> None:
        """Wait until so many more answers are held back."""
        for _ in range(count):
            assert self._count.acquire(timeout=TIMEOUT_S)

    def release(self) -> None:
        """Let go of all answers, and hold back none any more."""
        with self._lock:
            self._hold = None
            for loop, event in self._held:
                loop.call_soon_threadsafe(event.set)
            self._held.clear()

    def put(self, name: str, content: bytes) -> None:
        """Serve another content."""
        self.server.put(f"/model/{name}", content)

    def read(self, name: str) -> list[int]:
        """The first bytes of the ranges of a file that were answered, in order, but for a look at how long it is."""
        return [
            int(seen.headers["range"].removeprefix("bytes=").split("-")[0])
            for seen in [*self.server.seen]
            if seen.path == f"/model/{name}" and seen.status == 206 and seen.headers["range"] != "bytes=0-0"
        ]

    async def _instead(self, request: web.Request) -> web.StreamResponse | None:
        wanted = request.headers.get("Range", "bytes=0-")
        with self._lock:
            if self._hold is None or not self._hold(request.path.rpartition("/")[2], int(wanted[6:].split("-")[0])):
                return None
            event = asyncio.Event()
            self._held.append((asyncio.get_running_loop(), event))
        self._count.release()
        await event.wait()
        return None


@contextmanager
def origin_of(folder: Path) -> Iterator[Origin]:
    """Serve two shards and an index."""
    source_of(folder)
    for path in folder.iterdir():
        if path.name not in (FIRST, SECOND, "model.safetensors.index.json"):
            path.unlink()
    with run_server(FileServer()) as server:
        origin = Origin(server, folder)
        try:
            yield origin
        finally:
            origin.release()


def random_ranges(nbytes: int, count: int, seed: int) -> list[tuple[int, int]]:
    """Ranges of a file."""
    chance = random.Random(seed)
    found: list[tuple[int, int]] = []
    for _ in range(count):
        start, end = sorted(chance.sample(range(nbytes + 1), 2))
        found.append((start, end))
    return found
