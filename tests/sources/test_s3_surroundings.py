"""What lies between this process and S3, and what says where it is: proxies, TLS, regions, profiles, tokens."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import json
import socket
import ssl
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

import pytest
from aiobotocore.session import AioSession

from streamload.errors import CredentialsError, SourceError, TransientError
from streamload.loan import Loan
from streamload.sources import SourceObject
from streamload.sources.s3 import S3Source
from streamload.sources.s3_settings import S3Settings
from streamload.testing import run_on_each_loop
from tests.servers import Answer, S3Bucket, run_tunnels, serve, serve_by
from tests.wire.server import ca_file, server_tls, until

_OBJECT = SourceObject("a", 1000, '"0123"')
_GOOD = Answer(206, {"ETag": '"0123"', "Content-Range": "bytes 0-9/1000"}, b"0123456789")
_ENTRY = '<Contents><Key>llama/a</Key><Size>1000</Size><ETag>"0123"</ETag></Contents>'
_LISTING = Answer(200, {}, f"<ListBucketResult>{_ENTRY}</ListBucketResult>".encode())
_ALLOW_ALL = json.dumps({"Version": "2012-10-17", "Statement": [{"Effect": "Allow", "Action": "*", "Resource": "*"}]})

_TRUSTED = {"Effect": "Allow", "Action": ["sts:AssumeRole", "sts:AssumeRoleWithWebIdentity"], "Principal": "*"}
_TRUST_ALL = json.dumps({"Version": "2012-10-17", "Statement": [_TRUSTED]})


@pytest.fixture
def keys(clean_aws_env: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    clean_aws_env.setenv("AWS_ACCESS_KEY_ID", "key")
    clean_aws_env.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    clean_aws_env.setenv("AWS_REGION", "us-east-1")
    return clean_aws_env


@pytest.fixture(params=["direct", "through aiobotocore"])
def path(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """Which way the bytes come; tests say the same of both."""
    if request.param != "direct":
        monkeypatch.setattr("streamload.sources.s3_wire._SIGNATURES", frozenset[str]())
    return str(request.param)


@pytest.fixture
def authority(tmp_path: Path) -> str:
    """The file with the certificate of the one who vouches for the tests' servers."""
    return str(ca_file(tmp_path))


async def _read(source: S3Source) -> bytes:
    memory = bytearray(10)
    await source.read(_OBJECT, 0, 10, Loan([memoryview(memory)]))
    return bytes(memory)


async def _store(head: str) -> Answer:
    """A store of this one object."""
    return _LISTING if "list-type=2" in head.split("\r\n", 1)[0] else _GOOD


async def _refused(calls: list[Callable[[], Awaitable[Any]]], kind: type[SourceError], cause: str) -> None:
    for call in calls:
        with pytest.raises(SourceError, match=cause) as caught:
            await call()
        assert type(caught.value) is kind
        assert "secret" not in str(caught.value)


# Proxies


@pytest.mark.parametrize("scheme", ["http", "https"])
@pytest.mark.parametrize(
    ("proxy", "named"),
    [("http://user:secret@127.0.0.1:1", "127.0.0.1:1"), ("http://no-such-proxy.invalid:3128", "no-such-proxy.invalid")],
)
def test_a_proxy_that_is_not_there_is_named(keys: pytest.MonkeyPatch, scheme: str, proxy: str, named: str) -> None:
    keys.setenv("AWS_ENDPOINT_URL", f"{scheme}://store.invalid")
    keys.setenv(f"{scheme}_proxy", proxy)

    async def body() -> None:
        async with S3Source("s3://bucket/llama") as source:
            cause = f"cannot reach store.invalid through the proxy {named}: "
            await _refused([source.list, lambda: _read(source)], TransientError, cause)

    run_on_each_loop(body)


