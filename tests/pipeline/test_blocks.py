"""Blocks of a manifest, compared as reads bring them: all of those that are covered, and no others."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from streamload.checkpoint import Catalog, ManifestFile, ManifestTensor, ShardFile, TensorInfo
from streamload.checksums import Checksum, RunningChecksum
from streamload.errors import ChecksumError, ManifestError
from streamload.loan import Loan
from streamload.pipeline.blocks import BlockVerifier
from streamload.pipeline.verify import BY_MANIFEST, PARTLY_READ, Verifier
from streamload.plan import Batch, Piece, Plan, Read
from streamload.report import Recorder

BLOCK = 4096
HEADER = 16


def _sum(content: bytes | bytearray) -> int:
    running = RunningChecksum("CRC64NVME")
    running.add(memoryview(content))
    return running.value


def _manifest(content: bytes, sizes: Sequence[int]) -> ManifestFile:
    tensors = []
    position = HEADER
    for number, size in enumerate(sizes):
        sums = b"".join(
            _sum(content[at : min(at + BLOCK, position + size)]).to_bytes(8, "big")
            for at in range(position, position + size, BLOCK)
        )
        tensors.append(ManifestTensor(f"t{number}", position, position + size, sums))
        position += size
    return ManifestFile("f", position, HEADER, _sum(content[:HEADER]), BLOCK, tuple(tensors))


def _file(manifest: ManifestFile) -> ShardFile:
    tensors = tuple(TensorInfo(t.name, "U8", (t.end - t.start,), t.start, t.end) for t in manifest.tensors)
    return ShardFile("f", manifest.size_bytes, HEADER, tensors)


def _content(sizes: Sequence[int]) -> bytes:
    return random.Random(7).randbytes(HEADER + sum(sizes))


@st.composite
def _slices(draw: st.DrawFn) -> tuple[list[int], list[Batch]]:
    """Tensors, and for some of them a batch that reads a part, in one read or several, with gaps or without."""
    sizes = draw(st.lists(st.integers(0, 4 * BLOCK), min_size=1, max_size=4))
    batches: list[Batch] = []
    position = HEADER
    for number, size in enumerate(sizes):
        start, end = position, position + size
        position = end
        cuts = sorted(draw(st.lists(st.integers(start, end), min_size=2, max_size=5, unique=True))) if size > 5 else []
        reads = []
        for low, high in itertools.pairwise(cuts):
            if draw(st.booleans()) or draw(st.booleans()):
                # A gap at the read's end, which belongs to nobody.
                needed = draw(st.integers(1, high - low))
                reads.append(Read(low, high, (Piece(0, 0, 0, needed),)))
        if reads:
            tensor = TensorInfo(f"t{number}", "U8", (size,), start, end)
            batches.append(Batch(len(batches), 0, (tensor,), tuple(reads)))
    return sizes, batches


def _covered(manifest: ManifestFile, batches: Sequence[Batch]) -> set[int]:
    """The bytes whose blocks one batch covers whole, byte by byte."""
    found: set[int] = set()
    for batch in batches:
        read = {at for each in batch.reads for at in range(each.start, each.end)}
        for tensor in manifest.tensors:
            for start in range(tensor.start, tensor.end, BLOCK):
                block = range(start, min(start + BLOCK, tensor.end))
                if read.issuperset(block):
                    found.update(block)
    return found


@given(_slices(), st.data())
def test_a_byte_that_is_wrong_is_found_where_its_block_is_covered(
    drawn: tuple[list[int], list[Batch]], data: st.DataObject
) -> None:
    sizes, batches = drawn
    assume(batches)
    content = bytearray(_content(sizes))
    manifest = _manifest(bytes(content), sizes)
    covered = _covered(manifest, batches)
    needed = {
        read.start + piece.read_start + at
        for batch in batches
        for read in batch.reads
        for piece in read.pieces
        for at in range(piece.nbytes)
    }
    verifier = BlockVerifier(manifest, batches)
    assert verifier.verifiable_bytes == len(needed & covered)
    assert verifier.partial_bytes == len(needed - covered)

    wrong = data.draw(st.integers(HEADER, len(content) - 1)) if data.draw(st.booleans()) else None
    if wrong is not None:
        content[wrong] ^= 1
    reads = data.draw(st.permutations([read for batch in batches for read in batch.reads]))
    verified, error = _take(verifier, content, reads)
    if error is None:
        assert wrong not in covered
        assert verified == verifier.verifiable_bytes
        return
    assert wrong is not None
    assert wrong in covered
    assert error.start is not None
    assert error.end is not None
    assert error.start <= wrong < error.end
    tensor = next(t for t in manifest.tensors if t.start <= wrong < t.end)
    assert repr(tensor.name) in str(error)
    assert error.object == "f"


def _take(verifier: BlockVerifier, content: bytearray, reads: Sequence[Read]) -> tuple[int, ChecksumError | None]:
    """How many bytes are verified when these reads have come, and what is raised then."""
    verified = 0
    for read in reads:
        running = RunningChecksum("CRC64NVME", verifier.cuts(read.start))
        running.add(memoryview(content)[read.start : read.end])
        try:
            verified += verifier.add(read.start, running.sums())
        except ChecksumError as error:
            return verified, error
    return verified, None


def _plan(manifest: ManifestFile, *reads: Read) -> Plan:
    file = _file(manifest)
    catalog = Catalog((file,))
    nbytes = sum(piece.nbytes for read in reads for piece in read.pieces)
    return Plan(catalog, (Batch(0, 0, file.tensors, reads),), nbytes, 0, len(reads))


SIZES = (2 * BLOCK,)
CONTENT = _content(SIZES)
MANIFEST = _manifest(CONTENT, SIZES)
WHOLE = _plan(MANIFEST, Read(HEADER, len(CONTENT), (Piece(0, 0, 0, 2 * BLOCK),)))
PART = _plan(MANIFEST, Read(HEADER, len(CONTENT) - 1, (Piece(0, 0, 0, 2 * BLOCK - 1),)))


def _recorder() -> Recorder:
    return Recorder("memory://", "cpu", 1 << 20)


def test_a_part_of_a_block_is_told_as_not_verified() -> None:
    recorder = _recorder()
    verifier = Verifier(PART, {}, {"f": CONTENT[:HEADER]}, recorder, manifests={"f": MANIFEST})
    verifier.add("f", HEADER, Loan([memoryview(bytearray(CONTENT[HEADER:-1]))]))
    report = recorder.report()
    assert report.verified == {BY_MANIFEST: BLOCK}
    assert report.unverified == {PARTLY_READ: BLOCK - 1}


def test_what_has_to_be_verified_and_cannot_be_is_an_error_before_anything_is_read() -> None:
    with pytest.raises(ChecksumError, match=r"nothing vouches for 4095 bytes: only a part of a block") as caught:
        Verifier(PART, {}, {"f": CONTENT[:HEADER]}, _recorder(), manifests={"f": MANIFEST}, required=True)
    assert caught.value.object == "f"
    assert caught.value.cause.endswith("; verify='auto' loads them"), "there is a manifest"
    with pytest.raises(ChecksumError, match=r"only a part of the object.*; `streamload manifest` writes what does"):
        Verifier(PART, {}, {"f": CONTENT[:HEADER]}, _recorder(), required=True)
    Verifier(WHOLE, {}, {"f": CONTENT[:HEADER]}, _recorder(), manifests={"f": MANIFEST}, required=True)


def test_the_header_is_compared() -> None:
    with pytest.raises(ChecksumError, match="the header sums up to") as caught:
        Verifier(WHOLE, {}, {"f": bytes(HEADER)}, _recorder(), manifests={"f": MANIFEST})
    assert (caught.value.start, caught.value.end) == (0, HEADER)


def test_the_stores_checksum_is_compared_with_the_manifest() -> None:
    kept = Checksum("CRC64NVME", _sum(CONTENT))
    headers = {"f": CONTENT[:HEADER]}
    Verifier(WHOLE, {"f": kept}, headers, _recorder(), manifests={"f": MANIFEST})
    other = Checksum("CRC64NVME", kept.value ^ 1)
    with pytest.raises(ManifestError, match="for other content"):
        Verifier(WHOLE, {"f": other}, headers, _recorder(), manifests={"f": MANIFEST})
    # By another algorithm it says nothing about the manifest.
    Verifier(WHOLE, {"f": Checksum("CRC32", 1)}, headers, _recorder(), manifests={"f": MANIFEST})
