"""Whether files are what manifests or the store say, where they are read once, by several processes perhaps."""

from __future__ import annotations

import hashlib
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from itertools import islice

from streamload.checkpoint import MANIFEST_ALGORITHM, ManifestFile, ShardFile
from streamload.checksums import Algorithm, Checksum, PartChecksums, PartialChecksum, RunningChecksum, combined
from streamload.errors import ChecksumError, ManifestError
from streamload.loan import Loan
from streamload.pipeline.verify import BY_MANIFEST, NOT_WHOLE, SWITCHED_OFF
from streamload.report import Recorder

__all__ = ["SourceSums"]


class _File:
    """What one file has to sum up to, stretch by stretch."""

    def __init__(
        self, file: ShardFile, algorithm: Algorithm, ends: Iterable[int], values: Iterable[int], *, by: str, says: str
    ) -> None:
        self._file = file
        self.algorithm: Algorithm = algorithm
        self._ends = array("q", ends)
        self._values = array("Q", values)
        self.by = by
        self._says = says
        # Stretches of which something has come, and not all.
        self.begun: dict[int, PartialChecksum] = {}

    def digest(self) -> bytes:
        """Tells this from what another process has compared the file with."""
        return hashlib.sha256(
            b"\0".join([self.algorithm.encode(), self._ends.tobytes(), self._values.tobytes()])
        ).digest()

    def running(self, start: int) -> RunningChecksum:
        ends = islice(self._ends, bisect_right(self._ends, start), None)
        return RunningChecksum(self.algorithm, (end - start for end in ends))

    def add(self, start: int, nbytes: int, value: int) -> int:
        """Take the sum of some bytes of one stretch; how many bytes of tensors are verified with it.

        Raises:
            ChecksumError: The stretch is complete, and not what it should be.
        """
        number = bisect_right(self._ends, start)
        began, end = self._ends[number - 1] if number else 0, self._ends[number]
        stretch = self.begun.setdefault(number, PartialChecksum(self.algorithm, end - began))
        stretch.add_sum(start - began, nbytes, value)
        if not stretch.complete:
            return 0
        del self.begun[number]
        found, expected = stretch.result(), Checksum(self.algorithm, self._values[number])
        if found != expected:
            names = [tensor.name for tensor in self._file.tensors if tensor.start < end and began < tensor.end]
            where = f"tensor {names[0]!r}" if len(names) == 1 else f"{len(names)} tensors"
            raise ChecksumError(
                f"what was read of {where} sums up to {found}, but {self._says} {expected}",
                object=self._file.key,
                start=began,
                end=end,
            )
        return max(0, end - max(began, self._file.header_bytes))

    def restore(self, stretches: Mapping[str, list[list[int]]]) -> None:
        for number, parts in stretches.items():
            began = self._ends[int(number) - 1] if int(number) else 0
            stretch = self.begun[int(number)] = PartialChecksum(self.algorithm, self._ends[int(number)] - began)
            for start, nbytes, value in parts:
                stretch.add_sum(start, nbytes, value)


