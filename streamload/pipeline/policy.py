"""When to try again: pure decisions, from what was observed."""

from __future__ import annotations

from dataclasses import dataclass

from streamload.errors import StreamloadError, TransientError

__all__ = ["RetryPolicy"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """Capped exponential backoff with full jitter.

    Source: M. Brooker, "Exponential Backoff And Jitter", AWS Architecture Blog, 2015.

    Attributes:
        attempts: How often a read is tried without getting further.
        progress_bytes: How much an attempt must have brought to count as getting further: then the count starts anew,
            since a connection that is cut every few megabytes is no reason to give up. It bounds all attempts for a
            read of 8 MiB to some hundreds.
        first_backoff_s: The longest wait before the second attempt; it doubles with each.
        longest_backoff_s: No wait is longer, unless the source asks for it.
        longest_asked_s: No wait that the source asks for is longer.
    """

    # Six attempts with these waits bridge about fifteen seconds, the order of a store's failover.
    attempts: int = 6
    progress_bytes: int = 64 << 10
    first_backoff_s: float = 0.5
    longest_backoff_s: float = 8.0
    longest_asked_s: float = 30.0

    def failures(self, before: int, error: StreamloadError) -> int:
        """How many attempts in a row have failed to get further, this one included, after `before` of them."""
        return 0 if error.valid_bytes >= self.progress_bytes else before + 1

    def backoff_s(self, failures: int, error: StreamloadError, jitter: float) -> float | None:
        """How long to wait before the next attempt, or None to give up.

        Args:
            failures: How many attempts in a row have brought nothing, this one included.
            error: What this attempt ended with.
            jitter: A random number in [0, 1).
        """
        if not error.retryable or failures >= self.attempts:
            return None
        ceiling = min(self.longest_backoff_s, self.first_backoff_s * 2.0 ** max(0, failures - 1))
        wait_s = ceiling * jitter
        asked_s = error.retry_after_s if isinstance(error, TransientError) else None
        if asked_s is None:
            return wait_s
        # Not all at the moment that it named: whoever was turned away with us was told the same.
        return max(wait_s, min(asked_s + wait_s, self.longest_asked_s))
