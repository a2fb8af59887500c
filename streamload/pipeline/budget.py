"""How many bytes may be under way: credit in bytes, taken before the first request is sent."""

from __future__ import annotations

import asyncio

__all__ = ["Budget"]


class Budget:
    """Credit for what is in flight, staged, or finished and not yet taken by the consumer.

    One task acquires, in plan order; hence there is at most one waiter and no queue. All methods are called on the
    engine's loop. A batch's credit passes through three states: *in use* from `acquire` on, *lingering* once the
    consumer took it (its last tensor is still bound to the consumer's loop variable while the next one is made), and
    released when the consumer has moved past it.

    A batch is granted when everything, lingering included, stays within the limit, or when nothing is in use: a batch
    larger than the limit goes alone, and what a consumer keeps for itself never stops the load.

    Args:
        limit_bytes: The limit.
    """

    def __init__(self, limit_bytes: int) -> None:
        self.limit_bytes = limit_bytes
        self.raised_bytes = 0
        self.peak_bytes = 0
        self._in_use = 0
        self._lingering = 0
        self._changed = asyncio.Event()

    @property
    def outstanding_bytes(self) -> int:
        """Credit that is not back yet."""
        return self._in_use + self._lingering

    @property
    def spare_bytes(self) -> int:
        """How much of the limit is not out."""
        return max(0, self.limit_bytes - self._in_use - self._lingering)

    def fits(self, nbytes: int) -> bool:
        """Whether that much would be granted at once."""
        return self._in_use == 0 or self._in_use + self._lingering + nbytes <= self.limit_bytes

    async def acquire(self, nbytes: int) -> None:
        """Wait for credit and take it. Cancelled, it has taken nothing."""
        while not self.fits(nbytes):
            self._changed.clear()
            await self._changed.wait()
        if nbytes > self.limit_bytes:
            self.raised_bytes = max(self.raised_bytes, nbytes)
        self._in_use += nbytes
        self.peak_bytes = max(self.peak_bytes, self._in_use)

    def taken(self, nbytes: int) -> None:
        """The consumer took a batch of `nbytes`; it still counts, as lingering."""
        self._in_use -= nbytes
        self._lingering += nbytes
        self._changed.set()

    def release(self, nbytes: int) -> None:
        """The consumer has moved past a batch of `nbytes`."""
        self._lingering -= nbytes
        self._changed.set()

    def give_back(self, nbytes: int) -> None:
        """Credit that was in use and will not be delivered."""
        self._in_use -= nbytes
        self._changed.set()
