"""A server that follows a script, memory that shows what was written to it, and what must be left of neither."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import functools
import ipaddress
import ssl
import struct
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from socket import SO_LINGER, SOL_SOCKET
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from streamload.errors import SourceError
from streamload.wire import Head, Pool

__all__ = [
    "REQUEST",
    "Lent",
    "Peer",
    "Script",
    "ScriptedServer",
    "answer",
    "ca_file",
    "client_tls",
    "closing",
    "pattern",
    "serve",
    "server_tls",
    "turn",
    "until",
    "watching",
    "wired",
]

REQUEST = b"GET /weights HTTP/1.1\r\nHost: server\r\n\r\n"

_POISON = 0xA5
_GUARD_BYTES = 64

# How often the loop turns until everything that is under way on one machine has surely arrived.
_TURNS = 12


async def turn(turns: int = _TURNS) -> None:
    """Let what was sent arrive and be acted on."""
    for _ in range(turns):
        await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    """Turn the loop until something is so; `run_on_each_loop` ends what never is."""
    while not condition():  # noqa: ASYNC110 -- what is waited for knows nothing of events
        await asyncio.sleep(0)


def pattern(nbytes: int, seed: int = 0) -> bytes:
    """Bytes of which no piece looks like another one nearby, and none like poison or zeros."""
    return bytes(1 + (index * 7 + index // 97 + seed) % 0x7F for index in range(nbytes))


def answer(body: bytes, *headers: str, status: int = 206, length: int | None = None) -> bytes:
    """A whole response with a length."""
    fields = [f"Content-Length: {len(body) if length is None else length}", *headers]
    return "\r\n".join([f"HTTP/1.1 {status} Said", *fields, "", ""]).encode("latin-1") + body


class Lent:
    """Views with poison in them, before, between and after them.

    Attributes:
        views: Where a body goes.
        heads: What `place` was asked about.
    """

    def __init__(self, *sizes: int) -> None:
        self.heads: list[Head] = []
        self.nbytes = sum(sizes)
        self._spans: list[tuple[int, int]] = []
        position = _GUARD_BYTES
        for size in sizes:
            self._spans.append((position, position + size))
            position += size + _GUARD_BYTES
        self.memory = bytearray([_POISON]) * position
        whole = memoryview(self.memory)
        self.views = [whole[start:end] for start, end in self._spans]

    def place(self, head: Head) -> Sequence[memoryview] | None:
        """Take a 206, keep an error's explanation, refuse anything else."""
        self.heads.append(head)
        if head.status >= 300:
            return None
        if head.status != 206:
            raise SourceError(f"the server ignores ranges ({head.status})")
        return self.views

    @property
    def content(self) -> bytes:
        return b"".join(self.memory[start:end] for start, end in self._spans)

    def check(self, body: bytes) -> None:
        """The leading bytes are these, and nothing was written where nothing was lent."""
        assert self.content[: len(body)] == body
        around = bytearray(self.memory)
        for start, end in self._spans:
            around[start:end] = bytes([_POISON]) * (end - start)
        assert around == bytes([_POISON]) * len(around), "something was written beside the views"

    @property
    def untouched(self) -> bool:
        return self.memory == bytes([_POISON]) * len(self.memory)


class Peer:
    """The server's end of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self.requests: list[bytes] = []

    async def request(self) -> bytes:
        """Wait for the next request."""
        head = await self._reader.readuntil(b"\r\n\r\n")
        self.requests.append(head)
        return head

    def send(self, data: bytes) -> None:
        """Send, unless the client has gone."""
        if not self._writer.transport.is_closing():
            self._writer.write(data)

    def close(self) -> None:
        self._writer.close()

    def reset(self) -> None:
        self._writer.get_extra_info("socket").setsockopt(SOL_SOCKET, SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()

    async def gone(self) -> None:
        """Wait until the client's end is closed."""
        with contextlib.suppress(OSError):
            while await self._reader.read(1 << 16):
                pass


Script = Callable[[Peer], Awaitable[None]]
"""What the server does on one connection. It is ended when the server is."""


def closing(*answers: bytes) -> Script:
    """Answers as many requests, and closes the connection."""

    async def script(peer: Peer) -> None:
        for data in answers:
            await peer.request()
            peer.send(data)
        peer.close()

    return script


