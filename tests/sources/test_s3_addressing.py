"""What an S3 URI may say beside bucket and key: a version, who pays, an access point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from streamload.checksums import Checksum
from streamload.errors import NotFoundError, OptionError
from streamload.loan import Loan
from streamload.sources import SourceObject, open_source
from streamload.sources.s3 import S3Source
from streamload.testing import run_on_each_loop
from tests.servers import Answer, S3Bucket, serve

_KEY = "llama/model.safetensors"
_ARNS = [
    "arn:aws:s3:us-west-2:123456789012:accesspoint/weights",
    "arn:aws:s3:us-west-2:123456789012:accesspoint:weights",
    "arn:aws:s3::123456789012:accesspoint/mfzwi23gnjvgw.mrap",
    "arn:aws:s3-object-lambda:us-west-2:123456789012:accesspoint/weights",
    "arn:aws:s3-outposts:us-west-2:123456789012:outpost/op-01ac5d28a6a232904/accesspoint/weights",
    "arn:aws:s3-outposts:us-west-2:123456789012:outpost:op-01ac5d28a6a232904:accesspoint:weights",
]


@pytest.fixture(params=["direct", "through aiobotocore"])
def path(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Which way the bytes come; tests say the same of both."""
    if request.param != "direct":
        monkeypatch.setattr("streamload.sources.s3_wire._SIGNATURES", frozenset[str]())
    return str(request.param)


@pytest.fixture
def versioned(s3_bucket: S3Bucket) -> S3Bucket:
    s3_bucket.client.put_bucket_versioning(Bucket=s3_bucket.name, VersioningConfiguration={"Status": "Enabled"})
    return s3_bucket


def _put(bucket: S3Bucket, body: bytes, **more: Any) -> str:
    return str(bucket.client.put_object(Bucket=bucket.name, Key=_KEY, Body=body, **more)["VersionId"])


async def _read(source: S3Source, object: SourceObject) -> bytes:
    memory = bytearray(object.size_bytes)
    await source.read(object, 0, object.size_bytes, Loan([memoryview(memory)]))
    return bytes(memory)


# Versions


def test_each_version_is_read_as_it_was(versioned: S3Bucket, path: str) -> None:
    bodies = [b"old", b"newer", b"newest"]
    ids = [_put(versioned, body) for body in bodies]

    async def body() -> None:
        for version, expected in zip(ids, bodies, strict=True):
            async with S3Source(f"{versioned.uri}/{_KEY}?versionId={version}") as source:
                (object,) = await source.list()
                assert (object.key, object.size_bytes) == ("model.safetensors", len(expected))
                assert await _read(source, object) == expected
                assert version in source.uri

    run_on_each_loop(body)


def test_a_version_stays_when_the_object_is_written_anew_or_removed(versioned: S3Bucket, path: str) -> None:
    async def body() -> None:
        version = _put(versioned, b"pinned")
        async with S3Source(f"{versioned.uri}/{_KEY}?versionId={version}") as source:
            (object,) = await source.list()
            _put(versioned, b"other!")
            assert await _read(source, object) == b"pinned"
            versioned.remove(_KEY)
            assert await _read(source, object) == b"pinned"
            assert await source.stat("model.safetensors") == object

    run_on_each_loop(body)


def test_the_checksum_is_of_the_version(versioned: S3Bucket) -> None:
    async def body() -> None:
        version = _put(versioned, b"pinned", ChecksumAlgorithm="CRC32")
        _put(versioned, b"other!", ChecksumAlgorithm="CRC32")
        async with S3Source(f"{versioned.uri}/{_KEY}?versionId={version}") as source:
            (object,) = await source.list()
            found = await source.checksum(object)
            assert isinstance(found, Checksum)
        with versioned.server.client() as client:
            head = client.head_object(Bucket=versioned.name, Key=_KEY, VersionId=version, ChecksumMode="ENABLED")
        assert found == Checksum.from_base64("CRC32", head["ChecksumCRC32"])

    run_on_each_loop(body)


def test_neighbours_of_a_version_are_at_their_newest(versioned: S3Bucket) -> None:
    version = _put(versioned, b"pinned")
    versioned.put("llama/config.json", b"{}")

    async def body() -> None:
        async with S3Source(f"{versioned.uri}/{_KEY}?versionId={version}") as source:
            assert await _read(source, await source.stat("config.json")) == b"{}"

    run_on_each_loop(body)


