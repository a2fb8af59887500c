"""The HTTP source against a server that obeys RFC 9110, and against what servers do instead."""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from aiohttp import web

from streamload.errors import (
    AccessError,
    CredentialsError,
    NotFoundError,
    ObjectChangedError,
    OptionError,
    SourceError,
    StreamloadError,
    TransientError,
    TruncatedReadError,
)
from streamload.loan import Loan
from streamload.options import LoadOptions, resolve
from streamload.sources import SourceObject
from streamload.sources.http import HttpSource
from streamload.testing import run_on_each_loop
from tests.httpserver import FileServer, Handler, answer_range, cut, run_server, serve_tunnel
from tests.wire.server import ca_file, server_tls

CONTENT = bytes(range(256)) * 400
KEY = "model.safetensors"
PATH = f"/llama/{KEY}"

Body = Callable[[HttpSource], Awaitable[None]]


@pytest.fixture(autouse=True)
def _no_proxy(clean_aws_env: pytest.MonkeyPatch) -> None:
    """Nothing of the machine's own proxies."""


@pytest.fixture(scope="module")
def _servers() -> Iterator[tuple[FileServer, FileServer]]:
    with run_server(FileServer()) as home, run_server(FileServer()) as elsewhere:
        yield home, elsewhere


@pytest.fixture
def home(_servers: tuple[FileServer, FileServer]) -> FileServer:
    """Serves one object."""
    return _fresh(_servers[0])


@pytest.fixture
def elsewhere(_servers: tuple[FileServer, FileServer]) -> FileServer:
    """The same on another port: another origin."""
    return _fresh(_servers[1])


def _fresh(server: FileServer) -> FileServer:
    server.__init__(origin=server.origin)  # type: ignore[misc]
    server.put(PATH, CONTENT)
    return server


def run(server: FileServer, body: Body, **more: object) -> None:
    async def whole() -> None:
        async with HttpSource(f"{server.origin}/llama", **more) as source:  # type: ignore[arg-type]
            await body(source)

    run_on_each_loop(whole)


async def read(source: HttpSource, object: SourceObject, start: int = 100, end: int = 300) -> bytes:
    memory = bytearray(end - start)
    await source.read(object, start, end, Loan([memoryview(memory)]))
    return bytes(memory)


def redirect(to: str, status: int = 302) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return web.Response(status=status, headers={"Location": to})

    return handler


def only(answer: Callable[[web.Request], web.StreamResponse]) -> Handler:
    async def handler(request: web.Request) -> web.StreamResponse:
        return answer(request)

    return handler


class TestVersions:
    def test_a_strong_etag_is_asked_for_and_compared(self, home: FileServer) -> None:
        async def body(source: HttpSource) -> None:
            object = await source.stat(KEY)
            assert object == SourceObject(KEY, len(CONTENT), f'"{home.files[PATH].tag}"')
            assert await read(source, object) == CONTENT[100:300]
            last = home.seen[-1].headers
            assert (last["range"], last["if-match"]) == ("bytes=100-299", object.version)
            assert last["accept-encoding"] == "identity"

        run(home, body)

    @pytest.mark.parametrize("conditions", [True, False])
    @pytest.mark.parametrize("ranges", [True, False])
    @pytest.mark.parametrize("tags", ["strong", "weak", "none"])
    def test_an_object_changed_in_the_middle(self, home: FileServer, conditions: bool, ranges: bool, tags: str) -> None:
        """412 from those who know conditions; a 206 or 200 of another version from those who do not."""
        home.conditions, home.ranges, home.tags = conditions, ranges, tags  # type: ignore[assignment]

        async def body(source: HttpSource) -> None:
            home.put(PATH, CONTENT)
            object = await source.stat(KEY)
            assert await read(source, object) == CONTENT[100:300]
            home.put(PATH, CONTENT[::-1], modified_s=1_700_000_001.0)
            with pytest.raises(ObjectChangedError) as caught:
                await read(source, object)
            assert (caught.value.object, caught.value.start, caught.value.end) == (KEY, 100, 300)
            assert (home.seen[-1].status == 412) == conditions
            assert ("if-match" in home.seen[-1].headers) == (tags == "strong")

        run(home, body)

    def test_an_object_that_became_shorter(self, home: FileServer) -> None:
        home.conditions = False

        async def body(source: HttpSource) -> None:
            home.put(PATH, CONTENT)
            object = await source.stat(KEY)
            home.put(PATH, CONTENT[:10])
            with pytest.raises(ObjectChangedError):
                await read(source, object)

        run(home, body)

    def test_without_a_version_nothing_is_read(self, home: FileServer) -> None:
        home.tags, home.dates = "weak", False

        async def body(source: HttpSource) -> None:
            with pytest.raises(SourceError, match="neither a strong ETag nor Last-Modified"):
                await source.stat(KEY)

        run(home, body)

    def test_a_date_of_this_very_second_pins_nothing_yet(self, home: FileServer) -> None:
        home.tags = "none"
        home.put(PATH, CONTENT, modified_s=4_000_000_000.0)

        async def body(source: HttpSource) -> None:
            with pytest.raises(TransientError, match="changed within this second") as caught:
                await source.stat(KEY)
            assert caught.value.retry_after_s == 1.0

        run(home, body)

    def test_an_answer_that_leaves_the_version_out(self, home: FileServer) -> None:
        async def body(source: HttpSource) -> None:
            home.tags = "strong"
            object = await source.stat(KEY)
            home.tags, home.conditions = "none", False
            with pytest.raises(SourceError, match="no ETag"):
                await read(source, object)

        run(home, body)


