"""What S3 keeps as an object's checksums.

Sources: "Checking object integrity in Amazon S3", Amazon S3 user guide; HeadObject and GetObjectAttributes, Amazon S3
API reference.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

from streamload.checksums import ALGORITHMS, Algorithm, Checksum, PartChecksums, Sha256
from streamload.errors import SourceError

__all__ = ["composite_of", "part_checksums", "part_sha256s", "sha256_of", "whole_checksum", "whole_sha256"]


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
    found = [Checksum.from_base64(algorithm, str(part.get(f"Checksum{algorithm}", ""))) for part in parts]
    values = [checksum.value for checksum in found if checksum is not None]
    ends = _ends(algorithm, composite, parts, len(values), size)
    if Checksum.of_checksums(algorithm, values) != Checksum.from_base64(algorithm, composite.partition("-")[0]):
        raise SourceError(f"the parts' checksums do not make up the object's, {composite}")
    return PartChecksums(algorithm, ends, tuple(values))


def sha256_of(answer: dict[str, Any]) -> str | None:
    """The text of the SHA-256 that the answer to a HEAD has, if it has one: base64; composite with a dash in it."""
    text = answer.get("ChecksumSHA256")
    return text if isinstance(text, str) and text else None


def whole_sha256(text: str) -> bytes:
    """The SHA-256 of the whole object.

    Raises:
        SourceError: The text is none.
    """
    digest = _digest(text)
    if digest is None:
        raise SourceError(f"the store tells a SHA-256 that is none: {text!r}")
    return digest


def part_sha256s(composite: str, parts: Sequence[dict[str, Any]], size: int) -> Sha256:
    """The same as `part_checksums`, for SHA-256.

    Raises:
        SourceError: They are not all, or do not make up the object or its composite SHA-256.
    """
    found = [_digest(str(part.get("ChecksumSHA256", ""))) for part in parts]
    digests = tuple(digest for digest in found if digest is not None)
    ends = _ends("SHA-256", composite, parts, len(digests), size)
    if hashlib.sha256(b"".join(digests)).digest() != _digest(composite.partition("-")[0]):
        raise SourceError(f"the parts' checksums do not make up the object's, {composite}")
    return Sha256(ends, digests)


def _digest(text: str) -> bytes | None:
    try:
        digest = base64.b64decode(text, validate=True)
    except ValueError:
        return None
    return digest if len(digest) == hashlib.sha256().digest_size else None


def _ends(what: str, composite: str, parts: Sequence[dict[str, Any]], known: int, size: int) -> tuple[int, ...]:
    """Where each part ends in the object.

    Args:
        what: Of which checksum.
        composite: Its text, which ends in the number of parts.
        parts: As GetObjectAttributes names them, in order.
        known: For how many of them the checksum is known.
        size: The object's length in bytes.

    Raises:
        SourceError: They are not all, or not the object's.
    """
    sizes = [nbytes for part in parts if isinstance(nbytes := part.get("Size"), int) and nbytes > 0]
    if not parts:
        raise SourceError("the store does not tell the parts that the object was uploaded in")
    if not len(sizes) == known == len(parts):
        raise SourceError(f"the store does not tell the size and the {what} of every part")
    ends = tuple(accumulate(sizes))
    count = composite.partition("-")[2]
    if ends[-1] != size or str(len(ends)) != count:
        raise SourceError(f"{len(ends)} parts of {ends[-1]} bytes are not the object of {count} parts and {size} bytes")
    return ends
