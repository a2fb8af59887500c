"""An HTTP server for tests that serves bytes as RFC 9110 says, or not quite so where it is told to."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import socket
import ssl
import threading
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from email.utils import formatdate, parsedate_to_datetime
from typing import Literal, cast

from aiohttp import web

__all__ = ["File", "FileServer", "Seen", "answer_range", "cut", "run_server", "serve_tunnel"]

# Long ago, so that nobody takes it for a file that is still being written.
_MODIFIED_S = 1_700_000_000.0


@dataclass(frozen=True)
class File:
    """What is served under one path.

    Attributes:
        content: Its bytes.
        modified_s: When they were written.
    """

    content: bytes
    modified_s: float = _MODIFIED_S

    @property
    def tag(self) -> str:
        return hashlib.sha256(self.content).hexdigest()[:16]


@dataclass(frozen=True)
class Seen:
    """A request as it came."""

    path: str
    query: str
    headers: dict[str, str]
    status: int


Handler = Callable[[web.Request], Awaitable[web.StreamResponse | None]]
"""Answers a request in the files' place; None where the files are to be served."""


@dataclass
class FileServer:
    """Serves files; see `run_server`.

    Attributes:
        files: By their path, which begins with a slash.
        instead: Asked first.
        ranges: Whether it honours ranges.
        conditions: Whether it honours If-Match and the like.
        tags: Which ETags it gives.
        dates: Whether it gives Last-Modified.
        seen: The requests, in order.
    """

    files: dict[str, File] = field(default_factory=dict)
    instead: Handler | None = None
    ranges: bool = True
    conditions: bool = True
    tags: Literal["strong", "weak", "none"] = "strong"
    dates: bool = True
    seen: list[Seen] = field(default_factory=list)
    origin: str = ""

    def put(self, path: str, content: bytes, **more: float) -> None:
        self.files[path] = File(content, **more)

    async def answer(self, plain: web.BaseRequest) -> web.StreamResponse:
        request = cast("web.Request", plain)
        answer: web.StreamResponse | None = None
        try:
            answer = await self.instead(request) if self.instead is not None else None
            if answer is None:
                answer = self._serve(request)
        finally:
            status = 0 if answer is None else answer.status
            headers = {name.lower(): value for name, value in request.headers.items()}
            self.seen.append(Seen(request.path, request.query_string, headers, status))
        return answer

    def _serve(self, request: web.Request) -> web.StreamResponse:
        file = self.files.get(request.path)
        if file is None:
            return web.Response(status=404, text="nothing is here")
        headers: dict[str, str] = {}
        if self.tags != "none":
            headers["ETag"] = f'"{file.tag}"' if self.tags == "strong" else f'W/"{file.tag}"'
        if self.dates:
            headers["Last-Modified"] = formatdate(file.modified_s, usegmt=True)
        if self.conditions and not _holds(request, headers.get("ETag"), file.modified_s):
            return web.Response(status=412, text="it is another one")
        return answer_range(request, file.content, headers, ranges=self.ranges)


def _holds(request: web.Request, tag: str | None, modified_s: float) -> bool:
    wanted = request.headers.get("If-Match")
    if wanted is not None and (tag is None or tag.startswith("W/") or wanted != tag):
        return False
    since = request.headers.get("If-Unmodified-Since")
    return since is None or modified_s <= parsedate_to_datetime(since).timestamp()


def answer_range(
    request: web.Request, content: bytes, headers: dict[str, str], *, ranges: bool = True
) -> web.StreamResponse:
    """The answer to a GET, in which there may be one range."""
    wanted = request.headers.get("Range")
    if wanted is None or not ranges:
        return web.Response(status=200, body=content, headers=headers)
    first, last = wanted.removeprefix("bytes=").split("-")
    start, end = int(first), min(int(last) + 1, len(content))
    if start >= len(content):
        return web.Response(status=416, headers={"Content-Range": f"bytes */{len(content)}"})
    headers = {**headers, "Content-Range": f"bytes {start}-{end - 1}/{len(content)}"}
    return web.Response(status=206, body=content[start:end], headers=headers)


async def cut(request: web.Request, content: bytes, headers: dict[str, str], *, after: int) -> web.StreamResponse:
    """The answer to a range, whose connection is closed after so many bytes of the body."""
    whole = answer_range(request, content, headers)
    assert isinstance(whole, web.Response)
    assert isinstance(whole.body, bytes)
    answer = web.StreamResponse(
        status=whole.status, headers={**headers, "Content-Range": whole.headers["Content-Range"]}
    )
    answer.content_length = len(whole.body)
    await answer.prepare(request)
    await answer.write(whole.body[:after])
    assert request.transport is not None
    request.transport.close()
    return answer


@contextlib.contextmanager
def run_server(server: FileServer, *, tls: ssl.SSLContext | None = None) -> Iterator[FileServer]:
    """Run a server on a thread of its own, on a free port of 127.0.0.1."""
    started: Future[asyncio.AbstractEventLoop] = Future()
    end = asyncio.Event()

    async def main() -> None:
        # What aiohttp calls low-level: no router, which has ideas of its own about paths.
        web_server = web.Server(server.answer, access_log=None, handler_cancellation=True)
        runner = web.ServerRunner(web_server)
        await runner.setup()
        listening = socket.create_server(("127.0.0.1", 0))
        await web.SockSite(runner, listening, ssl_context=tls).start()
        host, port = listening.getsockname()
        server.origin = f"{'http' if tls is None else 'https'}://{host}:{port}"
        started.set_result(asyncio.get_running_loop())
        await end.wait()
        # Not gracefully: a client that is still connected would be waited for, or its transport left over. One that has
        # just been accepted is a task first, and asyncio forgets its socket where the server is closed meanwhile: so
        # nobody is accepted any more, and then nobody is left, and then it is closed.
        asyncio.get_running_loop().remove_reader(listening)
        while asyncio.all_tasks() - {asyncio.current_task()}:
            for connection in web_server.connections:
                if connection.transport is not None:
                    connection.transport.abort()
            await asyncio.sleep(0)
        await runner.cleanup()

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="http-server")
    thread.start()
    loop = started.result()
    try:
        yield server
    finally:
        loop.call_soon_threadsafe(end.set)
        thread.join()


@contextlib.asynccontextmanager
async def serve_tunnel(port: int) -> AsyncIterator[tuple[str, list[str]]]:
    """Run a proxy that connects whoever asks to a port of this machine; its address, and what it was asked."""
    heads: list[str] = []
    tasks: set[asyncio.Task[None]] = set()

    async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.add(task)
        try:
            heads.append((await reader.readuntil(b"\r\n\r\n")).decode())
            up_reader, up_writer = await asyncio.open_connection("127.0.0.1", port)
            try:
                writer.write(b"HTTP/1.1 200 Connected\r\n\r\n")
                await asyncio.wait(
                    [asyncio.create_task(_pass(reader, up_writer)), asyncio.create_task(_pass(up_reader, writer))]
                )
            finally:
                up_writer.transport.abort()
        finally:
            tasks.discard(task)
            writer.transport.abort()

    server = await asyncio.start_server(connected, "127.0.0.1", 0)
    try:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", heads
    finally:
        server.close()
        if tasks:
            await asyncio.wait(tasks)


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Pass bytes on until there are no more, and end the other side then."""
    with contextlib.suppress(OSError):
        while piece := await reader.read(1 << 16):
            writer.write(piece)
            await writer.drain()
    writer.transport.abort()
