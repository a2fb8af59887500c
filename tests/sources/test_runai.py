"""Run:ai's engine as a source: what it is told, what becomes of its failures, and what it leaves behind."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import subprocess
import sys
import threading
from collections.abc import Awaitable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from runai_model_streamer.libstreamer import libstreamer

import streamload
from streamload.errors import (
    AccessError,
    MissingDependencyError,
    NotFoundError,
    ObjectChangedError,
    OptionError,
    SourceError,
    StreamloadError,
    TransientError,
)
from streamload.loan import Loan
from streamload.sources import SourceObject, open_source
from streamload.sources.local import LocalSource
from streamload.sources.runai import RunaiBlobSource, RunaiFileSource, RunaiObjectSource, RunaiSource
from streamload.sources.runai_engine import Engine, EngineRead
from streamload.sources.runai_settings import RunaiSettings, Setup
from streamload.sources.runai_versions import Versions
from streamload.sources.s3 import S3Source
from tests.checkpoints import read_with_safetensors, same_tensor, varied_tensors, write_sharded
from tests.faultproxy import Fault, FaultProxy, run_fault_proxy
from tests.servers import S3Bucket

# It depends on torch itself.
pytestmark = pytest.mark.torch


MIB = 1 << 20

# What the engine does where nobody says anything.
_FILE_STRATEGY = "io_uring_direct,libaio_direct,sync_buffered"
_KEY = "model.safetensors"
_CONTENT = os.urandom(12 * MIB)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharded(tmp_path_factory.mktemp("runai"), varied_tensors())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / _KEY
    path.write_bytes(_CONTENT)
    return path


class Spoiler:
    """Decides, while a test runs, what becomes of the engine's requests."""

    def __init__(self) -> None:
        self.fault: Fault | None = None
        self.left: int | None = None  # how many requests it is for; None for all
        self.spoiled = threading.Event()

    def __call__(self, number: int, head: bytes) -> Fault | None:
        if self.fault is not None and b"CRTS3NativeClient" in head:
            self.spoiled.set()
            fault = self.fault
            if self.left is not None:
                self.left -= 1
                if not self.left:
                    self.fault = None
            return fault
        return None


@pytest.fixture
def spoiler() -> Spoiler:
    return Spoiler()


@pytest.fixture
def proxy(s3_bucket: S3Bucket, spoiler: Spoiler, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """S3 behind a proxy that obeys the spoiler; the bucket has one object."""
    s3_bucket.put(f"llama/{_KEY}", _CONTENT)
    where = urlsplit(s3_bucket.server.endpoint)
    assert where.hostname is not None
    assert where.port is not None
    with run_fault_proxy(where.hostname, where.port, spoiler) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{proxy.port}")
        yield proxy


def _object_source(bucket: S3Bucket, **arguments: Any) -> RunaiObjectSource:
    uri = f"{bucket.uri}/llama"
    return RunaiObjectSource(f"runai+{uri}", S3Source(uri), **arguments)


async def _read(source: RunaiSource, object: SourceObject, memory: bytearray, start: int = 0) -> Loan:
    loan = Loan([memoryview(memory)])
    await source.read(object, start, start + len(memory), loan)
    return loan


async def _error_of(call: Awaitable[object]) -> StreamloadError:
    try:
        await call
    except StreamloadError as error:
        return error
    raise AssertionError("nothing was raised")


def _engine_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name == "streamload-runai"]


class TestWhichSource:
    @pytest.mark.parametrize(
        ("uri", "source", "kind"),
        [
            ("runai+file:///models/llama", None, RunaiFileSource),
            ("runai+s3://bucket/llama", None, RunaiObjectSource),
            ("/models/llama", "runai", RunaiFileSource),
            ("s3://bucket/llama", "runai", RunaiObjectSource),
            ("runai+s3://bucket/llama", "runai", RunaiObjectSource),
            ("gs://bucket/llama", None, RunaiBlobSource),
            ("az://container/llama", None, RunaiBlobSource),
            ("runai+gs://bucket/llama", None, RunaiBlobSource),
        ],
    )
    def test_by_scheme_or_by_option(self, uri: str, source: str | None, kind: type[RunaiSource]) -> None:
        made = open_source(uri, source=source, concurrency=3, runai_chunk_bytes=8 * MIB)
        assert type(made) is kind
        assert (made.uri, made.scheme) == (uri, "runai")

    @pytest.mark.parametrize("query", ["versionId=1", "requestPayer=requester"])
    def test_what_the_engine_cannot_say_to_s3_is_refused(self, query: str) -> None:
        with pytest.raises(OptionError, match="no versions, access points"):
            open_source(f"runai+s3://bucket/{_KEY}?{query}")

    def test_it_does_not_ask_without_credentials(self) -> None:
        with pytest.raises(OptionError, match="with credentials only"):
            open_source(f"runai+s3://bucket/{_KEY}", s3_anonymous=True)

    def test_a_scheme_that_it_does_not_read(self) -> None:
        with pytest.raises(OptionError, match="does not read ftp://"):
            open_source("ftp://host/x", source="runai")


