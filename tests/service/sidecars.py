"""Sidecars for tests: in this process, and as programs of their own."""

from __future__ import annotations

import asyncio
import http.client
import json
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from streamload.options import resolve
from streamload.service.listening import Listeners
from streamload.service.options import ServeOptions
from streamload.service.sidecar import Sidecar
from streamload.stage import StageOptions, Stager
from tests.cli.programs import TIMEOUT_S, program
from tests.stage.models import PIECE

__all__ = ["SMALL", "Answer", "LocalSidecar", "Running", "ask", "ask_port", "connect", "running"]

SMALL = {"read_bytes": PIECE, "memory_bytes": 1 << 20}


class LocalSidecar:
    """A sidecar on a thread of this process, which can be begun again; the thread stays until the block ends.

    Args:
        source: What is staged.
        folder: Where to; the socket is in it.
    """

    def __init__(self, source: Path, folder: Path) -> None:
        self.socket = folder / "s.sock"
        self.uri = f"sidecar://{self.socket}"
        self._source = source
        self._folder = folder
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._serving: asyncio.Task[None] | None = None
        self._sidecar: Sidecar | None = None

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def restart(self) -> None:
        """End the one that serves, and begin another one; returns when that has staged everything, or has failed."""
        self._call(self._restart())

    def settle(self) -> None:
        """Wait until it has staged everything, or has failed, whatever it was asked to begin meanwhile."""
        self._call(self._settle())

    def _call(self, coroutine: Any) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(TIMEOUT_S)

    async def _restart(self) -> None:
        await self._stop()
        reading = resolve(SMALL)[0]

        def make() -> Stager:
            return Stager(str(self._source), str(self._folder), StageOptions(), reading)

        self._sidecar = sidecar = Sidecar(make, str(self._folder), reading, drain_s=0.0, began_s=0.0)

        async def serve() -> None:
            async with Listeners(sidecar, str(self.socket), ServeOptions()):
                await sidecar.run()

        self._serving = asyncio.create_task(serve())
        await self._settle()

    async def _settle(self) -> None:
        while self._sidecar is not None and self._sidecar.state == "staging":
            await self._sidecar.changed(TIMEOUT_S)

    async def _stop(self) -> None:
        serving, self._serving = self._serving, None
        if serving is not None:
            serving.cancel()
            await asyncio.wait({serving})


@dataclass(frozen=True)
class Answer:
    """An answer over HTTP."""

    status: int
    body: bytes

    @property
    def json(self) -> dict[str, Any]:
        found = json.loads(self.body)
        assert isinstance(found, dict)
        return found

    @property
    def error(self) -> str:
        """What it says is wrong."""
        return str(self.json["error"]["cause"])


def connect(path: Path) -> socket.socket:
    """A connection to a Unix socket."""
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(TIMEOUT_S)
    connection.connect(str(path))
    return connection


def ask(path: Path, method: str, what: str, body: object = None) -> Answer:
    """Ask a sidecar on its socket, on a connection of its own."""
    client = http.client.HTTPConnection("sidecar", timeout=TIMEOUT_S)
    client.sock = connect(path)
    return _ask(client, method, what, body)


def ask_port(port: int, what: str, method: str = "GET", body: object = None) -> Answer:
    """Ask a sidecar on its port."""
    return _ask(http.client.HTTPConnection("127.0.0.1", port, timeout=TIMEOUT_S), method, what, body)


def _ask(client: http.client.HTTPConnection, method: str, what: str, body: object) -> Answer:
    try:
        content = body if isinstance(body, bytes | None) else json.dumps(body).encode()
        client.request(method, what, content)
        response = client.getresponse()
        return Answer(response.status, response.read())
    finally:
        client.close()


class Running:
    """A sidecar that is a program of its own."""

    def __init__(self, process: Any, path: Path) -> None:
        self.process = process
        self.socket = path
        self.uri = f"sidecar://{path}"
        self.lines: list[dict[str, Any]] = []

    def until(self, message: str) -> dict[str, Any]:
        """Read its log up to the line that says this."""
        for text in self.process.stderr:
            line: dict[str, Any] = json.loads(text)
            self.lines.append(line)
            if message in line["message"]:
                return line
        raise AssertionError(f"it never said {message!r}: {self.lines}")

    def status(self) -> dict[str, Any]:
        """What it says of itself."""
        return ask(self.socket, "GET", "/v1/status").json

    def ended(self) -> int:
        """Wait for its end; the exit code."""
        _, rest = self.process.communicate(timeout=TIMEOUT_S)
        self.lines += [json.loads(text) for text in rest.splitlines()]
        return int(self.process.returncode)


@contextmanager
def running(
    source: object, folder: Path, *options: object, environment: Mapping[str, str] | None = None
) -> Iterator[Running]:
    """``streamload serve`` with small reads, once its socket answers; killed in the end."""
    # More at once than a test holds back.
    arguments = ["serve", source, folder, "--read-bytes", PIECE, "--memory-bytes", "1MiB", "--concurrency", 8]
    arguments += ["--log", "json", *options]
    with program(*arguments, environment=environment) as process:
        sidecar = Running(process, folder / "streamload.sock")
        sidecar.until("serving on")
        yield sidecar
