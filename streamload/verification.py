"""Whether a checkpoint is what its manifest, or its store, says."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Unpack, cast

from streamload.checkpoint import (
    MANIFEST_ALGORITHM,
    MANIFEST_NAME,
    ManifestFile,
    ShardFile,
    is_manifest,
    manifest_names,
    parse_manifest,
)
from streamload.checksums import Checksum, PartChecksums, combined
from streamload.errors import (
    NotFoundError,
    SourceError,
    StreamloadError,
)
from streamload.options import Options
from streamload.pipeline.discover import ask_checksums, find_shards
from streamload.pipeline.manifests import is_one_file, read_manifests
from streamload.pipeline.scan import Scan
from streamload.sources import SourceObject
from streamload.units import format_bytes, format_count
from streamload.whole import WholeRead

__all__ = ["BadBlock", "FileVerification", "Verification", "verify"]

# How many tensors a line names, of those that a bad stretch touches.
_SHOWN_TENSORS = 4


@dataclass(frozen=True, slots=True)
class BadBlock:
    """A stretch of a file that is not what it should be.

    Attributes:
        start: Its first byte in the file.
        end: One past its last.
        tensors: The tensors that have bytes in it; none where only the header does.
        problem: What is wrong, in words.
    """

    start: int
    end: int
    tensors: tuple[str, ...]
    problem: str


@dataclass(frozen=True, slots=True)
class FileVerification:
    """What was found out about one file.

    Attributes:
        key: Its name.
        size_bytes: Its length; 0 where it is missing.
        by: What it was compared with; None where there was nothing.
        verified_bytes: How many bytes are what they should be.
        unverified: Why the others could not be compared; None where all were.
        bad: What is not what it should be, in order of its bytes.
    """

    key: str
    size_bytes: int
    by: str | None
    verified_bytes: int
    unverified: str | None
    bad: tuple[BadBlock, ...]


@dataclass(frozen=True, slots=True)
class Verification:
    """A checkpoint, compared with its manifest or its store's checksums.

    Attributes:
        uri: What was verified.
        files: Each shard file.
    """

    uri: str
    files: tuple[FileVerification, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong, and everything could be compared."""
        return all(not file.bad and file.unverified is None for file in self.files)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {"uri": self.uri, "ok": self.ok, "files": [asdict(file) for file in self.files]}

    def __str__(self) -> str:
        return "\n".join(_lines(self))


def verify(
    uri: str | os.PathLike[str], *, manifest: str | os.PathLike[str] | None = None, **options: Unpack[Options]
) -> Verification:
    """Read a whole checkpoint and compare it with its manifest, or else with the checksums that its store keeps.

    Everything is compared, however much of it is wrong. Memory is bounded as for a load; needs no torch.

    Args:
        uri: As for `streamload.open`. All shard files in a folder count, those of all ranks.
        manifest: A file on this machine that has the manifest, in place of what lies beside the weights.
        **options: The fields of `LoadOptions`; those that choose tensors or say where they go have no effect.

    Returns:
        What was found; ``ok`` where all of it was compared, and is as it should be.

    Raises:
        StreamloadError: Bad options, no checkpoint there, or a manifest that is none.
    """
    given = None if manifest is None else _read_given(Path(manifest))
    task = WholeRead(os.fspath(uri), options)
    return task.run(lambda: _verify(task, given))


async def _verify(task: WholeRead, given: Mapping[str, ManifestFile] | None) -> Verification:
    shards = await find_shards(task.fetcher, task.recorder, task.concurrency, all_ranks=True)
    listed, objects = shards.listed, shards.objects
    said, missing = dict(given or {}), set[str]()
    if given is None:
        said, missing = await _find_said(task, listed, objects)
    elif not is_one_file(task.source.uri, listed):
        missing = given.keys() - objects.keys()
    checksums = await ask_checksums(task.fetcher, objects.values(), task.concurrency)
    headers = await task.headers(object for key, object in objects.items() if key not in said)
    plans = [
        _of_manifest(object, said[key], checksums[key])
        if key in said
        else _of_store(object, checksums[key], headers[key])
        for key, object in objects.items()
    ]
    await task.scan([plan.scan for plan in plans if plan.scan is not None])
    found = [plan.outcome() for plan in plans]
    for key in sorted(missing):
        problem = BadBlock(0, 0, (), f"the manifest {said[key].manifest!r} tells of this file, and it is not there")
        found.append(FileVerification(key, 0, None, 0, None, (problem,)))
    return Verification(task.recorder.uri, tuple(found))


