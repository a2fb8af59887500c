"""Loads from a real S3 server: equal tensors, counted requests, verified bytes."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import streamload
from streamload.errors import ChecksumError, CredentialsError, HeaderError, NotFoundError
from streamload.loan import Loan
from streamload.sources.base import SourceObject
from streamload.sources.s3 import S3Source
from tests.checkpoints import read_with_safetensors, same_tensor, varied_tensors, write_sharded
from tests.servers import S3Bucket

MIB = 1 << 20


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharded(tmp_path_factory.mktemp("s3"), varied_tensors())


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, torch.Tensor]:
    return read_with_safetensors(folder)


def upload(bucket: S3Bucket, folder: Path, prefix: str = "models/tiny/", **arguments: str) -> str:
    for file in folder.iterdir():
        bucket.client.put_object(Bucket=bucket.name, Key=prefix + file.name, Body=file.read_bytes(), **arguments)
    return f"s3://{bucket.name}/{prefix}"


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(same_tensor(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("algorithm", ["CRC64NVME", "CRC32C", "CRC32"])
def test_every_way_to_load_and_the_objects_checksums(
    s3_bucket: S3Bucket,
    folder: Path,
    expected: dict[str, torch.Tensor],
    algorithm: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # On a busy machine reads are late, and asked for again; here requests are counted.
    monkeypatch.setattr(S3Source, "hedged", False)
    uri = upload(s3_bucket, folder, ChecksumAlgorithm=algorithm)
    check(streamload.load(uri), expected)
    check(dict(streamload.stream(uri.rstrip("/"), read_bytes=100_000, memory_bytes=2 * MIB)), expected)

    async def scenario() -> None:
        async with streamload.open(uri) as stream:
            check({name: tensor async for name, tensor in stream}, expected)
        report = stream.report
        assert report.source == "s3"
        assert report.verified == {f"{algorithm} of the whole object": report.total_bytes}
        assert report.unverified == {}
        # One list, one index, and for each of three files a header, a checksum and its reads.
        assert report.requests == 1 + 1 + 3 + 3 + report.reads
        # The index came while headers and checksums did.
        assert report.round_trips == 3
        assert ", 3 in turn before data; " in str(report)

    asyncio.run(scenario())


def test_one_object(s3_bucket: S3Bucket, folder: Path) -> None:
    uri = upload(s3_bucket, folder)
    name = "model-00002-of-00003.safetensors"
    found = streamload.load(uri + name)
    assert found.keys() == streamload.load(folder / name).keys()


def test_files_beside_those_of_the_index_do_not_matter(
    s3_bucket: S3Bucket, folder: Path, expected: dict[str, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their headers may be asked for before it is known that they do not count."""
    monkeypatch.setattr(S3Source, "hedged", False)
    uri = upload(s3_bucket, folder)
    s3_bucket.put("models/tiny/consolidated.safetensors", b"\xff" * 100)
    with streamload.stream(uri) as stream:
        check(dict(stream), expected)
    assert stream.report.round_trips == 3
    assert set(stream.report.verified.values()) == {stream.report.total_bytes}
    (first, *_) = sorted(file.name for file in folder.glob("*.safetensors"))
    s3_bucket.put(f"models/tiny/{first}", b"\xff" * 100)
    with pytest.raises(HeaderError) as caught:
        streamload.load(uri)
    assert caught.value.object == first


@pytest.mark.parametrize("deeper", [False, True])
def test_round_trips_are_counted(s3_bucket: S3Bucket, tmp_path: Path, deeper: bool) -> None:
    file = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(3)}, file)
    key = "deeper/model.safetensors" if deeper else "model.safetensors"
    s3_bucket.put(f"m/{key}", file.read_bytes())
    if deeper:
        s3_bucket.put("m/model.safetensors.index.json", json.dumps({"weight_map": {"x": key}}).encode())
    with streamload.stream(f"{s3_bucket.uri}/m" + ("" if deeper else f"/{key}")) as stream:
        assert len(dict(stream)) == 1
    # The list or the head; an index, and the head of what it names; the header; the tensor.
    assert stream.report.round_trips == (5 if deeper else 3)


def test_verify_off_asks_for_no_checksums_and_says_so(s3_bucket: S3Bucket, folder: Path) -> None:
    with streamload.stream(upload(s3_bucket, folder, ChecksumAlgorithm="CRC64NVME"), verify="off") as stream:
        for _ in stream:
            pass
    report = stream.report
    assert report.verified == {}
    assert report.unverified == {"verify is off": report.total_bytes}
    assert report.requests == 1 + 1 + 3 + report.reads


def test_a_part_of_an_object_cannot_be_verified_and_the_report_says_so(s3_bucket: S3Bucket, folder: Path) -> None:
    uri = upload(s3_bucket, folder, ChecksumAlgorithm="CRC64NVME")
    with streamload.stream(uri, include=["model.layers.*"]) as stream:
        for _ in stream:
            pass
    (reason,) = stream.report.unverified
    assert "only a part" in reason


def test_bytes_that_are_not_what_the_store_keeps_end_the_load(
    s3_bucket: S3Bucket, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = upload(s3_bucket, folder, ChecksumAlgorithm="CRC64NVME")
    read = S3Source.read

    async def flipping_read(self: S3Source, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        # Through a loan of its own, as from a source that does not tell when bytes land.
        await read(self, object, start, end, Loan(loan.views))
        if end == object.size_bytes and object.key.startswith("model-00003"):
            loan.views[-1][-1] ^= 1

    monkeypatch.setattr(S3Source, "read", flipping_read)
    with pytest.raises(ChecksumError) as caught:
        streamload.load(uri)
    assert caught.value.object == "model-00003-of-00003.safetensors"


def test_missing_bucket_and_prefix(s3_bucket: S3Bucket) -> None:
    with pytest.raises(NotFoundError, match="no-such-bucket"):
        streamload.load("s3://no-such-bucket-here/x")
    with pytest.raises(NotFoundError) as caught:
        streamload.load(f"s3://{s3_bucket.name}/nothing/here")
    assert caught.value.uri == f"s3://{s3_bucket.name}/nothing/here"


def test_no_credentials(clean_aws_env: pytest.MonkeyPatch) -> None:
    with pytest.raises(CredentialsError, match="no AWS credentials"):
        streamload.load("s3://some-bucket/x")


def test_wrong_credentials_are_named_but_not_shown(s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "completely-wrong-secret")
    with pytest.raises(CredentialsError) as caught:
        streamload.load(f"s3://{s3_bucket.name}/x")
    assert "completely-wrong-secret" not in str(caught.value) + repr(caught.value)