@pytest.mark.parametrize(("status", "kind"), [(407, SourceError), (403, SourceError), (502, TransientError)])
def test_a_proxy_that_refuses(keys: pytest.MonkeyPatch, status: int, kind: type[SourceError]) -> None:
    keys.setenv("AWS_ENDPOINT_URL", "https://store.invalid")

    async def body() -> None:
        async with serve(Answer(status, then="close")) as proxy:
            keys.setenv("HTTPS_PROXY", proxy.endpoint.replace("://", "://user:secret@"))
            async with S3Source("s3://bucket/llama") as source:
                cause = f"store.invalid through the proxy {urlsplit(proxy.endpoint).netloc}: it answered {status} Said"
                await _refused([source.list, lambda: _read(source)], kind, cause)
            assert all(head.startswith("CONNECT store.invalid:443 ") for head in proxy.requests)

    run_on_each_loop(body)


@pytest.mark.parametrize("excepted", ["", "127.0.0.1", "*"])
def test_tls_through_a_proxy_or_not(keys: pytest.MonkeyPatch, authority: str, excepted: str) -> None:
    keys.setenv("AWS_CA_BUNDLE", authority)
    keys.setenv("NO_PROXY", excepted)

    async def body() -> None:
        async with serve_by(_store, tls=server_tls()) as server, run_tunnels() as proxy:
            keys.setenv("AWS_ENDPOINT_URL", server.endpoint)
            keys.setenv("HTTPS_PROXY", proxy.url)
            async with S3Source("s3://bucket/llama") as source:
                assert await source.list() == [_OBJECT]
                assert await _read(source) == _GOOD.body
                way = "from the socket into place" if excepted else "through aiobotocore: a proxy is configured"
                assert source.paths == {way: 10}
            assert set(proxy.asked) == (set() if excepted else {urlsplit(server.endpoint).netloc})

    run_on_each_loop(body)


# TLS


def test_only_the_authority_that_is_named_counts(keys: pytest.MonkeyPatch, path: str, authority: str) -> None:
    async def body() -> None:
        async with serve_by(_store, tls=server_tls()) as server:
            keys.setenv("AWS_ENDPOINT_URL", server.endpoint)
            keys.setenv("AWS_CA_BUNDLE", authority)
            async with S3Source("s3://bucket/llama") as source:
                assert await source.list() == [_OBJECT]
                assert await _read(source) == _GOOD.body
            asked = len(server.requests)
            keys.delenv("AWS_CA_BUNDLE")
            async with S3Source("s3://bucket/llama") as source:
                cause = "no secure connection to 127.0.0.1:.*(certificate|CERTIFICATE)"
                await _refused([source.list, lambda: _read(source)], SourceError, cause)
            assert len(server.requests) == asked
        await until(lambda: len(asyncio.all_tasks()) == 1)

    run_on_each_loop(body)


def test_what_is_set_for_one_source(keys: pytest.MonkeyPatch, path: str, authority: str) -> None:
    """It counts more than what is found: the endpoint that is found answers nothing, and the keys are not asked for."""
    keys.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    keys.setenv("AWS_CA_BUNDLE", "/missing.pem")

    async def body() -> None:
        async with serve_by(_store, tls=server_tls()) as server:
            there = S3Settings(endpoint_url=server.endpoint, access_key_id="ours", secret_access_key="s", region="mars")
            for settings in (replace(there, ca_bundle=authority), replace(there, verify_tls=False)):
                async with S3Source("s3://bucket/llama", s3_settings=settings) as source:
                    assert await source.list() == [_OBJECT]
                    assert await _read(source) == _GOOD.body
            assert all("Credential=ours/" in head and "/mars/s3/" in head for head in server.requests)
            server.requests.clear()
            unsigned = replace(there, verify_tls=False, anonymous=True)
            async with S3Source("s3://bucket/llama", s3_settings=unsigned) as source:
                assert await source.list() == [_OBJECT]
            assert all("Credential=" not in head for head in server.requests)

    run_on_each_loop(body)
    assert "ours" not in repr(S3Settings(access_key_id="ours", secret_access_key="ours"))


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_file_of_authorities_that_is_none(keys: pytest.MonkeyPatch, tmp_path: Path, scheme: str) -> None:
    keys.setenv("AWS_ENDPOINT_URL", f"{scheme}://127.0.0.1:1")
    (tmp_path / "empty.pem").touch()

    async def body() -> None:
        for name in ("missing.pem", "empty.pem"):
            keys.setenv("AWS_CA_BUNDLE", str(tmp_path / name))
            async with S3Source("s3://bucket/llama") as source:
                await _refused([source.list, lambda: _read(source)], SourceError, f"the CA bundle .*{name}.* is none")

    run_on_each_loop(body)