def test_a_version_that_there_is_not(versioned: S3Bucket) -> None:
    _put(versioned, b"x")
    unknown = "0" * 32

    async def body() -> None:
        async with S3Source(f"{versioned.uri}/{_KEY}?versionId={unknown}") as source:
            with pytest.raises(NotFoundError, match="the object has no such version") as caught:
                await source.list()
            assert caught.value.object == "model.safetensors"

    run_on_each_loop(body)


def test_a_version_that_is_a_deletion(versioned: S3Bucket) -> None:
    _put(versioned, b"x")
    marker = versioned.client.delete_object(Bucket=versioned.name, Key=_KEY)["VersionId"]

    async def body() -> None:
        async with S3Source(f"{versioned.uri}/{_KEY}?versionId={marker}") as source:
            with pytest.raises(NotFoundError, match="this version marks that the object was deleted"):
                await source.list()

    run_on_each_loop(body)


# URIs


@pytest.mark.parametrize(
    ("query", "cause"),
    [
        ("/llama?versionId=1", "one object"),
        ("/llama/?versionId=1", "one object"),
        ("?versionId=1", "one object"),
        ("/a.safetensors?versionId=", "versionId is ''"),
        ("/a.safetensors?versionId=1&versionId=2", "twice"),
        ("/a.safetensors?requestPayer=me", "requestPayer is 'me'"),
        ("/llama?requestPayer=", "requestPayer is ''"),
    ],
)
def test_options_that_make_no_sense(query: str, cause: str) -> None:
    with pytest.raises(OptionError, match=cause) as caught:
        open_source(f"s3://bucket{query}")
    assert caught.value.uri is not None


@pytest.mark.parametrize(
    "uri",
    [
        "s3://arn:aws:s3:us-west-2:123456789012:bucket/weights",
        "s3://arn:aws:s3:us-west-2:12345:accesspoint/weights",
        "s3://arn:aws:s3:us-west-2:123456789012:accesspoint",
        "s3://arn:aws:s3:us-west-2:123456789012:accesspoint/",
        "s3://arn:aws:s3-outposts:us-west-2:123456789012:outpost/op-1/bucket/weights",
        "s3://arn:aws:iam::123456789012:role/weights",
        "s3://arn:",
    ],
)
def test_arns_that_are_no_access_point(uri: str) -> None:
    with pytest.raises(OptionError, match="not the ARN of an access point"):
        open_source(uri)


@pytest.mark.parametrize(
    "key",
    ["what?.safetensors", "?", "a?versionid=1", "a?versionId=1&x=2", "a?b=c", "a?versionId=1/b", "a?versionId=1?b"],
)
def test_any_other_question_mark_belongs_to_the_key(s3_bucket: S3Bucket, path: str, key: str) -> None:
    name = key.rpartition("/")[2].removesuffix(".safetensors") + ".safetensors"
    folder = f"{key}/"
    s3_bucket.put(folder + name, b"literal")

    async def body() -> None:
        for uri in (f"{s3_bucket.uri}/{key}/", f"{s3_bucket.uri}/{folder}{name}"):
            async with S3Source(uri) as source:
                (object,) = await source.list()
                assert await _read(source, object) == b"literal"

    run_on_each_loop(body)


# What the requests say


def _listing(prefix: str) -> Answer:
    entry = f"<Contents><Key>{prefix}a</Key><Size>10</Size><ETag>x</ETag></Contents>"
    return Answer(200, {"Content-Type": "application/xml"}, f"<ListBucketResult>{entry}</ListBucketResult>".encode())


_HEAD = Answer(200, {"ETag": "x", "Content-Length": "10"})
_RANGE = Answer(206, {"ETag": "x", "Content-Range": "bytes 0-9/10"}, b"0123456789")


