"""From strided copies to the bytes that are read: each element arrives where the copy wants it, by either way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from unittest.mock import patch

from hypothesis import given
from hypothesis import strategies as st

from streamload.checkpoint import TensorInfo
from streamload.plan import copies as planned
from streamload.plan.copies import Axis, Copy, Layout, arrange, compose

_START = 1000


def _strides(sizes: Sequence[int], order: Sequence[int], gaps: Sequence[int], item: int) -> list[int]:
    """Of elements that do not overlap, with gaps between them, the dimensions in this order from the nearest."""
    strides = [0] * len(sizes)
    for dim in order:
        strides[dim] = item
        item = item * sizes[dim] + gaps[dim] * item
    return strides


@st.composite
def some_copies(draw: st.DrawFn) -> list[Copy]:
    item = draw(st.sampled_from([1, 2, 4]))
    found: list[Copy] = []
    target = 0
    for _ in range(draw(st.integers(1, 3))):
        sizes = draw(st.lists(st.integers(2, 4), max_size=4))
        dims = list(range(len(sizes)))
        gap = st.lists(st.integers(0, 2), min_size=len(sizes), max_size=len(sizes))
        sources = _strides(sizes, draw(st.permutations(dims)) if draw(st.booleans()) else dims[::-1], draw(gap), item)
        targets = _strides(sizes, draw(st.permutations(dims)) if draw(st.booleans()) else dims[::-1], draw(gap), item)
        axes = tuple(map(Axis, sizes, sources, targets))
        block = draw(st.integers(0, 1))
        found.append(Copy(item * draw(st.integers(0, 30)), item, axes, draw(st.integers(0, 4)) > 0, block, target))
        target += item + sum((axis.size - 1) * axis.target for axis in axes)
    return found


def _places(start: int, axes: Sequence[Axis], which: str) -> list[int]:
    """Where the elements lie, in one order for both sides."""
    steps = [[index * getattr(axis, which) for index in range(axis.size)] for axis in axes]
    return [start + sum(chosen) for chosen in itertools.product(*steps)]


@given(copies=some_copies(), least=st.sampled_from([1, 8, 512]), most=st.sampled_from([1, 3, 1024]))
def test_every_element_arrives(copies: list[Copy], least: int, most: int) -> None:
    tensor = TensorInfo("x", "U8", (1 << 20,), _START, _START + (1 << 20))
    with patch.object(planned, "_LEAST_RUN_BYTES", least), patch.object(planned, "_MOST_STRIPES", most):
        arranged = arrange(tensor, copies)
    part = arranged.part
    memory: dict[int, int] = {}
    for first, place, nbytes in part.runs(part.start, part.end):
        for offset in range(nbytes):
            assert place + offset not in memory
            memory[place + offset] = first + offset - _START
    assert len(memory) == part.nbytes
    for number, copy in enumerate(copies):
        sources = _places(copy.start, copy.axes, "source")
        if arranged.low is not None:
            assert copy.direct
            found = _places(copy.target - arranged.low, copy.axes, "target")
            assert max(found) + copy.itemsize <= arranged.span
        else:
            staged = arranged.staged[number]
            assert [axis.target for axis in staged.axes] == [axis.target for axis in copy.axes]
            assert not any(value % copy.itemsize for value in (staged.start, *(axis.source for axis in staged.axes)))
            found = _places(staged.start, staged.axes, "source")
        for source, place in zip(sources, found, strict=True):
            assert [memory[place + byte] for byte in range(copy.itemsize)] == [
                source + byte for byte in range(copy.itemsize)
            ]
    # What goes straight into its place is just what is wanted.
    if arranged.low is not None:
        assert part.nbytes == sum(copy.itemsize * math.prod(axis.size for axis in copy.axes) for copy in copies)


@given(
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    picked=st.lists(st.tuples(st.integers(0, 6), st.integers(1, 5), st.integers(1, 40)), max_size=3),
    data=st.data(),
)
def test_elements_of_a_copy_are_those_of_the_original(
    sizes: list[int], picked: list[tuple[int, int, int]], data: st.DataObject
) -> None:
    """Whatever is composed leads to the places that the elements were copied from."""
    total = math.prod(sizes)
    base = Layout(0, tuple(sizes), tuple(math.prod(sizes[dim + 1 :]) for dim in range(len(sizes))))
    order = data.draw(st.permutations(range(len(sizes))))
    origin = Layout(5, tuple(sizes), tuple(_strides(sizes, order, [1] * len(sizes), 3)))
    came_from = dict(
        zip(
            _places(
                0, [Axis(size, stride, 0) for size, stride in zip(base.sizes, base.strides, strict=True)], "source"
            ),
            _places(
                5, [Axis(size, stride, 0) for size, stride in zip(origin.sizes, origin.strides, strict=True)], "source"
            ),
            strict=True,
        )
    )
    axes = [Axis(size, step, target) for step, size, target in picked if size > 1 and step > 0]
    start = data.draw(st.integers(0, total - 1))
    places = _places(start, axes, "source")
    if max(places) >= total:
        return
    composed = compose(start, axes, base, origin)
    if composed is None:
        return
    found = sorted(zip(_places(composed[0], composed[1], "source"), _places(0, composed[1], "target"), strict=True))
    wanted = sorted(zip((came_from[place] for place in places), _places(0, axes, "target"), strict=True))
    assert found == wanted


def test_a_flattened_copy_is_split_again() -> None:
    """Columns of a matrix, made contiguous and flattened: each of them is one dimension again."""
    composed = compose(0, [Axis(12, 1, 4)], Layout(0, (3, 4), (4, 1)), Layout(2, (3, 4), (1, 8)))
    assert composed == (2, [Axis(3, 1, 16), Axis(4, 8, 4)])
    assert compose(1, [Axis(4, 1, 4)], Layout(0, (3, 4), (4, 1)), Layout(2, (3, 4), (1, 8))) is None
