"""Servers for tests: S3's buckets, one that answers badly, and a proxy."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from streamload.testing.s3server import S3Server

__all__ = ["Answer", "BadServer", "S3Bucket", "Tunnels", "run_tunnels", "serve", "serve_by"]

_PIECE_BYTES = 64 << 10


@dataclass
class S3Bucket:
    """A bucket of its own, and a way to fill it that has nothing to do with the code under test."""

    server: S3Server
    name: str
    client: Any

    @property
    def uri(self) -> str:
        return f"s3://{self.name}"

    def put(self, key: str, content: bytes) -> None:
        self.client.put_object(Bucket=self.name, Key=key, Body=content)

    def remove(self, key: str) -> None:
        self.client.delete_object(Bucket=self.name, Key=key)


@dataclass(frozen=True)
class Answer:
    """What the server says to one request, and what it does then.

    Attributes:
        status: The HTTP status.
        headers: Header fields; ``Content-Length`` is added where nothing else ends the body.
        body: What is sent of the body, whatever the length says; nothing where the request is a HEAD.
        then: Keep the connection for the next request, end it, reset it, say nothing more, or never stop.
    """

    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    then: Literal["keep", "close", "reset", "hang", "flood"] = "keep"


class BadServer:
    """Answers requests with what it was given, one after the other, whatever is asked; or as a function says.

    Attributes:
        answers: What is still to be said; the last one is repeated.
        say: In their place: is given a request's head, and may wait.
        requests: The heads of the requests, as they came.
        asked: Set when a request has come.
        connections: How many connections were made.
        flooded_bytes: How much was sent by answers that never stop.
    """

    def __init__(self, answers: list[Answer], say: Callable[[str], Awaitable[Answer]] | None = None) -> None:
        self.answers = answers
        self.say = say
        self.requests: list[str] = []
        self.asked = asyncio.Event()
        self.connections = 0
        self.flooded_bytes = 0
        self.endpoint = ""
        self._handlers: set[asyncio.Task[None]] = set()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._handlers.add(task)
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                while await self._exchange(reader, writer):
                    pass
        except asyncio.CancelledError:
            # The test is over; asyncio's streams would log it.
            pass
        finally:
            self._handlers.discard(task)
            writer.close()

    async def close(self) -> None:
        handlers = list(self._handlers)
        for task in handlers:
            task.cancel()
        await asyncio.gather(*handlers)

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        self.requests.append((await reader.readuntil(b"\r\n\r\n")).decode())
        self.asked.set()
        if self.say is not None:
            answer = await self.say(self.requests[-1])
        else:
            answer = self.answers[0] if len(self.answers) == 1 else self.answers.pop(0)
        headers = dict(answer.headers)
        if "Transfer-Encoding" not in headers:
            headers.setdefault("Content-Length", str(len(answer.body)))
        body = b"" if self.requests[-1].startswith("HEAD ") else answer.body
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        writer.write(f"HTTP/1.1 {answer.status} Said\r\n{head}\r\n".encode() + body)
        await writer.drain()
        if answer.then == "hang":
            await asyncio.Event().wait()
        while answer.then == "flood":
            writer.write(bytes(_PIECE_BYTES))
            await writer.drain()
            self.flooded_bytes += _PIECE_BYTES
        if answer.then == "reset":
            reset = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, reset)
            writer.transport.abort()
        return answer.then == "keep"


def serve(*answers: Answer, tls: ssl.SSLContext | None = None) -> contextlib.AbstractAsyncContextManager[BadServer]:
    """Run a server with these answers on this loop, on a free port of 127.0.0.1."""
    return _run(BadServer(list(answers)), tls)


def serve_by(
    say: Callable[[str], Awaitable[Answer]], *, tls: ssl.SSLContext | None = None
) -> contextlib.AbstractAsyncContextManager[BadServer]:
    """The same, but each request is answered as a function says, which may wait."""
    return _run(BadServer([], say), tls)


@contextlib.asynccontextmanager
async def _run(bad: BadServer, tls: ssl.SSLContext | None) -> AsyncIterator[BadServer]:
    server = await asyncio.start_server(bad.handle, "127.0.0.1", 0, ssl=tls)
    bad.endpoint = f"http{'s' if tls else ''}://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield bad
    finally:
        server.close()
        await bad.close()
        await server.wait_closed()


@dataclass
class Tunnels:
    """An HTTP proxy that lets TLS through.

    Attributes:
        url: Where it is.
        asked: To which hosts and ports it was asked to lead.
    """

    url: str = ""
    asked: list[str] = field(default_factory=list)


@contextlib.asynccontextmanager
async def run_tunnels() -> AsyncIterator[Tunnels]:
    """Run a proxy on this loop, on a free port of 127.0.0.1."""
    tunnels = Tunnels()
    open_: set[asyncio.Task[None]] = set()

    async def tunnel(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        open_.add(task)
        far = None
        try:
            method, target, _ = (await reader.readuntil(b"\r\n\r\n")).decode().split(" ", 2)
            assert method == "CONNECT"
            tunnels.asked.append(target)
            host, _, port = target.rpartition(":")
            far_reader, far = await asyncio.open_connection(host, int(port))
            writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
            await asyncio.gather(_pass_on(reader, far), _pass_on(far_reader, writer))
        except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            pass  # either side has left, or the test is over
        finally:
            open_.discard(task)
            for each in (writer, far):
                if each is not None:
                    each.transport.abort()

    server = await asyncio.start_server(tunnel, "127.0.0.1", 0)
    tunnels.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield tunnels
    finally:
        server.close()
        for task in list(open_):
            task.cancel()
        await asyncio.gather(*open_)
        await server.wait_closed()


async def _pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(64 << 10):
        writer.write(data)
        await writer.drain()
    raise ConnectionResetError("it has left")
