"""From a tensor, a placement and a rank to the bytes that the rank needs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product
from typing import Literal, TypeAlias

from streamload.checkpoint import DTYPE_BITS, Stripe, TensorInfo
from streamload.errors import OptionError
from streamload.plan.placement import Absent, Experts, PackedShard, Placement, Ranks, Replicate, Shard

__all__ = ["Box", "Uneven", "slice_boxes", "slice_tensor"]

Uneven: TypeAlias = Literal["error", "ceil"]

# From and to, along one dimension.
_Range: TypeAlias = tuple[int, int]

Box: TypeAlias = "tuple[tuple[int, int], ...]"
"""A part of a tensor: from and to, in elements, along each of its dimensions."""


def slice_tensor(
    tensor: TensorInfo, placement: Placement, ranks: Ranks, *, uneven: Uneven = "error"
) -> TensorInfo | None:
    """Say which part of a tensor a rank has.

    Args:
        tensor: All of it.
        placement: How it is shared out.
        ranks: Which rank asks.
        uneven: What to do where a dimension is not a multiple of the number of ranks: ``"error"``, or ``"ceil"`` for
            the rule of ``torch.chunk``: each rank has the quotient, rounded up, until nothing is left.

    Returns:
        The part, with its own shape, and the place of its bytes in the file; None where the rank has nothing of the
        tensor. A part without elements has no bytes, and a shape that says so.

    Raises:
        OptionError: It cannot be shared out in this way; the error names the tensor.
    """
    try:
        if isinstance(placement, Absent):
            return None
        if isinstance(placement, Replicate):
            return tensor
        first = [(0, 1)]  # where there are no experts: one pseudo-expert, in front of the other dimensions
        within: Placement = placement
        shape = tensor.shape
        if isinstance(placement, Experts):
            if not shape:
                raise OptionError("it has no dimension that could count experts")
            first = _expert_ranges(placement.owned, shape[0], ranks)
            within = placement.within
            dim, parts = _parts_of(within, shape, ranks, uneven, least_dim=1)
        else:
            dim, parts = _parts_of(within, shape, ranks, uneven)
            shape = (1, *shape)
            dim += 1
        sliced = _cut(tensor, shape, first, dim, parts)
        return sliced if isinstance(placement, Experts) else sliced._replace(shape=sliced.shape[1:])
    except OptionError as error:
        raise OptionError(f"tensor {tensor.name!r} of shape {list(tensor.shape)}: {error.cause}") from None


def slice_boxes(tensor: TensorInfo, boxes: Sequence[Box]) -> TensorInfo:
    """Put parts of a tensor one behind the other.

    Args:
        tensor: All of it.
        boxes: The parts, in the order in which they are wanted; at least one.

    Returns:
        What is to be read, in the shape of the part where there is one, and else in one dimension.

    Raises:
        OptionError: A part does not begin and end with a byte; the error names the tensor.
    """
    stripes: list[Stripe] = []
    position = 0
    for box in boxes:
        nbytes = math.prod(end - start for start, end in box)
        if nbytes:
            stripes.extend(_stripes_of(box, tensor.shape, position))
        position += nbytes
    shape = tuple(end - start for start, end in boxes[0]) if len(boxes) == 1 else (position,)
    if not position:
        return tensor._replace(shape=shape, end=tensor.start)
    try:
        return _placed(tensor, shape, _joined(stripes))
    except OptionError as error:
        raise OptionError(f"tensor {tensor.name!r} of shape {list(tensor.shape)}: {error.cause}") from None


def _stripes_of(box: Box, shape: tuple[int, ...], position: int) -> Iterator[Stripe]:
    """A box's ranges, in elements, counted from the tensor's first; in what is read they begin at `position`."""
    inner, run = _whole_after(box, shape, len(shape) - 1)  # the last dimension that is cut, and what is behind it
    outer, rows = _whole_after(box, shape, inner - 1)  # the one before that
    start, end = box[inner] if inner >= 0 else (0, 1)
    row = run * (shape[inner] if inner >= 0 else 1)
    first, last = box[outer] if outer >= 0 else (0, 1)
    block = row * rows * (shape[outer] if outer >= 0 else 1)
    sizes = [math.prod(shape[dim + 1 : outer]) for dim in range(outer)]
    nbytes, count = (end - start) * run, (last - first) * rows
    for place in product(*(range(*limits) for limits in box[: max(outer, 0)])):
        number = sum(at * size for at, size in zip(place, sizes, strict=True))
        yield Stripe(number * block + first * rows * row + start * run, position, nbytes, row, nbytes, count)
        position += nbytes * count


def _whole_after(box: Box, shape: tuple[int, ...], dim: int) -> tuple[int, int]:
    """The last dimension up to `dim` that is not whole (or -1), and how many indices there are behind it."""
    size = 1
    while dim >= 0 and box[dim] == (0, shape[dim]):
        size *= shape[dim]
        dim -= 1
    return dim, size


def _expert_ranges(owned: Sequence[int] | None, experts: int, ranks: Ranks) -> list[_Range]:
    """The owned experts as runs of neighbours, in the order in which they are owned."""
    if owned is None:
        if experts % ranks.ep_size:
            raise OptionError(f"{experts} experts cannot be shared out equally to {ranks.ep_size} ranks")
        share = experts // ranks.ep_size
        return [(ranks.ep_rank * share, (ranks.ep_rank + 1) * share)]
    found: list[_Range] = []
    for expert in owned:
        if not 0 <= expert < experts:
            raise OptionError(f"there is no expert {expert}: there are {experts}")
        if found and found[-1][1] == expert:
            found[-1] = (found[-1][0], expert + 1)
        else:
            found.append((expert, expert + 1))
    return found


def _parts_of(
    placement: Placement, shape: tuple[int, ...], ranks: Ranks, uneven: Uneven, *, least_dim: int = 0
) -> tuple[int, list[_Range]]:
    """Which dimension is cut, and the ranges of it that the rank has."""
    if isinstance(placement, Shard):
        dim = _dimension(placement.dim, shape, least_dim)
        return dim, [_share(0, shape[dim], placement.replicas, ranks, uneven)]
    if isinstance(placement, PackedShard):
        dim = _dimension(placement.dim, shape, least_dim)
        return dim, list(_packed(placement, shape[dim], ranks, uneven))
    if len(shape) > least_dim:  # all of the first dimension that may be cut
        return least_dim, [(0, shape[least_dim])]
    return least_dim - 1, []


def _dimension(dim: int, shape: tuple[int, ...], least: int) -> int:
    positive = dim + len(shape) if dim < 0 else dim
    if not least <= positive < len(shape):
        counted = f"{len(shape)} dimensions" + (", the first of which counts experts" if least else "")
        raise OptionError(f"dimension {dim} cannot be shared out: there are {counted}")
    return positive


def _packed(placement: PackedShard, size: int, ranks: Ranks, uneven: Uneven) -> Iterator[_Range]:
    if isinstance(placement.parts, int):
        if size % placement.parts and uneven == "error":
            raise OptionError(f"a dimension of {size} does not hold {placement.parts} parts of equal size")
        each = -(-size // placement.parts)
        parts: Sequence[int] = [max(0, min(each, size - number * each)) for number in range(placement.parts)]
    else:
        parts = placement.parts
        if sum(parts) != size:
            raise OptionError(f"parts of {' + '.join(map(str, parts))} do not make a dimension of {size}")
    start = 0
    for part, replicas in zip(parts, placement.replicas or (1,) * len(parts), strict=True):
        yield _share(start, part, replicas, ranks, uneven)
        start += part


def _share(start: int, size: int, replicas: int, ranks: Ranks, uneven: Uneven) -> _Range:
    """The rank's share of `size` elements that begin at `start`."""
    if ranks.tp_size % replicas:
        raise OptionError(f"{ranks.tp_size} ranks cannot have {replicas} replicas of each share")
    shares, number = ranks.tp_size // replicas, ranks.tp_rank // replicas
    if size % shares and uneven == "error":
        raise OptionError(
            f"{size} cannot be shared out equally to {shares} ranks; uneven='ceil' gives the last ones less"
        )
    share = -(-size // shares)
    return start + min(number * share, size), start + min((number + 1) * share, size)


def _cut(
    tensor: TensorInfo, shape: tuple[int, ...], first: Sequence[_Range], dim: int, parts: Sequence[_Range]
) -> TensorInfo:
    """Take ranges of the first dimension, and of another one after it, if there is one."""
    first = [(start, end) for start, end in first if end > start]
    firsts = sum(end - start for start, end in first)
    if dim == 0:  # the experts are numbers
        size, row_size, local, outer = 1, 1, 1, 1
        parts, sliced_shape = [(0, 1)], (firsts, *shape[1:])
        inner = 1
    else:
        local = sum(end - start for start, end in parts)
        sliced_shape = (firsts, *shape[1:dim], local, *shape[dim + 1 :])
        inner = math.prod(shape[dim + 1 :])  # elements behind each index of the cut dimension
        size = shape[dim]
        row_size = size * inner
        outer = math.prod(shape[1:dim])  # rows in each index of the first dimension
    whole = firsts == shape[0] and local == size and _in_order(first) and _in_order(parts)
    if whole:
        return tensor._replace(shape=sliced_shape)
    if math.prod(sliced_shape) == 0:
        return tensor._replace(shape=sliced_shape, end=tensor.start)
    stripes = []
    position = 0  # in the slice, in elements
    for start, end in first:
        rows = (end - start) * outer
        offset = 0
        for part_start, part_end in parts:
            if part_end > part_start:
                stripes.append(
                    (
                        start * outer * row_size + part_start * inner,
                        position + offset,
                        (part_end - part_start) * inner,
                        row_size,
                        local * inner,
                        rows,
                    )
                )
                offset += (part_end - part_start) * inner
        position += rows * local * inner
    return _placed(tensor, sliced_shape, _joined([Stripe(*numbers) for numbers in stripes]))


def _in_order(ranges: Sequence[_Range]) -> bool:
    return all(before[1] <= after[0] for before, after in pairwise(ranges))


def _joined(stripes: list[Stripe]) -> list[Stripe]:
    """The same ranges, as few as there can be."""
    found: list[Stripe] = []
    for stripe in stripes:
        if stripe.count > 1 and stripe.nbytes == stripe.file_step == stripe.tensor_step:
            stripe = replace(stripe, nbytes=stripe.nbytes * stripe.count, count=1)
        last = found[-1] if found else None
        if (
            last is not None
            and last.count == stripe.count
            and (last.count == 1 or (last.file_step, last.tensor_step) == (stripe.file_step, stripe.tensor_step))
            and last.file_start + last.nbytes == stripe.file_start
            and last.tensor_start + last.nbytes == stripe.tensor_start
        ):
            found[-1] = replace(last, nbytes=last.nbytes + stripe.nbytes)
        else:
            found.append(stripe)
    return found


def _placed(tensor: TensorInfo, shape: tuple[int, ...], stripes: list[Stripe]) -> TensorInfo:
    """From elements to bytes, and from the tensor's beginning to the file's."""
    bits = DTYPE_BITS[tensor.dtype]

    def nbytes(elements: int) -> int:
        if elements * bits % 8:
            raise OptionError(f"a share of it does not begin and end with a byte: {tensor.dtype} has {bits} bits")
        return elements * bits // 8

    # The steps of a single range mean nothing.
    placed = tuple(
        Stripe(
            tensor.start + nbytes(stripe.file_start),
            nbytes(stripe.tensor_start),
            nbytes(stripe.nbytes),
            nbytes(stripe.file_step) if stripe.count > 1 else 0,
            nbytes(stripe.tensor_step) if stripe.count > 1 else 0,
            stripe.count,
        )
        for stripe in stripes
    )
    start = min(stripe.file_start for stripe in placed)
    end = max(stripe.file_start + (stripe.count - 1) * stripe.file_step + stripe.nbytes for stripe in placed)
    if len(placed) == 1 and placed[0].count == 1:
        return tensor._replace(shape=shape, start=start, end=end)
    return tensor._replace(shape=shape, start=start, end=end, stripes=placed)
