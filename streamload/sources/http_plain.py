"""Answers received with aiohttp, where our own connections do not serve: through a proxy, or of unknown length."""

from __future__ import annotations

import base64
import ssl
from collections.abc import Mapping

import aiohttp
from yarl import URL

from streamload.errors import AccessError, SourceError, TransientError, TruncatedReadError
from streamload.sources.writer import ViewWriter
from streamload.wire import Head, Response
from streamload.wire.connection import Place

__all__ = ["PlainClient"]

# The most that is taken from the connection's buffer at once; aiohttp stops reading the socket long before.
_MAX_PIECE_BYTES = 1 << 20


class PlainClient:
    """Asks as `wire` does, with a copy more for each byte.

    Args:
        tls: How connections are made secure.
        connect_timeout_s: How long making a connection may take, in seconds.
        stall_s: For how long a server may send nothing while it owes an answer, in seconds.
    """

    def __init__(self, tls: ssl.SSLContext, *, connect_timeout_s: float, stall_s: float) -> None:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(ssl=tls, limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s, sock_read=stall_s),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        )

    async def ask(
        self, url: str, headers: Mapping[str, str], proxy: str | None, place: Place, *, host: str
    ) -> Response:
        """Send a GET and wait for the whole answer; no redirect is followed.

        Args:
            url: Escaped already.
            headers: What goes with it.
            proxy: The URL of the proxy to ask, with user name and password where it wants them.
            place: As for `Pool.ask`, but a body whose length the head does not tell is taken, too.
            host: Who is asked, for errors.

        Raises:
            TransientError: The connection broke or stalled; ``valid_bytes`` says how much of the body is in place.
            SourceError: The answer is none, or not as long as what it should fill; or what `place` raised.
        """
        filled = 0
        try:
            at, shown = _through(proxy)
            # The proxy reads it in the request itself, or before it where it only passes bytes on.
            passed, shown = ({**headers, **shown}, {}) if url.startswith("http:") else (headers, shown)
            async with self._session.get(
                URL(url, encoded=True), headers=passed, allow_redirects=False, proxy=at, proxy_headers=shown or None
            ) as answer:
                head = Head(answer.status, _joined(answer.headers), keep_alive=False)
                views = place(head)
                if views is None:
                    # It is an error or a redirect, whose head says it all. Closing gives the connection up.
                    answer.close()
                    return Response(head, b"")
                writer = ViewWriter([view for view in views if view.nbytes])
                try:
                    while piece := await answer.content.read(_MAX_PIECE_BYTES):
                        if writer.write(piece):
                            raise SourceError(f"{host} sent more bytes than were asked for")
                finally:
                    filled = writer.filled
                wanted = sum(view.nbytes for view in views)
                if filled < wanted:
                    raise TruncatedReadError(f"{host} sent {filled} of {wanted} bytes", valid_bytes=filled)
                return Response(head, b"")
        except SourceError:
            raise
        except (aiohttp.ClientError, OSError, ValueError) as error:
            # Not chained: its text may show the proxy's password.
            translated = _translate(error, host)
            translated.valid_bytes = filled if translated.retryable else 0
            raise translated from None

    async def aclose(self) -> None:
        """Close the connections."""
        await self._session.close()


def _through(proxy: str | None) -> tuple[URL | None, dict[str, str]]:
    """A proxy's address, and what it wants to see."""
    if proxy is None:
        return None, {}
    url = URL(proxy)
    if url.user is None:
        return url, {}
    pair = f"{url.user}:{url.password or ''}".encode()
    return url.with_user(None), {"Proxy-Authorization": f"Basic {base64.b64encode(pair).decode('ascii')}"}


def _joined(headers: Mapping[str, str]) -> dict[str, str]:
    joined: dict[str, str] = {}
    for name, value in headers.items():
        key = name.lower()
        joined[key] = f"{joined[key]}, {value}" if key in joined else value
    return joined


def _translate(error: Exception, host: str) -> SourceError:
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        return SourceError(f"no secure connection to {host}: its certificate is not good")
    if isinstance(error, aiohttp.ClientHttpProxyError):
        cause = f"the proxy refuses to connect to {host}: it answered {error.status}"
        if error.status == 407:
            return AccessError(f"{cause}: it wants a user name and a password")
        return TransientError(cause) if error.status >= 500 else AccessError(cause)
    if isinstance(error, aiohttp.ClientPayloadError):
        return TruncatedReadError(f"the connection to {host} ended inside the body")
    if isinstance(error, TimeoutError):
        return TransientError(f"{host} sent nothing for too long, or no connection was made in time", throttled=True)
    if isinstance(error, ValueError) and not isinstance(error, OSError):
        return SourceError(f"{host} cannot be asked: {type(error).__name__}")
    reason = getattr(error, "os_error", None) or error
    return TransientError(
        f"the connection to {host} broke: {getattr(reason, 'strerror', None) or type(error).__name__}"
    )