@pytest.mark.parametrize("enabled", [True, False])
def test_garbage_is_collected_again_as_before(keys: pytest.MonkeyPatch, enabled: bool) -> None:
    keys.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    create_client = AioSession.create_client
    seen: list[bool] = []

    def watched(*args: Any, **kwargs: Any) -> Any:
        created = create_client(*args, **kwargs)
        real = created.__aenter__

        async def entered() -> Any:
            seen.append(gc.isenabled())
            return await real()

        keys.setattr(type(created), "__aenter__", lambda _: entered())
        return created

    keys.setattr(AioSession, "create_client", watched)

    async def body() -> None:
        async with S3Source("s3://bucket/llama") as source:
            await source.connection()

    (gc.enable if enabled else gc.disable)()
    try:
        asyncio.run(body())
        assert gc.isenabled() == enabled
    finally:
        gc.enable()
    assert seen == [False]


def test_garbage_is_collected_in_a_child_that_is_forked_meanwhile() -> None:
    script = (
        "import gc, os\n"
        "from streamload.sources.s3_client import _no_garbage_collected\n"
        "with _no_garbage_collected():\n"
        "    if not (child := os.fork()):\n"
        "        os._exit(0 if gc.isenabled() else 1)\n"
        "    assert not gc.isenabled() and os.waitpid(child, 0)[1] == 0\n"
        "assert gc.isenabled()\n"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=100)


