"""The limit for S3: two threads of blocking HTTP/1.1, ranged GETs received into one reused ring.

This is the plainest code that moves the same bytes over the same protocol: botocore signs, and nothing else stands
between the socket and the ring. It retries nothing, verifies nothing, and makes no tensors.
"""

from __future__ import annotations

import mmap
import os
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from urllib.parse import quote, urlsplit

from bench.loaders.base import MIB, Job, Outcome

__all__ = ["drain_sockets"]

RING_BYTES = 256 * MIB
# S3's own advice is ranges of 8 to 16 MB.
RANGE_BYTES = 8 * MIB
THREADS = 2
# An answer's head has some 400 bytes; what comes with it of the body is copied once more.
_HEAD_BYTES = 4096
_TIMEOUT_S = 60


def drain_sockets(job: Job, then: Callable[[str, memoryview, int], None] | None = None) -> Outcome:
    """Move all files of the job through the ring.

    Args:
        job: Of an object store; credentials and the CA bundle are found in the environment.
        then: Given the key, the bytes and their place in the object, on the thread that received them.

    Raises:
        RuntimeError: No credentials, or an answer that is not the range that was asked for.
        OSError: The connection broke, or was silent for a minute.
    """
    requests = Requests(job)
    ring = memoryview(mmap.mmap(-1, RING_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    todo = enumerate(_ranges(job))
    lock = threading.Lock()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            with requests.connect() as connection:
                while not errors:
                    with lock:
                        number, (key, start, nbytes) = next(todo, (0, ("", 0, 0)))
                    if not nbytes:
                        return
                    at = number * RANGE_BYTES % RING_BYTES
                    connection.sendall(requests.get(key, start, start + nbytes))
                    _receive(connection, ring[at : at + nbytes])
                    if then is not None:
                        then(key, ring[at : at + nbytes], start)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(THREADS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return Outcome(nbytes=job.size_bytes, last=time.perf_counter())


class Requests:
    """Makes connections to the job's endpoint and signed requests for them."""

    def __init__(self, job: Job) -> None:
        # Only here, as in all loaders: the module must be importable without it.
        from botocore.auth import S3SigV4Auth
        from botocore.awsrequest import AWSRequest
        from botocore.session import Session

        session = Session()
        credentials = session.get_credentials()
        if credentials is None:
            raise RuntimeError("there are no AWS credentials in the environment")
        region = os.environ.get("AWS_REGION") or session.get_config_variable("region") or "us-east-1"
        self._request = AWSRequest
        self._auth = S3SigV4Auth(credentials.get_frozen_credentials(), "s3", region)
        endpoint = job.endpoint or f"https://s3.{region}.amazonaws.com"
        self._base = f"{endpoint.rstrip('/')}/{job.bucket}/"
        self._url = urlsplit(endpoint)
        self._tls: ssl.SSLContext | None = None
        if self._url.scheme == "https":
            self._tls = ssl.create_default_context(cafile=os.environ.get("AWS_CA_BUNDLE"))

    def connect(self) -> socket.socket:
        """A connection whose reads block, and fail after a minute."""
        host = self._url.hostname or ""
        connection = socket.create_connection((host, self._url.port or (443 if self._tls else 80)), _TIMEOUT_S)
        # Python's own time-outs cost a poll before each read.
        connection.settimeout(None)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("ll", _TIMEOUT_S, 0))
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return connection if self._tls is None else self._tls.wrap_socket(connection, server_hostname=host)

    def get(self, key: str, start: int, end: int) -> bytes:
        """The request for the object's bytes from ``start`` to before ``end``."""
        request = self._request(
            method="GET",
            url=self._base + quote(key, safe="/~"),
            headers={"Host": self._url.netloc, "Range": f"bytes={start}-{end - 1}"},
        )
        self._auth.add_auth(request)
        target = urlsplit(request.url)
        lines = [f"GET {target.path} HTTP/1.1", *(f"{name}: {value}" for name, value in request.headers.items())]
        return "\r\n".join([*lines, "", ""]).encode()


def _ranges(job: Job) -> Iterator[tuple[str, int, int]]:
    for key, size in zip(job.files, job.sizes, strict=True):
        for start in range(0, size, RANGE_BYTES):
            yield key, start, min(RANGE_BYTES, size - start)


def _receive(connection: socket.socket, into: memoryview) -> None:
    """Receive one answer whose body is as long as ``into``."""
    head = bytearray()
    while (end := head.find(b"\r\n\r\n")) < 0:
        piece = connection.recv(_HEAD_BYTES)
        if not piece:
            raise ConnectionError(f"the connection ended in the answer's head: {bytes(head[:200])!r}")
        head += piece
    length = f"\r\ncontent-length: {len(into)}\r\n".encode()
    if not head.startswith(b"HTTP/1.1 206") or length not in head[: end + 2].lower():
        raise RuntimeError(f"not {len(into)} bytes of a range: {bytes(head[:500]).decode(errors='replace')}")
    body = memoryview(head)[end + 4 :]
    at = len(body)
    into[:at] = body
    # TLS gives one record of 16 KiB at a time whatever is asked for; plain sockets wait for all of it in the kernel.
    flags = 0 if isinstance(connection, ssl.SSLSocket) else socket.MSG_WAITALL
    while at < len(into):
        received = connection.recv_into(into[at:], 0, flags)
        if not received:
            raise ConnectionError(f"the connection ended after {at} of {len(into)} bytes")
        at += received
