"""`streamload.shard` where an earlier conversion has been, finished or not: nothing is mixed, and nothing lost."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from awscrt.checksums import crc64nvme

import streamload
from streamload.checksums import Checksum
from streamload.errors import ChecksumError, SourceError
from streamload.save.conversion import ConversionWriter
from streamload.save.journal import JOURNAL_NAME, Journal
from streamload.save.local import LocalDestination, _LocalFile
from streamload.sources import SourceObject
from streamload.sources.local import LocalSource
from streamload.sources.s3_client import S3Client
from tests.checkpoints import write_sharded
from tests.save.sharded import threads_of_ours
from tests.servers import S3Bucket
from tests.test_ranks import CONFIG, HIDDEN, llama
from tests.test_sharding import check, keys, unfinished, weights

MIB = 1 << 20
OPTIONS: dict[str, Any] = {"tp": 2, "max_file_bytes": 100_000, "read_bytes": 16 << 10}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Every test leaves no thread of ours behind."""
    yield
    assert threads_of_ours() == []


@pytest.fixture(autouse=True)
def noted_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamload.sharding._NOTED_BYTES", 40_000)


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return {
        name: tensor[tuple(slice(size // 4) for size in tensor.shape)].contiguous() for name, tensor in llama().items()
    }


def write_source(folder: Path, tensors: dict[str, torch.Tensor], *, plus: int = 0, **copies: str) -> Path:
    """A Llama of 800 KiB, in place of what is there; one is added to its weights, and other files to it."""
    shutil.rmtree(folder, ignore_errors=True)
    write_sharded(folder, {name: tensor + plus for name, tensor in tensors.items()})
    (folder / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": HIDDEN // 4, "plus": plus}))
    for name, content in copies.items():
        (folder / f"{name}.txt").write_text(content)
    return folder


@pytest.fixture
def source(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    return write_source(tmp_path / "source", tensors, old="old")


@contextmanager
def full_after(nbytes: int) -> Iterator[None]:
    """A disk that takes no more than this."""
    append, written = _LocalFile.append, 0

    def full(self: _LocalFile, data: memoryview) -> None:
        nonlocal written
        if JOURNAL_NAME not in self.name:
            written += data.nbytes
            if written > nbytes:
                raise OSError(errno.ENOSPC, "No space left on device")
        append(self, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_LocalFile, "append", full)
        yield


def interrupt(source: Path, made: Path, nbytes: int, **options: Any) -> None:
    with full_after(nbytes), pytest.raises(SourceError, match="No space left"):
        streamload.shard(source, made, **{**OPTIONS, **options})


def journal_in(made: Path) -> Journal:
    return Journal.parse((made / JOURNAL_NAME).read_bytes())


def test_one_that_begins_anew_leaves_no_journal_of_another(
    source: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    made = tmp_path / "made"
    interrupt(source, made, 400_000)
    before = journal_in(made)
    assert before.files
    write_source(source, tensors, plus=1)
    interrupt(source, made, 0)
    after = journal_in(made)
    assert after.made != before.made
    assert (after.files, after.tensor) == ({}, 0)
    # Nothing lies there that could keep one for other ranks out.
    streamload.shard(source, made, tp=1)
    check(source, made, 1)


def test_a_begun_file_is_gone_on_with_only_if_its_content_is_the_one_that_was_noted(
    source: Path, tmp_path: Path
) -> None:
    made, whole = tmp_path / "made", tmp_path / "whole"
    options = {**OPTIONS, "max_file_bytes": None}
    interrupt(source, made, 400_000, max_file_bytes=None)
    begun = made / ".model-rank-1-part-0.safetensors.streamload-unfinished"
    noted = journal_in(made).files["model-rank-1-part-0.safetensors"]
    assert noted.kept["bytes"] < noted.size_bytes
    inode = begun.stat().st_ino
    # As another conversion's would be that got the same inode.
    begun.write_bytes(b"\x01" * begun.stat().st_size)
    assert begun.stat().st_ino == inode
    again = streamload.shard(source, made, **options)
    streamload.shard(source, whole, **options)
    assert weights(made) == weights(whole)
    assert again.resumed_bytes == 0


def test_copies_come_and_go_with_the_weights(
    source: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = tmp_path / "made"
    streamload.shard(source, made, **OPTIONS)
    assert (made / "old.txt").read_text() == "old"
    write_source(source, tensors, plus=1, new="new")
    remove, publish, there = LocalDestination.remove, _LocalFile.publish, []

    def note(name: str) -> None:
        if name.endswith(".safetensors"):
            config = json.loads((made / "config.json").read_text())
            there.append((config["plus"], (made / "old.txt").exists(), (made / "new.txt").exists()))

    async def noting_remove(self: LocalDestination, name: str) -> None:
        note(name)
        await remove(self, name)

    async def noting_publish(self: _LocalFile) -> None:
        note(self.name)
        await publish(self)

    monkeypatch.setattr(LocalDestination, "remove", noting_remove)
    monkeypatch.setattr(_LocalFile, "publish", noting_publish)
    files = len(streamload.shard(source, made, **OPTIONS).files)
    assert there == [(0, True, False)] * files + [(1, False, True)] * files
    check(source, made, 2)


def test_a_copy_that_somebody_has_changed_stays(source: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]) -> None:
    made = tmp_path / "made"
    streamload.shard(source, made, **OPTIONS)
    (made / "old.txt").write_text("somebody's own")
    write_source(source, tensors, plus=1)
    streamload.shard(source, made, **OPTIONS)
    assert (made / "old.txt").read_text() == "somebody's own"


def test_copies_are_taken_back(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = tmp_path / "made"
    publish = _LocalFile.publish

    async def bad(self: _LocalFile) -> None:
        if self.name.endswith(".safetensors"):
            raise ChecksumError("it is not what was written")
        await publish(self)

    monkeypatch.setattr(_LocalFile, "publish", bad)
    with pytest.raises(ChecksumError, match="not what was written"):
        streamload.shard(source, made, **OPTIONS)
    assert list(made.iterdir()) == []


def test_one_that_is_interrupted_among_the_copies_is_cleared_up(source: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    # All that is written of the weights fits, and nothing else does.
    written = streamload.shard(source, tmp_path / "whole", **OPTIONS).written_bytes
    interrupt(source, made, written)
    assert not (made / "config.json").exists()
    (made / ".old.txt.streamload-unfinished").write_text("of one that was killed")
    again = streamload.shard(source, made, **OPTIONS)
    assert again.resumed_bytes == again.nbytes
    assert not list(made.glob("*unfinished"))
    check(source, made, 2)


def test_a_failed_one_does_not_disown_the_files_of_an_earlier_one(
    source: Path, tmp_path: Path, tensors: dict[str, torch.Tensor]
) -> None:
    made = tmp_path / "made"
    streamload.shard(source, made, **OPTIONS)
    before = weights(made)
    streamload.write_manifest(write_source(source, tensors, plus=1))
    file = sorted(source.glob("*.safetensors"))[-1]
    status, content = file.stat(), file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ChecksumError, match="the manifest"):
        streamload.shard(source, made, **OPTIONS)
    assert weights(made) == before
    assert not list(made.glob("*unfinished"))
    write_source(source, tensors, plus=2)
    streamload.shard(source, made, **OPTIONS)
    assert sorted(path.name for path in made.glob("*.txt")) == []
    check(source, made, 2)


@pytest.mark.parametrize("then", [False, True])
def test_other_checksums_than_before_are_reason_to_begin_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, then: bool
) -> None:
    """What has been read of a file that is to be compared as a whole must be summed up from its beginning."""
    made = tmp_path / "made"
    sums = {path.name: crc64nvme(path.read_bytes()) for path in source.glob("*.safetensors")}
    kept = not then

    async def checksum(self: LocalSource, object: SourceObject) -> Checksum | None:
        return Checksum("CRC64NVME", sums[object.key]) if kept else None

    with monkeypatch.context() as patch:
        patch.setattr(LocalSource, "checksum", checksum)
        interrupt(source, made, 500_000)
        assert journal_in(made).tensor
        kept = then
        again = streamload.shard(source, made, **OPTIONS)
    assert again.resumed_bytes == 0
    assert sum(again.verified.values()) == (again.nbytes if then else 0)
    check(source, made, 2)


@pytest.mark.parametrize("number", [4, -1])
def test_a_journal_that_was_replaced_stays_where_that_did_not_end_well(
    source: Path, tmp_path: Path, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fourth one; and the last one, which says that all is done."""
    made, put = tmp_path / "made", 0
    publish = _LocalFile._publish

    def bad(self: _LocalFile) -> None:
        nonlocal put
        publish(self)
        if self.name == JOURNAL_NAME:
            put += 1
            if put == number or (number < 0 and journal_in(made).done):
                raise OSError(errno.EIO, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr(_LocalFile, "_publish", bad)
        with pytest.raises(SourceError, match="Input/output error"):
            streamload.shard(source, made, **OPTIONS)
    said = journal_in(made)
    again = streamload.shard(source, made, **OPTIONS)
    assert again.resumed_bytes == (again.nbytes if said.done else again.resumed_bytes) > 0
    check(source, made, 2)


def test_nor_is_one_taken_back_whose_upload_had_no_answer(source: Path, s3_bucket: S3Bucket) -> None:
    made = f"{s3_bucket.uri}/made"
    options: dict[str, Any] = {"tp": 2, "memory_bytes": 64 * MIB, "max_file_bytes": 200_000}
    call, put = S3Client.call, 0

    async def losing(client: S3Client, operation: str, **arguments: Any) -> dict[str, Any]:
        nonlocal put
        answer = await call(client, operation, **arguments)
        if operation == "complete_multipart_upload" and arguments["Key"].endswith(JOURNAL_NAME):
            put += 1
            if put == 2:
                raise SourceError("no answer")
        return answer

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Client, "call", losing)
        with pytest.raises(SourceError, match="no answer"):
            streamload.shard(source, made, **options)
    assert streamload.shard(source, made, **options).resumed_bytes > 0
    check(source, made, 2)
    assert unfinished(s3_bucket) == []


@pytest.mark.parametrize("moment", ["note", "publish"])
def test_one_that_was_overtaken_in_s3_leaves_the_other_as_it_is(
    source: Path, tmp_path: Path, tensors: dict[str, torch.Tensor], s3_bucket: S3Bucket, moment: str
) -> None:
    made = f"{s3_bucket.uri}/made"
    options: dict[str, Any] = {"tp": 2, "memory_bytes": 64 * MIB}
    streamload.shard(source, made, **options)
    mine = write_source(tmp_path / "mine", tensors, plus=1)
    theirs = write_source(tmp_path / "theirs", tensors, plus=2)
    call: Any = getattr(ConversionWriter, moment)

    async def overtaken(self: ConversionWriter, *args: Any, **kwargs: Any) -> Any:
        # Before that, the other one aborts what is being uploaded.
        if moment == "publish" or kwargs["group"] == len(self._conversion.groups):
            patch.undo()
            await asyncio.to_thread(streamload.shard, theirs, made, **options)
        return await call(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConversionWriter, moment, overtaken)
        with pytest.raises(SourceError, match="another conversion into the same place"):
            streamload.shard(mine, made, **options)
    check(theirs, made, 2)
    assert "old.txt" not in keys(s3_bucket, "made")
    assert unfinished(s3_bucket) == []
    assert streamload.shard(theirs, made, **options).resumed_bytes > 0