class TestFolders:
    def test_the_index_file_says_what_is_there(self, home: FileServer) -> None:
        async def body(source: HttpSource) -> None:
            assert [object.key for object in await source.list()] == [KEY]
            home.put("/llama/model.safetensors.index.json", b"{}")
            assert [object.key for object in await source.list()] == ["model.safetensors.index.json"]
            del home.files["/llama/model.safetensors.index.json"]

        run(home, body)

    def test_an_index_file_that_is_refused_is_not_taken_for_missing(self, home: FileServer) -> None:
        home.instead = only(lambda request: web.Response(status=403))

        async def body(source: HttpSource) -> None:
            with pytest.raises(AccessError, match=r"access is refused.*where there is no model.*: then name the file"):
                await source.list()

        run(home, body)

    def test_an_empty_folder_says_what_was_looked_for(self, home: FileServer) -> None:
        home.files.clear()

        async def body(source: HttpSource) -> None:
            with pytest.raises(NotFoundError, match=r"neither model\.safetensors\.index\.json nor model"):
                await source.list()

        run(home, body)

    @pytest.mark.parametrize(
        ("uri", "path", "query"),
        [
            ("/a%20b/model%2B.safetensors", "/a b/model+.safetensors", ""),
            ("/a b/ü.safetensors?sig=a%2Fb&x", "/a b/ü.safetensors", "sig=a/b&x"),
            ("/model.safetensors", "/model.safetensors", ""),
        ],
    )
    def test_one_file(self, home: FileServer, uri: str, path: str, query: str) -> None:
        home.put(path, CONTENT)

        async def body() -> None:
            async with HttpSource(home.origin + uri) as source:
                (object,) = await source.list()
                assert object.key == path.rpartition("/")[2]
                assert await read(source, object) == CONTENT[100:300]
                assert (home.seen[-1].path, home.seen[-1].query) == (path, query)

        run_on_each_loop(body)


