"""What a file has to sum up to, and whether it does, as it arrives in any order."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Sequence

from streamload.checkpoint import MANIFEST_ALGORITHM, ManifestFile
from streamload.checksums import Algorithm, Checksum, PartChecksums, RunningChecksum, Sha256, combined
from streamload.errors import ChecksumError, ManifestError
from streamload.pipeline.scan import Scan
from streamload.pipeline.verify import BY_SHA256, BY_SHA256S
from streamload.sources.base import SourceObject

__all__ = ["Check", "check_for"]

_UNKNOWN = "nothing vouches for it"


class Check:
    """One file's sums.

    Args:
        object: The file.
        algorithm: How it is summed up.
        ends: Where the stretches end that are compared by themselves.
        expected: What each sums up to; None where that is not known.
        by: What says so.
        reason: Why nothing does.

    Attributes:
        algorithm: As above.
        by: As above.
        reason: As above.
        sha256: What its SHA-256 has to be, which is compared when all of it is there; None where that is not known.
    """

    def __init__(
        self,
        object: SourceObject,
        *,
        algorithm: Algorithm = MANIFEST_ALGORITHM,
        ends: Sequence[int] | None = None,
        expected: Sequence[int] | None = None,
        by: str | None = None,
        reason: str | None = None,
    ) -> None:
        self._object = object
        if ends is None:
            ends = (object.size_bytes,)
        kept = [place for place, end in enumerate(ends) if end > (ends[place - 1] if place else 0)]
        self._scan = Scan(object, algorithm, [ends[place] for place in kept])
        self._expected = None if expected is None else [expected[place] for place in kept]
        self.algorithm: Algorithm = algorithm
        self.by = by
        self.reason = reason
        self.sha256: Sha256 | None = None

    def running(self, start: int) -> RunningChecksum:
        """What sums up a piece that begins at `start`."""
        return self._scan.running(start)

    def add(self, start: int, sums: Sequence[tuple[int, int]]) -> None:
        """Take the sums of a piece; what is complete with it is compared.

        Raises:
            ChecksumError: A stretch is not what it should be; located but for the URI.
        """
        self._scan.add(start, sums)
        if self._expected is None:
            return
        end = start + sum(nbytes for nbytes, _ in sums)
        ends, values = self._scan.ends, self._scan.values
        number = bisect_right(ends, start)
        while number < len(ends) and (number == 0 or ends[number - 1] < end):
            found, expected = values[number], self._expected[number]
            if found is not None and found != expected:
                raise ChecksumError(
                    f"what was read sums up to {Checksum(self.algorithm, found)}, but {self.by} is "
                    f"{Checksum(self.algorithm, expected)}",
                    object=self._object.key,
                    start=ends[number - 1] if number else 0,
                    end=ends[number],
                )
            number += 1

    def whole(self) -> Checksum:
        """What the file sums up to, when all of it has been added."""
        sums: list[tuple[int, int]] = []
        start = 0
        for end, value in zip(self._scan.ends, self._scan.values, strict=True):
            assert value is not None
            sums.append((end - start, value))
            start = end
        return combined(self.algorithm, sums)


def check_for(
    object: SourceObject,
    said: ManifestFile | None,
    kept: Checksum | PartChecksums | str,
    sha256: bytes | Sha256 | str | None,
    *,
    required: bool,
) -> Check:
    """Decide what a file is compared with: its manifest's blocks, or else what the store keeps.

    Args:
        object: The file.
        said: What a manifest says of it.
        kept: The store's checksum, or why there is none.
        sha256: The store's SHA-256, where it was asked for, or why there is none.
        required: Whether there has to be something.

    Raises:
        ManifestError: The manifest tells of another file.
        ChecksumError: There has to be something, and is not.
    """
    digest = Sha256((object.size_bytes,), (sha256,)) if isinstance(sha256, bytes) else sha256
    if said is not None:
        check = _by_manifest(object, said, kept)
    elif isinstance(kept, Checksum):
        by = f"the store's {kept.algorithm} of the whole object"
        check = Check(object, algorithm=kept.algorithm, expected=(kept.value,), by=by)
    elif isinstance(kept, PartChecksums):
        by = f"the store's {kept.algorithm} of the uploaded part"
        check = Check(object, algorithm=kept.algorithm, ends=kept.ends, expected=kept.values, by=by)
    elif isinstance(digest, Sha256):
        check = Check(object, by=f"the store's {BY_SHA256 if len(digest.ends) == 1 else BY_SHA256S}")
    elif required and object.size_bytes:
        raise ChecksumError(
            f"verify is 'require', and {_UNKNOWN}: {kept}; `streamload manifest` writes what does for weights",
            object=object.key,
        )
    else:
        check = Check(object, reason=digest or kept)
    check.sha256 = digest if isinstance(digest, Sha256) else None
    return check


def _by_manifest(object: SourceObject, said: ManifestFile, kept: Checksum | PartChecksums | str) -> Check:
    by = f"by the manifest {said.manifest!r} it"
    if said.size_bytes != object.size_bytes:
        raise ManifestError(
            f"the manifest {said.manifest!r} was written for another file: this one has {object.size_bytes} bytes, in "
            f"the manifest {said.size_bytes}; write it anew with `streamload manifest`, or remove it",
            object=object.key,
        )
    if isinstance(kept, Checksum) and kept.algorithm == MANIFEST_ALGORITHM:
        whole = combined(MANIFEST_ALGORITHM, said.sums())
        if whole != kept:
            raise ManifestError(
                f"the manifest {said.manifest!r} was written for other content: what it says makes up {whole}, but the "
                f"store keeps {kept}; write it anew with `streamload manifest`, or remove it",
                object=object.key,
            )
    ends, expected = _ends(said.sums())
    return Check(object, algorithm=MANIFEST_ALGORITHM, ends=ends, expected=expected, by=by)


def _ends(sums: Iterable[tuple[int, int]]) -> tuple[list[int], list[int]]:
    ends: list[int] = []
    values: list[int] = []
    for nbytes, value in sums:
        ends.append((ends[-1] if ends else 0) + nbytes)
        values.append(value)
    return ends, values
