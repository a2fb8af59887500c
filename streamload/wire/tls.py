"""Whether the other side speaks TLS, where that is not what was expected of it."""

from __future__ import annotations

import asyncio
import ssl

__all__ = ["NO_TLS", "ONLY_TLS", "is_alert", "is_plain", "speaks_tls"]

#: What to say where TLS was expected.
NO_TLS = "it speaks no TLS there, as it seems: does the endpoint's URL begin with https:// and should with http://?"

#: What to say where plain HTTP was expected.
ONLY_TLS = "it speaks TLS there, as it seems: does the endpoint's URL begin with http:// and should with https://?"

# How OpenSSL calls it when the first bytes of the other side are no record of TLS's; which one depends on its version.
_NO_RECORD = {"WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE", "PACKET_LENGTH_TOO_LONG", "HTTP_REQUEST"}

# A record with an alert, of any version 3.x (RFC 8446, section 5.1): what a server says that was sent a request in
# plain text.
_ALERT = b"\x15\x03"


def is_plain(error: BaseException | None) -> bool:
    """Whether a handshake failed because the other side answered in plain text."""
    return isinstance(error, ssl.SSLError) and error.reason in _NO_RECORD


def is_alert(data: bytes | bytearray) -> bool:
    """Whether the beginning of an answer is one of TLS's own."""
    return data.startswith(_ALERT)


async def speaks_tls(host: str, port: int, *, timeout_s: float) -> bool:
    """Whether there is a server that shakes hands in TLS; who it is, is not asked.

    Many close a connection that brings plain text, without a word.
    """
    context = ssl.create_default_context()
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    try:
        async with asyncio.timeout(timeout_s):
            transport, _ = await asyncio.get_running_loop().create_connection(asyncio.Protocol, host, port, ssl=context)
    except (OSError, TimeoutError):
        return False
    transport.abort()
    return True