class TestRanges:
    def test_a_server_without_ranges_sends_what_is_wanted_whole_in_one_go(self, home: FileServer) -> None:
        content = CONTENT * 100
        home.ranges = False
        home.put(PATH, content)

        async def body(source: HttpSource) -> None:
            object = await source.stat(KEY)
            before = source.requests
            assert await read(source, object, 0, len(content)) == content
            assert source.requests == before + 1
            with pytest.raises(SourceError, match="the server ignores ranges") as caught:
                await read(source, object, 0, 100)
            assert not caught.value.retryable

        run(home, body)

    @pytest.mark.parametrize("after", [0, 150, 250, 1000])
    def test_a_whole_object_that_breaks_off_tells_what_of_the_range_is_there(
        self, home: FileServer, after: int
    ) -> None:
        async def instead(request: web.Request) -> web.StreamResponse | None:
            if request.headers.get("Range") == "bytes=0-0":
                return None
            answer = web.StreamResponse(headers={"ETag": f'"{home.files[PATH].tag}"'})
            answer.content_length = len(CONTENT)
            await answer.prepare(request)
            await answer.write(CONTENT[:after])
            assert request.transport is not None
            request.transport.close()
            return answer

        home.instead = instead

        async def body(source: HttpSource) -> None:
            object = await source.stat(KEY)
            memory = bytearray(200)
            with pytest.raises(TransientError) as caught:
                await source.read(object, 100, 300, Loan([memoryview(memory)]))
            assert caught.value.valid_bytes == max(0, min(after - 100, 200))
            assert memory[: caught.value.valid_bytes] == CONTENT[100 : 100 + caught.value.valid_bytes]

        run(home, body)

    @pytest.mark.parametrize("after", [0, 1, 150])
    def test_a_range_that_breaks_off(self, home: FileServer, after: int) -> None:
        async def instead(request: web.Request) -> web.StreamResponse | None:
            if request.headers.get("Range") == "bytes=0-0":
                return None
            return await cut(request, CONTENT, {"ETag": f'"{home.files[PATH].tag}"'}, after=after)

        home.instead = instead

        async def body(source: HttpSource) -> None:
            object = await source.stat(KEY)
            with pytest.raises(TruncatedReadError) as caught:
                await read(source, object)
            assert caught.value.valid_bytes == after

        run(home, body)

    @pytest.mark.parametrize(
        ("headers", "what"),
        [
            ({"Content-Range": "bytes 0-199/102400"}, "asked for bytes 100-299/102400, the answer has bytes 0-199"),
            ({"Content-Range": "bytes 100-299/102401"}, "the answer has bytes 100-299/102401"),
            ({}, "the answer has None"),
            ({"Content-Range": "bytes 100-299/102400", "Content-Encoding": "gzip"}, r"compressed \(gzip\)"),
        ],
    )
    def test_an_answer_that_is_not_the_range(self, home: FileServer, headers: dict[str, str], what: str) -> None:
        def answer(request: web.Request) -> web.StreamResponse:
            pinned = {"ETag": f'"{home.files[PATH].tag}"', **headers}
            return web.Response(status=206, body=b"x" * 200, headers=pinned)

        async def body(source: HttpSource) -> None:
            home.instead = None
            object = await source.stat(KEY)
            home.instead = only(answer)
            with pytest.raises(SourceError, match=what) as caught:
                await read(source, object)
            assert not caught.value.retryable

        run(home, body)

    def test_an_answer_of_unknown_length_comes_with_aiohttp(self, home: FileServer) -> None:
        async def instead(request: web.Request) -> web.StreamResponse | None:
            whole = answer_range(request, CONTENT, {"ETag": f'"{home.files[PATH].tag}"'})
            assert isinstance(whole, web.Response)
            assert isinstance(whole.body, bytes)
            headers = {name: value for name, value in whole.headers.items() if name in {"ETag", "Content-Range"}}
            answer = web.StreamResponse(status=whole.status, headers=headers)
            answer.enable_chunked_encoding()
            await answer.prepare(request)
            await answer.write(whole.body)
            return answer

        home.instead = instead

        async def body(source: HttpSource) -> None:
            object = await source.stat(KEY)
            assert object.size_bytes == len(CONTENT)
            assert await read(source, object) == CONTENT[100:300]
            assert source.paths == {"with aiohttp: its answers do not say how long they are": 201}

        run(home, body)


