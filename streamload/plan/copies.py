"""From strided copies out of a tensor to the bytes of the file that they need, and where those go.

A copy is what a model's loader does with a tensor: it takes some of its elements, at regular distances, and writes them
into memory, at regular distances as well.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import NamedTuple

from streamload.checkpoint import Stripe, TensorInfo

__all__ = ["Arrangement", "Axis", "Copy", "Layout", "Staged", "arrange", "compose", "nested"]

# Shorter ranges cost more to put in place, one by one, than the bytes between them cost to read along.
_LEAST_RUN_BYTES = 512

# More stripes than this, each of which may be many ranges, are as many objects as a small model has tensors.
_MOST_STRIPES = 1024


# Of a complex number in double precision.
_LARGEST_ITEM_BYTES = 16


class Layout(NamedTuple):
    """Where the elements of a tensor lie in a storage, counted in elements.

    Attributes:
        offset: The first one.
        sizes: How many there are in each dimension.
        strides: From one to the next, in each dimension.
    """

    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]


class Axis(NamedTuple):
    """One dimension of a copy.

    Attributes:
        size: How many elements, at least two.
        source: From one to the next where they come from.
        target: The same where they go.
    """

    size: int
    source: int
    target: int


class Copy(NamedTuple):
    """Elements of a tensor that go to one place; all counted in bytes.

    Attributes:
        start: The first element's place in the tensor.
        itemsize: How large an element is.
        axes: The dimensions.
        direct: Whether the memory holds just what the file does and may be read into.
        block: Which memory they go to.
        target: The first element's place there.
    """

    start: int
    itemsize: int
    axes: tuple[Axis, ...]
    direct: bool
    block: int
    target: int


class Staged(NamedTuple):
    """Where a copy's elements lie in staged memory, in bytes.

    Attributes:
        start: The first element's place.
        axes: The dimensions, with the distances in the staged memory as their source's.
    """

    start: int
    axes: tuple[Axis, ...]


class Arrangement(NamedTuple):
    """What is read of a tensor, and where it goes.

    Attributes:
        part: The bytes that are read.
        low: Where they go straight to their places: the first byte of the block that is needed, from which on the
            part's places count; None where they are staged.
        span: How many bytes of the block are needed.
        staged: Where they are staged: each copy's elements there, in the order of the copies.
    """

    part: TensorInfo
    low: int | None
    span: int
    staged: tuple[Staged, ...] = ()


def nested(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether no two elements of a strided tensor can lie at the same place.

    Some that this says no to are none the less without overlaps; nobody makes such on purpose.
    """
    extent = 1
    for stride, size in sorted((stride, size) for size, stride in zip(sizes, strides, strict=True) if size > 1):
        if stride < extent:
            return False
        extent += stride * (size - 1)
    return True