@pytest.fixture
def keys(clean_aws_env: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    clean_aws_env.setenv("AWS_ACCESS_KEY_ID", "key")
    clean_aws_env.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    clean_aws_env.setenv("AWS_REGION", "us-east-1")
    return clean_aws_env


@pytest.mark.parametrize(
    ("uri", "answers", "payer", "version"),
    [
        ("s3://bucket/llama?requestPayer=requester", [_listing("llama/"), _RANGE, _HEAD], True, None),
        ("s3://bucket?requestPayer=requester", [_listing(""), _RANGE, _HEAD], True, None),
        ("s3://bucket/a.safetensors?requestPayer=requester", [_HEAD, _RANGE, _HEAD], True, None),
        ("s3://bucket/a.safetensors?versionId=v.1_-", [_HEAD, _RANGE, _HEAD], False, "v.1_-"),
        ("s3://bucket/a.safetensors?versionId=v1&requestPayer=requester", [_HEAD, _RANGE, _HEAD], True, "v1"),
        ("s3://bucket/a.safetensors?requestPayer=requester&versionId=v1", [_HEAD, _RANGE, _HEAD], True, "v1"),
        ("s3://bucket/a.safetensors", [_HEAD, _RANGE, _HEAD], False, None),
    ],
)
def test_every_request_says_which_version_and_who_pays(
    keys: pytest.MonkeyPatch, path: str, uri: str, answers: list[Answer], payer: bool, version: str | None
) -> None:
    async def body() -> None:
        async with serve(*answers) as server:
            keys.setenv("AWS_ENDPOINT_URL", server.endpoint)
            async with S3Source(uri) as source:
                (object,) = await source.list()
                assert await _read(source, object) == b"0123456789"
                await source.checksum(object)
            assert len(server.requests) == 3
            for request in server.requests:
                head = request.lower()
                assert ("\r\nx-amz-request-payer: requester\r\n" in head) is payer
                signed = next(line for line in head.split("\r\n") if line.startswith("authorization:"))
                assert ("x-amz-request-payer" in signed) is payer
                where = request.split()[1]
                assert where.partition("?")[2] == ("" if version is None else f"versionId={version}") or (
                    version is None and "list-type=2" in where
                )
            assert "\r\nif-match: x\r\n" in server.requests[1].lower()

    run_on_each_loop(body)


class _Seen(Exception):
    """Ends a request that would leave this machine."""


@pytest.fixture
def seen(keys: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """The URL and the signature of each request that is ready to be sent by either way; none is."""
    from aiobotocore.httpsession import AIOHTTPSession

    from streamload.wire import Pool

    requests: list[tuple[str, str]] = []

    async def send(_: Any, request: Any) -> None:
        requests.append((request.url, request.headers["Authorization"].decode()))
        raise _Seen

    async def ask(pool: Pool, request: bytes, *_: Any) -> None:
        lines = request.decode().split("\r\n")
        signature = next(line for line in lines if line.startswith("Authorization: "))
        requests.append((f"https://{pool.name.removesuffix(':443')}{lines[0].split()[1]}", signature))
        raise _Seen

    keys.setattr(AIOHTTPSession, "send", send)
    keys.setattr(Pool, "ask", ask)
    return requests


async def _see(call: Callable[[], Any]) -> None:
    with pytest.raises(_Seen):
        await call()


@pytest.mark.parametrize("arn", _ARNS)
@pytest.mark.parametrize("query", ["", "?requestPayer=requester"])
def test_an_access_point_stands_in_the_buckets_place(
    seen: list[tuple[str, str]], path: str, arn: str, query: str
) -> None:
    async def body() -> None:
        seen.clear()
        async with S3Source(f"s3://{arn}/llama/a b{query}") as source:
            await _see(source.list)
            await _see(lambda: source.stat("x.safetensors"))
            await _see(
                lambda: source.read(SourceObject("x.safetensors", 4, "x"), 0, 4, Loan([memoryview(bytearray(4))]))
            )
            assert source.uri.startswith(f"s3://{arn}/llama/a b")
        host = {url.split("/")[2] for url, _ in seen}
        assert len(host) == 1
        assert host.pop().startswith(("weights-123456789012.", "mfzwi23gnjvgw.mrap."))
        assert "prefix=llama%2Fa%20b%2F" in seen[0][0]
        assert [url.split("/", 3)[3] for url, _ in seen[1:]] == ["llama/a%20b/x.safetensors"] * 2
        for _, signature in seen:
            service = arn.split(":")[2]
            # Those that are everywhere are signed for no region in particular, with an elliptic curve.
            everywhere = service == "s3-outposts" or "mrap" in arn
            region = "" if everywhere else f"{arn.split(':')[3]}/"
            assert f"/{region}{service}/aws4_request" in signature, "not the region that the environment names"

    run_on_each_loop(body)


@pytest.mark.parametrize("arn", _ARNS)
def test_an_access_point_has_a_root_and_objects(seen: list[tuple[str, str]], arn: str) -> None:
    async def body() -> None:
        seen.clear()
        for uri in (f"s3://{arn}", f"s3://{arn}/", f"s3://{arn}/a.safetensors"):
            async with S3Source(uri) as source:
                await _see(source.list)
        assert "prefix=&" in seen[0][0] or seen[0][0].endswith("prefix=")
        assert seen[0][0] == seen[1][0]
        assert seen[2][0].endswith(".com/a.safetensors")

    run_on_each_loop(body)
