"""Whether what was read is what the store says it keeps."""

from __future__ import annotations

from collections.abc import Mapping

from streamload.checksums import Checksum, PartialChecksum, RunningChecksum
from streamload.errors import ChecksumError
from streamload.loan import Loan
from streamload.plan import Plan
from streamload.report import Recorder

__all__ = ["NOT_KEPT", "NOT_WHOLE", "SWITCHED_OFF", "Verifier"]

NOT_KEPT = "the source keeps no checksum of the whole object that parts could be combined to"
NOT_WHOLE = "only a part of the object is read, and its checksum covers all of it"
SWITCHED_OFF = "verify is off"


class Verifier:
    """Sums up what arrives and compares each object that is complete.

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
        checksums: Mapping[str, Checksum | str],
        headers: Mapping[str, bytes],
        recorder: Recorder,
        *,
        off: bool = False,
    ) -> None:
        self._checksums: dict[str, Checksum] = {}
        self._recorder = recorder
        self._parts: dict[str, PartialChecksum] = {}
        self._tensor_bytes: dict[str, int] = {}
        planned: dict[int, int] = {}
        for batch in plan.batches:
            planned[batch.file] = planned.get(batch.file, 0) + sum(read.nbytes for read in batch.reads)
        for number, file in enumerate(plan.catalog.files):
            tensor_bytes = sum(tensor.nbytes for tensor in file.tensors)
            checksum = checksums.get(file.key, NOT_WHOLE)
            if off:
                recorder.unverified(tensor_bytes, SWITCHED_OFF)
            elif isinstance(checksum, str):
                recorder.unverified(tensor_bytes, checksum)
            elif planned.get(number, 0) + file.header_bytes != file.size_bytes:
                recorder.unverified(tensor_bytes, NOT_WHOLE)
            else:
                self._checksums[file.key] = checksum
                self._tensor_bytes[file.key] = tensor_bytes
                self._parts[file.key] = PartialChecksum(checksum.algorithm, file.size_bytes)
                self.add(file.key, 0, Loan([memoryview(headers[file.key])]))

    def running(self, key: str) -> RunningChecksum | None:
        """What sums up a part of an object while it arrives; None where the object is not verified."""
        parts = self._parts.get(key)
        return None if parts is None else RunningChecksum(parts.algorithm)

    def add(self, key: str, start: int, loan: Loan) -> None:
        """A part of an object has arrived; with its last part the object is compared.

        Raises:
            ChecksumError: The object's content is not what the source says.
        """
        parts = self._parts.get(key)
        if parts is None:
            return
        if loan.checksum is not None and loan.checksum.nbytes == loan.nbytes:
            parts.add_sum(start, loan.checksum)
        else:
            parts.add(start, loan.views)
        if not parts.complete:
            return
        del self._parts[key]
        expected, found = self._checksums[key], parts.result()
        if found != expected:
            raise ChecksumError(
                f"what was read sums up to {found}, but the object's checksum is {expected}",
                object=key,
                start=0,
                end=parts.size_bytes,
            )
        self._recorder.verified(self._tensor_bytes[key], f"{expected.algorithm} of the whole object")
