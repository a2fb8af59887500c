"""Whether what was read is what the store, or a manifest, says it keeps."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

from streamload.checkpoint import ManifestFile
from streamload.checksums import Algorithm, Checksum, PartChecksums, PartialChecksum, RunningChecksum, Sha256, combined
from streamload.errors import ChecksumError, ManifestError
from streamload.loan import Loan
from streamload.pipeline.blocks import BlockVerifier
from streamload.pipeline.digest import OrderedDigest
from streamload.plan import Batch, Plan, Read
from streamload.report import Recorder

__all__ = [
    "BY_MANIFEST",
    "BY_SHA256",
    "BY_SHA256S",
    "NOT_KEPT",
    "NOT_WHOLE",
    "OUT_OF_ORDER",
    "PARTLY_READ",
    "SLICED",
    "SWITCHED_OFF",
    "Verifier",
]

BY_SHA256 = "SHA-256 of the whole object"
BY_SHA256S = "SHA-256 of each uploaded part"
BY_MANIFEST = "CRC64NVME of each block, by a manifest"

NOT_KEPT = "the source keeps no checksum of the whole object that parts could be combined to"
NOT_WHOLE = "only a part of the object is read, and its checksum covers all of it"
OUT_OF_ORDER = "its tensors are asked for in another order than they lie in, and a SHA-256 goes from first byte to last"
PARTLY_READ = "only a part of a block of the manifest is read"
SLICED = "slices of tensors that lie scattered over the file are not summed up"
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


@dataclass(slots=True)
class _Digested:
    """One object that is compared by a digest.

    Attributes:
        digest: What sums it up.
        tensor_bytes: Of its tensors.
        by: What it is compared with.
        header: What comes first; None once it was summed up.
    """

    digest: OrderedDigest
    tensor_bytes: int
    by: str
    header: bytes | None


def _in_order(reads: Sequence[Read], start: int, end: int) -> bool:
    """Whether reads bring all of a range, one behind the other. What is in a gap need not be brought."""
    for read in reads:
        if read.start != start or read.gap_bytes:
            return False
        start = read.end
    return start == end


class Verifier:
    """Sums up what arrives, and compares each block, object, or part an object was uploaded in, that is complete.

    Where a manifest tells of a file, its blocks are compared before their tensors are handed out. The store's checksum
    of that file's whole content is then compared with what the blocks' checksums combine to, before anything is read:
    bytes that agree with the manifest agree with the store. One by another algorithm, or of parts, has nothing to add.

    Batches in which slices lie scattered are left out: the gaps between the slices are not received, or several of them
    into the same memory, and nothing can be summed up over them.

    Args:
        plan: What will be read. Objects of which only a part is read cannot be verified without a manifest.
        checksums: What the source keeps, or why it keeps nothing, by key; objects that were not asked for are missing.
        headers: The objects' headers, their eight bytes of length included, by key.
        recorder: Told how many bytes were verified, by what, and how many not, and why.
        manifests: What manifests say of the files, by key; each fits its file.
        sha256s: The SHA-256 of files' content, by key, which are compared where nothing else is; or why there is none.
        off: Whether nothing is to be verified.
        required: Whether everything has to be.

    Raises:
        ChecksumError: A header is not what its manifest says; or everything has to be verified and cannot be.
        ManifestError: What a manifest says of a file does not make up what the store keeps of it.
    """

    def __init__(
        self,
        plan: Plan,
        checksums: Mapping[str, Checksum | PartChecksums | str],
        headers: Mapping[str, bytes],
        recorder: Recorder,
        *,
        manifests: Mapping[str, ManifestFile] | None = None,
        sha256s: Mapping[str, bytes | Sha256 | str] | None = None,
        off: bool = False,
        required: bool = False,
    ) -> None:
        self._recorder = recorder
        self._watched: dict[str, _Watched] = {}
        self._blocks: dict[str, BlockVerifier] = {}
        self._digests: dict[str, _Digested] = {}
        sha256s = sha256s or {}
        manifests = manifests or {}
        batches: dict[int, list[Batch]] = {}
        for batch in plan.batches:
            batches.setdefault(batch.file, []).append(batch)
        for number, file in enumerate(plan.catalog.files):
            of_file = [batch for batch in batches.get(number, []) if not batch.sliced]
            sliced_bytes = sum(batch.nbytes for batch in batches.get(number, []) if batch.sliced)
            tensor_bytes = sum(batch.nbytes for batch in of_file)
            checksum = checksums.get(file.key, NOT_WHOLE)
            if off:
                self._leave(tensor_bytes + sliced_bytes, SWITCHED_OFF)
                continue
            self._leave(sliced_bytes, SLICED, key=file.key, required=required)
            if file.key in manifests:
                self._watch_blocks(manifests[file.key], of_file, checksum, headers[file.key], required=required)
                continue
            planned_bytes = sum(read.nbytes for batch in of_file for read in batch.reads)
            if not isinstance(checksum, str) and planned_bytes + file.header_bytes != file.size_bytes:
                checksum = NOT_WHOLE
            reads = [read for batch in of_file for read in batch.reads]
            if isinstance(checksum, str) and file.key in sha256s:
                sha256 = sha256s[file.key]
                if isinstance(sha256, str):
                    checksum = sha256
                elif not _in_order(reads, file.header_bytes, file.size_bytes):
                    sorted_reads = sorted(reads, key=lambda read: read.start)
                    whole = _in_order(sorted_reads, file.header_bytes, file.size_bytes)
                    checksum = OUT_OF_ORDER if whole else NOT_WHOLE
                else:
                    digest = OrderedDigest(sha256, file.size_bytes)
                    by = BY_SHA256 if isinstance(sha256, bytes) else BY_SHA256S
                    self._digests[file.key] = _Digested(digest, tensor_bytes, by, headers[file.key])
                    continue
            if isinstance(checksum, str):
                self._leave(tensor_bytes, checksum, key=file.key, required=required)
            else:
                self._watched[file.key] = _Watched(checksum, file.size_bytes, tensor_bytes)
                self.add(file.key, 0, Loan([memoryview(headers[file.key])]))

    def _watch_blocks(
        self,
        manifest: ManifestFile,
        batches: Sequence[Batch],
        kept: Checksum | PartChecksums | str,
        header: bytes,
        *,
        required: bool,
    ) -> None:
        running = RunningChecksum("CRC64NVME")
        running.add(memoryview(header))
        if running.value != manifest.header_checksum:
            raise ChecksumError(
                f"the header sums up to {Checksum('CRC64NVME', running.value)}, but the manifest "
                f"{manifest.manifest!r} says {Checksum('CRC64NVME', manifest.header_checksum)}",
                object=manifest.key,
                start=0,
                end=manifest.header_bytes,
            )
        if isinstance(kept, Checksum) and kept.algorithm == "CRC64NVME":
            said = combined("CRC64NVME", manifest.sums())
            if said != kept:
                raise ManifestError(
                    f"the manifest {manifest.manifest!r} was written for other content: what it says makes up {said}, "
                    f"but the store keeps {kept}; write it anew with `streamload manifest`, or remove it",
                    object=manifest.key,
                )
        blocks = self._blocks[manifest.key] = BlockVerifier(manifest, batches)
        if blocks.partial_bytes:
            self._leave(blocks.partial_bytes, PARTLY_READ, key=manifest.key, required=required)

    def _leave(self, nbytes: int, reason: str, *, key: str | None = None, required: bool = False) -> None:
        """Some bytes will not be verified.

        Raises:
            ChecksumError: They have to be.
        """
        if not nbytes:
            return
        if required:
            # Where not all of a block is read, another manifest would not help.
            helps = (
                "verify='auto' loads them"
                if reason in (OUT_OF_ORDER, PARTLY_READ, SLICED)
                else "`streamload manifest` writes what does"
            )
            raise ChecksumError(
                f"verify is 'require', and nothing vouches for {nbytes} bytes: {reason}; {helps}", object=key
            )
        self._recorder.unverified(nbytes, reason)

    def running(self, key: str, start: int) -> RunningChecksum | None:
        """What sums up bytes of an object from `start` on while they arrive; None where the object is not verified."""
        blocks = self._blocks.get(key)
        if blocks is not None:
            return RunningChecksum("CRC64NVME", blocks.cuts(start))
        watched = self._watched.get(key)
        return None if watched is None else RunningChecksum(watched.algorithm, watched.cuts(start))

    def add(self, key: str, start: int, loan: Loan) -> None:
        """Bytes of an object have arrived; what is complete with them is compared.

        Raises:
            ChecksumError: The object's content is not what the source, or the manifest, says.
        """
        running = loan.checksum
        if running is None or running.nbytes != loan.nbytes:
            running = self.running(key, start)
            if running is None:
                return
            for view in loan.views:
                running.add(view)
        blocks = self._blocks.get(key)
        if blocks is not None:
            self._recorder.verified(blocks.add(start, running.sums()), BY_MANIFEST)
        elif key in self._watched:
            self._add(self._watched[key], key, start, running)

    async def digest(self, key: str, start: int, loan: Loan) -> None:
        """The same for an object that is compared by a digest: waits until what comes before was summed up.

        Raises:
            ChecksumError: The object is complete, and not what the source says.
        """
        digested = self._digests.get(key)
        if digested is None:
            return
        try:
            if digested.header is not None:
                header, digested.header = digested.header, None
                await digested.digest.add(0, [memoryview(header)])
            if await digested.digest.add(start, loan.views):
                self._recorder.verified(digested.tensor_bytes, digested.by)
        except ChecksumError as error:
            raise error.locate(object=key) from None

    def _add(self, watched: _Watched, key: str, start: int, running: RunningChecksum) -> None:
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