@contextlib.asynccontextmanager
async def _listening(answer: bytes, tls: ssl.SSLContext | None = None) -> AsyncIterator[int]:
    """A server that says this to whatever it is sent, and ends the connection."""

    class Server(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            self.transport = cast("asyncio.Transport", transport)

        def data_received(self, data: bytes) -> None:
            self.transport.write(answer)
            self.transport.close()

    server = await asyncio.get_running_loop().create_server(Server, "127.0.0.1", 0, ssl=tls)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()
        # Handshakes that have failed are over when asyncio's own tasks are.
        await until(lambda: len(asyncio.all_tasks()) == 1)


_PAGE = b"<html><h1>400 The plain HTTP request was sent to HTTPS port</h1></html>"
_EXPLAINED = b"HTTP/1.1 400 Bad Request\r\nContent-Length: %d\r\n\r\n%s" % (len(_PAGE), _PAGE)


@pytest.mark.parametrize("kind", ["it explains", "it says so in TLS", "it leaves"])
def test_plain_text_where_there_is_tls(keys: pytest.MonkeyPatch, path: str, kind: str) -> None:
    said = {"it explains": _EXPLAINED, "it says so in TLS": b"\x15\x03\x01\x00\x02\x02\x46", "it leaves": b""}[kind]

    async def body() -> None:
        async with _listening(said, server_tls() if kind == "it leaves" else None) as port:
            keys.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
            async with S3Source("s3://bucket/llama") as source:
                cause = "the server answered 400 .*sent to HTTPS" if kind == "it explains" else "should with https://"
                # What leaves is found out by a handshake, once, when nothing was answered yet.
                reading = [] if kind == "it leaves" else [lambda: _read(source)]
                await _refused([source.list, *reading], SourceError, cause)

    run_on_each_loop(body)


def test_tls_where_there_is_none(keys: pytest.MonkeyPatch) -> None:
    async def body() -> None:
        async with _listening(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n") as port:
            keys.setenv("AWS_ENDPOINT_URL", f"https://127.0.0.1:{port}")
            async with S3Source("s3://bucket/llama") as source:
                await _refused([source.list, lambda: _read(source)], SourceError, "should with http://")

    run_on_each_loop(body)


# Regions


@pytest.mark.parametrize("kind", ["301", "400", "307"])
def test_another_region(keys: pytest.MonkeyPatch, path: str, kind: str) -> None:
    """The first request finds out; all others are signed for the right region at once."""
    here = {"x-amz-bucket-region": "eu-west-1", "Content-Type": "application/xml"}
    told = {
        "301": Answer(301, here, b"<Error><Code>PermanentRedirect</Code></Error>"),
        "400": Answer(400, {}, b"<Error><Code>AuthorizationHeaderMalformed</Code><Region>eu-west-1</Region></Error>"),
        "307": Answer(307, here, b"<Error><Code>TemporaryRedirect</Code></Error>"),
    }[kind]

    async def say(head: str) -> Answer:
        return await _store(head) if "/eu-west-1/s3/aws4_request" in head else told

    async def body() -> None:
        async with serve_by(say) as server:
            keys.setenv("AWS_ENDPOINT_URL", server.endpoint)
            async with S3Source("s3://bucket/llama") as source:
                assert await _read(source) == _GOOD.body
                asked = len(server.requests)
                assert await source.list() == [_OBJECT]
                for _ in range(3):
                    assert await _read(source) == _GOOD.body
                assert len(server.requests) == asked + 4, kind
                assert sum(source.paths.values()) == 40

    run_on_each_loop(body)


# Where credentials and endpoints are found


def _use(env: pytest.MonkeyPatch, folder: Path, config: str, credentials: str = "") -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_REGION", "AWS_DEFAULT_REGION"):
        env.delenv(name, raising=False)
    for variable, text in (("AWS_CONFIG_FILE", config), ("AWS_SHARED_CREDENTIALS_FILE", credentials)):
        file = folder / variable
        file.write_text(text)
        env.setenv(variable, str(file))


def test_a_profile_says_everything(s3_bucket: S3Bucket, clean_aws_env: pytest.MonkeyPatch, tmp_path: Path) -> None:
    s3_bucket.put("a", b"0123456789")
    server = s3_bucket.server
    pair = f"aws_access_key_id={server.access_key}\naws_secret_access_key={server.secret_key}\n"
    config = f"[profile models]\nregion=us-east-1\nendpoint_url={server.endpoint}\n"
    _use(clean_aws_env, tmp_path, config, f"[default]\n{pair.replace('=', '=WRONG')}\n[models]\n{pair}")
    clean_aws_env.setenv("AWS_PROFILE", "models")

    async def body() -> None:
        async with S3Source(s3_bucket.uri) as source:
            (object,) = await source.list()
            assert object.size_bytes == 10
            assert (await source.describe())["credentials"] == "shared-credentials-file"

    run_on_each_loop(body)


@pytest.mark.parametrize("way", ["a role", "a service account"])
def test_keys_that_are_given_for_a_role(
    s3_bucket: S3Bucket, clean_aws_env: pytest.MonkeyPatch, tmp_path: Path, way: str
) -> None:
    """As pods have them, and people who switch roles; the reads are signed with what STS gave."""
    s3_bucket.put("a", b"0123456789")
    server = s3_bucket.server
    role = f"role-{s3_bucket.name}"
    with server.client("iam") as iam:
        iam.create_role(RoleName=role, AssumeRolePolicyDocument=_TRUST_ALL)
        iam.put_role_policy(RoleName=role, PolicyName="all", PolicyDocument=_ALLOW_ALL)
        arn = iam.get_role(RoleName=role)["Role"]["Arn"]
    settings = f"region=us-east-1\nendpoint_url={server.endpoint}\n"
    pair = f"aws_access_key_id={server.access_key}\naws_secret_access_key={server.secret_key}\n"
    if way == "a role":
        config = f"[profile pod]\n{settings}role_arn={arn}\nsource_profile=first\n[profile first]\n{settings}{pair}"
        _use(clean_aws_env, tmp_path, config)
        clean_aws_env.setenv("AWS_PROFILE", "pod")
    else:
        _use(clean_aws_env, tmp_path, f"[default]\n{settings}")
        (tmp_path / "token").write_text("header.payload.signature")
        clean_aws_env.setenv("AWS_ROLE_ARN", arn)
        clean_aws_env.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))

    async def body() -> None:
        async with S3Source(s3_bucket.uri) as source:
            (object,) = await source.list()
            memory = bytearray(10)
            await source.read(object, 0, 10, Loan([memoryview(memory)]))
            assert memory == b"0123456789"
            found = (await source.describe())["credentials"]
            assert found == ("assume-role" if way == "a role" else "assume-role-with-web-identity")

    run_on_each_loop(body)


