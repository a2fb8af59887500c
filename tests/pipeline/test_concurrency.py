"""How many reads are in flight, against models of what servers and links do with more of them."""

from __future__ import annotations

from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from streamload.pipeline.concurrency import ConcurrencyTuner

READ_BYTES = 8 << 20


class Server:
    """Ends reads one by one, evenly, at a rate that depends on how many there are at once."""

    def __init__(self, tuner: ConcurrencyTuner, bytes_per_s: Callable[[int], float]) -> None:
        self.tuner = tuner
        self.bytes_per_s = bytes_per_s
        self.now_s = 0.0
        self.landed_bytes = 0
        tuner.begin(0.0, 0)

    def serve(self, reads: int) -> list[int]:
        """Serve so many reads; how many were allowed at once after each."""
        targets = []
        for _ in range(reads):
            self.now_s += READ_BYTES / self.bytes_per_s(self.tuner.target)
            self.landed_bytes += READ_BYTES
            self.tuner.read_ended(self.now_s, self.landed_bytes)
            targets.append(self.tuner.target)
        return targets


def capped(connection: float, link: float = float("inf")) -> Callable[[int], float]:
    """So much for each connection, up to what the link takes."""
    return lambda concurrency: min(concurrency * connection, link)


def test_it_doubles_while_that_brings_more() -> None:
    targets = Server(ConcurrencyTuner(8, most=64), capped(100e6)).serve(8 + 16 + 32)
    assert targets == [8] * 7 + [16] * 16 + [32] * 32 + [64]


def test_it_goes_back_to_what_brought_as_much() -> None:
    """The link is full with five: sixteen bring nothing."""
    targets = Server(ConcurrencyTuner(8, most=64), capped(100e6, link=500e6)).serve(8 + 16 + 1)
    assert targets[-1] == 8
    assert max(targets) == 16


def test_a_link_that_is_full_is_not_crowded() -> None:
    """Tries are rare: most reads are made with as few connections as fill the link."""
    targets = Server(ConcurrencyTuner(8, most=64), capped(100e6, link=500e6)).serve(2000)
    assert max(targets) == 16
    assert targets.count(8) > 0.85 * len(targets)


def test_it_finds_later_what_has_become_free() -> None:
    tuner = ConcurrencyTuner(8, most=64)
    server = Server(tuner, capped(100e6, link=500e6))
    server.serve(100)
    server.bytes_per_s = capped(100e6, link=3e9)
    server.serve(400)
    assert tuner.target >= 32


def test_a_refusal_brings_it_down_once_in_a_round() -> None:
    tuner = ConcurrencyTuner(16, most=64)
    server = Server(tuner, capped(100e6))
    server.serve(3)
    for _ in range(10):  # what was in flight is refused together
        tuner.refused()
    assert tuner.target == 11
    server.serve(11)
    tuner.refused()
    assert tuner.target == 7


def test_it_does_not_rise_at_once_after_a_refusal() -> None:
    tuner = ConcurrencyTuner(16, most=64)
    server = Server(tuner, capped(100e6))
    tuner.refused()
    assert set(server.serve(150)) == {11}
    assert max(server.serve(40)) == 22


def test_refused_for_ever_it_keeps_a_few() -> None:
    tuner = ConcurrencyTuner(16, most=64)
    server = Server(tuner, capped(100e6))
    for _ in range(50):
        tuner.refused()
        server.serve(16)
    assert tuner.target == 2


def test_a_number_that_somebody_chose_is_kept() -> None:
    tuner = ConcurrencyTuner(5, most=5)
    server = Server(tuner, capped(100e6))
    assert set(server.serve(200)) == {5}
    tuner.refused()
    assert tuner.target == 5


def test_a_round_in_which_the_consumer_was_waited_for_says_nothing() -> None:
    tuner = ConcurrencyTuner(8, most=64)
    server = Server(tuner, capped(100e6))
    for _ in range(100):
        server.serve(7)
        tuner.begin(server.now_s, server.landed_bytes)
    assert tuner.target == 8


@given(
    st.integers(1, 64),
    st.integers(1, 128),
    st.lists(st.tuples(st.floats(0, 1), st.integers(0, 1 << 30), st.booleans()), max_size=400),
)
def test_it_stays_within_its_bounds(start: int, most: int, happenings: list[tuple[float, int, bool]]) -> None:
    tuner = ConcurrencyTuner(start, most=most)
    now_s = landed_bytes = 0.0
    for seconds, nbytes, refusal in happenings:
        now_s += seconds
        landed_bytes += nbytes
        tuner.read_ended(now_s, int(landed_bytes))
        if refusal:
            tuner.refused()
        assert 1 <= tuner.target <= most