class TestRedirects:
    @pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
    def test_where_they_lead_is_asked_first_from_then_on(
        self, home: FileServer, elsewhere: FileServer, status: int
    ) -> None:
        home.instead = redirect(f"{elsewhere.origin}{PATH}?sig=secret#part", status)

        async def body(source: HttpSource) -> None:
            home.seen.clear()
            object = await source.stat(KEY)
            for _ in range(5):
                assert await read(source, object) == CONTENT[100:300]
            assert len(home.seen) == 1
            assert elsewhere.seen[-1].query == "sig=secret"

        run(home, body)

    @pytest.mark.parametrize("hops", [5, 6])
    def test_five_are_followed(self, home: FileServer, hops: int) -> None:
        async def instead(request: web.Request) -> web.StreamResponse | None:
            hop = int(request.query.get("hop", "0"))
            return None if hop == hops else web.Response(status=302, headers={"Location": f"?hop={hop + 1}"})

        home.instead = instead

        async def body(source: HttpSource) -> None:
            if hops == 5:
                assert (await source.stat(KEY)).size_bytes == len(CONTENT)
                return
            with pytest.raises(SourceError, match="redirects more than 5 times") as caught:
                await source.stat(KEY)
            assert not caught.value.retryable

        run(home, body)

    @pytest.mark.parametrize("to", ["ftp://127.0.0.1/x", "https://[::1", "mailto:a@b", ""])
    def test_to_what_is_no_server(self, home: FileServer, to: str) -> None:
        home.instead = redirect(to)

        async def body(source: HttpSource) -> None:
            with pytest.raises(SourceError, match=r"redirects (to what is no HTTP server|without saying where to)"):
                await source.stat(KEY)

        run(home, body)

    def test_credentials_go_to_the_uris_own_origin_only(self, home: FileServer, elsewhere: FileServer) -> None:
        """Not to another port, and not to a user name that the redirect brings; back home they are sent again."""
        here, there = home.origin.removeprefix("http://"), elsewhere.origin.removeprefix("http://")

        async def to_there(request: web.Request) -> web.StreamResponse | None:
            if "back" in request.query:
                return None
            return web.Response(status=302, headers={"Location": f"http://spy:spied@{there}/step"})

        home.instead = to_there
        elsewhere.instead = redirect(f"{home.origin}{PATH}?back")

        async def body() -> None:
            headers = {"X-Token": "t0ken", "authorization": "Bearer hidden"}
            async with HttpSource(f"http://user:p%40ss@{here}/llama", http_headers=headers) as source:
                assert "ss" not in repr(source.uri)
                await source.stat(KEY)
            first, back = home.seen[-2:]
            for seen in (first, back):
                assert seen.headers["x-token"] == "t0ken"
                assert seen.headers["authorization"] == "Basic dXNlcjpwQHNz"
            (step,) = elsewhere.seen[-1:]
            assert not {"x-token", "authorization", "cookie"} & step.headers.keys()

        run_on_each_loop(body)

    def test_a_signed_address_that_expires_is_found_anew(self, home: FileServer, elsewhere: FileServer) -> None:
        signature = 0

        async def to_there(request: web.Request) -> web.StreamResponse | None:
            return web.Response(status=302, headers={"Location": f"{elsewhere.origin}{PATH}?sig={signature}"})

        async def check(request: web.Request) -> web.StreamResponse | None:
            good = request.query.get("sig") == str(signature) and signature >= 0
            return None if good else web.Response(status=403, text="Request has expired")

        home.instead, elsewhere.instead = to_there, check

        async def body(source: HttpSource) -> None:
            nonlocal signature
            signature = 0
            object = await source.stat(KEY)
            signature = 1
            home.seen.clear()
            assert await read(source, object) == CONTENT[100:300]
            assert await read(source, object) == CONTENT[100:300]
            assert len(home.seen) == 1
            signature = -1
            with pytest.raises(AccessError):
                await read(source, object)

        run(home, body)