def test_a_service_account_without_its_token(clean_aws_env: pytest.MonkeyPatch, tmp_path: Path) -> None:
    clean_aws_env.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/pod")
    clean_aws_env.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(tmp_path / "token"))
    clean_aws_env.setenv("AWS_REGION", "us-east-1")

    async def body() -> None:
        async with S3Source("s3://bucket/llama") as source:
            await _refused([source.list], CredentialsError, "looking for AWS credentials failed: .*token")

    run_on_each_loop(body)


@pytest.mark.parametrize(
    ("endpoint", "style", "bucket", "where"),
    [
        ("", "", "models", "https://models.s3.eu-west-1.amazonaws.com/llama/a"),
        ("", "", "my.models", "https://s3.eu-west-1.amazonaws.com/my.models/llama/a"),
        ("", "path", "models", "https://s3.eu-west-1.amazonaws.com/models/llama/a"),
        ("http://store.test:9000", "", "models", "http://store.test:9000/models/llama/a"),
        ("http://store.test:9000", "virtual", "models", "http://models.store.test:9000/llama/a"),
        ("http://store.test:9000", "as set", "models", "http://models.store.test:9000/llama/a"),
        ("https://store.test/base", "path", "models", "https://store.test/base/models/llama/a"),
    ],
)
def test_where_a_bucket_is(
    keys: pytest.MonkeyPatch, tmp_path: Path, endpoint: str, style: str, bucket: str, where: str
) -> None:
    """Both ways ask the same place; nothing is sent."""
    keys.setenv("AWS_REGION", "eu-west-1")
    if endpoint:
        keys.setenv("AWS_ENDPOINT_URL", endpoint)
    config = tmp_path / "config"
    as_set = style == "as set"
    config.write_text("" if as_set or not style else f"[default]\ns3 =\n  addressing_style = {style}\n")
    keys.setenv("AWS_CONFIG_FILE", str(config))
    asked: list[str] = []

    class Sent(Exception):
        pass

    async def send(_: Any, request: Any) -> None:
        asked.append(request.url)
        raise Sent

    async def ask(pool: Any, request: bytes, *_: Any) -> None:
        lines = request.decode().split("\r\n")
        host = next(line for line in lines if line.startswith("Host: ")).removeprefix("Host: ")
        asked.append(f"{where.partition('://')[0]}://{host}{lines[0].split()[1]}")
        raise Sent

    keys.setattr("streamload.sources.s3_answers.BoundedSession.send", send)
    keys.setattr("streamload.wire.Pool.ask", ask)

    async def body() -> None:
        async with S3Source(f"s3://{bucket}/llama", s3_settings=S3Settings(virtual=as_set)) as source:
            for call in (lambda: source.stat("a"), lambda: _read(source)):
                with pytest.raises(Sent):
                    await call()
        assert asked == [where] * len(asked)
        assert len(asked) in {2, 4}

    run_on_each_loop(body)


@pytest.mark.parametrize("addresses", [["127.0.0.2", "127.0.0.1"], ["127.0.0.1", "127.0.0.2"]])
def test_a_name_with_a_dead_address(
    s3_bucket: S3Bucket, monkeypatch: pytest.MonkeyPatch, path: str, addresses: list[str]
) -> None:
    """The real server listens at one of the two."""
    s3_bucket.put("a", b"0123456789")
    port = urlsplit(s3_bucket.server.endpoint).port
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://store.test:{port}")

    async def body() -> None:
        loop = asyncio.get_running_loop()
        plain = loop.getaddrinfo

        async def getaddrinfo(host: str, port: int, **more: Any) -> list[Any]:
            if host != "store.test":
                return await plain(host, port, **more)
            return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in addresses]

        loop.getaddrinfo = getaddrinfo  # type: ignore[method-assign,assignment]
        try:
            async with S3Source(s3_bucket.uri) as source:
                (object,) = await source.list()
                for _ in range(4):
                    memory = bytearray(10)
                    await source.read(object, 0, 10, Loan([memoryview(memory)]))
                    assert memory == b"0123456789"
                assert source.requests == 5
        finally:
            loop.getaddrinfo = plain  # type: ignore[method-assign]

    run_on_each_loop(body)
