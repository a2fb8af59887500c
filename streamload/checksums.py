"""Checksums of objects, or of the parts they were uploaded in, put together from what was read in any order.

Sources: "Checking object integrity" in the Amazon S3 user guide for which checksums a store keeps; awscrt computes and
combines them.
"""

from __future__ import annotations

import base64
from array import array
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = [
    "ALGORITHMS",
    "Algorithm",
    "BlockSums",
    "Checksum",
    "PartChecksums",
    "PartialChecksum",
    "RunningChecksum",
    "Sha256",
    "combined",
]

Algorithm: TypeAlias = Literal["CRC64NVME", "CRC32C", "CRC32"]

ALGORITHMS: tuple[Algorithm, ...] = ("CRC64NVME", "CRC32C", "CRC32")
"""Those whose parts can be combined, the strongest first."""


@dataclass(frozen=True, slots=True)
class Checksum:
    """What a store says an object's content sums up to.

    Attributes:
        algorithm: How it was computed.
        value: The checksum of the whole object, as a number.
    """

    algorithm: Algorithm
    value: int

    @classmethod
    def from_base64(cls, algorithm: Algorithm, text: str) -> Checksum | None:
        """As S3 writes it: the number's bytes, the highest first, in base64. None where the text is no such thing."""
        try:
            value = base64.b64decode(text, validate=True)
        except ValueError:
            return None
        return cls(algorithm, int.from_bytes(value, "big")) if len(value) == _nbytes(algorithm) else None

    @classmethod
    def of_checksums(cls, algorithm: Algorithm, values: Iterable[int]) -> Checksum:
        """The composite checksum of an object that was uploaded in parts: that of its parts' checksums, in order."""
        running = RunningChecksum(algorithm)
        running.add(memoryview(b"".join(value.to_bytes(_nbytes(algorithm), "big") for value in values)))
        return cls(algorithm, running.value)

    def __str__(self) -> str:
        return f"{self.algorithm} {self.value:0{2 * _nbytes(self.algorithm)}x}"


@dataclass(frozen=True, slots=True)
class PartChecksums:
    """What a store says that the parts of an object sum up to, which it was uploaded in.

    Attributes:
        algorithm: How they were computed.
        ends: Where each part ends in the object; the last one's end is the object's size.
        values: The parts' checksums, as numbers.
    """

    algorithm: Algorithm
    ends: tuple[int, ...]
    values: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sha256:
    """What a store says the SHA-256 of an object's content is, or of each of the parts that it was uploaded in.

    Attributes:
        ends: Where each part ends in the object; the last one's end is the object's size.
        digests: The parts' SHA-256, 32 bytes each.
    """

    ends: tuple[int, ...]
    digests: tuple[bytes, ...]


class RunningChecksum:
    """The checksum of bytes that come one after the other.

    Args:
        algorithm: How they are summed up.
        cuts: After how many bytes a new sum begins, in ascending order.

    Attributes:
        nbytes: How many bytes there were.
        value: The checksum of those since the last cut.
    """

    __slots__ = ("_began", "_cuts", "_next", "_sums", "_update", "nbytes", "value")

    def __init__(self, algorithm: Algorithm, cuts: Iterable[int] = ()) -> None:
        self._update = _update(algorithm)
        self._cuts = iter(cuts)
        self._next = next(self._cuts, None)
        self._began = 0
        self._sums: list[tuple[int, int]] = []
        self.nbytes = 0
        self.value = 0

    def add(self, view: memoryview) -> None:
        """Go on with these bytes."""
        while self._next is not None and self.nbytes + view.nbytes > self._next:
            left = self._next - self.nbytes
            self._sum(view[:left])
            view = view[left:]
            self._sums.append((self.nbytes - self._began, self.value))
            self._began, self.value = self.nbytes, 0
            self._next = next(self._cuts, None)
        self._sum(view)

    def sums(self) -> list[tuple[int, int]]:
        """Length and checksum of what lies between cuts, in order."""
        return [*self._sums, (self.nbytes - self._began, self.value)]

    def _sum(self, view: memoryview) -> None:
        self.value = self._update(view, self.value)
        self.nbytes += view.nbytes


