"""The free list against the plainest model of it: a set of bytes."""

from __future__ import annotations

from collections.abc import Iterable

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from streamload.sinks.freespace import FreeSpace, Ranges

SIZE = 64


def joined(places: Iterable[int]) -> list[tuple[int, int]]:
    """A set of places as ranges, neighbours joined."""
    ranges: list[tuple[int, int]] = []
    for at in sorted(places):
        if ranges and ranges[-1][1] == at:
            ranges[-1] = (ranges[-1][0], at + 1)
        else:
            ranges.append((at, at + 1))
    return ranges


@given(st.lists(st.tuples(st.booleans(), st.integers(0, SIZE - 1), st.integers(1, 20)), max_size=60))
def test_ranges(steps: list[tuple[bool, int, int]]) -> None:
    ranges = Ranges()
    model: set[int] = set()
    for adding, start, nbytes in steps:
        places = set(range(start, start + nbytes))
        if not adding:
            assert ranges.cut(start, start + nbytes) == [
                piece
                for low, high in joined(model)
                for piece in [(max(low, start), min(high, start + nbytes))]
                if piece[0] < piece[1]
            ]
            model -= places
        elif not places & model:
            ranges.add(start, start + nbytes)
            model |= places
        assert list(ranges) == joined(model)
        assert ranges.nbytes == len(model)


class FreeSpaceMachine(RuleBasedStateMachine):
    """Takes, gives and cleans at random; each byte is used or unused, and unused bytes are dirty or clean."""

    taken = Bundle("taken")

    @initialize()
    def begin(self) -> None:
        self.space = FreeSpace(SIZE)
        self.used: set[int] = set()
        self.dirty: set[int] = set()

    @rule(target=taken, nbytes=st.integers(1, 20))
    def take(self, nbytes: int) -> object:
        start = self.space.find(nbytes)
        fitting = [(end - begin, begin) for begin, end in joined(set(range(SIZE)) - self.used) if end - begin >= nbytes]
        if start is None:
            assert not fitting
            return multiple()
        ends = [(size, at) for size, begin in fitting for at in (begin, begin + size - nbytes)]
        resident = {at: len(self.dirty & set(range(at, at + nbytes))) for _, at in ends}
        assert (-resident[start], start) in [(-max(resident.values()), at) for _, at in ends], "the most resident"
        places = set(range(start, start + nbytes))
        assert self.space.take(start, nbytes) == joined(places - self.dirty)
        self.used |= places
        self.dirty -= places
        return (start, nbytes)

    @rule(region=consumes(taken))
    def give(self, region: tuple[int, int]) -> None:
        start, nbytes = region
        self.used -= set(range(start, start + nbytes))
        self.dirty |= set(range(start, start + nbytes))
        self.space.give(start, nbytes)

    @rule(share=st.integers(1, SIZE))
    def clean(self, share: int) -> None:
        for low, high in self.space.dirty():
            nbytes = min(high - low, share)
            self.space.cleaned(high - nbytes, nbytes)
            self.dirty -= set(range(high - nbytes, high))

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "space"):
            return
        assert self.space.nbytes == SIZE - len(self.used)
        assert self.space.dirty() == joined(self.dirty)[::-1]
        assert self.space.dirty_bytes == len(self.dirty)


TestFreeSpace = FreeSpaceMachine.TestCase


@given(st.lists(st.integers(1, 8), max_size=12))
def test_taking_all_and_giving_all_back_leaves_one_range(sizes: list[int]) -> None:
    space = FreeSpace(128)
    taken = []
    for nbytes in sizes:
        start = space.find(nbytes)
        assert start is not None
        space.take(start, nbytes)
        taken.append((start, nbytes))
    for start, nbytes in reversed(taken):
        space.give(start, nbytes)
    assert space.find(128) == 0
