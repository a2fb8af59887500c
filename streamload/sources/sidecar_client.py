"""Asks a sidecar over its Unix socket, and waits for one that is not there yet, or not there any more."""

from __future__ import annotations

import asyncio
import json
import os
from contextlib import suppress
from typing import Any

from streamload.errors import AccessError, OptionError, SourceError
from streamload.sources.sidecar_protocol import ASK_AGAIN_S, MAX_SOCKET_PATH_BYTES, error_from
from streamload.wire.head import MAX_HEAD_BYTES, parse_head

__all__ = ["PATIENCE_S", "SidecarClient", "socket_path"]

PATIENCE_S = 60.0
"""A sidecar that has crashed is begun again at once, or after ten seconds the second time, twenty, forty."""

# It takes half a second to begin.
_LOOK_AGAIN_S = 0.05
# Who hears nothing for three times as long as an answer takes at most asks one that hangs.
_SILENT_S = 3 * ASK_AGAIN_S
_AT_ONCE_S = 5.0
# Some 300 bytes for each file.
_MAX_ANSWER_BYTES = 64 << 20


def socket_path(uri: str) -> str:
    """The path that a URI names.

    Raises:
        OptionError: It names none.
    """
    path = uri.partition("://")[2]
    if not path.startswith("/") or path.endswith("/"):
        raise OptionError("name the sidecar's socket: sidecar:///run/streamload.sock", uri=uri)
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        raise OptionError(f"a Unix socket's path has at most {MAX_SOCKET_PATH_BYTES} bytes", uri=uri)
    return path


class SidecarClient:
    """Asks; used on one event loop, each time on a connection of its own.

    By hand, as little as it is: to import an HTTP client takes as long as to read 1 GB from the volume.

    Args:
        path: The socket's.
        uri: For errors.
        patience_s: How long to wait for a sidecar that does not answer.

    Attributes:
        requests: How many requests were sent.
    """

    def __init__(self, path: str, *, uri: str, patience_s: float = PATIENCE_S) -> None:
        self._path = path
        self._uri = uri
        self._patience_s = patience_s
        self.requests = 0

    async def ask(
        self, method: str, path: str, body: dict[str, Any] | None = None, *, patience_s: float | None = None
    ) -> dict[str, Any]:
        """Ask until there is an answer.

        Args:
            method: GET or POST.
            path: What is asked.
            body: What is said with it.
            patience_s: How long to wait for a sidecar that does not answer, where that is another time than usual.

        Raises:
            SourceError: No sidecar answers.
            StreamloadError: What it answers is an error.
        """
        loop = asyncio.get_running_loop()
        patience_s = self._patience_s if patience_s is None else patience_s
        silent_since: float | None = None
        # Who is not patient at all asks what is answered at once.
        limit_s = _SILENT_S if patience_s > 0 else _AT_ONCE_S
        while True:
            asked_s = loop.time()
            try:
                status, answer = await self._request(method, path, body, limit_s)
            except SourceError:  # an OSError, too
                raise
            except PermissionError as error:
                raise AccessError(
                    f"its socket refuses: {error.strerror} (--socket-mode and --socket-group of streamload serve say "
                    "who may ask)",
                    uri=self._uri,
                ) from error
            except (OSError, EOFError) as error:
                # It has not begun yet, or crashed, or hangs.
                silent_since = asked_s if silent_since is None else silent_since
                if loop.time() - silent_since >= patience_s:
                    text = "it hangs up" if isinstance(error, EOFError) else error.strerror or type(error).__name__
                    raise SourceError(f"no sidecar answers: {text}", uri=self._uri) from error
                await asyncio.sleep(_LOOK_AGAIN_S)
                continue
            if status == 200:
                return answer
            if status == 503:  # it is about to end, and another one will go on
                silent_since = loop.time() if silent_since is None else silent_since
                if loop.time() - silent_since >= patience_s:
                    raise SourceError("the sidecar has stopped, and no other one answers", uri=self._uri)
                await asyncio.sleep(_LOOK_AGAIN_S)
                continue
            silent_since = None
            if status != 202:
                raise error_from(answer.get("error"), uri=self._uri)

    async def _request(
        self, method: str, path: str, body: dict[str, Any] | None, limit_s: float
    ) -> tuple[int, dict[str, Any]]:
        """Ask once.

        Raises:
            OSError: Nobody listens, or nothing is heard.
            EOFError: Who listens ends before the answer does.
            SourceError: The answer makes no sense.
        """
        self.requests += 1
        content = b"" if body is None else json.dumps(body).encode()
        # The host is no address, only what HTTP wants to be named.
        asked = f"{method} {path} HTTP/1.1\r\nHost: sidecar\r\nConnection: close\r\n"
        asked += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
        async with asyncio.timeout(limit_s):
            reader, writer = await asyncio.open_unix_connection(self._path, limit=MAX_HEAD_BYTES)
            try:
                writer.write(asked.encode() + content)
                try:
                    head = parse_head(await reader.readuntil(b"\r\n\r\n"))
                except (asyncio.LimitOverrunError, SourceError):
                    raise self._stranger() from None
                if head.body_bytes is None or head.body_bytes > _MAX_ANSWER_BYTES:
                    raise self._stranger()
                content = await reader.readexactly(head.body_bytes)
            finally:
                writer.close()
                with suppress(OSError):
                    await writer.wait_closed()
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise self._stranger()
        return head.status, answer

    def _stranger(self) -> SourceError:
        return SourceError("what answers on this socket is no sidecar", uri=self._uri)
