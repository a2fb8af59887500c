"""Files that one process begins and another one finishes, on disks and in S3."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from awscrt.checksums import crc64nvme

from streamload.errors import SourceError
from streamload.save import Destination, NewFile
from streamload.saving import destination_for
from tests.servers import S3Bucket

NAME = "f.safetensors"
CONTENT = bytes(range(256)) * 100
# Of three parts, and a bit.
PART_BYTES = 8000


@pytest.fixture(params=["disk", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Callable[[], bytes | None]]:
    """A folder, and what reads the file in it."""
    if request.param == "disk":
        path = tmp_path / "made" / NAME
        return str(path.parent), lambda: path.read_bytes() if path.exists() else None
    bucket: S3Bucket = request.getfixturevalue("s3_bucket")
    patch: pytest.MonkeyPatch = request.getfixturevalue("monkeypatch")
    patch.setattr("streamload.save.s3._PART_BYTES", PART_BYTES)
    patch.setattr("streamload.save.s3._LEAST_PART_BYTES", 1)
    patch.setattr("streamload.save.s3._MIB", 1)

    def read() -> bytes | None:
        listed = bucket.client.list_objects_v2(Bucket=bucket.name).get("Contents", ())
        if not listed:
            return None
        content: bytes = bucket.client.get_object(Bucket=bucket.name, Key=f"made/{NAME}")["Body"].read()
        return content

    return f"{bucket.uri}/made", read


def within(uri: str, main: Callable[[Destination], Awaitable[Any]]) -> Any:
    """Do something with a destination of its own, as another process would."""

    async def body() -> Any:
        async with destination_for(uri, 1 << 20) as destination:
            return await main(destination)

    return asyncio.run(body())


async def finished(destination: Destination) -> tuple[NewFile, dict[str, Any]]:
    await destination.claim("lock")
    await destination.prepare(lambda name: name == NAME)
    file = await destination.create(NAME, len(CONTENT))
    await file.write(memoryview(CONTENT))
    await file.finish()
    kept = await file.keep()
    assert kept is not None
    return file, json.loads(json.dumps(kept))


async def kept_and_left(destination: Destination) -> dict[str, Any]:
    file, kept = await finished(destination)
    await file.leave()
    return kept


async def published(destination: Destination) -> dict[str, Any]:
    file, kept = await finished(destination)
    await file.publish()
    return kept


def test_a_finished_file_is_published_by_another(place: tuple[str, Callable[[], bytes | None]]) -> None:
    uri, read = place
    kept = within(uri, kept_and_left)
    assert read() is None

    async def publish(destination: Destination) -> bool:
        await destination.prepare(lambda name: name == NAME, {NAME: kept})
        file = await destination.reopen(NAME, len(CONTENT), kept)
        assert file is not None
        assert not file.published
        await file.publish()
        return file.published

    assert within(uri, publish)
    assert read() == CONTENT


def test_one_that_was_published_meanwhile_is_known_again(place: tuple[str, Callable[[], bytes | None]]) -> None:
    uri, read = place
    kept = within(uri, published)

    async def look(destination: Destination) -> bool:
        file = await destination.reopen(NAME, len(CONTENT), kept)
        assert file is not None
        await file.publish()  # which it is
        await file.leave()
        return file.published

    assert within(uri, look)
    assert read() == CONTENT


def test_one_that_is_gone_or_another_is_not_taken_for_it(place: tuple[str, Callable[[], bytes | None]]) -> None:
    uri, read = place
    kept = within(uri, kept_and_left)

    async def after_another(destination: Destination) -> NewFile | None:
        await destination.prepare(lambda name: name == NAME)  # which clears up
        assert await destination.reopen(NAME, len(CONTENT), kept) is None
        other = await destination.create(NAME, len(CONTENT))
        await other.write(memoryview(CONTENT[::-1]))
        await other.finish()
        await other.publish()
        return await destination.reopen(NAME, len(CONTENT), kept)

    assert within(uri, after_another) is None
    assert read() == CONTENT[::-1]


def test_what_is_discarded_is_gone(place: tuple[str, Callable[[], bytes | None]]) -> None:
    uri, read = place
    kept = within(uri, published)

    async def discard(destination: Destination) -> None:
        file = await destination.reopen(NAME, len(CONTENT), kept)
        assert file is not None
        await file.discard()

    within(uri, discard)
    assert read() is None


def test_a_begun_file_is_gone_on_with_on_a_disk(tmp_path: Path) -> None:
    async def begin(destination: Destination) -> Any:
        await destination.prepare(lambda name: True)
        file = await destination.create(NAME, len(CONTENT))
        await file.write(memoryview(CONTENT)[:1000])
        kept = await file.keep()
        await file.write(memoryview(b"what is written later does not count"))
        await file.leave()
        return kept

    async def end(destination: Destination) -> None:
        sums = [(nbytes, crc64nvme(CONTENT[start : start + nbytes])) for start, nbytes in [(0, 10), (10, 990)]]
        for others in ([], sums[:1], sums[::-1], [*sums, sums[0]], [(1000, 1)]):
            assert await destination.reopen(NAME, len(CONTENT), kept, others) is None
        file = await destination.reopen(NAME, len(CONTENT), kept, sums)
        assert file is not None
        await file.write(memoryview(CONTENT)[1000:])
        await file.finish()
        await file.publish()

    kept = within(str(tmp_path), begin)
    within(str(tmp_path), end)
    assert [path.name for path in tmp_path.iterdir()] == [NAME]
    assert (tmp_path / NAME).read_bytes() == CONTENT


def test_an_upload_that_is_not_finished_cannot_be_kept(s3_bucket: S3Bucket) -> None:
    async def begin(destination: Destination) -> Any:
        file = await destination.create(NAME, len(CONTENT))
        await file.write(memoryview(CONTENT)[:1000])
        kept = await file.keep()
        await file.leave()
        return kept

    assert within(f"{s3_bucket.uri}/made", begin) is None
    assert "Uploads" not in s3_bucket.client.list_multipart_uploads(Bucket=s3_bucket.name)


def test_a_folder_is_claimed_once(tmp_path: Path) -> None:
    async def claim(destination: Destination) -> None:
        await destination.claim("lock")
        async with destination_for(str(tmp_path), 1 << 20) as other:
            with pytest.raises(SourceError, match="another save is writing"):
                await other.claim("lock")

    for _ in range(2):
        within(str(tmp_path), claim)
        assert list(tmp_path.iterdir()) == []
