"""The SHA-256 of an object whose parts arrive in any order: each waits for its turn."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable

from streamload.checksums import Sha256
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
        expected: What the SHA-256 has to be, of all of it or of each part that it was uploaded in.
        size_bytes: The object's length.
    """

    def __init__(self, expected: bytes | Sha256, size_bytes: int) -> None:
        self._expected = Sha256((size_bytes,), (expected,)) if isinstance(expected, bytes) else expected
        self._size_bytes = size_bytes
        self._digest = hashlib.sha256()
        self._part = 0
        self._position = 0
        self._waiting: dict[int, asyncio.Future[None]] = {}

    async def add(self, start: int, views: Iterable[memoryview]) -> bool:
        """Sum up a part, in its turn. Returns whether that was the last one, and all is as it has to be.

        Args:
            start: Where it begins in the object.
            views: Its bytes.

        Raises:
            ChecksumError: The object, or a part that it was uploaded in, is complete, and something else.
        """
        if start != self._position:
            turn = self._waiting[start] = asyncio.get_running_loop().create_future()
            await turn
        for view in views:
            while view.nbytes:
                piece = view[: min(_PIECE_BYTES, self._expected.ends[self._part] - start)]
                self._digest.update(piece)
                start += piece.nbytes
                view = view[piece.nbytes :]
                if start == self._expected.ends[self._part]:
                    self._compare()
                if piece.nbytes == _PIECE_BYTES:
                    await asyncio.sleep(0)
        self._position = start
        following = self._waiting.pop(start, None)
        if following is not None and not following.done():
            following.set_result(None)
        return start == self._size_bytes

    def _compare(self) -> None:
        part, ends = self._part, self._expected.ends
        expected, found, self._digest = self._expected.digests[part], self._digest, hashlib.sha256()
        self._part += 1
        if found.digest() != expected:
            whose = "the object" if len(ends) == 1 else f"part {part + 1} of {len(ends)}"
            raise ChecksumError(
                f"what was read has the SHA-256 {found.hexdigest()}, but that of {whose} is {expected.hex()}",
                start=ends[part - 1] if part else 0,
                end=ends[part],
            )
