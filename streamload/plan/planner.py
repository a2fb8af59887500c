"""From a catalog to a plan: neighbours share a read, big tensors are split over several.

A slice that is many small ranges is read in one of three ways, by what the source says they cost: each range for
itself, where the gaps are wider than a request is worth; several in one read that passes over the gaps, where the
source can do that; or all of it, gaps included.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from streamload.checkpoint import Catalog, TensorInfo
from streamload.plan.reads import Batch, Piece, Pieces, Plan, Read

__all__ = ["LEAST_READ_BYTES", "plan_reads"]

LEAST_READ_BYTES = 4096
"""Reads smaller than a page would be all cost and no bytes."""

# Neighbours that are asked for further apart than this do not come with one read: one of them would have to be kept for
# too long. A decoder's layer has some ten tensors.
_ASKED_TOGETHER = 64

# Reads that split a tensor begin at multiples of a page within it, so that a sink's memory is written page by page.
_SPLIT_ALIGNMENT = 4096


def plan_reads(
    catalog: Catalog,
    *,
    read_bytes: int,
    gap_bytes: int,
    skip_bytes: int | None = None,
    asked: Mapping[str, int] | None = None,
) -> Plan:
    """Decide what to read.

    Every wanted byte of every tensor is in exactly one read. No other byte is read, except gaps of at most `gap_bytes`
    inside one read; of those inside a slice, wider ones than `skip_bytes` are not read either.

    Args:
        catalog: The tensors, or slices of them, that are wanted.
        read_bytes: How large a read should be; none extends over more. At least `LEAST_READ_BYTES`.
        gap_bytes: Up to how many unwanted bytes are read through rather than asked around.
        skip_bytes: The source passes over gaps of a slice that are wider than this; None: it reads every byte.
        asked: At which place each tensor will be asked for, where who wants them has an order of his own.

    Returns:
        The plan: files in the catalog's order, within a file the order of its bytes; or batches in the order in which
        the first tensor of each is asked for.
    """
    if read_bytes < LEAST_READ_BYTES:
        raise ValueError(f"read_bytes is {read_bytes}; it must be at least {LEAST_READ_BYTES}")
    batches: list[Batch] = []
    for number, file in enumerate(catalog.files):
        # Slices of neighbours may begin in another order than the neighbours do: empty ones begin where they like.
        tensors = sorted(file.tensors, key=_place_in_file) if any(t.stripes for t in file.tensors) else file.tensors
        for run in _neighbours(tensors, read_bytes, gap_bytes):
            for part in [run] if asked is None else _asked_together(run, asked):
                batches.append(Batch(len(batches), number, part, _reads(part, read_bytes, gap_bytes, skip_bytes)))
    if asked is not None:
        batches.sort(key=lambda batch: min(asked[tensor.name] for tensor in batch.tensors))
        batches = [replace(batch, index=index) for index, batch in enumerate(batches)]
    return Plan(
        catalog=catalog,
        batches=tuple(batches),
        tensor_bytes=sum(batch.nbytes for batch in batches),
        gap_bytes=sum(read.gap_bytes for batch in batches for read in batch.reads),
        reads=sum(len(batch.reads) for batch in batches),
    )


def _neighbours(tensors: Sequence[TensorInfo], read_bytes: int, gap_bytes: int) -> Iterator[tuple[TensorInfo, ...]]:
    """Cut a file's tensors into runs that fit one read; a tensor that needs several is a run of its own."""
    run: list[TensorInfo] = []
    start = end = 0
    for tensor in tensors:
        if tensor.end == tensor.start:
            # An empty tensor needs no byte: it goes along with whatever is at hand.
            run.append(tensor)
            continue
        if start == end:
            start = end = tensor.start
        elif tensor.start - end > gap_bytes or tensor.end - start > read_bytes or _widest_gap(tensor) > gap_bytes:
            yield tuple(run)
            run, start = [], tensor.start
        run.append(tensor)
        end = tensor.end
        if _widest_gap(tensor) > gap_bytes:
            yield tuple(run)
            run, start, end = [], 0, 0
    if run:
        yield tuple(run)


def _asked_together(run: Sequence[TensorInfo], asked: Mapping[str, int]) -> Iterator[tuple[TensorInfo, ...]]:
    """Cut a run where a tensor is asked for long before or after the one that the run begins with."""
    part: list[TensorInfo] = []
    for tensor in run:
        if part and abs(asked[tensor.name] - asked[part[0].name]) >= _ASKED_TOGETHER:
            yield tuple(part)
            part = []
        part.append(tensor)
    yield tuple(part)


def _widest_gap(tensor: TensorInfo) -> int:
    """The widest gap between two wanted ranges of a tensor."""
    if not tensor.stripes:
        return 0
    if len(tensor.stripes) == 1:
        return tensor.stripes[0].file_step - tensor.stripes[0].nbytes
    runs = tensor.runs(tensor.start, tensor.end)
    return max(after[0] - before[0] - before[2] for before, after in pairwise(runs))


