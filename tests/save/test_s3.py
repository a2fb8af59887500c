"""Rank-sharded checkpoints in S3: what is uploaded, and what is left when it fails."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import streamload
from streamload.errors import AccessError, ChecksumError, SourceError, TransientError
from streamload.pipeline.engine import Engine
from streamload.pipeline.policy import RetryPolicy
from streamload.pipeline.verify import BY_MANIFEST
from streamload.save import open_destination
from streamload.sources.s3_client import S3Client
from tests.save.sharded import MIB, check_folder, state, threads_of_ours
from tests.servers import S3Bucket

FIRST = "m/model-rank-0-part-0.safetensors"
MANIFEST = "m/streamload-manifest-model-rank-0-part-all.json"


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Every test leaves no thread of ours behind."""
    yield
    assert threads_of_ours() == []


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again is tried at once."""
    monkeypatch.setattr("streamload.saving.random.random", lambda: 0.0)


def _keys(bucket: S3Bucket) -> list[str]:
    answer = bucket.client.list_objects_v2(Bucket=bucket.name)
    return [entry["Key"] for entry in answer.get("Contents", ())]


def _uploads(bucket: S3Bucket) -> list[str]:
    answer = bucket.client.list_multipart_uploads(Bucket=bucket.name)
    return [entry["Key"] for entry in answer.get("Uploads", ())]


def _small() -> dict[str, torch.Tensor]:
    return {"a": torch.ones(1000), "b": torch.rand(50_000), "c": torch.ones(7)}


def _small_save(bucket: S3Bucket) -> None:
    """Three files, one of them of two parts, and a manifest; this server takes smaller parts than S3."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("streamload.save.s3._PART_BYTES", 150_000)
        patch.setattr("streamload.save.s3._LEAST_PART_BYTES", 1)
        patch.setattr("streamload.save.s3._MIB", 1)
        streamload.save_sharded(_small(), f"{bucket.uri}/m", max_file_bytes=100_000, memory_bytes=16 * MIB)


class _Calls:
    """Does something before, or after, the k-th request that is made."""

    def __init__(self, patch: pytest.MonkeyPatch, then: Callable[[int, str, bool], object]) -> None:
        self.operations: list[str] = []
        call = S3Client.call

        async def counted(client: S3Client, operation: str, **arguments: Any) -> dict[str, Any]:
            self.operations.append(operation)
            number = len(self.operations)
            then(number, operation, False)
            answer = await call(client, operation, **arguments)
            then(number, operation, True)
            return answer

        patch.setattr(S3Client, "call", counted)


def test_every_tensor_is_there_bit_for_bit(s3_bucket: S3Bucket, tmp_path: Path) -> None:
    tensors = state(large=12)
    saved = streamload.save_sharded(
        tensors, f"{s3_bucket.uri}/m", max_file_bytes=9 * MIB, memory_bytes=16 * MIB, rank=0, world_size=2
    )
    assert len(saved.files) == 2
    assert _keys(s3_bucket) == sorted([*(f"m/{name}" for name in saved.files), MANIFEST])
    assert _uploads(s3_bucket) == []
    for name in saved.files:
        answer = s3_bucket.client.get_object(Bucket=s3_bucket.name, Key=f"m/{name}")
        (tmp_path / name).write_bytes(answer["Body"].read())
    check_folder(tmp_path, tensors)
    with streamload.stream(f"{s3_bucket.uri}/m", verify="require") as stream:
        assert dict(stream).keys() == tensors.keys()
    assert stream.report.verified == {BY_MANIFEST: stream.report.total_bytes}


