"""From a catalog to a plan: neighbours share a read, big tensors are split over several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from streamload.checkpoint import Catalog, TensorInfo
from streamload.plan.reads import Batch, Piece, Plan, Read

__all__ = ["LEAST_READ_BYTES", "plan_reads"]

LEAST_READ_BYTES = 4096
"""Reads smaller than a page would be all cost and no bytes."""

# Reads that split a tensor begin at multiples of a page within it, so that a sink's memory is written page by page.
_SPLIT_ALIGNMENT = 4096


def plan_reads(catalog: Catalog, *, read_bytes: int, gap_bytes: int) -> Plan:
    """Decide what to read.

    Every byte of every tensor is in exactly one read. No other byte is read, except gaps of at most `gap_bytes` between
    neighbours in one read.

    Args:
        catalog: The tensors that are wanted.
        read_bytes: How large a read should be; no read is larger. At least `LEAST_READ_BYTES`.
        gap_bytes: Up to how many unwanted bytes are read through rather than asked around.

    Returns:
        The plan: files in the catalog's order, within a file the order of its bytes.
    """
    if read_bytes < LEAST_READ_BYTES:
        raise ValueError(f"read_bytes is {read_bytes}; it must be at least {LEAST_READ_BYTES}")
    batches: list[Batch] = []
    for number, file in enumerate(catalog.files):
        for tensors in _neighbours(file.tensors, read_bytes, gap_bytes):
            batches.append(Batch(len(batches), number, tensors, _reads(tensors, read_bytes)))
    return Plan(
        catalog=catalog,
        batches=tuple(batches),
        tensor_bytes=sum(batch.nbytes for batch in batches),
        gap_bytes=sum(read.gap_bytes for batch in batches for read in batch.reads),
        reads=sum(len(batch.reads) for batch in batches),
    )


def _neighbours(tensors: Sequence[TensorInfo], read_bytes: int, gap_bytes: int) -> Iterator[tuple[TensorInfo, ...]]:
    """Cut a file's tensors into runs that fit one read; a tensor larger than a read is a run of its own."""
    run: list[TensorInfo] = []
    start = end = 0
    for tensor in tensors:
        size = tensor.end - tensor.start
        if size == 0:
            # An empty tensor needs no byte: it goes along with whatever is at hand.
            run.append(tensor)
            continue
        if start == end:
            start = end = tensor.start
        elif tensor.start - end > gap_bytes or tensor.end - start > read_bytes:
            yield tuple(run)
            run, start = [], tensor.start
        run.append(tensor)
        end = tensor.end
    if run:
        yield tuple(run)


def _reads(tensors: Sequence[TensorInfo], read_bytes: int) -> tuple[Read, ...]:
    filled = [(place, tensor) for place, tensor in enumerate(tensors) if tensor.end > tensor.start]
    if not filled:
        return ()
    start, end = filled[0][1].start, filled[-1][1].end
    if end - start > read_bytes:
        # Such a run holds a single tensor with bytes, since no second one would have fitted.
        ((place, tensor),) = filled
        return tuple(_split(place, tensor, read_bytes))
    pieces = tuple(Piece(place, 0, tensor.start - start, tensor.end - tensor.start) for place, tensor in filled)
    return (Read(start, end, pieces),)


def _split(place: int, tensor: TensorInfo, read_bytes: int) -> Iterator[Read]:
    """Cut one tensor into reads of nearly equal size, so that the last one is not a crumb with a request's cost."""
    size = tensor.end - tensor.start
    count = -(-size // read_bytes)
    step = -(-size // count)
    step = min(-(-step // _SPLIT_ALIGNMENT) * _SPLIT_ALIGNMENT, read_bytes)
    for offset in range(0, size, step):
        nbytes = min(step, size - offset)
        yield Read(tensor.start + offset, tensor.start + offset + nbytes, (Piece(place, offset, 0, nbytes),))
