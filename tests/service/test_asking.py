"""Who asks a sidecar: many at once, in nonsense, for what is none of theirs, or only to look."""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest
from prometheus_client.parser import text_string_to_metric_families

import streamload
from streamload.errors import NotFoundError, OptionError, SourceError
from streamload.service.asking import MAX_BODY_BYTES
from streamload.sources import SourceObject
from streamload.sources.sidecar import SidecarSource, _Object
from streamload.sources.sidecar_protocol import error_from, error_to_json
from tests.cli.programs import TIMEOUT_S, Program, program
from tests.service.origins import Origin, origin_of, random_ranges
from tests.service.sidecars import Running, ask, ask_port, connect, running
from tests.stage.models import FIRST, SECOND

_CLIENTS = 200


@pytest.fixture
def origin(tmp_path: Path) -> Iterator[Origin]:
    with origin_of(tmp_path / "source") as origin:
        yield origin


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    return tmp_path / "volume"


def _open_files(sidecar: Running) -> int:
    return len(os.listdir(f"/proc/{sidecar.process.pid}/fd"))


def test_200_clients(origin: Origin, tmp_path: Path, volume: Path) -> None:
    """Each asks for ranges that have not landed; some leave while they wait; nothing is lost, and nothing is left."""
    content = {name: (tmp_path / "source" / name).read_bytes() for name in (FIRST, SECOND)}
    origin.hold(lambda name, start: start > 0)

    async def client(number: int, url: str, versions: dict[str, str]) -> int:
        name = (FIRST, SECOND)[number % 2]
        checked = 0
        async with aiohttp.ClientSession(connector=aiohttp.UnixConnector(str(volume / "streamload.sock"))) as session:
            for start, end in random_ranges(len(content[name]), 5, number):
                body = {"key": name, "version": versions[name], "start": start, "end": end}
                async with session.post(url + "range", json=body) as answer:
                    assert answer.status == 200
                    said = await answer.json()
                path = volume / said["path"]
                # It may have got its name before we open it: an engine asks again then.
                assert (path if path.exists() else volume / name).read_bytes()[start:end] == content[name][start:end]
                checked += 1
        return checked

    async def main(sidecar: Running) -> None:
        url = "http://sidecar/v1/"
        connector = aiohttp.UnixConnector(str(sidecar.socket))
        async with aiohttp.ClientSession(connector=connector) as session:

            async def status() -> dict[str, int]:
                async with session.get(url + "status") as answer:
                    found: dict[str, int] = await answer.json()
                    return found

            async with session.get(url + "objects") as answer:
                versions = {each["key"]: each["version"] for each in (await answer.json())["objects"]}
            before = _open_files(sidecar)
            async with asyncio.TaskGroup() as group:
                clients = [group.create_task(client(number, url, versions)) for number in range(_CLIENTS)]
                while (await status())["waiting"] < _CLIENTS:
                    pass
                leaving = clients[: _CLIENTS // 4]
                for each in leaving:
                    each.cancel()
                await asyncio.wait(leaving)
                while (await status())["waiting"] > _CLIENTS - len(leaving):
                    pass
                origin.release()
            assert all(each.result() == 5 for each in clients[len(leaving) :])
            # Connections are closed a moment after their clients are.
            while (await status())["waiting"] or _open_files(sidecar) > before:
                pass

    with running(origin.uri, volume) as sidecar:
        asyncio.run(asyncio.wait_for(main(sidecar), TIMEOUT_S))
        sidecar.until("all is staged")
        assert {line["level"] for line in sidecar.lines} == {"info"}
        assert sidecar.status()["answered"] == 5 * (_CLIENTS - _CLIENTS // 4)


def test_nonsense(origin: Origin, volume: Path) -> None:
    """Each is told so, none is found anything, and whoever comes next is served."""
    with running(origin.uri, volume) as sidecar:
        sidecar.until("all is staged")
        version = ask(sidecar.socket, "GET", "/v1/objects").json["objects"][0]["version"]
        file: dict[str, object] = {"key": FIRST, "version": version}
        escapes = ["../source/config.json", "/etc/passwd", f"./{FIRST}", f"x/../{FIRST}", "", "a\0b", "READY", "\udc80"]
        before = _open_files(sidecar)
        for status, method, what, body in [
            (400, "POST", "/v1/range", b""),
            (400, "POST", "/v1/range", b"\xff{"),
            (400, "POST", "/v1/range", b"[" * 50_000),
            (400, "POST", "/v1/range", [1]),
            (400, "POST", "/v1/range", file | {"path": "/etc/passwd"}),
            (400, "POST", "/v1/range", {"key": 1, "version": version}),
            (400, "POST", "/v1/range", file | {"start": True}),
            (400, "POST", "/v1/range", file | {"start": 0, "end": 1.5}),
            (400, "POST", "/v1/verdict", file | {"stamp": 7}),
            (409, "POST", "/v1/range", file | {"version": "another"}),
            (409, "POST", "/v1/range", file | {"stamp": "another"}),
            (416, "POST", "/v1/range", file | {"start": -1, "end": 1}),
            (416, "POST", "/v1/range", file | {"start": 5, "end": 4}),
            (416, "POST", "/v1/range", file | {"start": 5, "end": 5}),
            (416, "POST", "/v1/range", file | {"start": 0, "end": 10**30}),
            *((404, "POST", "/v1/range", file | {"key": key}) for key in escapes),
            *((404, "POST", "/v1/verdict", file | {"key": key}) for key in escapes),
            (404, "GET", "/v1/../../etc/passwd", None),
            (404, "GET", "/", None),
            (404, "GET", "/metrics", None),
            (405, "GET", "/v1/range", None),
            (405, "GET", "/v1/cancel", None),
            (405, "DELETE", "/v1/status", None),
            (413, "POST", "/v1/range", b"{" + b" " * MAX_BODY_BYTES + b"}"),
            (413, "POST", "/v1/cancel", b" " * (MAX_BODY_BYTES + 1)),
            (413, "GET", "/v1/status", b" " * (MAX_BODY_BYTES + 1)),
        ]:
            answer = ask(sidecar.socket, method, what, body)
            assert (answer.status, bool(answer.error)) == (status, True), (method, what, body)
        for raw in [
            b"\x16\x03\x01\x02\x00\x01",
            b"GET / HTTP/9.9\r\n\r\n",
            b"GET /v1/status HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 100_000,
            b"POST /v1/range HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n",
            b"POST /v1/range HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            b"POST /v1/range HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1000\r\n" + bytes(5000),
        ]:
            with connect(sidecar.socket) as connection:
                connection.sendall(raw)
                connection.shutdown(socket.SHUT_WR)
                heard = b""
                while more := connection.recv(1 << 16):
                    heard += more
            assert heard == b"" or heard.startswith((b"HTTP/1.1 400", b"HTTP/1.0 400", b"HTTP/1.1 500"[:9])), heard[:99]
        # A body that never ends is not read to its end.
        with connect(sidecar.socket) as connection:
            connection.sendall(b"POST /v1/range HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\n")
            with pytest.raises(OSError, match=r"Broken pipe|reset by peer"):
                _send_for_ever(connection)
        while _open_files(sidecar) > before:
            assert sidecar.status()["state"] == "staged"
        sidecar.process.terminate()
        sidecar.ended()
    assert [line for line in sidecar.lines if "Traceback" in line["message"]] == []


def _send_for_ever(connection: socket.socket) -> None:
    while True:
        connection.sendall(b"10000\r\n" + bytes(1 << 16) + b"\r\n")


def test_the_port_shows_and_starts_nothing(origin: Origin, volume: Path) -> None:
    origin.hold(lambda name, start: name == SECOND and start > 0)
    with running(origin.uri, volume, "--port", 0, "--host", "127.0.0.1") as sidecar:
        port = sidecar.until("state and metrics")["port"]
        origin.until_held()
        assert ask_port(port, "/startupz").status == 200
        assert ask_port(port, "/healthz").status == 200
        ready = ask_port(port, "/readyz")
        assert (ready.status, ready.body.startswith(b"staging: ")) == (503, True)
        assert _metrics(port)["streamload_sidecar_state", "staging"] == 1
        assert ("streamload_sidecar_time_to_ready_seconds", "") not in _metrics(port)
        for method, what in [
            ("GET", "/v1/status"),
            ("POST", "/v1/cancel"),
            ("POST", "/v1/start"),
            ("GET", "/v1/objects"),
        ]:
            assert ask_port(port, what, method).status == 404
        assert ask_port(port, "/readyz", "POST").status == 405
        assert ask_port(port, "/readyz", "GET", b"12").status == 413
        assert sidecar.status()["state"] == "staging"
        origin.release()
        sidecar.until("all is staged")
        while ask_port(port, "/readyz").status != 200:
            pass
        found = _metrics(port)
        status = sidecar.status()
    assert found["streamload_sidecar_state", "staged"] == 1
    assert found["streamload_sidecar_state", "staging"] == 0
    assert found["streamload_sidecar_time_to_ready_seconds", ""] == status["ready_s"] > 0
    assert found["streamload_sidecar_landed_bytes", ""] == found["streamload_sidecar_model_bytes", ""]
    assert found["streamload_sidecar_fetched_bytes_total", ""] == status["fetched_bytes"] == status["total_bytes"]
    assert found["streamload_sidecar_source_requests_total", ""] == len(origin.server.seen)
    assert found["streamload_sidecar_verified_bytes", "nothing"] == status["total_bytes"]
    assert found["streamload_sidecar_memory_budget_bytes", ""] == 1 << 20
    for name in ("retries_total", "hedged_bytes_total", "throughput_bytes_per_second", "concurrency"):
        assert (f"streamload_sidecar_{name}", "") in found


def _metrics(port: int) -> dict[tuple[str, str], float]:
    text = ask_port(port, "/metrics").body.decode()
    families = text_string_to_metric_families(text)
    return {
        (sample.name, "".join(sample.labels.values())): sample.value for family in families for sample in family.samples
    }


@pytest.mark.torch
def test_a_failure_is_shown_and_mended(tmp_path: Path, volume: Path) -> None:
    source = tmp_path / "source"
    with running(source, volume, "--port", 0) as sidecar:
        port = sidecar.until("state and metrics")["port"]
        sidecar.until("staging failed")
        while ask_port(port, "/readyz").body.startswith(b"staging"):
            pass
        ready = ask_port(port, "/readyz")
        assert ready.status == 503
        assert b"No such file" in ready.body
        # To be killed would not help.
        assert ask_port(port, "/healthz").status == 200
        assert _metrics(port)["streamload_sidecar_errors_total", "NotFoundError"] == 1
        with pytest.raises(NotFoundError, match="could not stage"):
            streamload.load(sidecar.uri)
        with origin_of(source):
            # Whoever asks now need not wait for the pause to be over.
            assert streamload.load(sidecar.uri).keys() == {"first", "second"}


def test_one_process_has_a_socket(tmp_path: Path, origin: Origin, volume: Path) -> None:
    with running(origin.uri, volume) as sidecar:
        with program("serve", origin.uri, volume, "--log", "text", "--termination-log", tmp_path / "words") as second:
            assert second.wait(TIMEOUT_S) == 2
        assert "another process serves on" in (tmp_path / "words").read_text()
        assert sidecar.status()["state"] in ("staging", "staged")
    (volume / "file").touch()
    with program("serve", origin.uri, volume, "--socket", volume / "file") as third:
        assert third.communicate(timeout=TIMEOUT_S)[1].count("is no socket") == 1
    assert (volume / "file").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "say what to stage"),
        (("a", "b", "c"), "3 places"),
        (("a",), "neither a folder"),
        (("a", "volume", "--socket", "elsewhere/s.sock"), "does not lie in the socket's folder"),
        (("a", "volume", "--socket", "x" * 200), "longer than the 107 bytes"),
        (("a", "volume", "--socket-group", "no such group"), "there is no such group"),
        (("a", "volume", "--port", "70000"), "is not from 0 to 65535"),
        (("a", "volume", "--drain-s", "-1"), "drain_s"),
        (("a", "link", "--cache", "cache"), "say where the socket is"),
        (("a", "link", "--cache", "cache", "--socket", "link/s.sock"), "does not lie in the socket's folder"),
        (("gopher://a", "volume"), "nothing serves"),
    ],
)
def test_wrong_use(
    cli: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    done = cli("serve", *arguments, "--log", "text")
    assert done.code == 2
    assert said in done.error


def test_a_port_that_is_taken(cli: Program, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        done = cli("serve", tmp_path, tmp_path / "volume", "--port", port, "--host", "127.0.0.1", "--log", "text")
    assert done.code == 1
    assert "already in use" in done.error
    assert "streamload.sock" not in os.listdir(tmp_path / "volume")


@pytest.mark.torch
def test_the_environment_alone(tmp_path: Path, origin: Origin) -> None:
    environment = {
        "STREAMLOAD_STAGE_URI": origin.uri,
        "STREAMLOAD_STAGE_DIR": str(tmp_path / "volume" / "model"),
        "STREAMLOAD_SERVE_SOCKET": str(tmp_path / "volume" / "s.sock"),
        "STREAMLOAD_SERVE_SOCKET_MODE": "600",
        "STREAMLOAD_SERVE_SOCKET_GROUP": str(os.getgid()),
        "STREAMLOAD_SERVE_PORT": "0",
        "STREAMLOAD_STAGE_LOG": "json",
    }
    with program("serve", environment=environment) as process:
        sidecar = Running(process, tmp_path / "volume" / "s.sock")
        sidecar.until("state and metrics on port")
        assert sidecar.socket.stat().st_mode & 0o777 == 0o600
        # The engine's container has the volume elsewhere.
        (tmp_path / "elsewhere").symlink_to(tmp_path / "volume")
        assert streamload.load(f"sidecar://{tmp_path}/elsewhere/s.sock").keys() == {"first", "second"}


@pytest.mark.torch
def test_a_version_that_is_served_is_not_evicted(tmp_path: Path, origin: Origin) -> None:
    cache = tmp_path / "cache"

    def stage_another() -> None:
        streamload.stage_checkpoint(tmp_path / "source", cache=str(cache), keep_bytes=0, keep_s=0.0)

    options = ("--cache", cache, "--socket", cache / "streamload.sock")
    with program("serve", origin.uri, *options, "--log", "json") as process:
        sidecar = Running(process, cache / "streamload.sock")
        sidecar.until("all is staged")
        stage_another()
        assert streamload.load(sidecar.uri).keys() == {"first", "second"}
        process.terminate()
        sidecar.ended()
    (folder,) = [path for path in cache.glob("model-*/*") if path.is_dir()]
    (tmp_path / "source" / "more.json").write_text("{}")
    stage_another()
    assert not folder.exists()


class TestSource:
    def test_nobody_answers(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with SidecarSource(f"sidecar://{tmp_path}/s.sock", patience_s=0.0) as source:
                with pytest.raises(SourceError, match=r"no sidecar answers: No such file"):
                    await source.list()
                assert (await source.describe())["sidecar"].startswith("no sidecar answers")

        asyncio.run(main())

    @pytest.mark.parametrize(
        "said", ["HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n[]", "220 mail.example.com ESMTP\r\n\r\n"]
    )
    def test_a_stranger_answers(self, tmp_path: Path, said: str) -> None:
        """It is asked once, and no more."""
        asked: list[bytes] = []

        async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            asked.append(await reader.readuntil(b"\r\n\r\n"))
            writer.write(said.encode())
            writer.close()

        async def main() -> None:
            server = await asyncio.start_unix_server(answer, f"{tmp_path}/s.sock")
            async with server, SidecarSource(f"sidecar://{tmp_path}/s.sock") as source:
                with pytest.raises(SourceError, match="what answers on this socket is no sidecar"):
                    await source.list()

        asyncio.run(main())
        assert len(asked) == 1

    @pytest.mark.parametrize("uri", ["sidecar://", "sidecar://s.sock", "sidecar:///folder/", f"sidecar:///{'x' * 200}"])
    def test_uris(self, uri: str) -> None:
        with pytest.raises(OptionError):
            SidecarSource(uri)

    @pytest.mark.parametrize(
        "said",
        [
            {"path": "../x", "stamp": "s", "landed": [0, 1], "mtime_ns": None},
            {"path": "/x", "stamp": "s", "landed": [0, 1], "mtime_ns": None},
            {"path": "x", "stamp": None, "landed": [0, 1], "mtime_ns": None},
            {"path": "x", "stamp": "s", "landed": [0], "mtime_ns": None},
            {"path": "x", "stamp": "s", "landed": [0, 1], "mtime_ns": "1"},
            {},
        ],
    )
    def test_answers_that_make_no_sense(self, said: dict[str, object]) -> None:
        known = _Object(SourceObject("key", 1, "v"))
        with pytest.raises(SourceError):
            known.take(said, uri="sidecar:///s.sock")
        assert not known.has(0, 1)

    def test_errors_are_told(self) -> None:
        error = NotFoundError("gone", uri="s3://bucket", object="file", start=1, end=2)
        told = error_from(json.loads(json.dumps(error_to_json(error))), uri="sidecar:///s.sock")
        assert type(told) is NotFoundError
        assert str(told) == "sidecar:///s.sock, file, bytes 1-2: the sidecar could not stage s3://bucket: gone"
        nonsense: object
        for nonsense in (None, [], {}, {"cause": 1}, {"kind": "exit", "cause": "x"}):
            assert type(error_from(nonsense, uri="sidecar:///s.sock")) is SourceError
        assert not error_from({"kind": "TransientError", "cause": "x"}, uri="sidecar:///s.sock").retryable