class TestRefusals:
    @pytest.mark.parametrize(
        ("status", "kind", "throttled"),
        [
            (400, SourceError, False),
            (401, CredentialsError, False),
            (403, AccessError, False),
            (404, NotFoundError, False),
            (408, TransientError, True),
            (410, NotFoundError, False),
            (418, SourceError, False),
            (429, TransientError, True),
            (500, TransientError, False),
            (502, TransientError, False),
            (503, TransientError, True),
            (504, TransientError, False),
        ],
    )
    def test_what_a_status_means(self, home: FileServer, status: int, kind: type[SourceError], throttled: bool) -> None:
        page = "<SignatureProvided>c2VjcmV0</SignatureProvided>"

        async def body(source: HttpSource) -> None:
            home.instead = None
            object = await source.stat(KEY)
            home.instead = only(lambda request: web.Response(status=status, text=page, headers={"Retry-After": "7"}))
            with pytest.raises(SourceError) as caught:
                await read(source, object)
            error = caught.value
            assert type(error) is kind
            assert str(status) in error.cause
            assert "c2VjcmV0" not in str(error)
            if isinstance(error, TransientError):
                assert (error.throttled, error.retry_after_s) == (throttled, 7.0)

        run(home, body)

    def test_nobody_is_there(self) -> None:
        with run_server(FileServer()) as gone:
            pass

        async def body(source: HttpSource) -> None:
            with pytest.raises(TransientError, match="cannot reach 127"):
                await source.stat(KEY)

        run(gone, body)


class TestSecrets:
    def test_none_shows(self, home: FileServer, caplog: pytest.LogCaptureFixture) -> None:
        caplog.set_level(logging.DEBUG)
        home.instead = only(lambda request: web.Response(status=403))
        uri = f"http://user:secret1@{home.origin.removeprefix('http://')}/llama?sig=secret2&X-Amz-Signature=secret3"

        async def body() -> None:
            async with HttpSource(uri, http_headers={"Authorization": "Bearer secret4"}) as source:
                shown = [source.uri, repr(source), repr(await source.describe())]
                with pytest.raises(AccessError) as caught:
                    await source.list()
                shown += [str(caught.value), repr(caught.value), repr(caught.value.args), caplog.text]
                assert "secret" not in "".join(shown)

        run_on_each_loop(body)

    @pytest.mark.parametrize(
        "headers",
        [
            {"X-Token": "secret\r\nX: y"},
            {"X-Token": ""},
            {"X-Token": "secret\u2013"},
            {"X Token": "secret"},
            {"": "secret"},
            {"Range": "secret"},
            {"host": "secret"},
        ],
    )
    def test_a_header_that_cannot_be_sent(self, headers: dict[str, str]) -> None:
        with pytest.raises(OptionError, match="header") as caught:
            HttpSource("https://host/x", http_headers=headers)
        assert "secret" not in str(caught.value)

    def test_headers_come_from_the_environment_and_are_not_shown(self) -> None:
        text = "Authorization: Bearer secret\n\nX-Other: a:b\n"
        options, origins = resolve({}, {"STREAMLOAD_HTTP_HEADERS": text})
        assert options.http_headers == {"Authorization": "Bearer secret", "X-Other": "a:b"}
        (shown,) = [origin for origin in origins if origin.name == "http_headers"]
        assert shown.value == "Authorization, X-Other"
        assert "secret" not in repr(options)
        with pytest.raises(OptionError, match="STREAMLOAD_HTTP_HEADERS") as caught:
            resolve({}, {"STREAMLOAD_HTTP_HEADERS": "secret"})
        assert "secret" not in str(caught.value)
        with pytest.raises(OptionError, match="http_headers"):
            LoadOptions(http_headers="X: y")  # type: ignore[arg-type]

    @pytest.mark.parametrize(
        "uri",
        ["https://", "http:///x", "https://[::1/x", "https://host:port/x", "https://host/x#part"],
    )
    def test_a_uri_that_names_nobody(self, uri: str) -> None:
        with pytest.raises(OptionError):
            HttpSource(uri)