async def _find_said(
    task: WholeRead, listed: Mapping[str, SourceObject], objects: Mapping[str, SourceObject]
) -> tuple[dict[str, ManifestFile], set[str]]:
    """What manifests say of each file, and the files that they tell of and that are not there."""
    one = is_one_file(task.source.uri, listed)
    names = [name for key in objects for name in manifest_names(key)] if one else list(filter(is_manifest, listed))
    manifests = await read_manifests(task.fetcher, task.recorder, listed, names)
    said: dict[str, ManifestFile] = {}
    for name in sorted(manifests, key=lambda name: name != MANIFEST_NAME):
        # Later ones count more: those of a rank or of a file. Others than those that a load would look at do not count.
        said |= {key: file for key, file in manifests[name].items() if name in manifest_names(key)}
    if one:
        return {key: file for key, file in said.items() if key in objects}, set()
    gone = {key for key in said if key not in objects and key not in listed}
    return said, {key for key in gone if _counts(said[key].manifest, key, manifests)}


def _counts(manifest: str, key: str, manifests: Mapping[str, Mapping[str, ManifestFile]]) -> bool:
    """Whether a manifest tells of a file and none that counts more is there, which would tell of it if it was needed.

    A rank that has saved anew, into fewer files, leaves those that are gone in the whole checkpoint's manifest.
    """
    names = manifest_names(key)
    return not any(name in manifests for name in names[1 : names.index(manifest)])


class _Comparison:
    """One file, and what it has to sum up to.

    Args:
        object: The file.
        by: What it is compared with.
        ends: Where the stretches that are compared end.
        expected: What each sums up to.
        describe: What to call a stretch, by its number.
        tensors: The file's tensors: name, first byte, one past the last.
    """

    def __init__(
        self,
        object: SourceObject,
        *,
        by: str | None = None,
        scan: Scan | None = None,
        expected: Sequence[int] = (),
        whose: Sequence[str] = (),
        tensors: Sequence[tuple[str, int, int]] = (),
        whole: Checksum | None = None,
        unverified: str | None = None,
        bad: Sequence[BadBlock] = (),
    ) -> None:
        self._object = object
        self._by = by
        self.scan = scan
        self._expected = expected
        self._whose = whose
        self._tensors = tensors
        self._whole = whole
        self._unverified = unverified
        self._bad = list(bad)

    def outcome(self) -> FileVerification:
        """What has come of it."""
        verified, unverified = 0, self._unverified
        if self.scan is not None:
            verified, missing = self._compare(self.scan)
            if missing:
                unverified = f"{missing} bytes could not be read: {self.scan.error}"
        object = self._object
        return FileVerification(object.key, object.size_bytes, self._by, verified, unverified, tuple(self._bad))

    def _compare(self, scan: Scan) -> tuple[int, int]:
        """How many bytes are as they should be, and how many did not come."""
        verified = missing = start = 0
        for number, (end, found) in enumerate(zip(scan.ends, scan.values, strict=True)):
            if found is None:
                missing += end - start
            elif found == self._expected[number]:
                verified += end - start
            else:
                self._note(start, end, found, self._expected[number], self._whose[number])
            start = end
        whole = self._whole
        if whole is not None and not missing and not self._bad:
            starts = (0, *scan.ends)
            values = cast("list[int]", scan.values)
            sums = [(end - start, value) for start, end, value in zip(starts, scan.ends, values, strict=False)]
            found_whole = combined("CRC64NVME", sums)
            if found_whole != whole:
                self._note(0, self._object.size_bytes, found_whole.value, whole.value, "the store keeps")
                verified = 0
        return verified, missing

    def _note(self, start: int, end: int, found: int, expected: int, whose: str) -> None:
        assert self.scan is not None
        algorithm = self.scan.algorithm
        names = tuple(name for name, first, last in self._tensors if first < end and start < last)
        problem = f"sums up to {Checksum(algorithm, found)}, {whose} {Checksum(algorithm, expected)}"
        self._bad.append(BadBlock(start, end, names, problem))


