"""When to try again: pure decisions, from what was observed."""

from __future__ import annotations

from dataclasses import dataclass

from streamload.errors import StreamloadError

__all__ = ["RetryPolicy"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Capped exponential backoff with full jitter.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.

    Attributes:
        attempts: How often a read is tried without getting a byte further. An attempt that brought bytes starts the
            count anew: a connection that is cut every few megabytes still ends the load, just not at once.
        first_backoff_s: The longest wait before the second attempt; it doubles with each.
        longest_backoff_s: No wait is longer.
    """

    # Six attempts with these waits bridge about fifteen seconds, the order of a store's failover.
    attempts: int = 6
    first_backoff_s: float = 0.5
    longest_backoff_s: float = 8.0

    def backoff_s(self, failures: int, error: StreamloadError, jitter: float) -> float | None:
        """How long to wait before the next attempt, or None to give up.

        Args:
            failures: How many attempts in a row have brought nothing, this one included; zero where it brought bytes.
            error: What this attempt ended with.
            jitter: A random number in [0, 1).
        """
        if not error.retryable or failures >= self.attempts:
            return None
        ceiling = min(self.longest_backoff_s, self.first_backoff_s * 2.0 ** max(0, failures - 1))
        return ceiling * jitter
