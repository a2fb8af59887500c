"""Whether what was read is what the store says it keeps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

from streamload.checksums import Algorithm, Checksum, PartChecksums, PartialChecksum, RunningChecksum
from streamload.errors import ChecksumError
from streamload.loan import Loan
from streamload.plan import Plan
from streamload.report import Recorder

__all__ = ["NOT_KEPT", "NOT_WHOLE", "SLICED", "SWITCHED_OFF", "Verifier"]

NOT_KEPT = "the source keeps no checksum of the whole object that parts could be combined to"
NOT_WHOLE = "only a part of the object is read, and its checksum covers all of it"
SLICED = "only slices of the object's tensors are handed out, and its checksum covers all of it"
SWITCHED_OFF = "verify is off"


class _Watched:
    """One object, and what each of its parts must sum up to; most objects are of one part."""

    def __init__(self, checksum: Checksum | PartChecksums, size_bytes: int, tensor_bytes: int) -> None:
        whole = isinstance(checksum, Checksum)
        self.algorithm: Algorithm = checksum.algorithm
        self.tensor_bytes = tensor_bytes
        self.ends: Sequence[int] = (size_bytes,) if isinstance(checksum, Checksum) else checksum.ends
        self.values: Sequence[int] = (checksum.value,) if isinstance(checksum, Checksum) else checksum.values
        self.by = f"{self.algorithm} of the whole object" if whole else f"{self.algorithm} of each uploaded part"
        self.left = len(self.ends)
        # Those of which something has come, and not all.
        self._begun: dict[int, PartialChecksum] = {}

    def cuts(self, start: int) -> Iterator[int]:
        """How far from `start` parts end."""
        return (end - start for end in islice(self.ends, bisect_right(self.ends, start), None))

    def add(self, start: int, nbytes: int, value: int) -> None:
        """Take the sum of some bytes of one part.

        Raises:
            ChecksumError: The part is complete, and not what the source says; the object is to be filled in.
        """
        number = bisect_right(self.ends, start)
        began, end = self.ends[number - 1] if number else 0, self.ends[number]
        part = self._begun.setdefault(number, PartialChecksum(self.algorithm, end - began))
        part.add_sum(start - began, nbytes, value)
        if not part.complete:
            return
        del self._begun[number]
        self.left -= 1
        expected, found = Checksum(self.algorithm, self.values[number]), part.result()
        if found != expected:
            whose = "the object's checksum" if len(self.ends) == 1 else f"that of part {number + 1} of {len(self.ends)}"
            raise ChecksumError(
                f"what was read sums up to {found}, but {whose} is {expected}",
                start=began,
                end=end,
            )


class Verifier:
    """Sums up what arrives, and compares each object, or each part it was uploaded in, that is complete.

    Args:
        plan: What will be read. Objects of which only a part is read cannot be verified.
        checksums: What the source keeps, or why it keeps nothing, by key; objects that were not asked for are missing.
        headers: The objects' headers, their eight bytes of length included, by key.
        recorder: Told how many bytes were verified, by what, and how many not, and why.
        off: Whether nothing is to be verified.
    """

    def __init__(
        self,
        plan: Plan,
        checksums: Mapping[str, Checksum | PartChecksums | str],
        headers: Mapping[str, bytes],
        recorder: Recorder,
        *,
        off: bool = False,
    ) -> None:
        self._recorder = recorder
        self._watched: dict[str, _Watched] = {}
        planned: dict[int, int] = {}
        for batch in plan.batches:
            planned[batch.file] = planned.get(batch.file, 0) + sum(read.nbytes for read in batch.reads)
        for number, file in enumerate(plan.catalog.files):
            tensor_bytes = sum(tensor.nbytes for tensor in file.tensors)
            checksum = checksums.get(file.key, NOT_WHOLE)
            if any(tensor.stripes for tensor in file.tensors):
                # Gaps between slices share their memory, and nothing can be summed up over them.
                checksum = SLICED
            if off:
                recorder.unverified(tensor_bytes, SWITCHED_OFF)
            elif isinstance(checksum, str):
                recorder.unverified(tensor_bytes, checksum)
            elif planned.get(number, 0) + file.header_bytes != file.size_bytes:
                recorder.unverified(tensor_bytes, NOT_WHOLE)
            else:
                self._watched[file.key] = _Watched(checksum, file.size_bytes, tensor_bytes)
                self.add(file.key, 0, Loan([memoryview(headers[file.key])]))

    def running(self, key: str, start: int) -> RunningChecksum | None:
        """What sums up bytes of an object from `start` on while they arrive; None where the object is not verified."""
        watched = self._watched.get(key)
        return None if watched is None else RunningChecksum(watched.algorithm, watched.cuts(start))

    def add(self, key: str, start: int, loan: Loan) -> None:
        """Bytes of an object have arrived; what is complete with them is compared.

        Raises:
            ChecksumError: The object's content is not what the source says.
        """
        watched = self._watched.get(key)
        if watched is None:
            return
        running = loan.checksum
        if running is None or running.nbytes != loan.nbytes:
            running = RunningChecksum(watched.algorithm, watched.cuts(start))
            for view in loan.views:
                running.add(view)
        for nbytes, value in running.sums():
            if not nbytes:
                continue
            try:
                watched.add(start, nbytes, value)
            except ChecksumError as error:
                raise error.locate(object=key) from None
            start += nbytes
        if not watched.left:
            del self._watched[key]
            self._recorder.verified(watched.tensor_bytes, watched.by)
