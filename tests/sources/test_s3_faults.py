"""S3 with a server that answers badly, and what is left of the connection and of the lent memory then."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Protocol

import pytest

from streamload.errors import (
    AccessError,
    CredentialsError,
    NotFoundError,
    ObjectChangedError,
    SourceError,
    TransientError,
    TruncatedReadError,
)
from streamload.loan import Loan
from streamload.sources import SourceObject
from streamload.sources.s3 import S3Source
from streamload.testing import run_on_each_loop
from tests.servers import Answer, BadServer, serve

_TAG = '"0123"'
_OBJECT = SourceObject("model.safetensors", 1000, _TAG)
_RANGE = {"ETag": _TAG, "Content-Range": "bytes 100-199/1000"}
_GOOD = Answer(206, _RANGE, b"x" * 100)

Body = Callable[[S3Source, BadServer], Awaitable[None]]


class Run(Protocol):
    """Runs a function with a source that asks a server which gives these answers."""

    def __call__(self, answers: list[Answer], body: Body, read_timeout_s: float = 20.0) -> None: ...


@pytest.fixture(params=["direct", "through aiobotocore"])
def run(clean_aws_env: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Run:
    if request.param != "direct":
        # As where requests are signed in a way of their own: whatever happens, the outcome is the same.
        clean_aws_env.setattr("streamload.sources.s3_wire._SIGNATURES", frozenset[str]())
    clean_aws_env.setenv("AWS_ACCESS_KEY_ID", "key")
    clean_aws_env.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    clean_aws_env.setenv("AWS_REGION", "us-east-1")

    def run(answers: list[Answer], body: Body, read_timeout_s: float = 20.0) -> None:
        async def served() -> None:
            async with serve(*answers) as server:
                clean_aws_env.setenv("AWS_ENDPOINT_URL", server.endpoint)
                async with S3Source("s3://bucket/llama", read_timeout_s=read_timeout_s) as source:
                    await body(source, server)

        run_on_each_loop(served)

    return run


def _read(source: S3Source, memory: bytearray) -> Coroutine[None, None, None]:
    return source.read(_OBJECT, 100, 200, Loan([memoryview(memory)]))


def _error(status: int, code: str, message: str = "Said so.") -> Answer:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>"
    return Answer(status, {"Content-Type": "application/xml"}, body.encode())


def test_a_read_asks_for_one_range_of_one_version(run: Run) -> None:
    async def body(source: S3Source, server: BadServer) -> None:
        for _ in range(3):
            memory = bytearray(100)
            await _read(source, memory)
            assert memory == b"x" * 100
        head = server.requests[0].lower()
        assert head.startswith("get /bucket/llama/model.safetensors ")
        assert "\r\nrange: bytes=100-199\r\n" in head
        assert f"\r\nif-match: {_TAG}\r\n" in head
        assert "\r\nauthorization: aws4-hmac-sha256 " in head
        assert server.connections == 1, "a body that was read to its end leaves its connection for the next"
        assert source.requests == len(server.requests) == 3

    run([_GOOD], body)


@pytest.mark.parametrize("arrived", [0, 1, 40, 99])
@pytest.mark.parametrize("then", ["close", "reset"])
def test_a_body_that_ends_early(run: Run, arrived: int, then: str) -> None:
    headers = {**_RANGE, "Content-Length": "100"}
    broken = Answer(206, headers, b"x" * arrived, then="close" if then == "close" else "reset")

    async def body(source: S3Source, server: BadServer) -> None:
        memory = bytearray(100)
        with pytest.raises(TransientError) as caught:
            await _read(source, memory)
        error = caught.value
        assert (error.object, error.start, error.end) == (_OBJECT.key, 100, 200)
        assert memory.count(b"x") == error.valid_bytes
        if then == "close":
            assert isinstance(error, TruncatedReadError)
            assert error.valid_bytes == arrived
        else:
            # A reset throws away what the client has not taken yet.
            assert error.valid_bytes <= arrived
        await _read(source, memory)
        assert server.connections == 2

    run([broken, _GOOD], body)


def test_a_body_without_a_length_that_ends_early(run: Run) -> None:
    chunked = {**_RANGE, "Transfer-Encoding": "chunked"}
    body_of_40 = b"28\r\n" + b"x" * 40 + b"\r\n0\r\n\r\n"

    async def body(source: S3Source, server: BadServer) -> None:
        with pytest.raises(TruncatedReadError, match="40 of 100 bytes") as caught:
            await _read(source, bytearray(100))
        assert caught.value.valid_bytes == 40

    run([Answer(206, chunked, body_of_40)], body)


def test_more_bytes_than_asked_for(run: Run) -> None:
    async def body(source: S3Source, server: BadServer) -> None:
        memory = bytearray(110)
        loan = Loan([memoryview(memory)[:100]])
        with pytest.raises(
            SourceError, match=r"more bytes than were asked for|asked for 100 bytes; the length of its answer is 110"
        ) as caught:
            await source.read(_OBJECT, 100, 200, loan)
        assert not caught.value.retryable
        assert memory[100:] == bytes(10)

    run([Answer(206, _RANGE, b"x" * 110)], body)


@pytest.mark.parametrize(
    ("answer", "kind", "cause"),
    [
        (Answer(200, {"ETag": _TAG}, b"x" * 1000), SourceError, "ignores ranges"),
        (Answer(206, {"ETag": _TAG}, b"x" * 100), SourceError, "the answer has None"),
        (Answer(206, {**_RANGE, "Content-Range": "bytes 0-99/1000"}, b"x" * 100), SourceError, "bytes 0-99/1000"),
        (Answer(206, {**_RANGE, "Content-Range": "bytes 100-199/999"}, b"x" * 100), SourceError, "100-199/999"),
        (Answer(206, {**_RANGE, "ETag": '"4567"'}, b"x" * 100), ObjectChangedError, "4567"),
        (Answer(206, {"Content-Range": "bytes 100-199/1000"}, b"x" * 100), SourceError, "no ETag"),
        (Answer(204, {"ETag": _TAG}), SourceError, "204"),
        (_error(404, "NoSuchKey"), NotFoundError, "no such object"),
        (_error(404, "NoSuchBucket"), NotFoundError, "no bucket 'bucket'"),
        (_error(403, "AccessDenied"), AccessError, "403 AccessDenied: Said so."),
        (_error(403, "AllAccessDisabled"), AccessError, "AllAccessDisabled"),
        (_error(403, "RequestTimeTooSkewed"), SourceError, "clock"),
        (_error(403, "InvalidObjectState"), SourceError, "archived"),
        (_error(400, "ExpiredToken"), CredentialsError, "ExpiredToken"),
        (_error(400, "RequestTimeout"), TransientError, "RequestTimeout"),
        (_error(400, "InvalidArgument"), SourceError, "InvalidArgument"),
        (_error(416, "InvalidRange"), SourceError, "InvalidRange"),
        (_error(500, "InternalError"), TransientError, "InternalError"),
        (_error(501, "NotImplemented"), SourceError, "NotImplemented"),
        (_error(503, "SlowDown"), TransientError, "SlowDown"),
        (Answer(503, {}, b"<html>busy</html>"), TransientError, "503"),
        (Answer(502), TransientError, "502"),
        (Answer(429), TransientError, "429"),
        (Answer(403), AccessError, "403"),
        (Answer(401), CredentialsError, "401"),
        (Answer(405), SourceError, "405"),
    ],
)
def test_answers_that_are_no_range_of_the_object(run: Run, answer: Answer, kind: type[SourceError], cause: str) -> None:
    async def body(source: S3Source, server: BadServer) -> None:
        memory = bytearray(100)
        with pytest.raises(SourceError, match=cause) as caught:
            await _read(source, memory)
        error = caught.value
        assert type(error) is kind
        assert (error.uri, error.object) == ("s3://bucket/llama", _OBJECT.key)
        assert (error.start, error.end, error.valid_bytes) == (100, 200, 0)
        assert not any(memory)
        assert len(server.requests) == source.requests == 1, "retrying is not the source's business"
        await _read(source, memory)
        assert memory == b"x" * 100

    run([answer, _GOOD], body)


def test_the_whole_object_is_a_good_answer_to_a_range_that_is_all_of_it(run: Run) -> None:
    async def body(source: S3Source, server: BadServer) -> None:
        memory = bytearray(1000)
        await source.read(_OBJECT, 0, 1000, Loan([memoryview(memory)]))
        assert memory == b"y" * 1000

    run([Answer(200, {"ETag": "0123"}, b"y" * 1000)], body)


@pytest.mark.parametrize("arrived", [0, 40])
def test_a_server_that_falls_silent(run: Run, arrived: int) -> None:
    silent = Answer(206, {**_RANGE, "Content-Length": "100"}, b"x" * arrived, then="hang")

    async def body(source: S3Source, server: BadServer) -> None:
        with pytest.raises(TransientError, match=r"127\.0\.0\.1:\d+ sent nothing for (too long|0\.2 s)") as caught:
            await _read(source, bytearray(100))
        assert caught.value.valid_bytes in {0, arrived}

    run([silent], body, read_timeout_s=0.2)


def test_a_cancelled_read_gives_up_its_connection(run: Run) -> None:
    silent = Answer(206, {**_RANGE, "Content-Length": "100"}, b"x" * 40, then="hang")

    async def body(source: S3Source, server: BadServer) -> None:
        memory = bytearray(100)
        reading = asyncio.create_task(_read(source, memory))
        await server.asked.wait()
        reading.cancel()
        with pytest.raises(asyncio.CancelledError):
            await reading
        after = bytearray(100)
        await _read(source, after)
        assert after == b"x" * 100
        assert server.connections == 2

    run([silent, _GOOD], body)


def test_an_answer_that_is_no_http(run: Run) -> None:
    async def body(source: S3Source, server: BadServer) -> None:
        with pytest.raises(SourceError):
            await _read(source, bytearray(100))
        await _read(source, bytearray(100))

    run([Answer(206, {"Content-Length": "many"}, then="close"), _GOOD], body)


def test_a_listing_that_is_no_listing(run: Run) -> None:
    async def body(source: S3Source, server: BadServer) -> None:
        with pytest.raises(SourceError):
            await source.list()

    run([Answer(200, {"Content-Type": "application/xml"}, b"<html>hello")], body)


@pytest.mark.parametrize("content", ["<Key>llama/a</Key><Size>1</Size>", "<Key>llama/a</Key><ETag>x</ETag>"])
def test_a_listing_that_pins_nothing(run: Run, content: str) -> None:
    listing = f"<ListBucketResult><Contents>{content}</Contents></ListBucketResult>"

    async def body(source: S3Source, server: BadServer) -> None:
        with pytest.raises(SourceError, match="no size or no ETag") as caught:
            await source.list()
        assert caught.value.object == "a"

    run([Answer(200, {"Content-Type": "application/xml"}, listing.encode())], body)


def test_a_listing_without_end(run: Run) -> None:
    listing = (
        b"<ListBucketResult><IsTruncated>true</IsTruncated><NextContinuationToken>x</NextContinuationToken>"
        b"<Contents><Key>llama/a</Key><ETag>x</ETag><Size>1</Size></Contents></ListBucketResult>"
    )

    async def body(source: S3Source, server: BadServer) -> None:
        with pytest.raises(SourceError, match="this is no checkpoint"):
            await source.list()
        assert source.requests == 100

    run([Answer(200, {"Content-Type": "application/xml"}, listing)], body)


def test_a_refused_head_is_asked_again_for_its_reason(run: Run) -> None:
    async def body(source: S3Source, server: BadServer) -> None:
        with pytest.raises(CredentialsError, match="ExpiredToken"):
            await source.stat("a")
        # The one in between is botocore's, which asks whether the bucket has moved.
        assert [request.split()[0] for request in server.requests] == ["HEAD", "HEAD", "GET"]
        assert source.requests == 3

    run([Answer(400), Answer(400), _error(400, "ExpiredToken")], body)


def test_a_refused_head_whose_object_has_come_since(run: Run) -> None:
    async def body(source: S3Source, server: BadServer) -> None:
        assert (await source.stat("a")).size_bytes == 1
        with pytest.raises(NotFoundError):
            await source.stat("a")
        assert [request.split()[0] for request in server.requests] == ["HEAD", "GET", "HEAD"] * 2

    here = Answer(206, {"ETag": _TAG, "Content-Range": "bytes 0-0/1"}, b"x")
    run([Answer(404), here, Answer(200, {"ETag": _TAG, "Content-Length": "1"}), Answer(404), here, Answer(404)], body)


def test_a_busy_server_is_not_asked_why(run: Run) -> None:
    async def body(source: S3Source, server: BadServer) -> None:
        with pytest.raises(TransientError, match="503"):
            await source.stat("a")
        assert len(server.requests) == 1

    run([Answer(503)], body)


# Which way the bytes come


def test_the_report_knows_which_way_the_bytes_came(run: Run) -> None:
    async def body(source: S3Source, server: BadServer) -> None:
        await _read(source, bytearray(100))
        (path,) = source.paths
        assert source.paths == {path: 100}
        assert path in {
            "from the socket into place",
            "through aiobotocore: requests are signed in another way (s3v4)",
        }

    run([Answer(206, _RANGE, b"x" * 100)], body)


def test_a_proxy_is_left_to_aiobotocore(clean_aws_env: pytest.MonkeyPatch) -> None:
    clean_aws_env.setenv("AWS_ACCESS_KEY_ID", "key")
    clean_aws_env.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    clean_aws_env.setenv("AWS_REGION", "us-east-1")
    clean_aws_env.setenv("AWS_ENDPOINT_URL", "http://store.invalid")

    async def body() -> None:
        async with serve(Answer(206, _RANGE, b"x" * 100)) as proxy:
            clean_aws_env.setenv("HTTP_PROXY", proxy.endpoint)
            async with S3Source("s3://bucket/llama") as source:
                memory = bytearray(100)
                await _read(source, memory)
                assert memory == b"x" * 100
                assert source.paths == {"through aiobotocore: a proxy is configured": 100}
                assert proxy.requests[0].startswith("GET http://store.invalid/bucket/llama/model.safetensors ")

    run_on_each_loop(body)


def test_an_answer_of_unknown_length_is_asked_for_again_the_plain_way(
    clean_aws_env: pytest.MonkeyPatch, run: Run
) -> None:
    chunked = Answer(206, {**_RANGE, "Transfer-Encoding": "chunked"}, b"64\r\n" + b"x" * 100 + b"\r\n0\r\n\r\n")

    async def body(source: S3Source, server: BadServer) -> None:
        for _ in range(3):
            memory = bytearray(100)
            await _read(source, memory)
            assert memory == b"x" * 100
        assert len(server.requests) <= 4, "what was found out once is not tried again"
        assert all(path.startswith("through aiobotocore") for path in source.paths)

    run([chunked] * 4, body)


def test_redirects_in_circles_end(run: Run) -> None:
    async def body(source: S3Source, server: BadServer) -> None:
        with pytest.raises(SourceError, match="redirects without end"):
            await _read(source, bytearray(100))

    run([_error(301, "PermanentRedirect")] * 2000, body)