def test_parts_carry_checksums(s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[dict[str, Any]] = []
    call = S3Client.call

    async def noted(client: S3Client, operation: str, **arguments: Any) -> dict[str, Any]:
        given.append({"operation": operation} | arguments)
        return await call(client, operation, **arguments)

    monkeypatch.setattr(S3Client, "call", noted)
    _small_save(s3_bucket)
    created = [each for each in given if each["operation"] == "create_multipart_upload"]
    assert {(each["ChecksumAlgorithm"], each["ChecksumType"]) for each in created} == {("CRC64NVME", "FULL_OBJECT")}
    parts = [each for each in given if each["operation"] == "upload_part"]
    assert len(parts) == 5
    assert all(each["ChecksumCRC64NVME"] for each in parts)


def test_memory_is_bounded(s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more parts are on their way than fit; with less memory than a part, one at a time is."""
    under_way: set[int] = set()
    most: list[int] = []
    call = S3Client.call

    async def counted(client: S3Client, operation: str, **arguments: Any) -> dict[str, Any]:
        if operation != "upload_part":
            return await call(client, operation, **arguments)
        under_way.add(id(arguments["Body"]))
        most.append(len(under_way))
        try:
            return await call(client, operation, **arguments)
        finally:
            under_way.discard(id(arguments["Body"]))

    monkeypatch.setattr(S3Client, "call", counted)
    tensors = {f"t{number}": torch.ones(500_000) for number in range(3)}
    for part_bytes, expected in [(500_000, 2), (1_500_000, 1)]:
        monkeypatch.setattr("streamload.save.s3._PART_BYTES", part_bytes)
        monkeypatch.setattr("streamload.save.s3._LEAST_PART_BYTES", 1)
        monkeypatch.setattr("streamload.save.s3._MIB", 1)
        streamload.save_sharded(tensors, f"{s3_bucket.uri}/m", max_file_bytes=MIB, memory_bytes=2 * MIB)
        assert max(most) == expected
        most.clear()


def test_a_second_save_replaces_the_first_and_clears_up(s3_bucket: S3Bucket) -> None:
    _small_save(s3_bucket)
    s3_bucket.client.create_multipart_upload(Bucket=s3_bucket.name, Key="m/model-rank-0-part-7.safetensors")
    s3_bucket.client.create_multipart_upload(Bucket=s3_bucket.name, Key="m/somebody-else.safetensors")
    streamload.save_sharded({"a": torch.ones(3)}, f"{s3_bucket.uri}/m", manifest=False)
    assert _keys(s3_bucket) == [FIRST]
    assert _uploads(s3_bucket) == ["m/somebody-else.safetensors"]


def _operations_of_a_save(bucket: S3Bucket) -> list[str]:
    with pytest.MonkeyPatch.context() as patch:
        calls = _Calls(patch, lambda number, operation, after: None)
        _small_save(bucket)
    _empty(bucket)
    return calls.operations


def _empty(bucket: S3Bucket) -> None:
    for key in _keys(bucket):
        bucket.remove(key)


@pytest.mark.parametrize("after", [False, True])
def test_a_save_that_fails_anywhere_leaves_nothing(s3_bucket: S3Bucket, after: bool) -> None:
    """Before a request is made, or when it has been answered and the answer is lost for good."""
    operations = _operations_of_a_save(s3_bucket)
    assert {"upload_part", "complete_multipart_upload", "create_multipart_upload"} <= set(operations)
    for at, operation in enumerate(operations, 1):
        if operation == "list_multipart_uploads":
            continue  # that it is refused changes nothing

        failed: list[str] = []

        def fail(number: int, operation: str, was_after: bool, at: int = at, failed: list[str] = failed) -> None:
            if (number, was_after) == (at, after):
                failed.append(operation)
                raise SourceError("no answer") if after else AccessError("refused")

        with pytest.MonkeyPatch.context() as patch:
            _Calls(patch, fail)
            with pytest.raises(SourceError, match="no answer" if after else "refused") as caught:
                _small_save(s3_bucket)
        assert caught.value.uri == f"{s3_bucket.uri}/m"
        assert _keys(s3_bucket) == [], f"at {operation}, request {at}"
        if not (after and failed == ["create_multipart_upload"]):  # its id was lost with the answer
            assert _uploads(s3_bucket) == [], f"at {operation}, request {at}"
        assert threads_of_ours() == []
    # What nobody knew of is cleared up by the next save.
    _small_save(s3_bucket)
    assert _uploads(s3_bucket) == []


def test_a_save_that_is_cancelled_anywhere_leaves_nothing(s3_bucket: S3Bucket) -> None:
    operations = _operations_of_a_save(s3_bucket)
    for at, operation in enumerate(operations, 1):
        with pytest.MonkeyPatch.context() as patch:
            tasks: list[Any] = []
            start = Engine.start

            def started(engine: Any, start: Any = start, tasks: list[Any] = tasks) -> None:
                tasks.append(engine)
                start(engine)

            patch.setattr(Engine, "start", started)

            def cancel(number: int, operation: str, after: bool, at: int = at, tasks: list[Any] = tasks) -> None:
                if number == at and not after:
                    tasks[-1].cancel()

            _Calls(patch, cancel)
            with pytest.raises(asyncio.CancelledError):
                _small_save(s3_bucket)
        assert _keys(s3_bucket) == [], f"at {operation}, request {at}"
        assert _uploads(s3_bucket) == [], f"at {operation}, request {at}"
        assert threads_of_ours() == []


def test_a_part_that_fails_for_a_moment_is_sent_again(s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    failed: list[int] = []

    def fail(number: int, operation: str, after: bool) -> None:
        if operation == "upload_part" and not after and len(failed) < RetryPolicy().attempts - 1:
            failed.append(number)
            raise TransientError("the connection broke")

    _Calls(monkeypatch, fail)
    _small_save(s3_bucket)
    assert len(failed) == 5
    assert len(_keys(s3_bucket)) == 4


def test_an_answer_to_the_last_request_that_is_lost(s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    """The upload is complete, but nobody knows; asked again, the store knows no such upload."""
    lost: list[int] = []

    def lose(number: int, operation: str, after: bool) -> None:
        if operation == "complete_multipart_upload" and after and not lost:
            lost.append(number)
            raise TransientError("the connection broke")

    calls = _Calls(monkeypatch, lose)
    _small_save(s3_bucket)
    assert lost
    assert "head_object" in calls.operations or calls.operations.count("complete_multipart_upload") > 4
    with streamload.stream(f"{s3_bucket.uri}/m", verify="require") as stream:
        assert len(dict(stream)) == 3


def test_a_store_that_has_put_the_parts_together_wrongly(s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    call = S3Client.call

    async def lying(client: S3Client, operation: str, **arguments: Any) -> dict[str, Any]:
        answer = await call(client, operation, **arguments)
        return answer | {"ChecksumCRC64NVME": "AAAAAAAAAAA="} if operation == "complete_multipart_upload" else answer

    monkeypatch.setattr(S3Client, "call", lying)
    with pytest.raises(ChecksumError, match="the store says") as caught:
        _small_save(s3_bucket)
    assert caught.value.object == "model-rank-0-part-2.safetensors"  # the last part comes first
    assert _keys(s3_bucket) == []


def test_a_file_that_could_not_be_replaced_is_still_there(s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    streamload.save_sharded({"a": torch.zeros(10)}, f"{s3_bucket.uri}/m")

    def refuse(number: int, operation: str, after: bool) -> None:
        if operation == "complete_multipart_upload":
            raise AccessError("refused")

    _Calls(monkeypatch, refuse)
    with pytest.raises(AccessError, match="refused"):
        streamload.save_sharded({"a": torch.ones(10)}, f"{s3_bucket.uri}/m")
    assert _keys(s3_bucket) == [FIRST]
    assert _uploads(s3_bucket) == []
    assert torch.equal(streamload.load(f"{s3_bucket.uri}/m")["a"], torch.zeros(10))


class TestWhatLiesUnderTheNameAlready:
    """An object of the same length as the one that is uploaded, by somebody else."""

    OLD, NEW = bytes(1000), bytes([1]) * 1000

    def attempt(self, bucket: S3Bucket, between: Callable[[str], object] = lambda upload_id: None) -> None:
        """Upload, do something, and publish; discard where that fails."""

        async def body() -> None:
            async with open_destination(f"{bucket.uri}/m", memory_bytes=MIB) as destination:
                file = await destination.create("f", len(self.NEW))
                try:
                    await file.write(memoryview(self.NEW))
                    await file.finish()
                    kept = await file.keep()
                    assert kept is not None
                    between(kept["upload"])
                    await file.publish()
                except BaseException:
                    await file.discard()
                    raise

        asyncio.run(body())

    def put(self, bucket: S3Bucket) -> None:
        bucket.client.put_object(Bucket=bucket.name, Key="m/f", Body=self.OLD, ChecksumAlgorithm="CRC64NVME")

    def there(self, bucket: S3Bucket) -> bytes | None:
        if not _keys(bucket):
            return None
        content: bytes = bucket.client.get_object(Bucket=bucket.name, Key="m/f")["Body"].read()
        return content

    @pytest.fixture(params=[True, False], ids=["checksums", "no checksums"])
    def sums(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        if request.param:
            return
        call = S3Client.call

        async def without(client: S3Client, operation: str, **arguments: Any) -> dict[str, Any]:
            answer = await call(client, operation, **arguments)
            if operation in ("head_object", "complete_multipart_upload"):
                answer.pop("ChecksumCRC64NVME", None)
            return answer

        monkeypatch.setattr(S3Client, "call", without)

    @pytest.mark.usefixtures("sums")
    def test_it_is_not_taken_for_an_upload_that_was_aborted(self, s3_bucket: S3Bucket) -> None:
        self.put(s3_bucket)

        def abort(upload_id: str) -> None:
            s3_bucket.client.abort_multipart_upload(Bucket=s3_bucket.name, Key="m/f", UploadId=upload_id)

        with pytest.raises(FileNotFoundError):
            self.attempt(s3_bucket, abort)
        assert self.there(s3_bucket) == self.OLD

    @pytest.mark.usefixtures("sums")
    @pytest.mark.parametrize("error", [AccessError("refused"), SourceError("no answer")])
    def test_it_stays_where_the_upload_was_not_completed(
        self, s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch, error: SourceError
    ) -> None:
        self.put(s3_bucket)

        def refuse(number: int, operation: str, after: bool) -> None:
            if operation == "complete_multipart_upload":
                raise error

        _Calls(monkeypatch, refuse)
        with pytest.raises(SourceError, match=error.cause):
            self.attempt(s3_bucket)
        assert self.there(s3_bucket) == self.OLD
        assert _uploads(s3_bucket) == []

    def test_nor_is_one_with_the_same_content_removed_then(
        self, s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        self.attempt(s3_bucket)

        def refuse(number: int, operation: str, after: bool) -> None:
            if operation == "complete_multipart_upload":
                raise AccessError("refused")

        _Calls(monkeypatch, refuse)
        with pytest.raises(AccessError, match="refused"):
            self.attempt(s3_bucket)
        assert self.there(s3_bucket) == self.NEW

    @pytest.mark.usefixtures("sums")
    @pytest.mark.parametrize("abort_fails", [False, True])
    def test_what_was_completed_without_an_answer_is_removed(
        self, s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch, abort_fails: bool
    ) -> None:
        self.put(s3_bucket)

        def lose(number: int, operation: str, after: bool) -> None:
            if operation == "complete_multipart_upload" and after:
                raise SourceError("no answer")
            if operation == "abort_multipart_upload" and abort_fails:
                raise AccessError("refused")

        _Calls(monkeypatch, lose)
        with pytest.raises(SourceError, match="refused" if abort_fails else "no answer"):
            self.attempt(s3_bucket)
        assert self.there(s3_bucket) is None


def test_what_is_published_has_no_upload_to_abort(s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = _Calls(monkeypatch, lambda number, operation, after: None)

    async def body() -> None:
        async with open_destination(f"{s3_bucket.uri}/m", memory_bytes=MIB) as destination:
            file = await destination.create("f", 3)
            await file.write(memoryview(b"abc"))
            await file.finish()
            await file.publish()
            await file.discard()

    asyncio.run(body())
    assert _keys(s3_bucket) == []
    assert "abort_multipart_upload" not in calls.operations


def test_a_part_that_is_damaged_on_the_way_is_refused(s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    call = S3Client.call

    async def damaging(client: S3Client, operation: str, **arguments: Any) -> dict[str, Any]:
        if operation == "upload_part":
            arguments["Body"].getbuffer()[5] ^= 1
        return await call(client, operation, **arguments)

    monkeypatch.setattr(S3Client, "call", damaging)
    with pytest.raises(SourceError, match="BadDigest"):
        _small_save(s3_bucket)
    assert _keys(s3_bucket) == []
    assert _uploads(s3_bucket) == []


def test_no_such_bucket(s3_bucket: S3Bucket) -> None:
    with pytest.raises(FileNotFoundError, match="there is no bucket"):
        streamload.save_sharded({"a": torch.ones(3)}, "s3://no-such-bucket-here/m")


def test_listing_uploads_may_be_refused(s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(number: int, operation: str, after: bool) -> None:
        if operation == "list_multipart_uploads":
            raise AccessError("refused")

    _Calls(monkeypatch, refuse)
    _small_save(s3_bucket)
    assert len(_keys(s3_bucket)) == 4
