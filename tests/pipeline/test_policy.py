"""How long to wait where the source says for how long it wants to be left alone."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamload.errors import AccessError, TransientError
from streamload.pipeline.policy import RetryPolicy


@given(st.integers(1, 5), st.floats(0, 1e9), st.floats(0, 1, exclude_max=True))
def test_a_wait_is_as_long_as_was_asked_for_up_to_a_limit(failures: int, asked_s: float, jitter: float) -> None:
    policy = RetryPolicy()
    usual_s = policy.backoff_s(failures, TransientError("busy"), jitter)
    wait_s = policy.backoff_s(failures, TransientError("busy", retry_after_s=asked_s), jitter)
    assert usual_s is not None
    assert wait_s is not None
    assert wait_s >= min(asked_s, 30.0)
    assert usual_s <= wait_s <= 30.0


def test_those_who_were_turned_away_together_come_back_one_by_one() -> None:
    policy = RetryPolicy()
    waits = {policy.backoff_s(1, TransientError("busy", retry_after_s=5.0), jitter) for jitter in (0.0, 0.3, 0.9)}
    assert waits == {5.0, 5.15, 5.45}


@pytest.mark.parametrize("asked_s", [0.0, float("inf")])
def test_the_ends_of_what_may_be_asked_for(asked_s: float) -> None:
    assert RetryPolicy().backoff_s(1, TransientError("busy", retry_after_s=asked_s), 0.5) == min(asked_s + 0.25, 30.0)


def test_asking_for_a_wait_makes_no_more_attempts() -> None:
    policy = RetryPolicy()
    assert policy.backoff_s(policy.attempts, TransientError("busy", retry_after_s=1.0), 0.5) is None
    assert policy.backoff_s(1, AccessError("refused"), 0.5) is None
