"""A limit on bytes a second, on a clock that stands still unless it is told to go."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamload.pipeline.pace import Pace


def test_the_first_read_begins_at_once() -> None:
    assert Pace(100.0).wait_s(5.0, 1000) == 0.0


def test_the_next_one_waits_for_the_first_ones_time() -> None:
    pace = Pace(100.0)
    pace.wait_s(0.0, 50)
    assert pace.wait_s(0.2, 10) == pytest.approx(0.3)
    assert pace.wait_s(0.2, 10) == pytest.approx(0.4)


def test_what_was_not_used_is_not_saved_up() -> None:
    pace = Pace(100.0)
    pace.wait_s(0.0, 10)
    assert pace.wait_s(60.0, 100) == 0.0
    assert pace.wait_s(60.0, 100) == 1.0


@given(
    st.floats(1, 1e10),
    st.lists(st.tuples(st.floats(0, 10), st.integers(1, 1 << 26)), min_size=1, max_size=50),
)
def test_no_span_of_time_sees_more_than_the_rate_and_one_read(rate: float, reads: list[tuple[float, int]]) -> None:
    pace = Pace(rate)
    now_s = 0.0
    begun: list[tuple[float, int]] = []
    for pause_s, nbytes in reads:
        now_s += pause_s
        begun.append((now_s + pace.wait_s(now_s, nbytes), nbytes))
    for first, (since_s, _) in enumerate(begun):
        total = 0
        for until_s, nbytes in begun[first:]:
            assert total <= rate * (until_s - since_s) * (1 + 1e-6) + 1
            total += nbytes
