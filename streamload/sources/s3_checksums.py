"""What S3 keeps as an object's checksums.

Sources: "Checking object integrity in Amazon S3", Amazon S3 user guide; HeadObject and GetObjectAttributes, Amazon S3
API reference.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from streamload.checksums import ALGORITHMS, Algorithm, Checksum, PartChecksums
from streamload.errors import SourceError

__all__ = ["composite_of", "part_checksums", "whole_checksum"]


def whole_checksum(answer: dict[str, Any]) -> Checksum | None:
    """The checksum of the whole object, where the answer to a HEAD has one that is neither composite nor unknown."""
    if answer.get("ChecksumType", "FULL_OBJECT") != "FULL_OBJECT":
        return None
    for algorithm in ALGORITHMS:
        text = answer.get(f"Checksum{algorithm}")
        # A composite checksum ends in a dash and the number of parts; stores that tell no type write it so too.
        if isinstance(text, str) and "-" not in text:
            return Checksum.from_base64(algorithm, text)
    return None


def composite_of(answer: dict[str, Any]) -> tuple[Algorithm, str] | None:
    """The algorithm and the text of the composite checksum that the answer to a HEAD has, if it has one."""
    for algorithm in ALGORITHMS:
        text = answer.get(f"Checksum{algorithm}")
        if isinstance(text, str) and "-" in text:
            return algorithm, text
    return None


def part_checksums(algorithm: Algorithm, composite: str, parts: Sequence[dict[str, Any]], size: int) -> PartChecksums:
    """The checksums of the parts that an object was uploaded in, once they are known to be the object's.

    Args:
        algorithm: Of the composite checksum.
        composite: Its text: base64, a dash, the number of parts.
        parts: As GetObjectAttributes names them, in order.
        size: The object's length in bytes.

    Raises:
        SourceError: They are not all, or do not make up the object or its composite checksum.
    """
    text, _, count = composite.partition("-")
    ends: list[int] = []
    values: list[int] = []
    for part in parts:
        found = Checksum.from_base64(algorithm, str(part.get(f"Checksum{algorithm}", "")))
        nbytes = part.get("Size")
        if found is None or not isinstance(nbytes, int) or nbytes <= 0:
            raise SourceError(f"the store does not tell the size and the {algorithm} of every part")
        ends.append((ends[-1] if ends else 0) + nbytes)
        values.append(found.value)
    if not ends:
        raise SourceError("the store does not tell the parts that the object was uploaded in")
    if ends[-1] != size or str(len(ends)) != count:
        raise SourceError(f"{len(ends)} parts of {ends[-1]} bytes are not the object of {count} parts and {size} bytes")
    if Checksum.of_checksums(algorithm, values) != Checksum.from_base64(algorithm, text):
        raise SourceError(f"the parts' checksums do not make up the object's, {composite}")
    return PartChecksums(algorithm, tuple(ends), tuple(values))
