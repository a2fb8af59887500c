"""Byte ranges of a file, half-open: put together, and what they have in common. Pure."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence

__all__ = ["Range", "merged", "overlap"]

Range = tuple[int, int]
"""The first byte, and one past the last."""


def merged(ranges: Iterable[Range]) -> list[Range]:
    """Ranges sorted, empty ones left out, those that touch or overlap made one."""
    found: list[Range] = []
    for start, end in sorted(ranges):
        if start == end:
            continue
        if found and start <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((start, end))
    return found


def overlap(ranges: Sequence[Range], start: int, end: int) -> int:
    """How many bytes of a range lie in any of `ranges`, which are as `merged` makes them."""
    nbytes = 0
    at = bisect_left(ranges, (start, start))
    if at and ranges[at - 1][1] > start:
        at -= 1
    while at < len(ranges) and ranges[at][0] < end:
        nbytes += min(end, ranges[at][1]) - max(start, ranges[at][0])
        at += 1
    return nbytes
