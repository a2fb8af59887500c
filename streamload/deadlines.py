"""A limit on time, with an error that says how far one got."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from streamload.errors import DeadlineError

__all__ = ["deadline"]


@asynccontextmanager
async def deadline(seconds: float | None, how_far: Callable[[], str]) -> AsyncIterator[None]:
    """Cancel the block when so many seconds have passed; None means never.

    Args:
        seconds: From now on.
        how_far: What the error should say of the work done.

    Raises:
        DeadlineError: The time was up. A TimeoutError of the block's own passes through.
    """
    limit = asyncio.timeout(seconds)
    try:
        async with limit:
            yield
    except TimeoutError:
        if not limit.expired():
            raise
        raise DeadlineError(f"not done after deadline_s={seconds:g}: {how_far()}") from None
