"""`streamload.shard`: each rank's files hold what a load of that rank gives, wherever it was interrupted."""

from __future__ import annotations

import asyncio
import concurrent.futures
import errno
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import streamload
from streamload import Absent, Experts, PackedShard, Placement, Replicate, Shard
from streamload.checksums import Checksum
from streamload.errors import CheckpointError, ChecksumError, OptionError, SourceError
from streamload.loan import Loan
from streamload.plan import Span
from streamload.save.conversion import ConversionWriter, Pieces
from streamload.save.journal import JOURNAL_NAME
from streamload.save.local import _LocalFile
from streamload.sharding import _in_order
from streamload.sources import SourceObject
from streamload.sources.s3 import S3Source
from tests.checkpoints import raw_checkpoint, same_tensor, write_sharded
from tests.save.sharded import cancelling, threads_of_ours
from tests.servers import S3Bucket
from tests.sharding import Task, run
from tests.test_ranks import CONFIG, HIDDEN, llama

MIB = 1 << 20


@pytest.fixture(autouse=True)
def nothing_left(request: pytest.FixtureRequest) -> Iterator[None]:
    """Every test leaves no thread of ours and no open file behind."""
    files = len(os.listdir("/proc/self/fd"))
    yield
    assert threads_of_ours() == []
    if "s3_bucket" not in request.fixturenames:  # the test's own client keeps connections
        assert len(os.listdir("/proc/self/fd")) <= files + 2  # libuv's own, for the process's first loop


@pytest.fixture(scope="module")
def tensors() -> dict[str, torch.Tensor]:
    return llama()


