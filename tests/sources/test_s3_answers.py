"""What S3's refusals mean: what is tried again and when, what is the end, and in which words."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from email.utils import formatdate

import pytest

from streamload.errors import AccessError, NotFoundError, ObjectChangedError, SourceError, TransientError
from streamload.loan import Loan
from streamload.sources import SourceObject
from streamload.sources.s3 import S3Source
from streamload.testing import run_on_each_loop
from tests.servers import Answer, serve

_OBJECT = SourceObject("model.safetensors", 1000, '"0123"')

Refused = Callable[..., SourceError]


@pytest.fixture(params=["direct", "through aiobotocore"])
def refused(clean_aws_env: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Refused:
    """The error of a read that is answered so; the source asks once for each answer."""
    if request.param != "direct":
        clean_aws_env.setattr("streamload.sources.s3_wire._SIGNATURES", frozenset[str]())

    def refused(*answers: Answer) -> SourceError:
        return _refused(
            clean_aws_env, answers, lambda source: source.read(_OBJECT, 0, 9, Loan([memoryview(bytearray(9))]))
        )

    return refused


def _refused(
    env: pytest.MonkeyPatch, answers: tuple[Answer, ...], call: Callable[[S3Source], Awaitable[object]]
) -> SourceError:
    env.setenv("AWS_ACCESS_KEY_ID", "key")
    env.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    env.setenv("AWS_REGION", "us-east-1")
    errors: list[SourceError] = []

    async def body() -> None:
        async with serve(*answers) as server:
            env.setenv("AWS_ENDPOINT_URL", server.endpoint)
            async with S3Source("s3://bucket/llama") as source:
                with pytest.raises(SourceError) as caught:
                    await call(source)
                errors.append(caught.value)
                assert len(server.requests) == len(answers)

    run_on_each_loop(body)
    assert str(errors[0]) == str(errors[1]), "on both loops"
    return errors[0]


def _error(status: int, code: str, message: str = "Said so.", more: str = "", **headers: str) -> Answer:
    body = f"<Error><Code>{code}</Code><Message>{message}</Message>{more}</Error>"
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return Answer(status, {"Content-Type": "application/xml", **fields}, body.encode())


# What is the end


@pytest.mark.parametrize(
    ("answer", "kind", "cause"),
    [
        (_error(403, "InvalidObjectState"), SourceError, "the object is archived and must be restored first (the"),
        (
            _error(403, "InvalidObjectState", more="<StorageClass>DEEP_ARCHIVE</StorageClass>"),
            SourceError,
            "the object is archived in DEEP_ARCHIVE and must be restored first (the server answered 403 InvalidObj",
        ),
        (_error(400, "KMS.DisabledException"), AccessError, "a key of KMS that may not be used"),
        (_error(400, "KMS.NotFoundException"), AccessError, "kms:Decrypt (the server answered 400 KMS.NotFound"),
        (
            _error(403, "AccessDenied", "User: me is not authorized to perform: kms:Decrypt on the resource"),
            AccessError,
            "a key of KMS that may not be used, which needs kms:Decrypt (the server answered 403 AccessDenied: User",
        ),
        (
            _error(403, "AccessDenied", "not authorized to perform: s3:GetObject on arn:aws:s3:::kms-models/x"),
            AccessError,
            "access is refused; this needs s3:GetObject (the server answered 403 AccessDenied: not authorized",
        ),
        (_error(404, "NoSuchKey"), NotFoundError, "there is no such object"),
        (_error(404, "NoSuchVersion"), NotFoundError, "the object has no such version"),
        (
            _error(405, "MethodNotAllowed", x_amz_delete_marker="true"),
            NotFoundError,
            "this version marks that the object was deleted",
        ),
        (_error(405, "MethodNotAllowed"), SourceError, "the server answered 405 MethodNotAllowed"),
        (
            _error(412, "PreconditionFailed", ETag='"4567"'),
            ObjectChangedError,
            'the object is now version "4567"; the one seen first was "0123"',
        ),
    ],
)
def test_refusals_that_end_at_once_say_why(
    refused: Refused, answer: Answer, kind: type[SourceError], cause: str
) -> None:
    error = refused(answer)
    assert type(error) is kind
    assert not error.retryable
    assert cause in error.cause


def test_a_listing_that_is_refused_needs_another_permission(clean_aws_env: pytest.MonkeyPatch) -> None:
    error = _refused(clean_aws_env, (_error(403, "AccessDenied"),), lambda source: source.list())
    assert type(error) is AccessError
    assert "access is refused; this needs s3:ListBucket (" in error.cause


@pytest.mark.parametrize(
    "changed", [_error(412, "PreconditionFailed"), _error(412, "PreconditionFailed", ETag="0123"), Answer(412)]
)
@pytest.mark.parametrize(
    ("now", "cause"),
    [
        (Answer(200, {"ETag": '"4567"'}), 'the object is now version "4567"; the one seen first was "0123"'),
        (Answer(200, {"ETag": '"0123"'}), 'said to be another version, then version "0123" again; the one'),
        (Answer(200), "said to be another version, then version None again; the one seen first"),
        (Answer(500), "another version, and which one cannot be told (the server answered 500 Internal"),
        (Answer(412), "another version, and which one cannot be told (the object is no longer"),
    ],
)
def test_the_version_that_the_object_has_now_is_asked_for(
    refused: Refused, changed: Answer, now: Answer, cause: str
) -> None:
    error = refused(changed, now)
    assert type(error) is ObjectChangedError
    assert cause in error.cause


# What is tried again


@pytest.mark.parametrize(
    ("answer", "throttled"),
    [
        (_error(503, "SlowDown"), True),
        (_error(503, "SlowDownRead"), True),
        (_error(503, "ServiceUnavailable"), True),
        (_error(400, "Throttling"), True),
        (_error(400, "ThrottlingException"), True),
        (_error(400, "ThrottledException"), True),
        (_error(400, "KMS.ThrottlingException"), True),
        (_error(400, "RequestLimitExceeded"), True),
        (_error(429, "TooManyRequests"), True),
        (_error(429, "Whatever"), True),
        (Answer(429), True),
        (Answer(503), True),
        (_error(500, "InternalError"), False),
        (_error(500, "KMS.InternalException"), False),
        (_error(503, "Whatever"), False),
        (Answer(500), False),
        (Answer(502), False),
    ],
)
def test_who_asks_for_less_is_told_from_who_fails(refused: Refused, answer: Answer, throttled: bool) -> None:
    error = refused(answer)
    assert type(error) is TransientError
    assert error.throttled is throttled
    assert error.retry_after_s is None


_NOON = 1_800_000_000


@pytest.mark.parametrize(
    ("headers", "wait_s"),
    [
        ({"Retry_After": "7"}, 7),
        ({"Retry_After": "0"}, 0),
        ({"Retry_After": "9" * 400}, float("inf")),
        # The server's own clock counts.
        ({"Retry_After": formatdate(_NOON + 12, usegmt=True), "Date": formatdate(_NOON, usegmt=True)}, 12),
        ({"Retry_After": formatdate(_NOON - 12, usegmt=True), "Date": formatdate(_NOON, usegmt=True)}, 0),
        ({"Retry_After": "-7"}, None),
        ({"Retry_After": "1.5"}, None),
        ({"Retry_After": "²"}, None),
        ({"Retry_After": "soon"}, None),
        ({"Retry_After": ""}, None),
        ({"Retry_After": "Thu, 99 Foo 2026 00:00:00 GMT"}, None),
    ],
)
@pytest.mark.parametrize(("status", "code"), [(503, "SlowDown"), (429, "TooManyRequests"), (500, "InternalError")])
def test_how_long_the_server_wants_to_be_left_alone(
    refused: Refused, status: int, code: str, headers: dict[str, str], wait_s: float | None
) -> None:
    error = refused(_error(status, code, **headers))
    assert isinstance(error, TransientError)
    assert error.retry_after_s == wait_s


def test_a_date_without_the_servers_clock_is_compared_with_ours(refused: Refused) -> None:
    until = formatdate(time.time() + 3600, usegmt=True)
    error = refused(_error(503, "SlowDown", Retry_After=until))
    assert isinstance(error, TransientError)
    assert error.retry_after_s is not None
    assert 3500 < error.retry_after_s <= 3600


@pytest.mark.parametrize("body", [b"", b"<html>busy</html>", b"busy"])
def test_a_load_balancer_may_ask_for_a_wait_too(refused: Refused, body: bytes) -> None:
    error = refused(Answer(503, {"Retry-After": "3"}, body))
    assert isinstance(error, TransientError)
    assert (error.throttled, error.retry_after_s) == (True, 3.0)
