"""A stream of bytes into a sequence of views."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["ViewWriter"]


class ViewWriter:
    """Copies what arrives piece by piece into views, in order.

    Args:
        views: One-dimensional writable byte views, none of them empty.

    Attributes:
        filled: How many bytes are in place.
    """

    __slots__ = ("_index", "_inside", "_views", "filled")

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = views
        self._index = 0
        self._inside = 0
        self.filled = 0

    def write(self, data: bytes) -> int:
        """Copy `data`. Returns how many of its last bytes found no room."""
        rest = memoryview(data)
        while rest.nbytes and self._index < len(self._views):
            view = self._views[self._index]
            count = min(rest.nbytes, view.nbytes - self._inside)
            view[self._inside : self._inside + count] = rest[:count]
            rest = rest[count:]
            self.filled += count
            self._inside += count
            if self._inside == view.nbytes:
                self._index += 1
                self._inside = 0
        return rest.nbytes
