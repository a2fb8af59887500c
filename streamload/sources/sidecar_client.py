"""Asks a sidecar over its Unix socket, and waits for one that is not there yet, or not there any more."""

from __future__ import annotations

import asyncio
import json
import os
from typing import Any

import aiohttp

from streamload.errors import AccessError, OptionError, SourceError
from streamload.sources.sidecar_protocol import ASK_AGAIN_S, MAX_SOCKET_PATH_BYTES, error_from

__all__ = ["PATIENCE_S", "SidecarClient", "socket_path"]

PATIENCE_S = 60.0
"""A sidecar that has crashed is begun again at once, or after ten seconds the second time, twenty, forty."""

# It takes half a second to begin.
_LOOK_AGAIN_S = 0.05
# Who hears nothing for three times as long as an answer takes at most asks one that hangs.
_SILENT_S = 3 * ASK_AGAIN_S
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
    """Asks; used on one event loop.

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
        self._session: aiohttp.ClientSession | None = None
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
        while True:
            try:
                status, answer = await self._request(method, path, body)
            except (OSError, aiohttp.ClientError, TimeoutError) as error:
                cause = error.os_error if isinstance(error, aiohttp.ClientConnectorError) else error
                if isinstance(cause, PermissionError):
                    raise AccessError(
                        f"its socket refuses: {cause.strerror} (--socket-mode and --socket-group of streamload serve "
                        "say who may ask)",
                        uri=self._uri,
                    ) from error
                # It has not begun yet, or crashed, or hangs.
                now = loop.time()
                silent_since = now if silent_since is None else silent_since
                if now - silent_since >= patience_s:
                    text = getattr(cause, "strerror", None) or str(cause) or type(cause).__name__
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

    async def aclose(self) -> None:
        """Close the connections. May be called twice."""
        session, self._session = self._session, None
        if session is not None:
            await session.close()

    async def _request(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, dict[str, Any]]:
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.UnixConnector(self._path, limit=0),
                timeout=aiohttp.ClientTimeout(total=_SILENT_S),
                cookie_jar=aiohttp.DummyCookieJar(),
            )
        self.requests += 1
        # The host is no address, only what HTTP wants to be named.
        async with self._session.request(method, f"http://sidecar{path}", json=body) as response:
            content = await response.content.read(_MAX_ANSWER_BYTES + 1)
            while len(content) <= _MAX_ANSWER_BYTES and (more := await response.content.read(_MAX_ANSWER_BYTES)):
                content += more
        try:
            answer = json.loads(content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict) or len(content) > _MAX_ANSWER_BYTES:
            raise SourceError("what answers on this socket is no sidecar", uri=self._uri)
        return response.status, answer