class SourceSums:
    """Sums up what is read of files, and compares each stretch of which all has come.

    Args:
        recorder: Told how many bytes are verified, by what, and how many are not, and why.
        off: Whether nothing is to be verified.
        required: Whether everything has to be.
    """

    def __init__(self, recorder: Recorder, *, off: bool = False, required: bool = False) -> None:
        self._recorder = recorder
        self._off = off
        self._required = required
        self._files: dict[str, _File] = {}

    def watch(
        self,
        file: ShardFile,
        covered: int,
        header: bytes,
        kept: Checksum | PartChecksums | str,
        manifest: ManifestFile | None,
    ) -> None:
        """Say what a file has to sum up to.

        Args:
            file: Which.
            covered: How many bytes of its tensors will be read.
            header: Its header, with the eight bytes of its length.
            kept: What the store keeps, or why it keeps nothing.
            manifest: What a manifest says; it fits the file.

        Raises:
            ChecksumError: The header is not what the manifest says; or everything has to be verified and cannot be.
            ManifestError: What the manifest says does not make up what the store keeps.
        """
        if self._off:
            self._recorder.unverified(covered, SWITCHED_OFF)
            return
        if manifest is not None:
            if isinstance(kept, Checksum) and kept.algorithm == MANIFEST_ALGORITHM:
                said = combined(MANIFEST_ALGORITHM, manifest.sums())
                if said != kept:
                    raise ManifestError(
                        f"the manifest {manifest.manifest!r} was written for other content: what it says makes up "
                        f"{said}, but the store keeps {kept}; write it anew with `streamload manifest`, or remove it",
                        object=file.key,
                    )
            ends, end = array("q"), 0
            for nbytes, _ in manifest.sums():
                end += nbytes
                ends.append(end)
            says = f"the manifest {manifest.manifest!r} says"
            values = (value for _, value in manifest.sums())
            watched = _File(file, MANIFEST_ALGORITHM, ends, values, by=BY_MANIFEST, says=says)
        elif isinstance(kept, str) or covered + file.header_bytes != file.size_bytes:
            self._leave(file.key, covered, kept if isinstance(kept, str) else NOT_WHOLE)
            return
        elif isinstance(kept, Checksum):
            by = f"{kept.algorithm} of the whole object"
            watched = _File(
                file, kept.algorithm, [file.size_bytes], [kept.value], by=by, says="the object's checksum is"
            )
        else:
            by = f"{kept.algorithm} of each uploaded part"
            watched = _File(file, kept.algorithm, kept.ends, kept.values, by=by, says="that of the uploaded part is")
        self._files[file.key] = watched
        running = watched.running(0)
        running.add(memoryview(header))
        self._add(watched, 0, running)

    def _leave(self, key: str, nbytes: int, reason: str) -> None:
        if self._required and nbytes:
            raise ChecksumError(
                f"verify is 'require', and nothing vouches for {nbytes} bytes: {reason}; `streamload manifest` writes "
                "what does",
                object=key,
            )
        self._recorder.unverified(nbytes, reason)

    def running(self, key: str, start: int) -> RunningChecksum | None:
        """What sums up a read that begins at `start`; None where the file is not verified."""
        watched = self._files.get(key)
        return None if watched is None else watched.running(start)

    def add(self, key: str, start: int, loan: Loan) -> None:
        """A read has arrived.

        Raises:
            ChecksumError: A stretch is complete with it, and not what it should be; located but for the URI.
        """
        watched = self._files.get(key)
        if watched is None:
            return
        running = loan.checksum
        if running is None or running.nbytes != loan.nbytes:
            running = watched.running(start)
            for view in loan.views:
                running.add(view)
        self._add(watched, start, running)

    def _add(self, watched: _File, start: int, running: RunningChecksum) -> None:
        for nbytes, value in running.sums():
            if nbytes:
                verified = watched.add(start, nbytes, value)
                if verified:
                    self._recorder.verified(verified, watched.by)
                start += nbytes

    def state(self) -> dict[str, dict[str, list[list[int]]]]:
        """What has come of stretches that are not complete: for another process, by `restore`."""
        return {
            key: {str(number): [list(part) for part in begun.parts()] for number, begun in watched.begun.items()}
            for key, watched in self._files.items()
            if watched.begun
        }

    @property
    def digest(self) -> str:
        """Tells what files have to sum up to from what they had to for another process: a state fits only the same."""
        digest = hashlib.sha256(b"off" if self._off else b"")
        for key, watched in sorted(self._files.items()):
            digest.update(hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest() + watched.digest())
        return digest.hexdigest()

    def restore(self, state: Mapping[str, Mapping[str, list[list[int]]]]) -> None:
        """Go on from a state; the headers are in it."""
        for key, watched in self._files.items():
            watched.begun = {}
            watched.restore(state.get(key, {}))

    def check_complete(self) -> None:
        """See that every file that can only be compared as a whole was.

        Raises:
            ChecksumError: Something has not come.
        """
        for key, watched in self._files.items():
            if watched.begun and watched.by != BY_MANIFEST:
                raise ChecksumError("not all of it was read, and it could not be verified", object=key)
