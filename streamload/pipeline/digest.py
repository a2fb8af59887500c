"""The SHA-256 of an object whose parts arrive in any order: each waits for its turn."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable

from streamload.errors import ChecksumError

__all__ = ["OrderedDigest"]

# After so many bytes, a millisecond's work or less, others get their turn on the event loop.
_PIECE_BYTES = 1 << 20


class OrderedDigest:
    """Sums up an object from its first byte to its last, and compares.

    A digest, unlike a CRC, cannot be combined from those of parts. So whoever brings a part waits until all before it
    were summed up. As reads are begun, and lent memory, in the order of their bytes, the one that the others wait for
    is under way itself, and waits for nobody.

    Args:
        expected: What the object's SHA-256 has to be.
        size_bytes: The object's length.
    """

    def __init__(self, expected: bytes, size_bytes: int) -> None:
        self._expected = expected
        self._size_bytes = size_bytes
        self._digest = hashlib.sha256()
        self._position = 0
        self._waiting: dict[int, asyncio.Future[None]] = {}

    async def add(self, start: int, views: Iterable[memoryview]) -> bool:
        """Sum up a part, in its turn. Returns whether that was the last one, and all is as it has to be.

        Args:
            start: Where it begins in the object.
            views: Its bytes.

        Raises:
            ChecksumError: The object is complete, and something else.
        """
        if start != self._position:
            turn = self._waiting[start] = asyncio.get_running_loop().create_future()
            await turn
        for view in views:
            for at in range(0, view.nbytes, _PIECE_BYTES):
                piece = view[at : at + _PIECE_BYTES]
                self._digest.update(piece)
                start += piece.nbytes
                if piece.nbytes == _PIECE_BYTES:
                    await asyncio.sleep(0)
        self._position = start
        following = self._waiting.pop(start, None)
        if following is not None and not following.done():
            following.set_result(None)
        if start < self._size_bytes:
            return False
        if self._digest.digest() != self._expected:
            raise ChecksumError(
                f"what was read has the SHA-256 {self._digest.hexdigest()}, but that of the object is "
                f"{self._expected.hex()}",
                start=0,
                end=self._size_bytes,
            )
        return True