def _reads(tensors: Sequence[TensorInfo], read_bytes: int, gap_bytes: int, skip_bytes: int | None) -> tuple[Read, ...]:
    filled = [(place, tensor) for place, tensor in enumerate(tensors) if tensor.end > tensor.start]
    if not filled:
        return ()
    start, end = filled[0][1].start, filled[-1][1].end
    if end - start > read_bytes or _widest_gap(filled[0][1]) > gap_bytes:
        # Such a run holds a single tensor with bytes, since no second one would have fitted.
        ((place, tensor),) = filled
        if tensor.stripes:
            return tuple(_split_slice(place, tensor, read_bytes, gap_bytes, skip_bytes))
        return tuple(_split(place, tensor, read_bytes))
    if any(tensor.stripes for _, tensor in filled):
        return (_sliced_read(filled, start, end, skip_bytes),)
    pieces = tuple(Piece(place, 0, tensor.start - start, tensor.end - tensor.start) for place, tensor in filled)
    return (Read(start, end, pieces),)


def _split(place: int, tensor: TensorInfo, read_bytes: int) -> Iterator[Read]:
    """Cut one tensor into reads of nearly equal size, so that the last one is not a crumb with a request's cost."""
    for offset, nbytes in _even_parts(tensor.end - tensor.start, read_bytes):
        yield Read(tensor.start + offset, tensor.start + offset + nbytes, (Piece(place, offset, 0, nbytes),))


def _even_parts(size: int, read_bytes: int) -> Iterator[tuple[int, int]]:
    """Where each part begins, and how long it is."""
    count = -(-size // read_bytes)
    step = -(-size // count)
    step = min(-(-step // _SPLIT_ALIGNMENT) * _SPLIT_ALIGNMENT, read_bytes)
    for offset in range(0, size, step):
        yield offset, min(step, size - offset)


def _split_slice(
    place: int, tensor: TensorInfo, read_bytes: int, gap_bytes: int, skip_bytes: int | None
) -> Iterator[Read]:
    """Cut a slice into reads: as many of its ranges in each as belong together, and of nearly equal size."""
    for start, end in _groups(tensor, read_bytes, gap_bytes):
        if end - start <= read_bytes:
            yield _sliced_read([(place, tensor)], start, end, skip_bytes)
        else:  # a single range
            for offset, nbytes in _even_parts(end - start, read_bytes):
                yield _sliced_read([(place, tensor)], start + offset, start + offset + nbytes, skip_bytes)


def _groups(tensor: TensorInfo, read_bytes: int, gap_bytes: int) -> Iterator[tuple[int, int]]:
    """Ranges of the file, each with one or more of a slice's ranges; one that is larger than a read is alone."""
    stripe = tensor.stripes[0]
    if len(tensor.stripes) == 1 and stripe.file_step - stripe.nbytes <= gap_bytes and stripe.file_step <= read_bytes:
        # By far the most frequent case, and one that needs no look at each of the rows.
        most = (read_bytes - stripe.nbytes) // stripe.file_step + 1
        rows = -(-stripe.count // -(-stripe.count // most))
        for row in range(0, stripe.count, rows):
            start = stripe.file_start + row * stripe.file_step
            yield start, start + (min(rows, stripe.count - row) - 1) * stripe.file_step + stripe.nbytes
        return
    start = end = -1
    for first, _, nbytes in tensor.runs(tensor.start, tensor.end):
        if start < 0:
            start = first
        elif first - end > gap_bytes or first + nbytes - start > read_bytes:
            yield start, end
            start = first
        end = first + nbytes
    yield start, end


def _sliced_read(tensors: Sequence[tuple[int, TensorInfo]], start: int, end: int, skip_bytes: int | None) -> Read:
    nbytes = count = skipped = 0
    for _, tensor in tensors:
        if len(tensor.stripes) == 1:
            stripe = tensor.stripes[0]
            low = max(start, tensor.start)
            rows = -(-(min(end, tensor.end) - low) // stripe.file_step)
            if (low - stripe.file_start) % stripe.file_step == 0 and min(end, tensor.end) - low == (
                rows - 1
            ) * stripe.file_step + stripe.nbytes:
                count += rows
                nbytes += rows * stripe.nbytes
                gap = stripe.file_step - stripe.nbytes
                if skip_bytes is not None and gap > skip_bytes:
                    skipped += (rows - 1) * gap
                continue
        runs = tensor.runs(start, end)
        count += len(runs)
        nbytes += sum(run[2] for run in runs)
        if skip_bytes is not None:
            gaps = (after[0] - before[0] - before[2] for before, after in pairwise(runs))
            skipped += sum(gap for gap in gaps if gap > skip_bytes)
    if skip_bytes is not None:
        # Between neighbours: a gap there is one like any other.
        for (_, before), (_, after) in pairwise(tensors):
            if after.start - before.end > skip_bytes:
                skipped += after.start - before.end
    return Read(start, end, Pieces(tensors, start, end, nbytes=nbytes, count=count), skipped)


def _place_in_file(tensor: TensorInfo) -> tuple[int, int]:
    return tensor.start, tensor.end