class ScriptedServer:
    """Follows one script for each connection; the last one is repeated.

    Attributes:
        port: Where, on 127.0.0.1.
        peers: One for each connection that was made.
    """

    def __init__(self, scripts: Sequence[Script]) -> None:
        self._scripts = list(scripts)
        self.port = 0
        self.peers: list[Peer] = []
        self.failures: list[BaseException] = []
        self._tasks: dict[asyncio.Task[None], asyncio.StreamWriter] = {}

    @property
    def connections(self) -> int:
        return len(self.peers)

    @property
    def requests(self) -> int:
        """How many came."""
        return sum(len(peer.requests) for peer in self.peers)

    async def connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        peer = Peer(reader, writer)
        self.peers.append(peer)
        script = self._scripts[0] if len(self._scripts) == 1 else self._scripts.pop(0)
        task = asyncio.current_task()
        assert task is not None
        self._tasks[task] = writer
        try:
            await script(peer)
            await peer.gone()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # the client went, or the test is over
        except BaseException as error:
            self.failures.append(error)
        finally:
            del self._tasks[task]
            writer.transport.abort()

    async def clients_gone(self) -> None:
        """Wait until no script is followed any more: every client has closed its end."""
        while self._tasks:
            await asyncio.wait(list(self._tasks))

    async def close(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        await turn()
        for failure in self.failures:
            raise failure


@contextlib.asynccontextmanager
async def serve(
    *scripts: Script, tls: ssl.SSLContext | None = None, address: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[ScriptedServer]:
    """Run a server on this loop."""
    scripted = ScriptedServer(scripts)
    server = await asyncio.start_server(scripted.connected, address, port, ssl=tls)
    scripted.port = server.sockets[0].getsockname()[1]
    try:
        yield scripted
    finally:
        server.close()
        await scripted.close()
        await server.wait_closed()


@contextlib.asynccontextmanager
async def watching() -> AsyncIterator[None]:
    """Nothing inside reports an error to the loop, and no timer that streamload or a time limit of its set is left."""
    loop = asyncio.get_running_loop()
    reports: list[dict[str, Any]] = []
    timers: list[asyncio.TimerHandle] = []
    plain = loop.call_at

    def call_at(when: float, callback: Callable[..., object], *args: Any, **more: Any) -> asyncio.TimerHandle:
        timer = plain(when, callback, *args, **more)
        # Not those of asyncio's TLS, which sets its own for both ends.
        if str(getattr(callback, "__module__", "")).startswith(("streamload.", "asyncio.timeouts")):
            timers.append(timer)
        return timer

    def told(_: asyncio.AbstractEventLoop, report: dict[str, Any]) -> None:
        # A client that refuses the certificate may be gone before the server has noticed: asyncio tells the loop.
        if report.get("message") != "Error on transport creation for incoming connection":
            reports.append(report)

    loop.set_exception_handler(told)
    loop.call_at = call_at  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        loop.call_at = plain  # type: ignore[method-assign]
        loop.set_exception_handler(None)
    assert not reports, f"the loop was told: {reports}"
    # For uvloop, what is due at once is no timer.
    waiting = [timer for timer in timers if not timer.cancelled() and hasattr(timer, "when")]
    left = [timer for timer in waiting if timer.when() > loop.time()]
    assert not left, f"timers are left over: {left}"


@contextlib.asynccontextmanager
async def wired(
    *scripts: Script, stall_s: float = 20.0, server: ssl.SSLContext | None = None, client: ssl.SSLContext | None = None
) -> AsyncIterator[tuple[ScriptedServer, Pool]]:
    """A server, and a pool that asks it; after the test nothing of the pool is left."""
    async with serve(*scripts, tls=server) as scripted, watching():
        pool = Pool("127.0.0.1", scripted.port, tls=client, connect_timeout_s=20.0, stall_s=stall_s)
        try:
            yield scripted, pool
        finally:
            await pool.aclose()
        await turn(1)  # the count follows the connections by a turn
        assert pool.connections == 0
        await scripted.clients_gone()


@functools.cache
def _certificates() -> tuple[bytes, bytes]:
    """A CA's certificate, and a key with a certificate of it for 127.0.0.1 and ``server``."""
    now = datetime.datetime.now(datetime.UTC)

    def build(name: str, issuer: str, key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
            .issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, issuer)]))
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
        )

    ca_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    ca = (
        build("tests", "tests", ca_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(ca_key, hashes.SHA256())
    )
    names = x509.SubjectAlternativeName(
        [x509.IPAddress(ipaddress.IPv4Address("127.0.0.1")), x509.DNSName("server.test")]
    )
    leaf = build("server", "tests", key.public_key()).add_extension(names, critical=False).sign(ca_key, hashes.SHA256())
    pem = serialization.Encoding.PEM
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    return ca.public_bytes(pem), private + leaf.public_bytes(pem)


def server_tls(version: ssl.TLSVersion = ssl.TLSVersion.TLSv1_3) -> ssl.SSLContext:
    """What a server of this version needs."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = context.maximum_version = version
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "server.pem")
        path.write_bytes(_certificates()[1])
        context.load_cert_chain(path)
    return context


def ca_file(folder: Path) -> Path:
    """A file with the tests' CA in it."""
    path = folder / "ca.pem"
    path.write_bytes(_certificates()[0])
    return path


def client_tls() -> ssl.SSLContext:
    """Trusts the tests' CA."""
    return ssl.create_default_context(cadata=_certificates()[0].decode())
