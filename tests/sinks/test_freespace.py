"""The free list against the plainest model of it: a set of bytes."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from streamload.sinks.freespace import FreeSpace

SIZE = 64


class FreeSpaceMachine(RuleBasedStateMachine):
    """Takes, gives and cleans at random; each byte is used or unused, and unused bytes are dirty or clean."""

    taken = Bundle("taken")

    @initialize()
    def begin(self) -> None:
        self.space = FreeSpace(SIZE)
        self.used: set[int] = set()
        self.touched: set[int] = set()

    def unused(self) -> list[tuple[int, int]]:
        """The unused ranges, neighbours joined."""
        ranges: list[tuple[int, int]] = []
        for at in range(SIZE):
            if at in self.used:
                continue
            if ranges and ranges[-1][1] == at:
                ranges[-1] = (ranges[-1][0], at + 1)
            else:
                ranges.append((at, at + 1))
        return ranges

    @rule(target=taken, nbytes=st.integers(1, 20))
    def take(self, nbytes: int) -> object:
        start = self.space.take(nbytes)
        fits = [at for at in range(SIZE - nbytes + 1) if not self.used & set(range(at, at + nbytes))]
        if start is None:
            assert not fits
            return multiple()
        assert start in fits
        sizes = [end - begin for begin, end in self.unused() if end - begin >= nbytes]
        assert start in [begin for begin, end in self.unused() if end - begin == min(sizes)], "the smallest that fits"
        return self.note_taken(start, nbytes)

    @rule(target=taken, nbytes=st.integers(1, 20))
    def take_from_end(self, nbytes: int) -> object:
        start = self.space.take_from_end(nbytes)
        ends = [end for begin, end in self.unused() if end - begin >= nbytes]
        if start is None:
            assert not ends
            return multiple()
        assert start + nbytes == max(ends), "the end of the highest that fits"
        return self.note_taken(start, nbytes)

    def note_taken(self, start: int, nbytes: int) -> tuple[int, int]:
        self.used |= set(range(start, start + nbytes))
        self.touched |= set(range(start, start + nbytes))
        return (start, nbytes)

    @rule(region=consumes(taken))
    def give(self, region: tuple[int, int]) -> None:
        start, nbytes = region
        self.used -= set(range(start, start + nbytes))
        self.space.give(start, nbytes)

    @rule(share=st.integers(1, SIZE))
    def clean(self, share: int) -> None:
        for start, size, _ in list(self.space.dirty()):
            nbytes = min(size, share)
            self.space.cleaned(start, nbytes)
            self.touched -= set(range(start + size - nbytes, start + size))

    @invariant()
    def agrees(self) -> None:
        if not hasattr(self, "space"):
            return
        assert self.space.nbytes == SIZE - len(self.used)
        assert len(self.touched - self.used) <= self.space.dirty_bytes <= self.space.nbytes
        ranges = sorted((start, start + size) for start, size, _ in self.space.dirty())
        for (_, end), (start, _) in pairwise(ranges):
            assert end < start, "neighbours are joined"


TestFreeSpace = FreeSpaceMachine.TestCase


@given(st.lists(st.integers(1, 8), max_size=12))
def test_taking_all_and_giving_all_back_leaves_one_range(sizes: list[int]) -> None:
    space = FreeSpace(128)
    taken = [(start, nbytes) for nbytes in sizes if (start := space.take(nbytes)) is not None]
    for start, nbytes in reversed(taken):
        space.give(start, nbytes)
    assert space.take(128) == 0