class TestOtherWays:
    def test_a_proxy_is_asked_with_aiohttp(self, home: FileServer, monkeypatch: pytest.MonkeyPatch) -> None:
        """It is asked for the whole address, and gets the credentials that its own has."""
        monkeypatch.setenv("http_proxy", home.origin.replace("http://", "http://me:secret@"))
        monkeypatch.setenv("no_proxy", "elsewhere.test")

        async def body() -> None:
            async with HttpSource("http://files.test/llama") as source:
                object = await source.stat(KEY)
                assert await read(source, object) == CONTENT[100:300]
                assert source.paths == {"with aiohttp: through a proxy": 201}
                assert source.requests == 2
            last = home.seen[-1].headers
            assert (last["host"], last["proxy-authorization"]) == ("files.test", "Basic bWU6c2VjcmV0")

        run_on_each_loop(body)

    def test_a_proxy_passes_tls_on(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """It sees its own credentials, and nothing of what goes through it."""
        server = FileServer()
        server.put(PATH, CONTENT)
        monkeypatch.setenv("SSL_CERT_FILE", str(ca_file(tmp_path)))

        async def body() -> None:
            async with serve_tunnel(int(server.origin.rpartition(":")[2])) as (address, heads):
                monkeypatch.setenv("https_proxy", address.replace("http://", "http://me:secret@"))
                async with HttpSource("https://server.test/llama", http_headers={"X-Token": "t"}) as source:
                    assert await read(source, await source.stat(KEY)) == CONTENT[100:300]
                    assert source.paths == {"with aiohttp: through a proxy": 201}
                assert heads[0].startswith("CONNECT server.test:443 HTTP/1.1\r\n")
                assert "Proxy-Authorization: Basic bWU6c2VjcmV0" in heads[0]
                assert "X-Token" not in heads[0]
            assert "proxy-authorization" not in server.seen[-1].headers
            assert server.seen[-1].headers["x-token"] == "t"

        with run_server(server, tls=server_tls()):
            run_on_each_loop(body)

    @pytest.mark.parametrize("after", [0, 150])
    def test_a_proxy_that_breaks_off(self, home: FileServer, monkeypatch: pytest.MonkeyPatch, after: int) -> None:
        monkeypatch.setenv("http_proxy", home.origin)

        async def instead(request: web.Request) -> web.StreamResponse | None:
            if request.headers.get("Range") == "bytes=0-0":
                return None
            return await cut(request, CONTENT, {"ETag": f'"{home.files[PATH].tag}"'}, after=after)

        home.instead = instead

        async def body() -> None:
            async with HttpSource("http://files.test/llama") as source:
                object = await source.stat(KEY)
                with pytest.raises(TruncatedReadError) as caught:
                    await read(source, object)
                assert caught.value.valid_bytes == after

        run_on_each_loop(body)

    def test_tls_with_the_certificates_that_are_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        async def body(uri: str) -> None:
            async with HttpSource(uri) as source:
                assert await read(source, await source.stat(KEY)) == CONTENT[100:300]

        async def refused(uri: str) -> None:
            async with HttpSource(uri) as source:
                with pytest.raises(SourceError, match="no secure connection") as caught:
                    await source.stat(KEY)
                assert not caught.value.retryable

        server = FileServer()
        server.put(PATH, CONTENT)
        with run_server(server, tls=server_tls()), suppress(ssl.SSLError):
            run_on_each_loop(lambda: refused(f"{server.origin}/llama"))
            monkeypatch.setenv("SSL_CERT_FILE", str(ca_file(tmp_path)))
            run_on_each_loop(lambda: body(f"{server.origin}/llama"))
            # Who was connected safely is not sent on to where anybody can listen.
            server.instead = redirect("http://127.0.0.1:1/x")

            async def downgraded() -> None:
                async with HttpSource(f"{server.origin}/llama") as source:
                    with pytest.raises(SourceError, match="from https to http"):
                        await source.stat(KEY)

            run_on_each_loop(downgraded)


def test_closing_ends_a_request_that_waits(home: FileServer) -> None:
    """A request that waits for its answer ends when the source is closed, and leaves nothing."""

    async def body(source: HttpSource) -> None:
        loop, asked = asyncio.get_running_loop(), asyncio.Event()

        async def hang(request: web.Request) -> web.StreamResponse | None:
            loop.call_soon_threadsafe(asked.set)
            await asyncio.get_running_loop().create_future()
            raise AssertionError("unreachable")

        home.instead = hang
        looking = asyncio.create_task(source.stat(KEY))
        await asked.wait()
        await source.aclose()
        with pytest.raises(StreamloadError, match="closed"):
            await looking

    run(home, body)
