"""No more bytes a second than the caller allows."""

from __future__ import annotations

__all__ = ["Pace"]


class Pace:
    """Says when the next read may begin, so that all together stay within a rate.

    Each read takes its place on a line of time as long as it would need at that rate alone; what was not used is not
    saved up. So a load exceeds the rate by the bytes of the reads that begin at once, and no more.

    Args:
        bytes_per_s: The rate.
    """

    def __init__(self, bytes_per_s: float) -> None:
        self.bytes_per_s = bytes_per_s
        self._free_s = float("-inf")

    def wait_s(self, now_s: float, nbytes: int) -> float:
        """Take the next place for so many bytes; how long to wait before they may be asked for.

        Args:
            now_s: A clock's seconds.
            nbytes: The read's length.
        """
        begins_s = max(now_s, self._free_s)
        self._free_s = begins_s + nbytes / self.bytes_per_s
        return begins_s - now_s
