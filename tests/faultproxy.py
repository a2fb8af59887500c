"""A proxy in front of a real server that spoils the answers it is told to spoil."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

__all__ = ["Fault", "FaultProxy", "Instead", "Plan", "run_fault_proxy"]


@dataclass(frozen=True)
class Fault:
    """What becomes of one answer.

    Attributes:
        then: What happens after `passed_bytes` of it: the connection is reset or ended, nothing more is sent, a bit is
            flipped in the next byte and all goes on, or all goes on.
        passed_bytes: How much of the answer passes; None for all of its head.
        instead: Sent in the answer's place; the server is not asked.
    """

    then: Literal["reset", "close", "stall", "flip", "nothing"] = "nothing"
    passed_bytes: int | None = 0
    instead: bytes | None = None


Plan = Callable[[int, bytes], Fault | None]
"""Is given the number of a request for a range, counted from 1, and its head; says what becomes of its answer."""


Instead = Callable[[bytes], bytes | None]
"""Is given the head of any request; an answer to give in the server's place, or None."""


class FaultProxy:
    """Passes whole requests and answers on; see `run_fault_proxy`.

    Attributes:
        port: Where it listens, on 127.0.0.1.
        ranges: How many requests for ranges have come.
        spoiled: How many answers were spoiled.
        connections: How many clients are connected.
    """

    def __init__(self, host: str, port: int, plan: Plan, instead: Instead) -> None:
        self._target = (host, port)
        self._instead = instead
        self._plan = plan
        self.port = 0
        self.ranges = 0
        self.spoiled = 0
        self.connections = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: asyncio.Server | None = None
        self._clients: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    async def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)
        self.port = self._server.sockets[0].getsockname()[1]

    def cut(self) -> None:
        """End every connection there is now; from any thread."""
        assert self._loop is not None
        self._loop.call_soon_threadsafe(lambda: [task.cancel() for task in self._clients])

    async def stop(self) -> None:
        """End every connection, and listen no more."""
        assert self._server is not None
        self._server.close()
        for task in self._clients:
            task.cancel()
        if self._clients:
            await asyncio.wait(self._clients)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._clients[task] = writer
        self.connections += 1
        try:
            # A client that leaves, however it does it, ends it; so does `stop`.
            with contextlib.suppress(asyncio.IncompleteReadError, OSError, asyncio.CancelledError):
                await self._pass_on(reader, writer)
        finally:
            self.connections -= 1
            del self._clients[task]
            writer.transport.abort()

    async def _pass_on(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(*self._target)
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                fault = None
                if b"\r\nrange:" in head.lower():
                    self.ranges += 1
                    fault = self._plan(self.ranges, head)
                if (said := self._instead(head)) is not None:
                    answer = said
                elif fault is not None and fault.instead is not None:
                    answer = fault.instead
                else:
                    # Some clients send the whole URL, as to a proxy, and not every server understands that.
                    up_writer.write(re.sub(rb"^([A-Z]+) http://[^/]+", rb"\1 ", head))
                    answer = await _read_answer(up_reader, head.startswith(b"HEAD "))
                if fault is None:
                    writer.write(answer)
                    await writer.drain()
                elif not await self._spoil(fault, answer, reader, writer):
                    return
        finally:
            up_writer.transport.abort()

    async def _spoil(
        self, fault: Fault, answer: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> bool:
        """Send what is left of an answer; whether the connection goes on."""
        self.spoiled += 1
        passed = answer.index(b"\r\n\r\n") + 4 if fault.passed_bytes is None else fault.passed_bytes
        if fault.then == "nothing":
            passed = len(answer)
        writer.write(answer[:passed])
        await writer.drain()
        if fault.then == "flip":
            writer.write(bytes([answer[passed] ^ 1]) + answer[passed + 1 :])
            await writer.drain()
        elif fault.then == "stall":
            await reader.read(1)  # until the client gives up
            return False
        elif fault.then == "reset":
            linger = struct.pack("ii", 1, 0)
            writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            return False
        elif fault.then == "close":
            writer.close()
            await writer.wait_closed()
            return False
        return True


async def _read_answer(reader: asyncio.StreamReader, bodiless: bool) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    fields = dict(line.lower().split(b":", 1) for line in head.split(b"\r\n")[1:] if b":" in line)
    if bodiless:
        return head
    if fields.get(b"transfer-encoding", b"").strip() == b"chunked":
        answer = head
        while True:
            line = await reader.readuntil(b"\r\n")
            answer += line + await reader.readexactly(int(line, 16) + 2)
            if int(line, 16) == 0:
                return answer
    return head + await reader.readexactly(int(fields.get(b"content-length", b"0")))


@contextlib.contextmanager
def run_fault_proxy(host: str, port: int, plan: Plan, instead: Instead = lambda head: None) -> Iterator[FaultProxy]:
    """Run a proxy to a server on a thread of its own.

    Args:
        host: The server's.
        port: The server's.
        plan: Called on that thread.
        instead: The same.
    """
    proxy = FaultProxy(host, port, plan, instead)
    started: Future[asyncio.AbstractEventLoop] = Future()
    ended: Future[None] = Future()

    async def main() -> None:
        await proxy.start()
        end = asyncio.Event()
        ended.add_done_callback(lambda _: loop.call_soon_threadsafe(end.set))
        loop = asyncio.get_running_loop()
        started.set_result(loop)
        await end.wait()
        await proxy.stop()

    thread = threading.Thread(target=lambda: asyncio.run(main()), name="fault-proxy")
    thread.start()
    started.result()
    try:
        yield proxy
    finally:
        ended.set_result(None)
        thread.join()
