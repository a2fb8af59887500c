"""Whether objects are still the versions that were listed, where reads themselves cannot ask for one."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Awaitable, Callable

from streamload.sources.base import SourceObject

__all__ = ["Versions"]


class Versions:
    """Looks whether objects are still what they were.

    Args:
        look: Looks at an object, and raises ObjectChangedError where it is another version.
    """

    def __init__(self, look: Callable[[SourceObject], Awaitable[None]]) -> None:
        self._look = look
        self._clock = itertools.count()
        self._looks: defaultdict[tuple[str, str], _Look] = defaultdict(_Look)

    async def check(self, object: SourceObject) -> None:
        """Look at the object now.

        Raises:
            ObjectChangedError: It is another version.
            SourceError: It cannot be looked at.
        """
        look = self._looks[object.key, object.version]
        asked = next(self._clock)
        # Held across the request on purpose: all who wait here are served by one look that begins after they came.
        async with look.lock:
            if look.began > asked:
                return
            began = next(self._clock)
            await self._look(object)
            look.began = began


class _Look:
    """When an object was last found to be what it was."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.began = -1