@pytest.fixture(autouse=True)
def _files_are_the_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test has just written is in the page cache, where our own source would read it."""
    monkeypatch.setenv("RUNAI_STREAMER_FS_STRATEGY", _FILE_STRATEGY)


class TestLoads:
    """One checkpoint, the same tensors from wherever the engine reads it."""

    def _check(self, folder: Path, uri: str, **options: Any) -> streamload.Report:
        with streamload.stream(uri, read_bytes=MIB, **options) as stream:
            found = dict(stream)
        expected = read_with_safetensors(folder)
        assert found.keys() == expected.keys()
        assert all(same_tensor(found[name], expected[name]) for name in expected)
        report = stream.report
        assert report.source == "runai"
        assert report.paths["by Run:ai's engine"] > 0
        return report

    def test_files(self, folder: Path) -> None:
        self._check(folder, f"runai+file://{folder}")
        self._check(folder, str(folder), source="runai", concurrency=2, memory_bytes=4 * MIB)

    def test_files_in_the_page_cache_are_read_by_our_own_source(
        self, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.delenv("RUNAI_STREAMER_FS_STRATEGY")
        for file in folder.iterdir():
            file.read_bytes()
        with streamload.stream(f"runai+file://{folder}", read_bytes=MIB) as stream:
            found = dict(stream)
        expected = read_with_safetensors(folder)
        assert found.keys() == expected.keys()
        assert all(same_tensor(found[name], expected[name]) for name in expected)
        assert stream.report.paths == {}
        assert _engine_threads() == []

    def test_s3(self, folder: Path, s3_bucket: S3Bucket, proxy: FaultProxy) -> None:
        for file in folder.iterdir():
            s3_bucket.client.put_object(
                Bucket=s3_bucket.name,
                Key=f"varied/{file.name}",
                Body=file.read_bytes(),
                ChecksumAlgorithm="CRC64NVME",
            )
        report = self._check(folder, f"runai+{s3_bucket.uri}/varied")
        assert report.verified == {"CRC64NVME of the whole object": report.total_bytes}
        assert report.unverified == {}

    def test_failed_reads_are_tried_again(
        self, folder: Path, s3_bucket: S3Bucket, proxy: FaultProxy, spoiler: Spoiler
    ) -> None:
        for file in folder.iterdir():
            s3_bucket.put(f"varied/{file.name}", file.read_bytes())
        spoiler.fault = Fault(instead=b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
        spoiler.left = 2
        report = self._check(folder, f"runai+{s3_bucket.uri}/varied")
        assert report.retries == 2

    def test_a_program_that_leaves_in_the_middle_ends(self, folder: Path) -> None:
        script = (
            "import sys, streamload\n"
            "stream = streamload.stream(sys.argv[1], memory_bytes=1 << 20)\n"
            "print(next(stream)[0] != '', flush=True)\n"
        )
        ended = subprocess.run(
            [sys.executable, "-c", script, f"runai+file://{folder}"], capture_output=True, text=True, timeout=100
        )
        assert (ended.returncode, ended.stdout, ended.stderr) == (0, "True\n", "")

    def test_a_forked_child_is_refused(self, folder: Path) -> None:
        """Whatever the engine's library has, its threads are not in the child."""
        script = (
            "import os, sys, streamload\n"
            "streamload.load(sys.argv[1])\n"
            "if not os.fork():\n"
            "    try:\n"
            "        streamload.load(sys.argv[1])\n"
            "    except streamload.SourceError as error:\n"
            "        print(error.cause, flush=True)\n"
            "    os._exit(0)\n"
            "os.wait()\n"
        )
        ended = subprocess.run(
            [sys.executable, "-c", script, f"runai+file://{folder}"], capture_output=True, text=True, timeout=100
        )
        assert ended.stdout == "Run:ai's engine was in use before this process was forked; spawn processes instead\n"

    def test_from_the_command_line(self, folder: Path) -> None:
        command = [sys.executable, "-m", "streamload", "load", str(folder), "--source", "runai", "--quiet", "--json"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=100, check=True)
        assert json.loads(ended.stdout)["source"] == "runai"


