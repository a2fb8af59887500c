"""S3 with a server whose answers make no sense: whatever they hold, what comes out is one of our errors.

Invariant: a call returns what the answer says, or raises `SourceError`; never another exception, never more memory than
an answer of S3's could need, and nothing of an answer gets into the head of another request.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamload.errors import AccessError, ObjectChangedError, SourceError, TransientError
from streamload.loan import Loan
from streamload.sources import SourceObject
from streamload.sources.s3 import S3Source
from streamload.sources.s3_answers import parse_refusal
from streamload.testing import run_on_each_loop
from tests.servers import Answer, BadServer, serve

_OBJECT = SourceObject("a", 1000, '"0123"')
_MIB = 1 << 20

Body = Callable[[S3Source, BadServer], Awaitable[None]]
Run = Callable[[Answer, Body], None]


@pytest.fixture(params=["direct", "through aiobotocore"])
def run_both(run: Run, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Run:
    """The same; reads go either way."""
    if request.param != "direct":
        monkeypatch.setattr("streamload.sources.s3_wire._SIGNATURES", frozenset[str]())
    return run


@pytest.fixture
def run(clean_aws_env: pytest.MonkeyPatch) -> Run:
    """Runs a function with a source that asks a server which gives this answer."""
    clean_aws_env.setenv("AWS_ACCESS_KEY_ID", "key")
    clean_aws_env.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    clean_aws_env.setenv("AWS_REGION", "us-east-1")

    def run(answer: Answer, body: Body) -> None:
        async def served() -> None:
            async with serve(answer) as server:
                clean_aws_env.setenv("AWS_ENDPOINT_URL", server.endpoint)
                async with S3Source("s3://bucket/llama") as source:
                    await body(source, server)

        run_on_each_loop(served)

    return run


def _read(source: S3Source) -> Awaitable[None]:
    return source.read(_OBJECT, 0, 9, Loan([memoryview(bytearray(9))]))


def _xml(body: str, status: int = 200) -> Answer:
    return Answer(status, {"Content-Type": "application/xml"}, body.encode())


def _entry(key: str = "<Key>llama/a</Key>", size: str = "1", tag: str = '"0123"', more: str = "") -> str:
    return f"<Contents>{key}<Size>{size}</Size><ETag>{tag}</ETag>{more}</Contents>"


# Listings


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (_entry(size="many"), "makes no sense"),
        (_entry(size="1e3"), "makes no sense"),
        (_entry(size="-1"), "the object has -1 bytes"),
        (_entry(size="9" * 30), "the object has 999"),
        (_entry(size="9" * 5000), "makes no sense"),
        (_entry(size="<Deep><Deeper>1</Deeper></Deep>"), "makes no sense"),
        (_entry(more="<LastModified>yesterday</LastModified>"), "makes no sense"),
        (_entry(key=""), "lists '', which is not under the prefix"),
        (_entry(key="<Key/>"), "lists '', which is not under the prefix"),
        (_entry(key="<Key>other/a</Key>"), "lists 'other/a', which is not under the prefix"),
        (_entry(tag="&quot;0&#10;123&quot;"), "an ETag that is none"),
        (_entry(tag="&quot;0&#13;&#10;X-Header: 1&quot;"), "an ETag that is none"),
        (_entry(tag="&quot;é&quot;"), "an ETag that is none"),
        (_entry(tag=""), "no size or no ETag"),
        ("<IsTruncated>true</IsTruncated>" + _entry(), "goes on, and not where"),
        ("<IsTruncated>perhaps</IsTruncated>", "no objects under this prefix"),
    ],
)
def test_listings(run: Run, content: str, cause: str) -> None:
    async def body(source: S3Source, server: BadServer) -> None:
        with pytest.raises(SourceError) as caught:
            await source.list()
        assert cause in caught.value.cause
        assert not caught.value.retryable
        assert caught.value.uri == "s3://bucket/llama"
        assert len(str(caught.value)) < 500
        assert len(server.requests) == 1

    run(_xml(f"<ListBucketResult>{content}</ListBucketResult>"), body)


@pytest.mark.parametrize(
    ("answer", "cause"),
    [
        (Answer(200), "no listing: it is empty"),
        (Answer(200, {}, b"<html><head><style>p {}</style></head><p>Log in\n<b>first</b></html>"), "Log in first"),
        (Answer(200, {}, b"<html><p>Log in"), "the server answered 500"),  # as botocore takes what ends early
        (_xml("<Error><Code>SlowDown</Code></Error>"), "500 SlowDown"),
        (Answer(200, {}, b"\xff\xfe\x00"), "the server answered 500"),
    ],
)
def test_answers_that_are_no_listing(run: Run, answer: Answer, cause: str) -> None:
    async def body(source: S3Source, server: BadServer) -> None:
        with pytest.raises(SourceError) as caught:
            await source.list()
        assert cause in caught.value.cause

    run(answer, body)


# Heads


@pytest.mark.parametrize(
    "headers",
    [
        {"Content-Length": "-1", "ETag": '"1"'},
        {"Content-Length": "many", "ETag": '"1"'},
        {"Content-Length": "9" * 30, "ETag": '"1"'},
        {"ETag": '"1"', "Last-Modified": "yesterday"},
        {"ETag": '"\x01"'},
        {"ETag": '"é"'},
        {"ETag": ""},
        {},
    ],
)
def test_heads(run: Run, headers: dict[str, str]) -> None:
    async def body(source: S3Source, server: BadServer) -> None:
        with pytest.raises(SourceError) as caught:
            await source.stat("a")
        assert caught.value.object == "a"
        assert len(str(caught.value)) < 500

    run(Answer(200, headers), body)


# Refusals


@pytest.mark.parametrize(
    ("answer", "kind", "cause"),
    [
        (Answer(403), AccessError, "the server answered 403 Forbidden"),
        (Answer(403, {}, b"<html><h1>Blocked</h1> by policy</html>"), AccessError, "403 Blocked by policy"),
        (Answer(403, {}, b"\xff\xfe\x1b[31m" + b"x" * 900), AccessError, "[31m" + "x" * 100),
        (Answer(503, {}, b"<Error><Code>Slow"), TransientError, "the server answered 503"),
        (Answer(599, {}, b"{}"), SourceError, "the server answered 599 {}"),
        (_xml("<Error><Code><b>a</b><b>c</b></Code></Error>", 403), AccessError, "the server answered 403"),
        (_xml("<Error/>", 403), AccessError, "the server answered 403"),
        (_xml("<R><Error>text</Error></R>", 403), AccessError, "the server answered 403"),
        (_xml("<R><Error/><Error/></R>", 412), ObjectChangedError, "0123"),
        (_xml("<Error>" + "<a>" * 5000 + "</a>" * 5000 + "</Error>", 403), AccessError, "the server answered 403"),
        (
            _xml("<Error><Code>InvalidObjectState</Code><StorageClass><a/><a/></StorageClass></Error>", 403),
            SourceError,
            "the object is archived and",
        ),
    ],
)
def test_refusals(run_both: Run, answer: Answer, kind: type[SourceError], cause: str) -> None:
    async def body(source: S3Source, server: BadServer) -> None:
        calls = [_read(source)] if kind is ObjectChangedError else [_read(source), source.list()]
        for call in calls:
            with pytest.raises(SourceError) as caught:
                await call
            assert type(caught.value) is kind
            assert cause in caught.value.cause
            assert caught.value.cause.isprintable()
            assert len(str(caught.value)) < 500

    run_both(answer, body)


@pytest.mark.parametrize("status", [403, 503, 200])
@pytest.mark.parametrize("length", [{"Content-Length": str(1 << 40)}, {}])
def test_answers_without_end(run_both: Run, status: int, length: dict[str, str]) -> None:
    # In chunks, the zeros that never stop are none.
    headers = length or {"Connection": "close", "Transfer-Encoding": "identity"}

    async def body(source: S3Source, server: BadServer) -> None:
        calls = [source.list()] if status == 200 else [source.list(), _read(source)]
        for call in calls:
            with pytest.raises(SourceError):
                await call
        assert server.flooded_bytes < 100 * _MIB

    run_both(Answer(status, headers, b"<", then="flood"), body)


@settings(max_examples=300)
@given(
    body=st.one_of(
        st.binary(max_size=100),
        st.lists(
            st.sampled_from(
                ["<Error>", "</Error>", "<Code>", "</Code>", "<Message>", "</Message>", "a", "&#10;", "<a/>"]
            )
        ).map(lambda parts: "".join(parts).encode()),
    ),
    status=st.integers(300, 599),
)
def test_any_refusal_is_told_in_texts(body: bytes, status: int) -> None:
    refusal = parse_refusal(status, {"ETag": "x"}, body)
    assert refusal["ResponseMetadata"] == {"HTTPStatusCode": status, "HTTPHeaders": {"etag": "x"}}
    assert all(isinstance(text, str) for text in refusal["Error"].values())
    assert refusal["Error"]["Code"]