@pytest.fixture
def source(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A Llama of 13 MiB in three files, and what lies beside such a one."""
    folder = write_sharded(tmp_path / "source", tensors)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "tokenizer.model").write_bytes(bytes(range(256)) * 40)
    (folder / "chat_template.jinja").write_bytes(b"")
    (folder / "pytorch_model.bin").write_bytes(b"the same weights once more")
    return folder


@pytest.fixture
def small(tmp_path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A Llama of 800 KiB: the S3 server sums up a few MB a second."""
    quarter = {
        name: tensor[tuple(slice(size // 4) for size in tensor.shape)].contiguous() for name, tensor in tensors.items()
    }
    folder = write_sharded(tmp_path / "small", quarter)
    (folder / "config.json").write_text(json.dumps({**CONFIG, "hidden_size": HIDDEN // 4}))
    (folder / "chat_template.jinja").write_bytes(b"")
    return folder


def check(
    source: str | Path,
    made: str | Path,
    ranks: int,
    *,
    placements: Any = "auto",
    pattern: str | None = None,
    **options: Any,
) -> None:
    """Assert that each rank's files are verified, and hold what a load of that rank from the source gives."""
    for rank in range(ranks):
        expected = streamload.load(source, rank=rank, world_size=ranks, placements=placements, **options)
        expected = {name: tensor for name, tensor in expected.items() if tensor.numel()}
        here: dict[str, Any] = {"rank": rank, "world_size": ranks, "pattern": pattern, "verify": "require"}
        here["pp_size"] = options.get("pp_size", 1)
        found = streamload.load(made, **here)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert same_tensor(found[name], tensor), name
    assert streamload.verify(made).ok


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


@pytest.mark.parametrize(
    ("tp", "pp", "max_file_bytes", "memory_bytes"),
    [(1, 1, None, None), (2, 1, 300_000, MIB), (4, 1, 2 * MIB, 4 * MIB), (2, 2, MIB, 2 * MIB), (1, 3, None, None)],
)
def test_each_rank_gets_what_its_load_gives(
    source: Path, tmp_path: Path, tp: int, pp: int, max_file_bytes: int | None, memory_bytes: int | None
) -> None:
    made = streamload.shard(
        source, tmp_path / "made", tp=tp, pp=pp, max_file_bytes=max_file_bytes, memory_bytes=memory_bytes
    )
    check(source, tmp_path / "made", tp * pp, pp_size=pp)
    there = weights(tmp_path / "made")
    assert sorted(made.files) == sorted(there)
    assert made.ranks == len(made.manifests) == tp * pp
    assert made.nbytes == sum(tensor.nbytes for tensor in llama().values())
    assert made.written_bytes == sum(map(len, there.values()))
    assert sorted(made.copied) == ["chat_template.jinja", "config.json", "tokenizer.model"]
    for name in made.copied:
        assert (tmp_path / "made" / name).read_bytes() == (source / name).read_bytes()
    left = {path.name for path in (tmp_path / "made").iterdir()} - {*made.files, *made.manifests, *made.copied}
    assert left == {JOURNAL_NAME}
    if max_file_bytes is not None:
        for name in made.files:
            file = streamload.inspect(tmp_path / "made" / name).plan.catalog.files[0]
            assert file.size_bytes - file.header_bytes <= max_file_bytes or len(file.tensors) == 1


def test_what_is_made_fills_a_model(source: Path, tmp_path: Path) -> None:
    streamload.shard(source, tmp_path / "made", tp=2)
    expected = streamload.load(source, rank=1, world_size=2)
    into = {name: torch.full_like(tensor, 7) for name, tensor in expected.items()}
    streamload.load_into(into, tmp_path / "made", rank=1, world_size=2, verify="require")
    for name, tensor in expected.items():
        assert same_tensor(into[name], tensor), name


def test_all_placements_dtypes_and_sizes_that_do_not_divide(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(3)
    tensors = {
        "a.packed": torch.randn(12, 2 * 15, 40, generator=generator),
        "b.experts": torch.randn(8, 20, 300, generator=generator).to(torch.float16),
        "c.owned": torch.randn(8, 20, 300, generator=generator),
        "d.uneven": torch.randn(7, 11, generator=generator),
        "e.gone": torch.randn(10, generator=generator),
        "f.whole": torch.randn(5, generator=generator).to(torch.float64),
        "g.narrow": torch.rand(5, 3, generator=generator) > 0.5,
        "h.scalar": torch.tensor(3, dtype=torch.int16),
        "i.empty": torch.empty(0, 4),
    }
    source = write_sharded(tmp_path / "source", tensors, files=2)
    rules: dict[str, Placement] = {
        "a.*": PackedShard(-2, (15, 15)),
        "b.*": Experts(),
        "c.*": Experts((1, 2, 6), Shard(-1)),
        "d.*": Shard(-1),
        "e.*": Absent(),
        "*": Replicate(),
    }
    for read_bytes, max_file_bytes in ((None, None), (4096, 20_000)):
        made = tmp_path / f"made-{read_bytes}"
        options: Any = {"placements": rules, "uneven": "ceil", "expert_parallel": True}
        found = streamload.shard(
            source,
            made,
            tp=4,
            max_file_bytes=max_file_bytes,
            read_bytes=read_bytes,
            pattern="r{rank}.{part}.safetensors",
            **options,
        )
        assert found.nbytes == sum(tensor.nbytes for name, tensor in tensors.items() if name != "e.gone")
        check(source, made, 4, pattern="r{rank}.{part}.safetensors", **options)
    rules["c.*"] = Experts((6, 1), Shard(-1))
    with pytest.raises(OptionError, match=r"'c\.owned': a rank has its experts in another order"):
        streamload.shard(source, tmp_path / "never", tp=4, placements=rules, uneven="ceil", expert_parallel=True)
    assert not (tmp_path / "never").exists()


def test_a_rank_without_tensors_has_a_file_all_the_same(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    save_file({"t": torch.ones(3)}, tmp_path / "source" / "model.safetensors")
    streamload.shard(tmp_path / "source", tmp_path / "made", tp=2, placements={"*": Shard(0)}, uneven="ceil")
    assert len(weights(tmp_path / "made")) == 2
    check(tmp_path / "source", tmp_path / "made", 2, placements={"*": Shard(0)}, uneven="ceil")
    streamload.shard(tmp_path / "source", tmp_path / "none", tp=2, placements={"*": Absent()})
    assert len(weights(tmp_path / "none")) == 2
    again = streamload.shard(tmp_path / "source", tmp_path / "none", tp=2, placements={"*": Absent()})
    assert (again.tensors, again.nbytes, len(again.files)) == (0, 0, 2)


def test_a_finished_conversion_is_left_as_it_is(source: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    first = streamload.shard(source, made, tp=2)
    stamps = {path.name: path.stat().st_mtime_ns for path in made.iterdir()}
    again = streamload.shard(source, made, tp=2)
    assert {path.name: path.stat().st_mtime_ns for path in made.iterdir()} == stamps
    assert again.resumed_bytes == again.nbytes == first.nbytes
    assert (set(again.files), again.written_bytes) == (set(first.files), first.written_bytes)
    # What is missing or was touched since is made anew.
    (made / first.files[0]).unlink()
    assert streamload.shard(source, made, tp=2).resumed_bytes == 0
    check(source, made, 2)


@pytest.mark.parametrize(("at", "max_file_bytes"), [(1, None), (7 * MIB, None), (11 * MIB, MIB)])
def test_a_killed_conversion_goes_on_where_it_was(
    source: Path, tmp_path: Path, at: int, max_file_bytes: int | None
) -> None:
    made, whole = tmp_path / "made", tmp_path / "whole"
    options: dict[str, Any] = {"tp": 2, "max_file_bytes": max_file_bytes, "read_bytes": 256 << 10, "verify": "require"}
    streamload.write_manifest(source)
    assert run(Task(str(source), str(made), options, kill_at_bytes=at)) is None
    assert not weights(made), "nothing is under its name before everything is complete"
    again = streamload.shard(source, made, **options)
    # An entry of the journal comes after each MiB at least, but for the tensor that is being read then.
    assert max(0, at - 3 * MIB) <= again.resumed_bytes <= at
    # A block that was read in part before counts where it is complete.
    assert again.nbytes - again.resumed_bytes <= sum(again.verified.values()) <= again.nbytes
    streamload.shard(source, whole, **options)
    assert weights(made) == weights(whole)
    check(source, made, 2)
    assert not [path.name for path in made.iterdir() if path.name.endswith("unfinished")]


@pytest.mark.parametrize("at", [1, 4])
def test_one_killed_while_files_get_their_names_goes_on_too(source: Path, tmp_path: Path, at: int) -> None:
    made = tmp_path / "made"
    options: dict[str, Any] = {"tp": 2, "max_file_bytes": 4 * MIB}
    assert run(Task(str(source), str(made), options, kill_at_publish=at)) is None
    assert len(weights(made)) == at
    again = streamload.shard(source, made, **options)
    assert again.resumed_bytes == again.nbytes
    check(source, made, 2)


@pytest.mark.parametrize("at", [1, 2])
def test_one_that_replaces_another_and_is_killed_leaves_no_mixture(source: Path, tmp_path: Path, at: int) -> None:
    made = tmp_path / "made"
    options: dict[str, Any] = {"tp": 2, "max_file_bytes": 4 * MIB}
    streamload.shard(source, made, **options)
    older = weights(made)
    other = {name: tensor + 1 for name, tensor in llama().items()}
    shutil.rmtree(source)
    write_sharded(source, other)
    (source / "config.json").write_text(json.dumps(CONFIG))
    assert run(Task(str(source), str(made), options, kill_at_publish=at)) is None
    found = weights(made)
    assert len(found) == at
    assert all(content != older[name] for name, content in found.items())
    for rank in range(2):
        with pytest.raises(CheckpointError):
            streamload.load(made, rank=rank, world_size=2)
    again = streamload.shard(source, made, **options)
    assert again.resumed_bytes == again.nbytes
    check(source, made, 2)


@pytest.mark.parametrize("state", ["killed", "done"])
def test_a_source_that_has_changed_is_converted_anew(source: Path, tmp_path: Path, state: str) -> None:
    made = tmp_path / "made"
    killed = 7 * MIB if state == "killed" else None
    options: dict[str, Any] = {"tp": 2, "max_file_bytes": MIB}
    run(Task(str(source), str(made), options, kill_at_bytes=killed))
    other = {name: tensor + 1 for name, tensor in llama().items() if "layers.2" not in name}
    shutil.rmtree(source)
    write_sharded(source, other)
    (source / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 2}))
    again = streamload.shard(source, made, **options)
    assert again.resumed_bytes == 0
    assert sorted(weights(made)) == sorted(again.files), "files that are not written anew are gone"
    check(source, made, 2)


def test_what_was_kept_and_is_gone_is_made_anew(source: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    options: dict[str, Any] = {"tp": 2, "max_file_bytes": MIB}
    run(Task(str(source), str(made), options, kill_at_bytes=7 * MIB))
    next(made.glob(".model-rank-1-part-2.*")).unlink()
    assert streamload.shard(source, made, **options).resumed_bytes == 0
    check(source, made, 2)


def test_a_bad_source_leaves_nothing(source: Path, tmp_path: Path) -> None:
    streamload.write_manifest(source)
    made = tmp_path / "made"
    options: dict[str, Any] = {"tp": 2, "max_file_bytes": MIB}
    good = streamload.shard(source, tmp_path / "good", verify="require", **options)
    assert sum(good.verified.values()) == good.nbytes
    assert run(Task(str(source), str(made), options, kill_at_bytes=5 * MIB)) is None
    file = sorted(source.glob("*.safetensors"))[-1]
    status = file.stat()
    with file.open("r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        opened.write(b"\xff")
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(ChecksumError, match=r"the manifest 'streamload-manifest\.json' says") as raised:
        streamload.shard(source, made, **options)
    assert raised.value.object == file.name
    assert list(made.iterdir()) == []


def test_wrong_use(source: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    cases: list[tuple[dict[str, Any], Path, str]] = [
        ({"tp": 0}, made, "tp=0 is not a whole number of at least 1"),
        ({"tp": 2, "pp": 0}, made, "pp=0 is not"),
        ({"tp": 2, "max_file_bytes": 0}, made, "max_file_bytes=0 is not"),
        ({"tp": 3}, made, "cannot be shared out"),
        ({"tp": 1, "pp": 9}, made, "3 layers cannot be shared out to 9 pipeline stages"),
        ({"tp": 2, "verify": "sha256"}, made, "verify='sha256'"),
        ({"tp": 2, "world_size": 2}, made, "there is no option 'world_size' here: give tp"),
        ({"tp": 2, "pattern": "all-{part}.safetensors"}, made, "cannot tell ranks apart"),
        ({"tp": 2, "pattern": "r{rank}.safetensors", "max_file_bytes": MIB}, made, r"has no \{part\}"),
        ({"tp": 2}, source, "is the source"),
        ({"tp": 2}, source / "made", "lies in the source"),
    ]
    for options, where, cause in cases:
        with pytest.raises(OptionError, match=cause):
            streamload.shard(source, where, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamload.save.s3._MOST_PARTS", 1)
        with pytest.raises(
            OptionError, match=r"2 objects .* in parts of 6536192 bytes: it takes 19608576 .* 16777216,"
        ):
            streamload.shard(source, "s3://never-asked/made", tp=2, max_file_bytes=None, memory_bytes=32 * MIB)
    with pytest.raises(OptionError, match="is the source"):
        streamload.shard(next(source.glob("*.safetensors")), source, tp=2)
    assert not made.exists()
    assert not (source / "made").exists()


def test_files_of_somebody_else_are_not_touched(source: Path, tmp_path: Path) -> None:
    made = tmp_path / "made"
    streamload.shard(source, made, tp=4)
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    with pytest.raises(CheckpointError, match=r"for tp=4 and pp=1 .* asked for is tp=2 and pp=1"):
        streamload.shard(source, made, tp=2)
    (made / JOURNAL_NAME).unlink()
    with pytest.raises(CheckpointError, match=r"files of another checkpoint \(4\)"):
        streamload.shard(source, made, tp=2)
    (made / JOURNAL_NAME).write_text("[]")
    with pytest.raises(CheckpointError, match="no journal of a conversion"):
        streamload.shard(source, made, tp=4)
    after = {path.name: path.read_bytes() for path in made.iterdir()}
    assert after == before | {JOURNAL_NAME: b"[]"}


def upload(bucket: S3Bucket, folder: Path, prefix: str) -> str:
    for path in folder.iterdir():
        bucket.put(f"{prefix}/{path.name}", path.read_bytes())
    return f"{bucket.uri}/{prefix}"


def unfinished(bucket: S3Bucket) -> list[str]:
    return [upload["Key"] for upload in bucket.client.list_multipart_uploads(Bucket=bucket.name).get("Uploads", ())]


def keys(bucket: S3Bucket, prefix: str) -> list[str]:
    listed = bucket.client.list_objects_v2(Bucket=bucket.name, Prefix=f"{prefix}/").get("Contents", ())
    return [entry["Key"].removeprefix(f"{prefix}/") for entry in listed]


def test_from_and_to_s3(small: Path, tmp_path: Path, s3_bucket: S3Bucket) -> None:
    uri = upload(s3_bucket, small, "llama")
    options: dict[str, Any] = {"tp": 2, "max_file_bytes": 200_000, "memory_bytes": 64 * MIB}
    whole = streamload.shard(small, tmp_path / "from-disk", **options)
    from_s3 = streamload.shard(uri, tmp_path / "from-s3", **options)
    assert weights(tmp_path / "from-s3") == weights(tmp_path / "from-disk")
    assert sum(from_s3.verified.values()) == from_s3.nbytes, "by the store's checksums"
    for where, origin in (("disk-to-s3", str(small)), ("s3-to-s3", uri)):
        made = streamload.shard(origin, f"{s3_bucket.uri}/{where}", **options)
        assert made.files == whole.files
        for name, content in weights(tmp_path / "from-disk").items():
            assert s3_bucket.client.get_object(Bucket=s3_bucket.name, Key=f"{where}/{name}")["Body"].read() == content
        again = streamload.shard(origin, f"{s3_bucket.uri}/{where}", **options)
        assert again.resumed_bytes == again.nbytes
    check(small, f"{s3_bucket.uri}/s3-to-s3", 2)
    assert sorted(keys(s3_bucket, "s3-to-s3")) == sorted(path.name for path in (tmp_path / "from-disk").iterdir())
    assert unfinished(s3_bucket) == []
    with pytest.raises(OptionError, match="lies in the source"):
        streamload.shard(uri, f"{uri}/made", tp=2)
    with pytest.raises(OptionError, match=r"too little to write 16 objects at the same time.*it takes 178257920"):
        streamload.shard(uri, f"{s3_bucket.uri}/never", tp=16, memory_bytes=64 * MIB)


def test_a_whole_objects_checksum_counts_over_two_processes(small: Path, tmp_path: Path, s3_bucket: S3Bucket) -> None:
    uri, made = upload(s3_bucket, small, "llama"), tmp_path / "made"
    options: dict[str, Any] = {"tp": 2, "read_bytes": 64 << 10, "memory_bytes": 16 * MIB, "verify": "require"}
    assert run(Task(uri, str(made), options, noted_bytes=100_000, kill_at_bytes=400_000)) is None
    again = streamload.shard(uri, made, **options)
    assert 200_000 <= again.resumed_bytes <= 400_000
    # All bytes of the file that was being read, and those of the files after it.
    assert sum(again.verified.values()) > again.nbytes - again.resumed_bytes
    check(small, made, 2)


@pytest.mark.parametrize(("at_bytes", "at_publish"), [(400_000, None), (None, 3)])
def test_a_killed_conversion_into_s3_goes_on(
    small: Path, s3_bucket: S3Bucket, at_bytes: int | None, at_publish: int | None
) -> None:
    made = f"{s3_bucket.uri}/made"
    options: dict[str, Any] = {"tp": 2, "max_file_bytes": 64 << 10, "memory_bytes": 64 * MIB}
    task = Task(str(small), made, options, kill_at_bytes=at_bytes, kill_at_publish=at_publish)
    assert run(task) is None
    there = [name for name in keys(s3_bucket, "made") if name.endswith(".safetensors")]
    assert len(there) == (at_publish or 0)
    again = streamload.shard(small, made, **options)
    if at_bytes is None:
        assert again.resumed_bytes == again.nbytes
    else:
        assert at_bytes - 250_000 <= again.resumed_bytes < again.nbytes
    check(small, made, 2)
    assert unfinished(s3_bucket) == []


def test_a_source_in_s3_that_is_not_what_its_store_says_leaves_nothing(small: Path, s3_bucket: S3Bucket) -> None:
    # As corruption on the way would look: the object is another one than its checksum is of.
    uri = upload(s3_bucket, small, "llama")

    async def other(self: S3Source, object: SourceObject) -> Checksum:
        return Checksum("CRC64NVME", 1)

    made = f"{s3_bucket.uri}/made"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(S3Source, "checksum", other)
        with pytest.raises(ChecksumError, match="the object's checksum is CRC64NVME 0000000000000001") as raised:
            streamload.shard(uri, made, tp=2, memory_bytes=64 * MIB)
    assert raised.value.object is not None
    assert keys(s3_bucket, "made") == unfinished(s3_bucket) == []


class TestWhatFails:
    def test_a_disk_that_is_full_is_gone_on_from(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = tmp_path / "made"
        options: dict[str, Any] = {"tp": 2, "max_file_bytes": MIB, "read_bytes": 256 << 10}
        append, written = _LocalFile.append, 0

        def full(self: _LocalFile, data: memoryview) -> None:
            nonlocal written
            written += data.nbytes
            if written > 6 * MIB:
                raise OSError(errno.ENOSPC, "No space left on device")
            append(self, data)

        monkeypatch.setattr(_LocalFile, "append", full)
        with pytest.raises(SourceError, match=r"No space left") as raised:
            streamload.shard(source, made, **options)
        assert raised.value.uri == str(made)
        assert raised.value.object is not None
        assert weights(made) == {}
        monkeypatch.undo()
        again = streamload.shard(source, made, **options)
        assert 3 * MIB <= again.resumed_bytes < again.nbytes
        check(source, made, 2)

    def test_one_that_is_cancelled_is_gone_on_from(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = tmp_path / "made"
        options: dict[str, Any] = {"tp": 2, "max_file_bytes": MIB, "read_bytes": 256 << 10}
        with monkeypatch.context() as patch:
            cancel = cancelling(patch)
            append, written = _LocalFile.append, 0

            def cancelled(self: _LocalFile, data: memoryview) -> None:
                nonlocal written
                written += data.nbytes
                append(self, data)
                if written > 6 * MIB:
                    cancel()

            patch.setattr(_LocalFile, "append", cancelled)
            with pytest.raises((asyncio.CancelledError, concurrent.futures.CancelledError)):
                streamload.shard(source, made, **options)
        assert weights(made) == {}
        again = streamload.shard(source, made, **options)
        assert 3 * MIB <= again.resumed_bytes < again.nbytes
        check(source, made, 2)

    def test_a_second_one_at_the_same_time_is_refused(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made = tmp_path / "made"
        publish, refused = ConversionWriter.publish, []

        async def publish_after_another(self: ConversionWriter, *, manifests: bool) -> list[str]:
            with pytest.raises(SourceError, match="another save") as raised:
                await asyncio.to_thread(streamload.shard, source, made, tp=2)
            refused.append(raised.value)
            return await publish(self, manifests=manifests)

        monkeypatch.setattr(ConversionWriter, "publish", publish_after_another)
        streamload.shard(source, made, tp=2)
        assert len(refused) == 1
        check(source, made, 2)


_MEASURED = """
import json, sys
from pathlib import Path
import streamload

def status(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
made = streamload.shard(*sys.argv[1:3], tp=int(sys.argv[3]), memory_bytes=int(sys.argv[4]), placements=PLACEMENTS)
print(json.dumps({"above": status("VmHWM") - before, "torch": "torch" in sys.modules, "tensors": made.tensors}))
"""


def measured(source: Path, made: Path, tp: int, memory_bytes: int, placements: str) -> dict[str, int]:
    """Convert in a process of its own; how far its memory went above what it has after the import."""
    program = _MEASURED.replace("PLACEMENTS", placements)
    command = [sys.executable, "-W", "error", "-c", program, source, made, tp, memory_bytes]
    done = subprocess.run(list(map(str, command)), check=True, stdout=subprocess.PIPE, text=True, timeout=300)
    found: dict[str, int] = json.loads(done.stdout)
    return found


def test_memory_stays_within_its_limit(tmp_path: Path) -> None:
    tensors = {f"{number}.o_proj": torch.full((4096, 4096), number, dtype=torch.int16) for number in range(8)}
    source = write_sharded(tmp_path / "source", tensors, files=2)
    found = measured(source, tmp_path / "made", 8, 32 * MIB, '{"*": streamload.Shard(1)}')
    assert found["above"] <= (32 + 64) * MIB
    assert not found["torch"]


def test_little_is_cut_ahead_of_what_is_written() -> None:
    cut = written = most = 0

    async def fetch(span: Span, memory: memoryview) -> Loan:
        return Loan([memory])

    async def cut_out(span: Span, view: memoryview) -> Pieces:
        nonlocal cut, most
        cut += 1
        most = max(most, cut - written)
        return {}

    async def write(span: Span, loan: Loan, pieces: Pieces) -> None:
        nonlocal written
        for _ in range(100):  # all others have their turns
            await asyncio.sleep(0)
        written += 1

    spans = (Span(0, number, number + 1, number, number + 1, True) for number in range(20))
    asyncio.run(_in_order(spans, 20, 1, fetch, cut_out, write))
    assert (written, most) == (20, 3)


@pytest.mark.parametrize(("tp", "placements"), [(1, "auto"), (2, {"*": Replicate()})])
def test_neighbouring_tensors_are_written_without_a_copy(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tp: int, placements: Any
) -> None:
    write = ConversionWriter.write
    owners: list[type] = []

    async def noting(self: ConversionWriter, pieces: Pieces) -> None:
        owners.extend(type(piece.obj) for piece in pieces.values())
        await write(self, pieces)

    monkeypatch.setattr(ConversionWriter, "write", noting)
    streamload.shard(small, tmp_path / "made", tp=tp, placements=placements)
    assert set(owners) == {bytearray}, "what is read into, not bytes that were joined"
    check(small, tmp_path / "made", tp, placements=placements)


def test_many_small_tensors_take_little_memory(tmp_path: Path) -> None:
    shapes = {f"model.layers.{n // 500}.mlp.experts.{n % 500}.up_proj.weight": ("BF16", (8, 16)) for n in range(50_000)}
    source = tmp_path / "source"
    source.mkdir()
    (source / "model.safetensors").write_bytes(raw_checkpoint(shapes))
    found = measured(source, tmp_path / "made", 2, 32 * MIB, '{"*": streamload.Shard(0)}')
    assert found["tensors"] == 50_000
    assert found["above"] <= (32 + 64) * MIB
    with (
        safe_open(source / "model.safetensors", "pt") as whole,
        safe_open(tmp_path / "made" / "model-rank-1-part-0.safetensors", "pt") as made,
    ):
        assert len(made.keys()) == 50_000
        for name in list(shapes)[::997]:
            assert same_tensor(made.get_tensor(name), whole.get_tensor(name).chunk(2)[1])