class TestReads:
    def test_large_reads_are_the_engines_and_small_ones_our_own(self, file: Path) -> None:
        async def scenario() -> None:
            async with open_source(f"runai+file://{file.parent}") as source:
                assert isinstance(source, RunaiSource)
                (object,) = await source.list()
                head, body = bytearray(1000), bytearray(len(_CONTENT) - 1000)
                await _read(source, object, head)
                assert source.paths == {}
                assert _engine_threads() == []
                await _read(source, object, body, 1000)
                assert source.paths == {"by Run:ai's engine": len(body)}
                assert head + body == _CONTENT

        asyncio.run(scenario())
        assert _engine_threads() == []

    def test_names_that_the_engine_cannot_say_are_read_by_our_own_source(self, tmp_path: Path) -> None:
        name = os.fsdecode(b"model-\xff.safetensors")
        (tmp_path / name).write_bytes(_CONTENT)

        async def scenario() -> None:
            async with RunaiFileSource(str(tmp_path), LocalSource(str(tmp_path))) as source:
                (object,) = await source.list()
                memory = bytearray(len(_CONTENT))
                await _read(source, object, memory)
                assert memory == _CONTENT
                assert source.paths == {}

        asyncio.run(scenario())

    def test_one_look_serves_all_who_came_before_it_began(self) -> None:
        object = SourceObject(_KEY, 10, "1")
        looks = 0
        may_answer = asyncio.Event()

        async def look(looked_at: SourceObject) -> None:
            nonlocal looks
            looks += 1
            await may_answer.wait()
            if looked_at != object:
                raise ObjectChangedError("it is another one")

        async def scenario() -> None:
            versions = Versions(look)
            checks = [asyncio.create_task(versions.check(object)) for _ in range(12)]
            await asyncio.sleep(0)
            assert looks == 1, "the others came after it had begun"
            may_answer.set()
            await asyncio.gather(*checks)
            assert looks == 2
            for _ in range(2):
                with pytest.raises(ObjectChangedError):
                    await versions.check(SourceObject(_KEY, 10, "0"))
            assert looks == 4, "a look that failed serves nobody else"

        asyncio.run(scenario())

    def test_a_file_replaced_by_renaming_is_another_version(self, file: Path) -> None:
        """The engine opens the file for each read, and would read the new one to its end."""

        async def scenario() -> None:
            async with RunaiFileSource(str(file), LocalSource(str(file))) as source:
                (object,) = await source.list()
                await _read(source, object, bytearray(MIB))
                other = file.parent / "other"
                other.write_bytes(_CONTENT[::-1])
                os.replace(other, file)
                error = await _error_of(_read(source, object, bytearray(MIB)))
                assert isinstance(error, ObjectChangedError)
                assert (error.object, error.start, error.end) == (_KEY, 0, MIB)

        asyncio.run(scenario())


