"""Loads that verify against a manifest, `write_manifest` and `verify`."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streamload
from streamload.errors import AccessError, ChecksumError, HeaderError, ManifestError, NotFoundError, OptionError
from streamload.pipeline.verify import BY_MANIFEST, NOT_KEPT, SWITCHED_OFF
from tests.checkpoints import raw_checkpoint, varied_tensors, write_sharded
from tests.servers import S3Bucket

MIB = 1 << 20
FIRST = "model-00001-of-00003.safetensors"
MANIFEST = "streamload-manifest.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_sharded(tmp_path_factory.mktemp("original"), varied_tensors())
    written = streamload.write_manifest(folder)
    assert (written.manifest, written.files, written.tensors) == (MANIFEST, 3, len(varied_tensors()))
    assert written.size_bytes == (folder / MANIFEST).stat().st_size
    assert written.nbytes == sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    return folder


@pytest.fixture
def checkpoint(original: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(original, tmp_path / "checkpoint"))


def _flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


def _tensor_at(file: streamload.ShardFile, position: int) -> streamload.TensorInfo:
    return next(tensor for tensor in file.tensors if tensor.start <= position < tensor.end)


@pytest.mark.parametrize("read_bytes", [4096, 100_000, 700_001, 8 * MIB])
def test_everything_is_verified(checkpoint: Path, read_bytes: int) -> None:
    with streamload.stream(checkpoint, verify="require", read_bytes=read_bytes) as stream:
        assert dict(stream).keys() == varied_tensors().keys()
    assert stream.report.verified == {BY_MANIFEST: stream.report.total_bytes}
    assert stream.report.unverified == {}
    assert "by a manifest" in str(stream.report)


def test_a_part_of_the_tensors_is_verified_too(checkpoint: Path) -> None:
    with streamload.stream(checkpoint, verify="require", include=["model.layers.*", "model.scalar"]) as stream:
        assert len(dict(stream)) == 19
    assert stream.report.verified == {BY_MANIFEST: stream.report.total_bytes}


def test_switched_off_the_manifest_is_not_even_read(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).write_bytes(b"nonsense")
    with streamload.stream(checkpoint, verify="off") as stream:
        dict(stream)
    assert stream.report.unverified == {SWITCHED_OFF: stream.report.total_bytes}
    with pytest.raises(ManifestError, match="cannot be read") as caught:
        streamload.load(checkpoint)
    assert caught.value.object == MANIFEST


def test_without_a_manifest_nothing_changes_but_where_it_is_required(checkpoint: Path) -> None:
    (checkpoint / MANIFEST).unlink()
    with streamload.stream(checkpoint) as stream:
        dict(stream)
    assert stream.report.unverified == {NOT_KEPT: stream.report.total_bytes}
    with pytest.raises(ChecksumError, match="verify is 'require', and nothing vouches for"):
        streamload.load(checkpoint, verify="require")


def test_one_file_and_its_manifest_beside_it(checkpoint: Path) -> None:
    with streamload.stream(checkpoint / FIRST, verify="require") as stream:
        dict(stream)
    assert stream.report.verified == {BY_MANIFEST: stream.report.total_bytes}
    written = streamload.write_manifest(checkpoint / FIRST)
    assert written.manifest == "streamload-manifest-model-00001-of-00003.json"
    (checkpoint / MANIFEST).unlink()
    with streamload.stream(checkpoint / FIRST, verify="require") as stream:
        dict(stream)
    # The other files have none now.
    with pytest.raises(ChecksumError, match="nothing vouches for"):
        streamload.load(checkpoint, verify="require")


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("read_bytes", [100_000, 8 * MIB])
def test_a_byte_that_is_wrong_anywhere(checkpoint: Path, seed: int, read_bytes: int) -> None:
    """Its tensor is never handed out, and `verify` names the block and the tensor."""
    chosen = random.Random(seed)
    files = streamload.inspect(checkpoint).plan.catalog.files
    file = chosen.choice(files)
    position = chosen.randrange(file.header_bytes, file.size_bytes)
    tensor = _tensor_at(file, position)
    _flip(checkpoint / file.key, position)

    found: list[str] = []
    with pytest.raises(ChecksumError) as caught, streamload.stream(checkpoint, read_bytes=read_bytes) as stream:
        found.extend(name for name, _ in stream)
    assert tensor.name not in found
    error = caught.value
    assert error.object == file.key
    assert error.start is not None
    assert error.end is not None
    assert error.start <= position < error.end
    assert error.end - error.start <= MIB
    assert repr(tensor.name) in str(error)

    verification = streamload.verify(checkpoint, read_bytes=read_bytes)
    assert not verification.ok
    (bad,) = [(each.key, bad) for each in verification.files for bad in each.bad]
    assert bad[0] == file.key
    assert (bad[1].start, bad[1].end, bad[1].tensors) == (error.start, error.end, (tensor.name,))


def test_every_bad_block_is_named(checkpoint: Path) -> None:
    files = streamload.inspect(checkpoint).plan.catalog.files
    wrong = {(file.key, position) for file in files for position in (3, file.header_bytes, file.size_bytes - 1)}
    for key, position in wrong:
        _flip(checkpoint / key, position)
    found = streamload.verify(checkpoint)
    bad = [(file.key, block) for file in found.files for block in file.bad]
    assert len(bad) == len(wrong)
    for key, position in wrong:
        assert any(each == key and block.start <= position < block.end for each, block in bad)
    assert [block.tensors == () for _, block in bad].count(True) == 3  # the headers
    assert "9 bad blocks" in str(found)
    assert json.loads(json.dumps(found.to_dict()))["ok"] is False
    # A load does not get that far.
    with pytest.raises((HeaderError, ChecksumError)):
        streamload.load(checkpoint)


def test_a_header_that_is_wrong_and_stands(checkpoint: Path) -> None:
    path = checkpoint / FIRST
    content = path.read_bytes()
    path.write_bytes(content.replace(b'"pt"', b'"qt"', 1))
    with pytest.raises(ChecksumError, match="the header sums up to"):
        streamload.load(checkpoint)


def test_a_stale_manifest(checkpoint: Path) -> None:
    save_file({"other": torch.ones(3)}, checkpoint / FIRST)
    (checkpoint / "model.safetensors.index.json").unlink()
    with pytest.raises(ManifestError, match="was written for another file") as caught:
        streamload.load(checkpoint)
    assert caught.value.object == FIRST
    found = streamload.verify(checkpoint)
    (file,) = [file for file in found.files if file.bad]
    assert (file.key, file.verified_bytes) == (FIRST, 0)
    assert "bytes, the manifest" in file.bad[0].problem
    # A file that is gone.
    (checkpoint / FIRST).unlink()
    (file,) = [file for file in streamload.verify(checkpoint).files if file.bad]
    assert file.key == FIRST
    assert "not there" in file.bad[0].problem
    # Written anew, it is right again.
    streamload.write_manifest(checkpoint)
    assert streamload.verify(checkpoint).ok


def test_a_new_manifest_takes_the_place_of_those_of_ranks(tmp_path: Path) -> None:
    for rank in (0, 1):
        tensors = {f"w.{rank}": torch.ones(3), "other": torch.ones(3)}
        streamload.save_sharded(tensors, tmp_path, rank=rank, world_size=2, max_file_bytes=12)
    assert streamload.verify(tmp_path).ok
    (tmp_path / "streamload-manifest-other.json").write_bytes(b"not of these files")
    streamload.write_manifest(tmp_path)
    manifests = sorted(path.name for path in tmp_path.glob("*.json"))
    assert manifests == ["streamload-manifest-other.json", MANIFEST]
    (tmp_path / "streamload-manifest-other.json").unlink()
    # One rank saves anew: its own manifest counts more, and tells of fewer files.
    streamload.save_sharded({"w.0": torch.zeros(4)}, tmp_path, rank=0, world_size=2)
    assert streamload.verify(tmp_path).ok
    for rank in (0, 1):
        assert f"w.{rank}" in streamload.load(tmp_path, rank=rank, world_size=2, verify="require")
    (tmp_path / "model-rank-1-part-1.safetensors").unlink()
    assert not streamload.verify(tmp_path).ok


def test_a_manifest_elsewhere(checkpoint: Path, tmp_path: Path) -> None:
    (checkpoint / MANIFEST).unlink()
    output = tmp_path / "elsewhere.json"
    written = streamload.write_manifest(checkpoint, output=output)
    assert written.manifest == "elsewhere.json"
    assert not (checkpoint / MANIFEST).exists()
    assert not streamload.verify(checkpoint).ok
    assert streamload.verify(checkpoint, manifest=output).ok
    _flip(checkpoint / FIRST, -1)
    assert not streamload.verify(checkpoint, manifest=output).ok
    with pytest.raises(NotFoundError):
        streamload.verify(checkpoint, manifest=tmp_path / "none.json")


def test_a_place_that_is_read_only(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("streamload.manifesting.os.access", lambda path, mode: False)
    with pytest.raises(AccessError, match="--output"):
        streamload.write_manifest(checkpoint)


def test_no_manifest_for_what_is_no_checkpoint(checkpoint: Path) -> None:
    (checkpoint / FIRST).write_bytes((checkpoint / FIRST).read_bytes()[:-1])
    (checkpoint / MANIFEST).unlink()
    with pytest.raises(HeaderError):
        streamload.write_manifest(checkpoint)
    assert not (checkpoint / MANIFEST).exists()
    found = streamload.verify(checkpoint)
    assert any(block.problem for file in found.files for block in file.bad)


def test_every_dtype_of_the_format(tmp_path: Path) -> None:
    shapes: dict[str, tuple[str, tuple[int, ...]]] = {
        "six": ("F6_E2M3", (4,)),
        "four": ("F4", (3, 2)),
        "e": ("U8", (0,)),
    }
    (tmp_path / "m.safetensors").write_bytes(raw_checkpoint(shapes, padding=3))
    streamload.write_manifest(tmp_path)
    assert streamload.verify(tmp_path).ok


class TestS3:
    @pytest.fixture
    def bucket(self, s3_bucket: S3Bucket, original: Path) -> S3Bucket:
        for path in original.iterdir():
            if path.name != MANIFEST:
                self.put(s3_bucket, path.name, path.read_bytes())
        return s3_bucket

    def put(self, bucket: S3Bucket, name: str, content: bytes, algorithm: str = "CRC64NVME") -> None:
        bucket.client.put_object(Bucket=bucket.name, Key=f"m/{name}", Body=content, ChecksumAlgorithm=algorithm)

    def test_written_found_and_compared(self, bucket: S3Bucket) -> None:
        uri = f"{bucket.uri}/m"
        found = streamload.verify(uri)
        assert found.ok
        assert {file.by for file in found.files} == {"the store's CRC64NVME of the whole object"}
        streamload.write_manifest(uri)
        found = streamload.verify(uri)
        assert found.ok
        assert {file.by for file in found.files} == {f"the manifest {MANIFEST!r}"}
        for where in (uri, f"{uri}/{FIRST}"):
            with streamload.stream(where, verify="require") as stream:
                dict(stream)
            assert stream.report.verified == {BY_MANIFEST: stream.report.total_bytes}

    def test_a_byte_that_is_wrong(self, bucket: S3Bucket, original: Path) -> None:
        self.put(bucket, MANIFEST, (original / MANIFEST).read_bytes())
        content = bytearray((original / FIRST).read_bytes())
        content[-1] ^= 1
        # By a store's checksum of another kind, the blocks say it; by one of the same kind, it is seen beforehand.
        self.put(bucket, FIRST, bytes(content), "CRC32")
        with pytest.raises(ChecksumError, match="block 1 of 1"):
            streamload.load(f"{bucket.uri}/m")
        self.put(bucket, FIRST, bytes(content))
        with pytest.raises(ManifestError, match="for other content") as caught:
            streamload.load(f"{bucket.uri}/m")
        assert caught.value.object == FIRST
        (file,) = [file for file in streamload.verify(f"{bucket.uri}/m").files if file.bad]
        assert file.key == FIRST
        assert len(file.bad) == 1

    def test_a_store_whose_checksum_does_not_fit(self, bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
        from streamload.checksums import Checksum
        from streamload.sources.s3 import S3Source

        async def checksum(source: S3Source, object: Any) -> Checksum:
            return Checksum("CRC64NVME", 7)

        monkeypatch.setattr(S3Source, "checksum", checksum)
        with pytest.raises(ChecksumError, match="no manifest is written"):
            streamload.write_manifest(f"{bucket.uri}/m")
        found = streamload.verify(f"{bucket.uri}/m")
        assert all(len(file.bad) == 1 and len(file.bad[0].tensors) > 1 for file in found.files)

    def test_one_version_of_an_object_has_no_manifest(self, bucket: S3Bucket) -> None:
        with pytest.raises(OptionError, match="--output"):
            streamload.write_manifest(f"{bucket.uri}/m/{FIRST}?versionId=null")
