"""Whether objects are still the versions that were listed, where reads themselves cannot ask for one."""

from __future__ import annotations

import asyncio
import itertools
from collections import defaultdict
from collections.abc import Awaitable, Callable

from streamload.errors import ObjectChangedError
from streamload.sources.base import SourceObject

__all__ = ["Versions"]


class Versions:
    """Looks whether objects are still what they were.

    Args:
        stat: Finds an object; see `Source.stat`.
    """

    def __init__(self, stat: Callable[[str], Awaitable[SourceObject]]) -> None:
        self._stat = stat
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
            found = await self._stat(object.key)
            # Some servers quote the tag in one kind of answer and not in another.
            if (found.version.strip('"'), found.size_bytes) != (object.version.strip('"'), object.size_bytes):
                raise ObjectChangedError(
                    f"the object is now version {found.version}; the one seen first was {object.version}"
                )
            look.began = began


class _Look:
    """When an object was last found to be what it was."""

    def __init__(self) -> None:
        self.lock = asyncio.Lock()
        self.began = -1
