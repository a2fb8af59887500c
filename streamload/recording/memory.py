"""What is written into a model's memory: which regions, by whom, and which of them overlap."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator

import torch

from streamload.sinks.regions import RegionCopy

__all__ = ["Memory", "Write"]


class Write:
    """A region of a storage that is written, in bytes."""

    __slots__ = ("axes", "copy", "end", "name", "start")

    def __init__(self, tensor: torch.Tensor, name: str = "", copy: RegionCopy | None = None) -> None:
        item = tensor.element_size()
        self.name = name
        self.copy = copy
        self.start = int(tensor.storage_offset()) * item
        self.axes = sorted(
            (stride * item, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size > 1
        )
        self.end = self.start + item + sum(stride * (size - 1) for stride, size in self.axes)

    def same(self, other: Write) -> bool:
        return (self.start, self.end, self.axes) == (other.start, other.end, other.axes)

    def overlaps(self, other: Write) -> bool:
        """Whether the two may have a byte in common."""
        if self.end <= other.start or other.end <= self.start:
            return False
        # Parts of rows lie apart although their extents do not: look at them within one row.
        for row in {stride for stride, _ in (*self.axes, *other.axes)}:
            mine, theirs = self._within(row), other._within(row)
            if mine and theirs and (mine[1] <= theirs[0] or theirs[1] <= mine[0]):
                return False
        return True

    def _within(self, row: int) -> tuple[int, int] | None:
        """Which bytes of every `row` bytes it has, where that is the same range in each."""
        if any(stride >= row and stride % row for stride, _ in self.axes):
            return None
        first = self.start % row
        outside = sum(stride * (size - 1) for stride, size in self.axes if stride >= row)
        last = first + self.end - self.start - outside
        return (first, last) if last <= row else None


class Memory:
    """A storage of the model's.

    Attributes:
        names: Whose values go into it, or may.
        problem: Why it cannot be recorded, if it cannot.
    """

    def __init__(self, storage: torch.UntypedStorage) -> None:
        self.storage = storage
        self.names: set[str] = set()
        self.problem: str | None = None
        self._writes: list[tuple[int, int, Write]] = []
        self._longest = 0
        self._counted = 0

    @property
    def writes(self) -> Iterator[Write]:
        return (write for _, _, write in self._writes)

    def described(self) -> list[object]:
        """What is copied into it, to be compared with what another run copies into it."""
        return [
            (write.name, write.start, write.axes, write.copy and (write.copy[:4], write.copy.target.dtype))
            for write in self.writes
        ]

    def overlapping(self, write: Write) -> list[tuple[int, int, Write]]:
        first = bisect_left(self._writes, (write.start - self._longest,))
        entries = self._writes[first : bisect_left(self._writes, (write.end,))]
        return [entry for entry in entries if entry[2].overlaps(write)]

    def add(self, write: Write, names: Iterable[str]) -> None:
        """Note what is written. What writes the very same region as something before takes its place.

        It is a problem where it overlaps with something in another way.

        Args:
            write: The region.
            names: Which names it comes from, or may come from.
        """
        self.names.update(names)
        for entry in self.overlapping(write):
            if not entry[2].same(write):
                self.fail("what is copied into a parameter overlaps in part")
                break
            self._writes.remove(entry)
        self._counted += 1
        self._longest = max(self._longest, write.end - write.start)
        insort(self._writes, (write.start, self._counted, write))

    def touched(self, tensor: torch.Tensor) -> bool:
        """Whether a tensor has memory whose values are yet to come."""
        return tensor.numel() > 0 and bool(self.overlapping(Write(tensor)))

    def fail(self, problem: str) -> None:
        self.problem = self.problem or problem