class TestFailures:
    def test_an_object_that_is_gone_and_one_that_is_refused(self, s3_bucket: S3Bucket, proxy: FaultProxy) -> None:
        async def scenario() -> None:
            async with _object_source(s3_bucket) as source:
                (object,) = await source.list()
                memory = bytearray(2 * MIB)
                s3_bucket.remove(f"llama/{_KEY}")
                error = await _error_of(_read(source, object, memory))
                assert isinstance(error, NotFoundError)
                assert str(error).startswith(f"runai+{s3_bucket.uri}/llama, {_KEY}, bytes 0-{2 * MIB}: ")

        asyncio.run(scenario())

    def test_credentials_that_are_not_accepted(
        self, s3_bucket: S3Bucket, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "something-else")

        async def scenario() -> None:
            async with _object_source(s3_bucket) as source:
                object = SourceObject(_KEY, len(_CONTENT), '"0"')
                error = await _error_of(_read(source, object, bytearray(2 * MIB)))
                assert isinstance(error, AccessError)
                assert "something-else" not in str(error)

        asyncio.run(scenario())

    def test_what_another_try_may_mend(self, s3_bucket: S3Bucket, proxy: FaultProxy, spoiler: Spoiler) -> None:
        """The engine names no reason; where the object is there and unchanged, it is worth another try."""

        async def scenario() -> None:
            async with _object_source(s3_bucket) as source:
                (object,) = await source.list()
                spoiler.fault = Fault(instead=b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
                memory = bytearray(2 * MIB)
                error = await _error_of(_read(source, object, memory))
                assert isinstance(error, TransientError)
                assert "Run:ai's engine: File access error (code 2)" in error.cause
                spoiler.fault = None
                assert not (await _read(source, object, memory)).quarantined
                assert memory == _CONTENT[: 2 * MIB]

        asyncio.run(scenario())

    def test_credentials_that_have_changed_are_found_anew(
        self, s3_bucket: S3Bucket, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        connect = S3Source.connection
        secrets = ["outdated"]

        async def connection(self: S3Source) -> Any:
            found = await connect(self)
            return dataclasses.replace(found, secret_key=secrets.pop()) if secrets else found

        monkeypatch.setattr(S3Source, "connection", connection)

        async def scenario() -> None:
            async with _object_source(s3_bucket) as source:
                (object,) = await source.list()
                memory = bytearray(2 * MIB)
                assert isinstance(await _error_of(_read(source, object, memory)), TransientError)
                await _read(source, object, memory)
                assert memory == _CONTENT[: 2 * MIB]

        asyncio.run(scenario())

    def test_requests_ended_by_another_user_of_the_engine(
        self, s3_bucket: S3Bucket, proxy: FaultProxy, spoiler: Spoiler, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        told = threading.Event()
        respond = libstreamer.runai_response

        def watched(streamer: Any, timeout_ms: int = 0) -> Any:
            answer = respond(streamer, timeout_ms)
            if answer is None:
                told.set()
            return answer

        monkeypatch.setattr(libstreamer, "runai_response", watched)

        async def scenario() -> None:
            async with _object_source(s3_bucket) as source:
                (object,) = await source.list()
                await _read(source, object, bytearray(2 * MIB))
                other = libstreamer.runai_start()
                _read_with(other, f"{s3_bucket.uri}/llama/{_KEY}", s3_bucket)
                spoiler.fault = Fault("stall")
                memory = bytearray(2 * MIB)
                reading = asyncio.create_task(_read(source, object, memory))
                await asyncio.to_thread(spoiler.spoiled.wait)
                spoiler.fault = None
                ending = asyncio.create_task(asyncio.to_thread(libstreamer.runai_end, other))
                await asyncio.to_thread(told.wait)
                # Both ends wait for what is still under way.
                proxy.cut()
                await ending
                error = await _error_of(reading)
                assert isinstance(error, TransientError)
                assert "another user of it" in error.cause
                await _read(source, object, memory)
                assert memory == _CONTENT[: 2 * MIB]

        asyncio.run(scenario())

    def test_an_engine_that_is_not_installed(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "runai_model_streamer.libstreamer.libstreamer", None)

        async def scenario() -> None:
            async with RunaiFileSource(str(file), LocalSource(str(file))) as source:
                (object,) = await source.list()
                error = await _error_of(_read(source, object, bytearray(MIB)))
                assert isinstance(error, MissingDependencyError)
                assert "pip install 'streamload[runai]'" in error.cause
                assert error.uri == str(file)

        asyncio.run(scenario())

    def test_an_engine_that_lacks_what_is_needed(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(libstreamer, "runai_request", lambda streamer, path, offset: 0)

        async def scenario() -> None:
            async with RunaiFileSource(str(file), LocalSource(str(file))) as source:
                (object,) = await source.list()
                error = await _error_of(_read(source, object, bytearray(MIB)))
                assert isinstance(error, MissingDependencyError)
                assert "no fitting runai_request" in error.cause

        asyncio.run(scenario())

    def test_memory_that_may_still_be_written_to_is_quarantined(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Code 11: the engine stopped waiting. It cannot be made to say so, so its answers are changed."""
        answer = libstreamer.runai_response

        def spoiled(streamer: Any, timeout_ms: int = 0) -> Any:
            return (11, *answer(streamer, timeout_ms)[1:])

        async def scenario() -> None:
            async with RunaiFileSource(str(file), LocalSource(str(file))) as source:
                (object,) = await source.list()
                monkeypatch.setattr(libstreamer, "runai_response", spoiled)
                loan = Loan([memoryview(bytearray(MIB))])
                error = await _error_of(source.read(object, 0, MIB, loan))
                assert type(error) is SourceError
                assert "Unknown Error (code 11)" in error.cause
                assert loan.quarantined

        asyncio.run(scenario())

    def test_another_kind_of_object_store(self, s3_bucket: S3Bucket, proxy: FaultProxy) -> None:
        """Its library would call the plugin for S3."""

        async def scenario() -> None:
            async with _object_source(s3_bucket) as source:
                (object,) = await source.list()
                await _read(source, object, bytearray(2 * MIB))
            engine = Engine.acquire()
            read = EngineRead(Setup("gs"), "gs://bucket/key", 0, [memoryview(bytearray(10))])
            engine.submit(read)
            failure = await read.result()
            assert isinstance(failure, SourceError)
            assert "one kind of object store in a process, and has read s3://" in failure.cause
            assert engine.release()
            await asyncio.wrap_future(engine.ended)

        asyncio.run(scenario())


class TestLeaving:
    def test_what_does_not_end_in_time_is_quarantined_and_closing_does_not_wait(
        self, s3_bucket: S3Bucket, proxy: FaultProxy, spoiler: Spoiler, caplog: pytest.LogCaptureFixture
    ) -> None:
        async def scenario() -> None:
            async with _object_source(s3_bucket, grace_s=0.1) as source:
                (object,) = await source.list()
                spoiler.fault = Fault("stall")
                loan = Loan([memoryview(bytearray(MIB))])
                stalled = asyncio.create_task(source.read(object, 0, MIB, loan))
                await asyncio.to_thread(spoiler.spoiled.wait)
                stalled.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await stalled
                assert loan.quarantined
            assert "does not end; its thread is left behind" in caplog.text
            assert len(_engine_threads()) == 1
            spoiler.fault = None
            # The next one waits until that one has ended: the end of an engine is the end of all requests.
            async with _object_source(s3_bucket) as source:
                memory = bytearray(2 * MIB)
                reading = asyncio.create_task(_read(source, object, memory))
                proxy.cut()
                await reading
                assert memory == _CONTENT[: 2 * MIB]

        asyncio.run(scenario())
        assert _engine_threads() == []

    def test_a_program_that_leaves_while_the_server_says_nothing_ends(
        self,
        s3_bucket: S3Bucket,
        proxy: FaultProxy,
        spoiler: Spoiler,
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The engine's requests are waited for: the libraries under it crash where the process ends before them."""
        for file in folder.iterdir():
            s3_bucket.put(f"varied/{file.name}", file.read_bytes())
        script = (
            "import sys, streamload\n"
            "stream = streamload.stream(sys.argv[1], read_bytes=1 << 20, runai_request_timeout_s=1)\n"
            "sys.stdin.readline()\n"
        )
        # The engine's requests fail soon.
        monkeypatch.setenv("RUNAI_STREAMER_S3_MAX_RETRIES", "1")
        spoiler.fault = Fault("stall", passed_bytes=1000)
        command = [sys.executable, "-c", script, f"runai+{s3_bucket.uri}/varied"]
        with subprocess.Popen(command, stdin=subprocess.PIPE) as process:
            spoiler.spoiled.wait()
            process.communicate(b"\n", timeout=100)
            assert process.returncode == 0

    def test_a_read_that_was_not_submitted_yet_is_taken_back(self, file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        async def scenario() -> None:
            submitted = asyncio.Event()
            submit = Engine.submit

            def noticed(self: Engine, read: EngineRead) -> None:
                submit(self, read)
                submitted.set()

            monkeypatch.setattr(Engine, "submit", noticed)
            async with RunaiFileSource(str(file), LocalSource(str(file)), grace_s=60.0) as source:
                (object,) = await source.list()
                with _occupied():
                    loan = Loan([memoryview(bytearray(MIB))])
                    reading = asyncio.create_task(source.read(object, 0, MIB, loan))
                    await submitted.wait()
                    reading.cancel()
                    with pytest.raises(asyncio.CancelledError):
                        await reading
                    assert not loan.quarantined
                    # Waiting for its turn, the engine can be ended.
                    await source.aclose()
            assert _engine_threads() == []

        asyncio.run(scenario())


class TestSettings:
    def test_all_of_them_reach_the_engine_and_the_environment_is_as_it_was(
        self, file: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("RUNAI_STREAMER_CHUNK_BYTESIZE", "1234567")
        before = dict(os.environ)
        seen: dict[str, str] = {}
        start = libstreamer.runai_start

        def watched() -> Any:
            seen.update({name: value for name, value in os.environ.items() if name.startswith("RUNAI_")})
            return start()

        monkeypatch.setattr(libstreamer, "runai_start", watched)

        async def scenario() -> None:
            async with open_source(str(file), source="runai", concurrency=5, runai_chunk_bytes=4 * MIB) as source:
                assert isinstance(source, RunaiSource)
                (object,) = await source.list()
                await _read(source, object, bytearray(MIB))

        asyncio.run(scenario())
        assert seen == {
            "RUNAI_STREAMER_CONCURRENCY": "5",
            "RUNAI_STREAMER_FS_QUEUE_DEPTH": "5",
            "RUNAI_STREAMER_CHUNK_BYTESIZE": str(4 * MIB),
            "RUNAI_STREAMER_FS_CHUNK_BYTESIZE": str(4 * MIB),
            "RUNAI_STREAMER_FS_STRATEGY": _FILE_STRATEGY,
        }
        assert dict(os.environ) == before

    def test_for_s3(self) -> None:
        secret = (("secret_access_key", "very-secret"),)
        setup = Setup.of("s3", RunaiSettings(request_timeout_s=3.5), concurrency=4, virtual=False, credentials=secret)
        assert dict(setup.variables) == {
            "RUNAI_STREAMER_CONCURRENCY": "4",
            "RUNAI_STREAMER_OBJ_CONCURRENCY": "4",
            "RUNAI_STREAMER_S3_REQUEST_TIMEOUT_MS": "3500",
            "RUNAI_STREAMER_S3_TIMEOUT": "0",
            "RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0",
        }
        assert "very-secret" not in repr(setup)
        chosen = Setup.of("s3", RunaiSettings(virtual_addressing=True), virtual=False)
        assert dict(chosen.variables)["RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING"] == "1"

    def test_sources_with_other_settings_read_at_the_same_time(
        self, file: Path, s3_bucket: S3Bucket, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They take turns at one engine, which is started anew between them."""
        starts = 0
        start = libstreamer.runai_start

        def counted() -> Any:
            nonlocal starts
            starts += 1
            return start()

        monkeypatch.setattr(libstreamer, "runai_start", counted)

        async def scenario() -> None:
            async with (
                RunaiFileSource(str(file), LocalSource(str(file))) as files,
                _object_source(s3_bucket, concurrency=2) as few,
                _object_source(s3_bucket, concurrency=3) as many,
            ):
                memories = [bytearray(2 * MIB) for _ in range(12)]
                sources: list[RunaiSource] = [files, few, many] * 4
                objects = {source: (await source.list())[0] for source in sources[:3]}
                await asyncio.gather(
                    *[
                        _read(source, objects[source], memory, number % 6 * 2 * MIB)
                        for number, (source, memory) in enumerate(zip(sources, memories, strict=True))
                    ]
                )
                for number, memory in enumerate(memories):
                    assert memory == _CONTENT[number % 6 * 2 * MIB :][: 2 * MIB]
                assert len(_engine_threads()) == 1

        asyncio.run(scenario())
        assert starts >= 3
        assert _engine_threads() == []


def _read_with(streamer: Any, uri: str, bucket: S3Bucket) -> None:
    """Make an engine of somebody else's a user of S3."""
    keys = libstreamer.S3Credentials(bucket.server.access_key, bucket.server.secret_key, None, bucket.server.region)
    keys.endpoint = os.environ["AWS_ENDPOINT_URL"]
    libstreamer.runai_set_credentials(streamer, keys)
    memory = (libstreamer.ctypes.c_char * 100)()
    libstreamer.runai_request(streamer, [uri], [1], [0], [100], [libstreamer.ctypes.addressof(memory)])
    code, *_ = libstreamer.runai_response(streamer, 60_000)
    assert code == 0


def _occupied() -> Any:
    """As if an engine that everybody has left had not ended yet."""
    from streamload.sources import runai_engine

    return runai_engine._LIFETIME
