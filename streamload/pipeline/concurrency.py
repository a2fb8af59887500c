"""How many reads are in flight: found from what more of them bring."""

from __future__ import annotations

__all__ = ["ConcurrencyTuner"]

# Twice as many reads must bring at least so much more to be worth their connections, and what they cost the server.
_WORTH = 1.15

# After a round that brought nothing, so many rounds pass before more are tried again: what other ranks leave of a link
# changes within seconds, and a try costs little.
_ROUNDS_BETWEEN_TRIES = 16

# What is left after the server has asked for less.
_BACK_OFF = 0.7

# However much the server refuses.
_LEAST = 2

# A round is no shorter: in less time the scheduler of a busy machine decides what is measured.
_LEAST_ROUND_S = 0.05


class ConcurrencyTuner:
    """Doubles the number of reads while that brings more, and goes back where it does not.

    It decides from what it is told, and from nothing else. A round ends when as many reads have ended as may be in
    flight. Its rate is that of all bytes which landed in it, whether or not their reads have ended, since reads that
    begin together end together.

    After a server's refusal the number falls, once in a round, and rises no more until the next try.

    Args:
        start: How many to begin with.
        most: Never more. Where that is no more than `start`, the number is somebody's choice, and kept.

    Attributes:
        target: How many reads may be in flight.
        most: Never more.
    """

    def __init__(self, start: int, *, most: int) -> None:
        self.most = most
        self.target = min(start, most)
        self._least = min(_LEAST, self.target) if start < most else self.target
        self._rates: dict[int, float] = {}
        self._climbing = self.target < self.most
        self._rounds_left = 0
        self._refused = False
        self._ended = 0
        self._began_s: float | None = None
        self._began_bytes = 0

    def begin(self, now_s: float, landed_bytes: int) -> None:
        """The first read begins, or what was measured so far says nothing: the consumer had to be waited for."""
        self._ended = 0
        self._began_s = now_s
        self._began_bytes = landed_bytes
        self._refused = False

    def read_ended(self, now_s: float, landed_bytes: int) -> None:
        """A read has ended well.

        Args:
            now_s: A clock's seconds.
            landed_bytes: How many bytes have landed since the load began.
        """
        if self._began_s is None:
            self.begin(now_s, landed_bytes)
            return
        self._ended += 1
        seconds = now_s - self._began_s
        if self._ended < self.target or seconds < _LEAST_ROUND_S:
            return
        if not self._refused:
            self._decide((landed_bytes - self._began_bytes) / seconds)
        self.begin(now_s, landed_bytes)

    def refused(self) -> None:
        """The server asked for less, or did not answer in time."""
        if not self._refused:
            self._refused = True
            self.target = max(self._least, int(self.target * _BACK_OFF))
            self._hold()

    def _decide(self, rate: float) -> None:
        self._rates[self.target] = rate
        if not self._climbing:
            self._rounds_left -= 1
            if self._rounds_left <= 0 and self.target < self.most:
                self._climb()
            return
        before = max((level for level in self._rates if level < self.target), default=None)
        if before is not None and rate < self._rates[before] * _WORTH:
            self.target = before
            self._hold()
        elif self.target < self.most:
            self._climb()
        else:
            self._hold()

    def _climb(self) -> None:
        self._rates = {self.target: self._rates[self.target]}
        self._climbing = True
        self.target = min(self.most, 2 * self.target)

    def _hold(self) -> None:
        self._climbing = False
        self._rounds_left = _ROUNDS_BETWEEN_TRIES
