"""S3 with a real server that checks credentials: places, listings, refusals."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable

import pytest

from streamload.errors import (
    AccessError,
    ClosedError,
    CredentialsError,
    NotFoundError,
    ObjectChangedError,
    OptionError,
    SourceError,
    StreamloadError,
    TransientError,
)
from streamload.loan import Loan
from streamload.sources import Source, SourceObject, open_source
from streamload.sources.s3 import S3Source
from streamload.testing import run_on_each_loop
from streamload.testing.s3server import S3Server
from tests.servers import S3Bucket

_KEY = "model.safetensors"


def _loan(nbytes: int) -> Loan:
    return Loan([memoryview(bytearray(nbytes))])


async def _read(source: Source, object: SourceObject) -> bytes:
    memory = bytearray(object.size_bytes)
    await source.read(object, 0, object.size_bytes, Loan([memoryview(memory)]))
    return bytes(memory)


@pytest.mark.parametrize("path", ["/llama", "/llama/"])
def test_a_prefix_is_a_folder(s3_bucket: S3Bucket, path: str) -> None:
    for key in ("llama/a", "llama/b", "llama/", "llama/deeper/c", "llama-2/d", "llamas"):
        s3_bucket.put(key, b"" if key.endswith("/") else key.encode())

    async def body() -> None:
        async with S3Source(s3_bucket.uri + path) as source:
            objects = await source.list()
            assert [object.key for object in objects] == ["a", "b"]
            assert source.requests == 1
            assert await _read(source, objects[1]) == b"llama/b"
            assert source.requests == 2
            assert (await source.stat("deeper/c")).size_bytes == 14

    run_on_each_loop(body)


@pytest.mark.parametrize("path", ["", "/"])
def test_the_root_of_a_bucket(s3_bucket: S3Bucket, path: str) -> None:
    s3_bucket.put(_KEY, b"root")
    s3_bucket.put("llama/" + _KEY, b"deeper")

    async def body() -> None:
        async with S3Source(s3_bucket.uri + path) as source:
            (object,) = await source.list()
            assert object.key == _KEY
            assert await _read(source, object) == b"root"

    run_on_each_loop(body)


@pytest.mark.parametrize("folder", ["", "a folder/deeper/"])
def test_one_object_and_its_neighbours(s3_bucket: S3Bucket, folder: str) -> None:
    s3_bucket.put(folder + _KEY, b"0123456789")
    s3_bucket.put(folder + "config.json", b"{}")

    async def body() -> None:
        async with S3Source(f"{s3_bucket.uri}/{folder}{_KEY}") as source:
            (object,) = await source.list()
            assert (object.key, object.size_bytes) == (_KEY, 10)
            assert source.requests == 1
            assert await _read(source, object) == b"0123456789"
            assert (await source.stat("config.json")).size_bytes == 2

    run_on_each_loop(body)


def test_a_listing_of_more_than_a_page(s3_bucket: S3Bucket) -> None:
    keys = [f"{n:04}" for n in range(1005)]
    for key in keys:
        s3_bucket.put(f"many/{key}", b"x")

    async def body() -> None:
        async with S3Source(f"{s3_bucket.uri}/many") as source:
            assert [object.key for object in await source.list()] == keys
            assert source.requests == 2

    run_on_each_loop(body)


def test_both_versions_are_named_when_the_one_pinned_is_gone(s3_bucket: S3Bucket) -> None:
    async def body() -> None:
        s3_bucket.put(_KEY, b"old")
        async with S3Source(s3_bucket.uri) as source:
            (object,) = await source.list()
            s3_bucket.put(_KEY, b"new")
            new = (await source.stat(_KEY)).version
            for call in (source.read(object, 0, 3, _loan(3)), source.checksum(object)):
                with pytest.raises(ObjectChangedError) as caught:
                    await call
                assert caught.value.cause == f"the object is now version {new}; the one seen first was {object.version}"
                assert caught.value.uri == s3_bucket.uri
            s3_bucket.remove(_KEY)

    run_on_each_loop(body)


@pytest.mark.parametrize(
    "call",
    [
        lambda source: source.list(),
        lambda source: source.stat(_KEY),
        lambda source: source.read(SourceObject(_KEY, 10, '"tag"'), 0, 10, _loan(10)),
    ],
    ids=["list", "stat", "read"],
)
@pytest.mark.parametrize("path", ["", "/folder", f"/{_KEY}"])
def test_a_missing_bucket_is_told_from_a_missing_object(
    aws_env: S3Server, path: str, call: Callable[[S3Source], asyncio.Future[None]]
) -> None:
    async def body() -> None:
        async with S3Source(f"s3://no-such-bucket{path}") as source:
            with pytest.raises(NotFoundError, match="there is no bucket 'no-such-bucket'"):
                await call(source)

    run_on_each_loop(body)


def test_a_missing_object(s3_bucket: S3Bucket) -> None:
    async def body() -> None:
        async with S3Source(f"{s3_bucket.uri}/folder/{_KEY}") as source:
            for call in (source.list(), source.stat(_KEY)):
                with pytest.raises(NotFoundError, match="no such object") as caught:
                    await call
                assert caught.value.object == _KEY

    run_on_each_loop(body)


@pytest.mark.parametrize("path", ["", f"/{_KEY}"])
@pytest.mark.parametrize("variable", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"])
def test_wrong_keys(s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch, path: str, variable: str) -> None:
    s3_bucket.put(_KEY, b"x")
    monkeypatch.setenv(variable, "AKIAWRONGWRONGWRONG1")

    async def body() -> None:
        async with S3Source(s3_bucket.uri + path) as source:
            with pytest.raises(CredentialsError, match=r"InvalidAccessKeyId|SignatureDoesNotMatch") as caught:
                await source.list()
            assert s3_bucket.server.secret_key not in str(caught.value)
            assert "AKIAWRONG" not in str(caught.value)
            facts = await source.describe()
            assert facts["answer"].startswith("403 ")

    run_on_each_loop(body)


def test_a_user_without_permission(s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    s3_bucket.put(_KEY, b"x")
    with s3_bucket.server.client("iam") as iam:
        iam.create_user(UserName=f"nobody-{s3_bucket.name}")
        key = iam.create_access_key(UserName=f"nobody-{s3_bucket.name}")["AccessKey"]
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", key["AccessKeyId"])
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", key["SecretAccessKey"])

    async def body() -> None:
        for path in ("", f"/{_KEY}"):
            async with S3Source(s3_bucket.uri + path) as source:
                with pytest.raises(AccessError, match="AccessDenied") as caught:
                    await source.list()
                assert type(caught.value) is AccessError

    run_on_each_loop(body)


def test_no_credentials(clean_aws_env: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with S3Source("s3://bucket/llama") as source:
            for call in (source.list(), source.stat(_KEY)):
                with pytest.raises(CredentialsError, match=r"no AWS credentials were found: .*s3_anonymous=True"):
                    await call
            assert source.requests == 0
            assert (await source.describe())["credentials"].startswith("none: ")

    run_on_each_loop(body)


@pytest.mark.parametrize("keys", [True, False])
def test_without_credentials_a_public_bucket_is_read_and_no_other(
    s3_bucket: S3Bucket, clean_aws_env: pytest.MonkeyPatch, keys: bool
) -> None:
    s3_bucket.put(_KEY, b"0123456789")
    statement = {"Effect": "Allow", "Principal": "*", "Action": "*", "Resource": f"arn:aws:s3:::{s3_bucket.name}*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    s3_bucket.client.delete_public_access_block(Bucket=s3_bucket.name)
    if not keys:
        clean_aws_env.delenv("AWS_ACCESS_KEY_ID")
        clean_aws_env.delenv("AWS_SECRET_ACCESS_KEY")

    async def body() -> None:
        async with S3Source(s3_bucket.uri, s3_anonymous=True) as source:
            for call in (source.list, lambda: source.stat(_KEY)):
                with pytest.raises(AccessError, match="AccessDenied"):
                    await call()
        s3_bucket.client.put_bucket_policy(Bucket=s3_bucket.name, Policy=policy)
        async with open_source(s3_bucket.uri, s3_anonymous=True) as source:
            (object,) = await source.list()
            assert await source.stat(_KEY) == object
            for _ in range(2):
                assert await _read(source, object) == b"0123456789"
            assert source.paths == {"from the socket into place": 20}
            assert (await source.describe())["credentials"] == "none, as asked for"
        s3_bucket.client.delete_bucket_policy(Bucket=s3_bucket.name)

    run_on_each_loop(body)


def test_no_credentials_and_no_instance_that_has_a_role(clean_aws_env: pytest.MonkeyPatch) -> None:
    clean_aws_env.delenv("AWS_EC2_METADATA_DISABLED")
    clean_aws_env.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", "http://127.0.0.1:1")

    async def body() -> None:
        async with S3Source("s3://bucket/llama") as source:
            with pytest.raises(CredentialsError, match="no AWS credentials were found"):
                await source.list()

    run_on_each_loop(body)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AWS_PROFILE", "no-such-profile"),
        ("AWS_SECRET_ACCESS_KEY", ""),
    ],
)
def test_half_a_configuration(clean_aws_env: pytest.MonkeyPatch, name: str, value: str) -> None:
    clean_aws_env.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONGWRONGWRONG1")
    clean_aws_env.setenv(name, value)

    async def body() -> None:
        async with S3Source("s3://bucket/llama") as source:
            with pytest.raises(CredentialsError):
                await source.list()

    run_on_each_loop(body)


def _with_keys(env: pytest.MonkeyPatch, endpoint: str) -> None:
    env.setenv("AWS_ACCESS_KEY_ID", "AKIAWRONGWRONGWRONG1")
    env.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    env.setenv("AWS_REGION", "us-east-1")
    env.setenv("AWS_ENDPOINT_URL", endpoint)


@pytest.mark.parametrize("host", ["127.0.0.1:1", "no-such-host.invalid"])
def test_nobody_listens(clean_aws_env: pytest.MonkeyPatch, host: str) -> None:
    _with_keys(clean_aws_env, f"http://{host}")

    async def body() -> None:
        async with S3Source("s3://bucket/llama") as source:
            with pytest.raises(TransientError, match=f"cannot reach {host}"):
                await source.list()
            facts = await source.describe()
            assert facts["answer"].startswith(f"none: cannot reach {host}")
            assert facts["endpoint"] == f"http://{host}"

    run_on_each_loop(body)


def test_an_endpoint_with_a_password_is_refused_without_showing_it(clean_aws_env: pytest.MonkeyPatch) -> None:
    _with_keys(clean_aws_env, "http://user:password@127.0.0.1:1")

    async def body() -> None:
        async with S3Source("s3://bucket/llama") as source:
            with pytest.raises(SourceError) as caught:
                await source.list()
            assert not caught.value.retryable
            assert "password" not in f"{caught.value} {await source.describe()}"

    run_on_each_loop(body)


def test_an_endpoint_that_is_no_url(clean_aws_env: pytest.MonkeyPatch) -> None:
    _with_keys(clean_aws_env, "nonsense")

    async def body() -> None:
        async with S3Source("s3://bucket/llama") as source:
            with pytest.raises(SourceError, match="nonsense") as caught:
                await source.list()
            assert not caught.value.retryable

    run_on_each_loop(body)


def test_describes_where_it_asks_and_as_whom(s3_bucket: S3Bucket) -> None:
    async def body() -> None:
        async with S3Source(s3_bucket.uri) as source:
            facts = await source.describe()
            offset, unit = facts.pop("clock offset").split()
            assert abs(int(offset)) < 30
            assert unit == "s"
            assert facts == {
                "endpoint": s3_bucket.server.endpoint,
                "region": "us-east-1",
                "credentials": "env",
                "addressing": "path",
                "answer": "200",
            }

    run_on_each_loop(body)


def test_many_first_uses_make_one_client(s3_bucket: S3Bucket) -> None:
    s3_bucket.put(_KEY, b"x")

    async def body() -> None:
        async with S3Source(s3_bucket.uri) as source:
            calls = [asyncio.create_task(source.stat(_KEY)) for _ in range(10)]
            await asyncio.sleep(0)
            calls[0].cancel()
            found = await asyncio.gather(*calls, return_exceptions=True)
            assert isinstance(found[0], asyncio.CancelledError)
            assert len({object for object in found[1:] if isinstance(object, SourceObject)}) == 1

    run_on_each_loop(body)


def test_a_closed_source_makes_no_client(s3_bucket: S3Bucket) -> None:
    async def body() -> None:
        source = S3Source(s3_bucket.uri)
        await source.aclose()
        object = SourceObject(_KEY, 1, '"tag"')
        for call in (source.list(), source.stat(_KEY), source.read(object, 0, 1, _loan(1)), source.describe()):
            with pytest.raises(ClosedError):
                await call
        assert source.requests == 0

    run_on_each_loop(body)


@pytest.mark.parametrize("uri", ["s3://", "s3:///key", "s3://AKIAX:secret@bucket/key"])
def test_uris_that_make_no_sense(uri: str) -> None:
    with pytest.raises(OptionError) as caught:
        S3Source(uri)
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("name", ["my bucket", "bücket", "a\nb", "a%20b", "a" * 256, "b&c"])
@pytest.mark.parametrize("path", ["", "/llama", "/a.safetensors"])
def test_names_that_no_bucket_can_have(name: str, path: str) -> None:
    with pytest.raises(OptionError, match="cannot be a bucket's name: those have letters, digits") as caught:
        S3Source(f"s3://{name}{path}")
    assert repr(name) in caught.value.cause


@pytest.mark.parametrize(
    ("keys", "cause"),
    [
        ([], "there are no objects under this prefix"),
        (["llama-2/a"], "there are no objects under this prefix"),
        (["llama/"], "there are no objects under this prefix"),
        (["llama/1b/a", "llama/7b/a/b"], "there are no objects under this prefix, only folders: 1b/, 7b/"),
        ([f"llama/{n}/a" for n in range(7)], "under this prefix, only folders: 0/, 1/, 2/, 3/, 4/, …"),
    ],
)
def test_folders_are_named_where_there_is_nothing_else(s3_bucket: S3Bucket, keys: list[str], cause: str) -> None:
    for key in keys:
        s3_bucket.put(key, b"" if key.endswith("/") else b"x")

    async def body() -> None:
        async with S3Source(f"{s3_bucket.uri}/llama") as source:
            with pytest.raises(NotFoundError) as caught:
                await source.list()
            assert caught.value.cause.endswith(cause)

    run_on_each_loop(body)


@pytest.mark.parametrize("uri", ["s3://not_a_bucket_/llama", "s3://ab/llama"])
def test_buckets_that_cannot_be(aws_env: S3Server, uri: str) -> None:
    async def body() -> None:
        async with S3Source(uri) as source:
            with pytest.raises(StreamloadError) as caught:
                await source.list()
            assert not caught.value.retryable

    run_on_each_loop(body)
