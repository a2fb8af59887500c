"""What comes with a request, whatever is asked for: bounded, read to its end, and not waited for for ever."""

from __future__ import annotations

import asyncio

from aiohttp import web

__all__ = ["read_body"]

# The longest has 64 KiB, and nobody who asks is far away.
_BODY_S = 10.0


async def read_body(request: web.Request) -> bytes:
    """A request's body, of at most the application's ``client_max_size``.

    Raises:
        HTTPRequestEntityTooLarge: It is longer.
        HTTPRequestTimeout: It does not come.
    """
    try:
        async with asyncio.timeout(_BODY_S):
            return await request.read()
    except TimeoutError:
        raise web.HTTPRequestTimeout from None