def compose(start: int, axes: Sequence[Axis], base: Layout, origin: Layout) -> tuple[int, list[Axis]] | None:
    """Say where elements came from that were taken out of a copy.

    Args:
        start: The first element's place in the copy's storage.
        axes: The dimensions, their source being that storage.
        base: How the copy lies there.
        origin: Where its elements came from: of the same sizes.

    Returns:
        The first element's place, and the dimensions, in the storage that they came from; some are split into several.
        None where they do not lie there at regular distances, or are not known to.
    """
    dimensions = sorted(
        (
            (stride, size, origin_stride)
            for size, stride, origin_stride in zip(base.sizes, base.strides, origin.strides, strict=True)
            if size > 1
        ),
        reverse=True,
    )
    place, rest = origin.offset, start - base.offset
    digits, used = [], []
    for stride, _, origin_stride in dimensions:
        digit, rest = divmod(rest, stride)
        digits.append(digit)
        used.append(digit)
        place += digit * origin_stride
    if rest or start < base.offset:
        return None
    places: list[Axis] = []
    for axis in axes:
        size, source, target = axis
        split: list[Axis] = []
        while size > 1:
            number = next((number for number, found in enumerate(dimensions) if found[0] <= source), None)
            if number is None:
                return None
            stride, length, origin_stride = dimensions[number]
            step, rest = divmod(source, stride)
            if rest:
                return None
            taken = size
            if digits[number] + (size - 1) * step >= length:
                # It goes on in the next dimension, from the beginning of this one each time.
                if length % step or size % (length // step) or length == step:
                    return None
                taken = length // step
                if not number or dimensions[number - 1][0] != stride * length:
                    return None
            used[number] += (taken - 1) * step
            split.append(Axis(taken, step * origin_stride, target))
            size, source, target = size // taken, source * taken, target * taken
        places.extend(reversed(split))
    if any(digit >= length for digit, (_, length, _) in zip(used, dimensions, strict=True)):
        return None
    return place, places


def arrange(tensor: TensorInfo, copies: Sequence[Copy]) -> Arrangement:
    """Say which bytes of a tensor some copies need, and where they go.

    Args:
        tensor: All of it.
        copies: At least one. What they take may overlap, but no two elements of one copy are the same.
    """
    direct = [_direct(copy) for copy in copies]
    if all(stripes is not None for stripes in direct) and len({copy.block for copy in copies}) == 1:
        low = min(copy.target for copy in copies)
        end = max(copy.target + _extent([axis.target for axis in copy.axes], copy) for copy in copies)
        stripes: list[Stripe] = [
            replace(stripe, tensor_start=stripe.tensor_start + copy.target - low)
            for copy, found in zip(copies, direct, strict=True)
            for stripe in found or ()
        ]
        part = _part(tensor, stripes)
        if part is not None:
            return Arrangement(part, low, end - low)
    position = 0
    stripes = []
    places: dict[int, Staged] = {}
    # The largest elements first: so all of them lie where elements of their size may lie.
    for number in sorted(range(len(copies)), key=lambda number: -copies[number].itemsize):
        found, places[number] = _staged(copies[number], position)
        stripes += found
        position += sum(stripe.nbytes * stripe.count for stripe in found)
    staged = [places[number] for number in range(len(copies))]
    part = _part(tensor, stripes)
    if part is None:  # some bytes are wanted twice: all from the first to the last one are read, once
        first = min(stripe.file_start for stripe in stripes)
        first -= first % _LARGEST_ITEM_BYTES
        last = max(stripe.file_start + (stripe.count - 1) * stripe.file_step + stripe.nbytes for stripe in stripes)
        part = _part(tensor, [Stripe(first, 0, last - first, 0, 0, 1)])
        assert part is not None
        staged = [Staged(copy.start - first, copy.axes) for copy in copies]
    return Arrangement(part, None, 0, tuple(staged))


def _extent(strides: Sequence[int], copy: Copy) -> int:
    return copy.itemsize + sum((axis.size - 1) * stride for axis, stride in zip(copy.axes, strides, strict=True))


def _direct(copy: Copy) -> list[Stripe] | None:
    """The ranges of a copy whose bytes can be read to where they go; None where they are too many or too short."""
    if not copy.direct:
        return None
    axes = sorted(copy.axes, key=lambda axis: axis.source)
    run, outer = copy.itemsize, 0
    while outer < len(axes) and axes[outer].source == axes[outer].target == run:
        run *= axes[outer].size
        outer += 1
    if outer < len(axes) and run < _LEAST_RUN_BYTES:
        return None
    rest = _merged(axes[outer:])
    return None if _count(rest[1:]) > _MOST_STRIPES else _ranges(copy.start, 0, run, rest)


def _staged(copy: Copy, position: int) -> tuple[list[Stripe], Staged]:
    """The ranges of a copy whose elements are copied out of staged memory, and where they lie there."""
    axes = sorted(copy.axes, key=lambda axis: axis.source)
    run, outer = copy.itemsize, 0
    while outer < len(axes) and (
        axes[outer].source == run or run < _LEAST_RUN_BYTES or _count(axes[outer + 1 :]) > _MOST_STRIPES
    ):
        run += (axes[outer].size - 1) * axes[outer].source
        outer += 1
    nbytes = run
    placed = list(axes[:outer])
    packed = []
    for axis in axes[outer:]:
        placed.append(axis._replace(source=nbytes))
        packed.append(axis._replace(target=nbytes))
        nbytes *= axis.size
    places = dict(zip(axes, placed, strict=True))
    staged = Staged(position, tuple(places[axis] for axis in copy.axes))
    return _ranges(copy.start, position, run, _merged(packed)), staged


def _count(axes: Sequence[Axis]) -> int:
    count = 1
    for axis in axes:
        count *= axis.size
    return count


def _merged(axes: Sequence[Axis]) -> list[Axis]:
    """The same places, from the nearest to the farthest, in as few dimensions as possible."""
    found: list[Axis] = []
    for axis in axes:
        last = found[-1] if found else None
        if last and (axis.source, axis.target) == (last.source * last.size, last.target * last.size):
            found[-1] = last._replace(size=last.size * axis.size)
        else:
            found.append(axis)
    return found


def _ranges(start: int, position: int, run: int, axes: Sequence[Axis]) -> list[Stripe]:
    if not axes:
        return [Stripe(start, position, run, 0, 0, 1)]
    near, far = axes[0], axes[1:]
    return [
        Stripe(
            start + sum(index * axis.source for index, axis in zip(indices, far, strict=True)),
            position + sum(index * axis.target for index, axis in zip(indices, far, strict=True)),
            run,
            near.source,
            near.target,
            near.size,
        )
        for indices in itertools.product(*(range(axis.size) for axis in far))
    ]


def _part(tensor: TensorInfo, ranges: Sequence[Stripe]) -> TensorInfo | None:
    """The tensor with these ranges as what is wanted of it; None where they overlap in the file."""
    start = min(found.file_start for found in ranges)
    end = max(found.file_start + (found.count - 1) * found.file_step + found.nbytes for found in ranges)
    whole = tensor._replace(start=tensor.start + start, end=tensor.start + end)
    if len(ranges) == 1 and ranges[0].count == 1:
        return whole
    stripes = tuple(
        replace(found, file_start=tensor.start + found.file_start)
        for found in sorted(ranges, key=lambda found: found.file_start)
    )
    part = whole._replace(stripes=stripes)
    ends = [found.file_start + (found.count - 1) * found.file_step + found.nbytes for found in stripes]
    if any(after.file_start < end for end, after in zip(ends, stripes[1:], strict=False)):
        runs = part.runs(part.start, part.end)
        if any(before[0] + before[2] > after[0] for before, after in pairwise(runs)):
            return None
    return part
