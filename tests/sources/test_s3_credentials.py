"""Credentials that expire while they are used, and clocks that are wrong."""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Awaitable, Callable
from datetime import UTC, datetime, timedelta
from email.utils import formatdate
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import botocore.auth
import pytest

import streamload.sources.s3_signing
from streamload.errors import ClosedError, CredentialsError, SourceError
from streamload.loan import Loan
from streamload.sources import SourceObject
from streamload.sources.s3 import S3Source
from streamload.testing import run_on_each_loop
from tests.faultproxy import Fault, run_fault_proxy
from tests.servers import Answer, BadServer, S3Bucket, serve_by
from tests.wire.server import pattern, turn, until

_OBJECT = SourceObject("model.safetensors", 1600, '"0123"')
_CONTENT = pattern(1600)
_READS = 16


@pytest.fixture(params=["direct", "through aiobotocore"])
def path(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Which way the bytes come; tests say the same of both."""
    if request.param != "direct":
        monkeypatch.setattr("streamload.sources.s3_wire._SIGNATURES", frozenset[str]())
    return str(request.param)


async def _read(source: S3Source, number: int, object: SourceObject = _OBJECT) -> bytes:
    """The sixteenth of the object that has this number."""
    part = object.size_bytes // _READS
    memory = bytearray(part)
    await source.read(object, number * part, (number + 1) * part, Loan([memoryview(memory)]))
    return bytes(memory)


def _error(status: int, code: str, **headers: str) -> Answer:
    body = f"<Error><Code>{code}</Code><Message>Said so.</Message></Error>"
    return Answer(status, {"Content-Type": "application/xml", **headers}, body.encode())


def _answer(head: str) -> Answer:
    """What a store of this one object says, and that is well."""
    where = {line.partition(": ")[0].lower(): line.partition(": ")[2] for line in head.split("\r\n")}.get("range")
    tag = {"ETag": _OBJECT.version}
    if head.startswith("HEAD "):
        return Answer(200, {**tag, "Content-Length": str(_OBJECT.size_bytes)})
    if where is None:
        entry = f"<Contents><Key>llama/{_OBJECT.key}</Key><Size>1600</Size><ETag>{_OBJECT.version}</ETag></Contents>"
        return Answer(200, {"Content-Type": "application/xml"}, f"<Result>{entry}</Result>".encode())
    start, end = map(int, where.removeprefix("bytes=").split("-"))
    return Answer(206, {**tag, "Content-Range": f"bytes {start}-{end}/1600"}, _CONTENT[start : end + 1])


class World:
    """A store, and the agent that a container has, which gives out one key after the other.

    Attributes:
        revoked: Keys that the store says have expired.
        code: How it says so.
        given: What the agent answers in turn; the last one is repeated.
        gate: While it is closed, the agent lets wait.
    """

    def __init__(self) -> None:
        self.revoked: set[str] = set()
        self.code = "ExpiredToken"
        self.given = [_keys("KEYA"), _keys("KEYB"), _keys("KEYC")]
        self.gate = asyncio.Event()
        self.gate.set()
        self.store: BadServer
        self.agent: BadServer

    async def answer_store(self, head: str) -> Answer:
        key = head.partition("Credential=")[2].partition("/")[0]
        assert head.lower().count("\r\nx-amz-security-token: ") == 1
        assert f"token-of-{key}" in head
        return _error(400, self.code) if key in self.revoked else _answer(head)

    async def answer_agent(self, head: str) -> Answer:
        await self.gate.wait()
        given = self.given[0] if len(self.given) == 1 else self.given.pop(0)
        return Answer(200, {"Content-Type": "application/json"}, json.dumps(given).encode())


def _keys(key: str) -> dict[str, str]:
    return {
        "AccessKeyId": key,
        "SecretAccessKey": "secret",
        "Token": f"token-of-{key}",
        "Expiration": (datetime.now(UTC) + timedelta(days=1)).isoformat(),
    }


Body = Callable[[S3Source, World], Awaitable[None]]
Run = Callable[[Body], None]


@pytest.fixture
def run(clean_aws_env: pytest.MonkeyPatch, path: str) -> Run:
    """Runs a function with a source in a world."""
    clean_aws_env.setenv("AWS_REGION", "us-east-1")

    def run(body: Body) -> None:
        async def served() -> None:
            world = World()
            async with serve_by(world.answer_store) as store, serve_by(world.answer_agent) as agent:
                world.store, world.agent = store, agent
                clean_aws_env.setenv("AWS_ENDPOINT_URL", store.endpoint)
                clean_aws_env.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{agent.endpoint}/keys")
                async with S3Source("s3://bucket/llama") as source:
                    await body(source, world)

        run_on_each_loop(served)

    return run


async def _all_reads(source: S3Source) -> list[bytes | BaseException]:
    return await asyncio.gather(*[_read(source, number) for number in range(_READS)], return_exceptions=True)


# Credentials


@pytest.mark.parametrize("code", ["ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"])
def test_credentials_are_found_anew_each_time_they_have_expired(run: Run, code: str) -> None:
    async def body(source: S3Source, world: World) -> None:
        world.code = code
        assert b"".join(await asyncio.gather(*[_read(source, n) for n in range(_READS)])) == _CONTENT
        for count, key in enumerate(["KEYA", "KEYB"], 2):
            world.revoked.add(key)
            assert b"".join(await asyncio.gather(*[_read(source, n) for n in range(_READS)])) == _CONTENT
            assert len(world.agent.requests) == count, "one renewal for all reads"
        assert (await source.describe())["answer"] == "200"

    run(body)


@pytest.mark.parametrize(
    "call",
    [
        lambda source: source.list(),
        lambda source: source.stat(_OBJECT.key),
        lambda source: source.checksum(_OBJECT),
        lambda source: source.describe(),
    ],
    ids=["list", "stat", "checksum", "describe"],
)
def test_every_kind_of_request_goes_on_with_new_ones(run: Run, call: Callable[[S3Source], Awaitable[object]]) -> None:
    async def body(source: S3Source, world: World) -> None:
        before = await call(source)
        world.revoked.add("KEYA")
        assert await call(source) == before
        assert len(world.agent.requests) == 2

    run(body)


def test_credentials_that_never_served_are_not_looked_for_again(run: Run) -> None:
    async def body(source: S3Source, world: World) -> None:
        world.revoked.add("KEYA")
        for found in await _all_reads(source):
            assert isinstance(found, CredentialsError)
            assert "ExpiredToken" in str(found)
        assert len(world.agent.requests) == 1
        assert len(world.store.requests) == _READS

    run(body)


def test_new_ones_that_have_expired_too_are_the_end(run: Run) -> None:
    async def body(source: S3Source, world: World) -> None:
        world.given = [_keys("KEYA")]
        await _read(source, 0)
        world.revoked.add("KEYA")
        for number, found in enumerate(await _all_reads(source)):
            assert isinstance(found, CredentialsError)
            assert "the credentials have expired, and no newer ones were found" in str(found)
            assert found.start == number * 100
        assert len(world.agent.requests) == 2
        assert len(world.store.requests) == 1 + 2 * _READS

    run(body)


def test_a_failure_to_find_new_ones_is_everybodys(run: Run) -> None:
    async def body(source: S3Source, world: World) -> None:
        world.given = [_keys("KEYA"), {"Code": "no"}]
        await _read(source, 0)
        world.revoked.add("KEYA")
        world.gate.clear()
        reads = asyncio.create_task(_all_reads(source))
        await until(lambda: len(world.store.requests) == 1 + _READS and len(world.agent.requests) == 2)
        await turn(50)
        world.gate.set()
        for number, found in enumerate(await reads):
            assert isinstance(found, CredentialsError)
            assert "the credentials have expired, and newer ones cannot be had: looking for" in str(found)
            assert (found.start, found.end) == (number * 100, number * 100 + 100)
        assert len(world.agent.requests) == 2

    run(body)


def test_who_is_cancelled_leaves_the_looking_to_the_next(run: Run) -> None:
    async def body(source: S3Source, world: World) -> None:
        await _read(source, 0)
        world.revoked.add("KEYA")
        world.gate.clear()
        reads = [asyncio.create_task(_read(source, number)) for number in range(4)]
        await until(lambda: len(world.store.requests) == 5 and len(world.agent.requests) == 2)
        await turn(50)
        for read in reads[:3]:
            read.cancel()
        await asyncio.wait(reads[:3])
        assert all(read.cancelled() for read in reads[:3])
        assert not reads[3].done()
        world.gate.set()
        assert await reads[3] == _CONTENT[300:400]

    run(body)


def test_closing_ends_the_looking(run: Run) -> None:
    async def body(source: S3Source, world: World) -> None:
        await _read(source, 0)
        world.revoked.add("KEYA")
        world.gate.clear()
        reads = asyncio.create_task(_all_reads(source))
        await until(lambda: len(world.store.requests) == 1 + _READS and len(world.agent.requests) == 2)
        await source.aclose()
        assert all(isinstance(found, ClosedError) for found in await reads)

    run(body)


@pytest.mark.parametrize("turns", [*range(1, 20, 2), 25, 35, 50, 80])
def test_cancelling_at_any_moment_leaves_nothing(run: Run, turns: int) -> None:
    async def body(source: S3Source, world: World) -> None:
        await _read(source, 0)
        world.revoked.add("KEYA")
        read = asyncio.create_task(_read(source, 1))
        await turn(turns)
        read.cancel()
        await asyncio.wait([read])
        assert await _read(source, 2) == _CONTENT[200:300]

    run(body)


@pytest.mark.parametrize("turns", [*range(1, 20, 2), 25, 35, 50, 80])
def test_closing_at_any_moment_leaves_nothing(run: Run, turns: int) -> None:
    async def body(source: S3Source, world: World) -> None:
        await _read(source, 0)
        world.revoked.add("KEYA")
        read = asyncio.create_task(_read(source, 1))
        await turn(turns)
        await source.aclose()
        (found,) = await asyncio.gather(read, return_exceptions=True)
        assert isinstance(found, ClosedError) or found == _CONTENT[100:200]

    run(body)


def test_reads_under_way_on_a_real_server_go_on(
    s3_bucket: S3Bucket, clean_aws_env: pytest.MonkeyPatch, tmp_path: Path, path: str
) -> None:
    """What refreshes the file of credentials has done so by the time that the old ones are refused."""
    s3_bucket.put(_OBJECT.key, _CONTENT)
    server = s3_bucket.server
    user = f"second-{s3_bucket.name}"
    allow = {"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]}
    with server.client("iam") as iam:
        iam.create_user(UserName=user)
        iam.put_user_policy(UserName=user, PolicyName="all", PolicyDocument=json.dumps(allow))
        second = iam.create_access_key(UserName=user)["AccessKey"]
    file = tmp_path / "credentials"
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        clean_aws_env.delenv(name)
    clean_aws_env.setenv("AWS_SHARED_CREDENTIALS_FILE", str(file))

    def write(key: str, secret: str) -> None:
        # Never half of it: it is read meanwhile.
        new = file.with_suffix(".new")
        new.write_text(f"[default]\naws_access_key_id={key}\naws_secret_access_key={secret}\n")
        new.replace(file)

    expired = _error(400, "ExpiredToken")
    fault = Fault(
        instead=f"HTTP/1.1 400 Bad Request\r\nContent-Length: {len(expired.body)}\r\n\r\n".encode() + expired.body
    )
    spent: list[int] = []

    def plan(number: int, head: bytes) -> Fault | None:
        if f"Credential={server.access_key}/".encode() not in head:
            return None
        spent.append(number)
        if len(spent) <= 6:
            return None
        write(second["AccessKeyId"], second["SecretAccessKey"])
        return fault

    endpoint = urlsplit(server.endpoint)
    assert endpoint.hostname is not None
    assert endpoint.port is not None
    with run_fault_proxy(endpoint.hostname, endpoint.port, plan) as proxy:
        clean_aws_env.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")

        async def body() -> None:
            spent.clear()
            write(server.access_key, server.secret_key)
            async with S3Source(s3_bucket.uri) as source:
                (object,) = await source.list()
                reads = [_read(source, number, object) for number in range(_READS)]
                assert b"".join(await asyncio.gather(*reads)) == _CONTENT
                assert len(spent) == _READS
                assert source.requests == 1 + _READS + (_READS - 6)

        run_on_each_loop(body)


# Clocks


def _set_clock(env: pytest.MonkeyPatch, wrong_s: float) -> None:
    """Let this machine's clock be wrong, as far as signatures are concerned."""

    def now(remove_tzinfo: bool = True) -> datetime:
        wrong = datetime.now(UTC) + timedelta(seconds=wrong_s)
        return wrong.replace(tzinfo=None) if remove_tzinfo else wrong

    for module in (botocore.auth, sys.modules.get("botocore.crt.auth")):
        if module is not None:
            env.setattr(module, "get_current_datetime", now)
    ours = SimpleNamespace(time=lambda: time.time() + wrong_s, monotonic=time.monotonic)
    env.setattr(streamload.sources.s3_signing, "time", ours)


@pytest.mark.parametrize("wrong_s", [-10800, 10800, 90 * 86400])
def test_a_clock_that_is_wrong_is_corrected_once(
    s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch, path: str, wrong_s: int
) -> None:
    """A real server compares the times, and the signatures."""
    s3_bucket.put(_OBJECT.key, _CONTENT)
    with s3_bucket.server.client("sts") as sts:
        keys = sts.get_session_token()["Credentials"]
    for name, field in (
        ("AWS_ACCESS_KEY_ID", "AccessKeyId"),
        ("AWS_SECRET_ACCESS_KEY", "SecretAccessKey"),
        ("AWS_SESSION_TOKEN", "SessionToken"),
    ):
        monkeypatch.setenv(name, keys[field])

    async def body() -> None:
        _set_clock(monkeypatch, wrong_s)
        async with S3Source(s3_bucket.uri) as source:
            (object,) = await source.list()
            assert source.requests == 2
            reads = [_read(source, number, object) for number in range(_READS)]
            assert b"".join(await asyncio.gather(*reads)) == _CONTENT
            assert await source.stat(object.key) == object
            await source.checksum(object)
            assert source.requests == 2 + _READS + 2
            # Somebody sets it right.
            _set_clock(monkeypatch, 0)
            assert await _read(source, 3, object) == _CONTENT[300:400]
            assert await source.list() == [object]
            assert source.requests == 2 + _READS + 2 + 2

    run_on_each_loop(body)


@pytest.mark.parametrize(
    "call",
    [
        lambda source, object: source.stat(object.key),
        lambda source, object: source.checksum(object),
        lambda source, object: _read(source, 1, object),
    ],
    ids=["stat", "checksum", "read"],
)
def test_any_request_may_be_the_first_that_is_refused(
    s3_bucket: S3Bucket,
    monkeypatch: pytest.MonkeyPatch,
    path: str,
    call: Callable[[S3Source, SourceObject], Awaitable[object]],
) -> None:
    s3_bucket.put(_OBJECT.key, _CONTENT)

    async def body() -> None:
        async with S3Source(s3_bucket.uri) as source:
            _set_clock(monkeypatch, 0)
            (object,) = await source.list()
            before = await call(source, object)
            _set_clock(monkeypatch, -3600)
            assert await asyncio.gather(*[call(source, object) for _ in range(4)]) == [before] * 4

    run_on_each_loop(body)


@pytest.mark.parametrize(("wrong_s", "text"), [(7200, "ahead of"), (-7200, "behind")])
def test_a_clock_that_cannot_be_right_ends_at_once(
    clean_aws_env: pytest.MonkeyPatch, path: str, wrong_s: int, text: str
) -> None:
    clean_aws_env.setenv("AWS_ACCESS_KEY_ID", "key")
    clean_aws_env.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    clean_aws_env.setenv("AWS_REGION", "us-east-1")

    async def answer(head: str) -> Answer:
        return _error(403, "RequestTimeTooSkewed", Date=formatdate(time.time() - wrong_s, usegmt=True))

    async def body() -> None:
        async with serve_by(answer) as server:
            clean_aws_env.setenv("AWS_ENDPOINT_URL", server.endpoint)
            async with S3Source("s3://bucket/llama") as source:
                for requests in (2, 3):
                    with pytest.raises(SourceError, match=rf"clock is 7[12]\d\d s {text} the server's") as caught:
                        await _read(source, 0)
                    assert not caught.value.retryable
                    assert len(server.requests) == requests, "corrected once for the source"
                assert {type(found) for found in await _all_reads(source)} == {SourceError}
                dates = {head.lower().partition("x-amz-date: ")[2][:11] for head in server.requests}
                assert len(dates) > 1, "the second one had another time"

    run_on_each_loop(body)


@pytest.mark.parametrize("date", ["", "yesterday", "Thu, 99 Foo 2026 00:00:00 GMT"])
def test_a_server_that_does_not_tell_the_time_corrects_nothing(
    clean_aws_env: pytest.MonkeyPatch, path: str, date: str
) -> None:
    clean_aws_env.setenv("AWS_ACCESS_KEY_ID", "key")
    clean_aws_env.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    clean_aws_env.setenv("AWS_REGION", "us-east-1")

    async def answer(head: str) -> Answer:
        return _error(403, "RequestTimeTooSkewed", Date=date)

    async def body() -> None:
        async with serve_by(answer) as server:
            clean_aws_env.setenv("AWS_ENDPOINT_URL", server.endpoint)
            async with S3Source("s3://bucket/llama") as source:
                with pytest.raises(SourceError, match="this machine's clock and the server's differ too much"):
                    await _read(source, 0)
                assert len(server.requests) == 1

    run_on_each_loop(body)