class BlockSums:
    """The CRC-64/NVME of each of many blocks, of bytes that come one after the other.

    Args:
        lengths: How long the blocks are; none is empty.
        values: The checksums of blocks that came before these.

    Attributes:
        values: Of the blocks that are complete.
    """

    __slots__ = ("_left", "_lengths", "_update", "_value", "values")

    def __init__(self, lengths: Iterable[int], values: Iterable[int] = ()) -> None:
        self._update = _update("CRC64NVME")
        self._lengths = iter(lengths)
        self._left = next(self._lengths, 0)
        self._value = 0
        # Eight bytes each: as tuples, those of a large checkpoint would take a hundred.
        self.values = array("Q", values)

    def add(self, view: memoryview) -> None:
        """Go on with these bytes; no more than there are blocks for."""
        while view.nbytes:
            if not self._left:
                raise ValueError(f"{view.nbytes} bytes more than all blocks together")
            taken = view[: self._left]
            self._value = self._update(taken, self._value)
            self._left -= taken.nbytes
            view = view[taken.nbytes :]
            if not self._left:
                self.values.append(self._value)
                self._value = 0
                self._left = next(self._lengths, 0)


class PartialChecksum:
    """Parts of one object, until together they are all of it.

    Args:
        algorithm: How the parts are summed up.
        size_bytes: The object's length.
    """

    def __init__(self, algorithm: Algorithm, size_bytes: int) -> None:
        self.algorithm: Algorithm = algorithm
        self.size_bytes = size_bytes
        self._parts: dict[int, tuple[int, int]] = {}
        self._missing = size_bytes

    def add(self, start: int, views: Iterable[memoryview | bytes | bytearray]) -> None:
        """Sum up the part that begins at byte `start`; parts do not overlap."""
        running = RunningChecksum(self.algorithm)
        for view in views:
            running.add(memoryview(view))
        self.add_sum(start, running.nbytes, running.value)

    def add_sum(self, start: int, nbytes: int, value: int) -> None:
        """Take the sum of the part that begins at byte `start`; parts do not overlap."""
        if nbytes:
            self._parts[start] = (nbytes, value)
            self._missing -= nbytes

    def parts(self) -> list[tuple[int, int, int]]:
        """What was added, neighbours put together: first byte, length and checksum of each stretch, in order."""
        combine = _combine(self.algorithm)
        found: list[tuple[int, int, int]] = []
        for start, (nbytes, value) in sorted(self._parts.items()):
            if found and found[-1][0] + found[-1][1] == start:
                first, before, whole = found.pop()
                found.append((first, before + nbytes, combine(whole, value, nbytes)))
            else:
                found.append((start, nbytes, value))
        return found

    @property
    def complete(self) -> bool:
        """Whether every byte was added."""
        return self._missing == 0

    def result(self) -> Checksum:
        """The whole object's checksum.

        Raises:
            ValueError: The parts are not the whole object, or overlap.
        """
        combine = _combine(self.algorithm)
        value = position = 0
        for start, (nbytes, part) in sorted(self._parts.items()):
            if start != position:
                raise ValueError(f"a part begins at {start}, the one before ended at {position}")
            value = combine(value, part, nbytes)
            position += nbytes
        if position != self.size_bytes:
            raise ValueError(f"the parts end at {position} of {self.size_bytes}")
        return Checksum(self.algorithm, value)


def combined(algorithm: Algorithm, sums: Iterable[tuple[int, int]]) -> Checksum:
    """The checksum of parts that follow one another, out of their lengths and checksums."""
    combine = _combine(algorithm)
    value = 0
    for nbytes, part in sums:
        value = combine(value, part, nbytes)
    return Checksum(algorithm, value)


# awscrt is imported where it is used: it takes 70 ms, which `import streamload` should not.


def _nbytes(algorithm: Algorithm) -> int:
    return 8 if algorithm == "CRC64NVME" else 4


def _update(algorithm: Algorithm) -> Callable[[memoryview | bytes | bytearray, int], int]:
    from awscrt import checksums

    functions: dict[Algorithm, Callable[[memoryview | bytes | bytearray, int], int]] = {
        "CRC64NVME": checksums.crc64nvme,
        "CRC32C": checksums.crc32c,
        "CRC32": checksums.crc32,
    }
    return functions[algorithm]


def _combine(algorithm: Algorithm) -> Callable[[int, int, int], int]:
    from awscrt import checksums

    functions: dict[Algorithm, Callable[[int, int, int], int]] = {
        "CRC64NVME": checksums.combine_crc64nvme,
        "CRC32C": checksums.combine_crc32c,
        "CRC32": checksums.combine_crc32,
    }
    return functions[algorithm]