def _of_manifest(object: SourceObject, said: ManifestFile, kept: Checksum | PartChecksums | str) -> _Comparison:
    by = f"the manifest {said.manifest!r}"
    tensors = [(tensor.name, tensor.start, tensor.end) for tensor in said.tensors]
    if said.size_bytes != object.size_bytes:
        names = tuple(name for name, _, _ in tensors)
        problem = f"the file has {object.size_bytes} bytes, {by} says {said.size_bytes}"
        return _Comparison(object, by=by, bad=[BadBlock(0, object.size_bytes, names, problem)])
    ends, expected, whose = [], [], []
    end = 0
    for nbytes, value in said.sums():
        end += nbytes
        ends.append(end)
        expected.append(value)
        whose.append("the manifest says")
    whole = kept if isinstance(kept, Checksum) and kept.algorithm == MANIFEST_ALGORITHM else None
    return _Comparison(
        object,
        by=by,
        scan=Scan(object, MANIFEST_ALGORITHM, ends),
        expected=expected,
        whose=whose,
        tensors=tensors,
        whole=whole,
    )


def _of_store(
    object: SourceObject, kept: Checksum | PartChecksums | str, header: ShardFile | StreamloadError
) -> _Comparison:
    if isinstance(header, StreamloadError):
        end = min(object.size_bytes, header.end or object.size_bytes)
        bad = [BadBlock(header.start or 0, end, (), header.cause)]
        return _Comparison(object, unverified="its header does not stand", bad=bad)
    if isinstance(kept, str):
        return _Comparison(object, unverified=f"there is no manifest, and {kept}")
    tensors = [(tensor.name, tensor.start, tensor.end) for tensor in header.tensors]
    if isinstance(kept, Checksum):
        ends: Sequence[int] = (object.size_bytes,)
        values: Sequence[int] = (kept.value,)
        by = f"the store's {kept.algorithm} of the whole object"
    else:
        ends, values, by = kept.ends, kept.values, f"the store's {kept.algorithm} of each uploaded part"
    return _Comparison(
        object,
        by=by,
        scan=Scan(object, kept.algorithm, ends),
        expected=values,
        whose=["the store keeps"] * len(ends),
        tensors=tensors,
    )


def _read_given(path: Path) -> dict[str, ManifestFile]:
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise NotFoundError("there is no such manifest", object=str(path)) from None
    except OSError as error:
        raise SourceError(f"the manifest cannot be read: {error.strerror}", object=str(path)) from None
    said = parse_manifest(content, key=str(path))
    return {key: replace(file, manifest=str(path)) for key, file in said.items()}


def _lines(found: Verification) -> Iterator[str]:
    files = format_count(len(found.files), "file")
    bad = sum(len(file.bad) for file in found.files)
    unverified = sum(file.unverified is not None for file in found.files)
    verdict = "ok" if found.ok else format_count(bad, "bad block") if bad else "not all of it could be verified"
    if bad and unverified:
        verdict += ", and not all of it could be verified"
    yield f"{found.uri}: {files}, {verdict}"
    for file in found.files:
        by = f", by {file.by}" if file.by else ""
        yield f"  {file.key}: {format_bytes(file.verified_bytes)} of {format_bytes(file.size_bytes)} verified{by}"
        for block in file.bad:
            yield f"    bad           bytes {block.start}-{block.end}: {block.problem}"
            if block.tensors:
                shown = ", ".join(block.tensors[:_SHOWN_TENSORS])
                more = len(block.tensors) - _SHOWN_TENSORS
                yield f"      in          {shown}" + (f" and {more} more" if more > 0 else "")
        if file.unverified is not None:
            yield f"    not verified  {file.unverified}"
