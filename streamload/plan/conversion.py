"""An ordinary checkpoint as one rank's files each: which tensors go into which, and in which order all of it is read.

There is one order for everything: wide dtypes first, as readers need it within a file, and else as the tensors lie in
the source. The source is read in it once, and of what a read brings, each rank's bytes are the next ones of the file
that is being written for it. No file is ever written other than from its first byte to its last.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import count
from typing import NamedTuple

from streamload.checkpoint import DTYPE_BITS, Catalog, Entry, TensorInfo
from streamload.errors import OptionError
from streamload.plan.placements import Slicer

__all__ = ["Conversion", "Span"]


class Span(NamedTuple):
    """One read of the source: neighbouring tensors, or a part of a large one.

    Attributes:
        file: The shard file's place in the catalog.
        start: The first byte in it.
        end: One past the last.
        first: The first tensor of which something is read, by its number in the order of all.
        stop: One past the number of the last.
        whole: Whether the last one ends where the read does.
    """

    file: int
    start: int
    end: int
    first: int
    stop: int
    whole: bool


class Conversion:
    """What goes where.

    Tensors are taken in order and put into *groups*: a new one begins where some rank's file would become too long.
    Of each group, each rank has one file, or none where it has nothing of the group's tensors. So all files of a group
    are complete when its tensors have been read, and they need nothing else.

    Tensors without elements are left out, as sharded_state knows none.

    Args:
        catalog: What is to be converted.
        slicers: What cuts out each rank's slices, in the order of the ranks.
        max_file_bytes: How many bytes of tensors a file may hold; a larger slice has a file of its own. None: no limit.

    Attributes:
        catalog: As given.
        groups: The numbers of each group's tensors.
        nbytes: Of the tensors that are read.
        digest: Tells this conversion from any other one: all slices, their places in the source and in the files.

    Raises:
        OptionError: A tensor cannot be shared out.
    """

    def __init__(self, catalog: Catalog, slicers: Sequence[Slicer], *, max_file_bytes: int | None) -> None:
        self.catalog = catalog
        self._slicers = slicers
        self._tensors: list[tuple[int, TensorInfo]] = []
        # For each rank, what it has of each tensor, in bytes: kept, for the slices themselves take twenty times that.
        self._nbytes = [array("q") for _ in slicers]
        self.groups: list[range] = []
        digest = hashlib.sha256()
        held = [0] * len(slicers)
        begun = 0
        for number, tensor in _in_order(catalog):
            slices = self._slices_of(tensor)
            if not any(slices):
                continue
            sizes = [0 if part is None else part.nbytes for part in slices]
            if max_file_bytes is not None and any(
                before and size and before + size > max_file_bytes for before, size in zip(held, sizes, strict=True)
            ):
                self.groups.append(range(begun, len(self._tensors)))
                begun, held = len(self._tensors), [0] * len(slicers)
                digest.update(b"group")
            for rank, size in enumerate(sizes):
                held[rank] += size
                self._nbytes[rank].append(size)
            self._tensors.append((number, tensor))
            digest.update(repr((catalog.files[number].key, slices)).encode("utf-8", "surrogatepass"))
        # A rank without any tensor has a file all the same, in the last group.
        self.groups.append(range(begun, len(self._tensors)))
        self._parts = [self._parts_of(sizes) for sizes in self._nbytes]
        self._covered = Counter[int]()
        for number, tensor in self._tensors:
            self._covered[number] += tensor.nbytes
        self.nbytes = self._covered.total()
        self.digest = digest.hexdigest()
        self._last: tuple[int, list[TensorInfo | None]] = (-1, [])

    @property
    def tensors(self) -> int:
        """How many tensors are read."""
        return len(self._tensors)

    def part(self, rank: int, group: int) -> int | None:
        """Which of a rank's files is that of a group; None where it has none."""
        return self._parts[rank][group]

    def _parts_of(self, sizes: Sequence[int]) -> list[int | None]:
        counted = count()
        parts = [next(counted) if any(sizes[group.start : group.stop]) else None for group in self.groups]
        if not any(sizes):
            parts[-1] = 0
        return parts

    def sizes(self, rank: int, numbers: range) -> Iterator[int]:
        """How many bytes a rank has of each of some tensors; of those that it has none of, nothing."""
        return (size for number in numbers if (size := self._nbytes[rank][number]))

    def entries(self, rank: int, group: int) -> Iterator[Entry]:
        """What lies in a rank's file of a group, in order."""
        for number in self.groups[group]:
            if self._nbytes[rank][number]:
                part = self._slicers[rank](self._tensors[number][1])
                assert part is not None
                yield part.name, part.dtype, part.shape

    def held(self, rank: int, group: int) -> Iterator[tuple[str, int]]:
        """The names of what lies in a rank's file of a group, in order, and how many bytes each has."""
        for number in self.groups[group]:
            if nbytes := self._nbytes[rank][number]:
                yield self._tensors[number][1].name, nbytes

    def slices(self, number: int) -> list[TensorInfo | None]:
        """What each rank has of a tensor, by the tensor's number."""
        if self._last[0] != number:
            self._last = number, self._slices_of(self._tensors[number][1])
        return self._last[1]

    def covered(self, file: int) -> int:
        """How many bytes of a source file are read."""
        return self._covered[file]

    def nbytes_before(self, number: int) -> int:
        """How many bytes the tensors before one have."""
        return sum(tensor.nbytes for _, tensor in self._tensors[:number])

    def spans(self, numbers: range, read_bytes: int) -> Iterator[Span]:
        """Cut the reading of some tensors into reads.

        Args:
            numbers: Which tensors.
            read_bytes: No read is longer.
        """
        first = numbers.start
        while first < numbers.stop:
            file, tensor = self._tensors[first]
            stop, end = first + 1, tensor.end
            if tensor.nbytes > read_bytes:
                for start in range(tensor.start, end, read_bytes):
                    yield Span(file, start, min(start + read_bytes, end), first, stop, start + read_bytes >= end)
            else:
                while stop < numbers.stop and self._follows(stop, file, end):
                    following = self._tensors[stop][1].end
                    if following - tensor.start > read_bytes:
                        break
                    stop, end = stop + 1, following
                yield Span(file, tensor.start, end, first, stop, True)
            first = stop

    def _follows(self, number: int, file: int, end: int) -> bool:
        return self._tensors[number][0] == file and self._tensors[number][1].start == end

    def _slices_of(self, tensor: TensorInfo) -> list[TensorInfo | None]:
        """What each rank has of a tensor; None where that is nothing, or no elements."""
        found = [slice_of(tensor) for slice_of in self._slicers]
        for part in found:
            starts = [] if part is None else [stripe.file_start for stripe in part.stripes]
            if starts != sorted(starts):
                raise OptionError(
                    f"tensor {tensor.name!r}: a rank has its experts in another order than they lie in, and files are "
                    "written in that order: list the owned ones in ascending order"
                )
        return [part if part is not None and part.nbytes else None for part in found]


def _in_order(catalog: Catalog) -> Iterator[tuple[int, TensorInfo]]:
    widths = sorted({DTYPE_BITS[tensor.dtype] for file in catalog.files for tensor in file.tensors}, reverse=True)
    for width in widths:
        for number, file in enumerate(catalog.files):
            for tensor in file.tensors:
                if DTYPE_BITS[tensor.dtype] == width:
                    yield number, tensor
