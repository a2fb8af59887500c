"""A sidecar on this process's own event loop: what takes long elsewhere."""

from __future__ import annotations

import asyncio
import os
import shutil
import socket
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from streamload.errors import DeadlineError, NotFoundError, ObjectChangedError
from streamload.loan import Loan
from streamload.options import resolve
from streamload.service import Sidecar, asking, bodies, listening
from streamload.service.listening import Listeners
from streamload.service.options import ServeOptions
from streamload.sources.sidecar import SidecarSource
from streamload.sources.sidecar_protocol import MAX_SOCKET_PATH_BYTES
from streamload.stage import Staged, StageOptions, Stager, calls, stager
from streamload.stage.files import StagedFile
from streamload.stage.locks import FileLock
from streamload.stage.names import LOCK_NAME
from streamload.stage.ready import Ready, read_ready
from streamload.stage.workers import Workers
from tests.cli.programs import TIMEOUT_S
from tests.service.origins import origin_of
from tests.service.sidecars import SMALL, ask, ask_port
from tests.stage.models import FIRST, PIECE, source_of


@asynccontextmanager
async def _running(uri: str, volume: Path, *, pause_s: float = 10.0, **options: object) -> AsyncIterator[Sidecar]:
    reading = resolve(SMALL | options)[0]

    def make() -> Stager:
        return Stager(uri, str(volume), StageOptions(), reading)

    sidecar = Sidecar(make, str(volume), reading, drain_s=0.0, began_s=0.0, pause_s=pause_s)
    async with Listeners(sidecar, str(volume / "s.sock"), ServeOptions()):
        running = asyncio.create_task(sidecar.run())
        try:
            yield sidecar
        finally:
            running.cancel()
            await asyncio.wait({running})


def _run(main: Callable[[], Awaitable[None]]) -> None:
    async def body() -> None:
        async with asyncio.timeout(TIMEOUT_S):
            await main()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(body(), debug=True)
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("streamload")] == []


def test_what_has_failed_is_tried_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with _running(str(tmp_path / "source"), tmp_path / "volume", pause_s=0.0) as sidecar:
            while sidecar.status()["state"] != "failed":
                await sidecar.changed(TIMEOUT_S)
            source_of(tmp_path / "source")
            while sidecar.status()["state"] != "staged":
                await sidecar.changed(TIMEOUT_S)
            status = sidecar.status()
            assert status["attempts"] > 1
            # Those that fell into the time in which the files were made have other reasons.
            assert status["errors"]["NotFoundError"] >= 1
            assert status["error"] is None

    _run(main)


def test_a_wait_that_takes_long_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would not be known whether the sidecar hangs."""
    monkeypatch.setattr(asking, "ASK_AGAIN_S", 0.001)

    async def main() -> None:
        with origin_of(tmp_path / "source") as origin:
            origin.hold(lambda name, start: name == FIRST and start == PIECE)
            async with (
                _running(origin.uri, tmp_path / "volume") as sidecar,
                SidecarSource(f"sidecar://{tmp_path}/volume/s.sock") as source,
            ):
                (object,) = [object for object in await source.list() if object.key == FIRST]
                content = memoryview(bytearray(PIECE))
                reading = asyncio.create_task(source.read(object, PIECE, 2 * PIECE, Loan([content])))
                while source.requests < 20:
                    await sidecar.changed(0.001)
                assert not reading.done()
                origin.release()
                await reading
                assert content == (tmp_path / "source" / FIRST).read_bytes()[PIECE : 2 * PIECE]
                await source.conclude()

    _run(main)


async def _until(sidecar: Sidecar, state: str) -> None:
    while sidecar.state != state:
        await sidecar.changed(TIMEOUT_S)


def _source(volume: Path) -> SidecarSource:
    return SidecarSource(f"sidecar://{volume}/s.sock")


def test_the_verdict_is_on_the_file_that_was_read(tmp_path: Path) -> None:
    volume = tmp_path / "volume"

    async def main() -> None:
        source = str(source_of(tmp_path / "source"))
        async with _running(source, volume) as sidecar, _source(volume) as reader:
            await _until(sidecar, "staged")
            (object,) = [object for object in await reader.list() if object.key == FIRST]
            await reader.read(object, 0, PIECE, Loan([memoryview(bytearray(PIECE))]))
            await reader.conclude()
            # Another one, which looks the same.
            shutil.copy2(volume / FIRST, volume / "other")
            os.replace(volume / "other", volume / FIRST)
            with pytest.raises(ObjectChangedError, match="another file"):
                await reader.conclude()

    _run(main)


@pytest.mark.parametrize("where", ["fsync", "lock"])
def test_a_call_that_hangs_keeps_its_locks_until_it_returns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    """And no longer: the next attempt waits for them."""
    monkeypatch.setattr(calls, "_GRACE_S", 0.0)
    began, go_on = threading.Event(), threading.Event()
    sync, take = StagedFile.sync, FileLock.take

    def hang() -> None:
        if not began.is_set():
            began.set()
            assert go_on.wait(TIMEOUT_S)

    def hanging_sync(self: StagedFile) -> int:
        if where == "fsync":
            hang()
        return sync(self)

    def hanging_take(self: FileLock, *, shared: bool = False) -> bool:
        taken = take(self, shared=shared)
        if where == "lock" and os.path.basename(self.path) == LOCK_NAME:
            hang()
        return taken

    monkeypatch.setattr(StagedFile, "sync", hanging_sync)
    monkeypatch.setattr(FileLock, "take", hanging_take)

    async def main() -> None:
        source = str(source_of(tmp_path / "source"))
        async with _running(source, tmp_path / "volume") as sidecar:
            try:
                while not began.is_set():
                    await sidecar.changed(0.001)
                await sidecar.cancel()
                assert sidecar.state == "cancelled"
                monkeypatch.setattr(calls, "_GRACE_S", TIMEOUT_S)  # no other one hangs
                await sidecar.start()
                assert not FileLock(str(tmp_path / "volume" / LOCK_NAME)).take()
            finally:
                go_on.set()
            await _until(sidecar, "staged")
        for thread in threading.enumerate():
            if thread.name.startswith("streamload-stage"):  # the one that hung lets go, and then ends
                thread.join(TIMEOUT_S)
        assert [path for path in map(_target, os.listdir("/proc/self/fd")) if path.startswith(str(tmp_path))] == []

    _run(main)


def _idle(folder: Path) -> Sidecar:
    """One that has begun nothing."""
    reading = resolve(SMALL)[0]

    def make() -> Stager:
        return Stager(str(folder), str(folder / "volume"), StageOptions(), reading)

    return Sidecar(make, str(folder), reading, drain_s=0.0, began_s=0.0)


@asynccontextmanager
async def _listening(folder: Path) -> AsyncIterator[int]:
    """One that has begun nothing can be asked; the port."""
    sidecar = _idle(folder)
    listeners = Listeners(sidecar, str(folder / "s.sock"), ServeOptions(port=0, host="127.0.0.1"))
    async with listeners:
        assert listeners.port is not None
        yield listeners.port
    await sidecar.stager().aclose()


async def _first_line(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bytes:
    writer.write(b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n")
    return await reader.readline()


def _target(fd: str) -> str:
    try:
        return os.readlink(f"/proc/self/fd/{fd}")
    except OSError:  # the one that listed them
        return ""


class TestEnded:
    def test_sigterm_after_a_cancellation(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A call to the volume has not returned yet when both have come."""
        began, go_on = threading.Event(), threading.Event()

        def slow(folder: str) -> Ready | None:
            began.set()
            assert go_on.wait(TIMEOUT_S)
            return read_ready(folder)

        monkeypatch.setattr(stager, "read_ready", slow)

        async def main() -> None:
            reading = resolve(SMALL)[0]
            source, volume = str(source_of(tmp_path / "source")), str(tmp_path / "volume")
            sidecar = Sidecar(
                lambda: Stager(source, volume, StageOptions(), reading), volume, reading, drain_s=0.0, began_s=0.0
            )
            running = asyncio.create_task(sidecar.run())
            try:
                while not began.is_set():
                    await sidecar.changed(0.001)
                cancelling = asyncio.create_task(sidecar.cancel())
                await asyncio.sleep(0)
                assert sidecar.was_cancelled
                running.cancel()
                await _until(sidecar, "stopping")
            finally:
                go_on.set()
            await asyncio.wait({running})
            assert running.cancelled()
            await cancelling

        _run(main)

    def test_a_cancellation_that_meets_a_failure(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        landing = asyncio.Event()

        async def land(*_: object) -> None:
            landing.set()
            try:
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                raise ObjectChangedError("it changed just then") from None

        monkeypatch.setattr(Workers, "_land", land)

        async def main() -> None:
            source = str(source_of(tmp_path / "source"))
            async with _running(source, tmp_path / "volume", pause_s=0.0) as sidecar:
                await landing.wait()
                await sidecar.cancel()
                assert (sidecar.state, sidecar.error) == ("cancelled", None)

        _run(main)

    def test_a_cancellation_that_comes_too_late(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """All is staged: nobody is told of it."""
        run = Stager.run

        async def run_on(self: Stager) -> Staged:
            staged = await run(self)
            try:
                running.set()
                await asyncio.Event().wait()
            except asyncio.CancelledError:
                return staged
            raise AssertionError

        running = asyncio.Event()
        monkeypatch.setattr(Stager, "run", run_on)

        async def main() -> None:
            source = str(source_of(tmp_path / "source"))
            async with _running(source, tmp_path / "volume") as sidecar:
                await running.wait()
                await sidecar.cancel()
                assert (sidecar.state, sidecar.was_cancelled) == ("staged", False)

        _run(main)

    def test_who_waits_is_told_of_the_deadline(self, tmp_path: Path) -> None:
        async def main() -> None:
            with origin_of(tmp_path / "source") as origin:
                origin.hold(lambda name, start: True)
                async with _running(origin.uri, tmp_path / "volume", deadline_s=0.05) as sidecar:
                    # Before the attempt has begun, so that it waits when the time is up.
                    waiting = asyncio.create_task(sidecar.stager().objects())
                    with pytest.raises(DeadlineError, match="deadline_s"):
                        await waiting

        _run(main)


def test_a_failure_that_is_asked_for_again_and_again(tmp_path: Path) -> None:
    """Its traceback would hold on to every request."""

    async def main() -> None:
        async with _running(str(tmp_path / "source"), tmp_path / "volume") as sidecar:
            await _until(sidecar, "failed")
            failed = sidecar._stager
            for _ in range(10):
                with pytest.raises(NotFoundError) as caught:
                    sidecar.stager()
                with pytest.raises(NotFoundError) as told:
                    await failed.objects()
                with pytest.raises(NotFoundError) as promised:
                    failed._promise()
            for each in (caught, told, promised):
                assert len(each.traceback) <= 3

    _run(main)


class TestListening:
    @pytest.mark.parametrize("length", [1, 2, 20, None])
    def test_a_socket_is_there_when_it_can_be_used(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, length: int | None
    ) -> None:
        """Who comes earlier waits; who were refused would not."""
        length = length or MAX_SOCKET_PATH_BYTES - len(str(tmp_path)) - 1
        path = tmp_path / ("s" * length)
        with socket.socket(socket.AF_UNIX) as left:  # by one that was killed
            left.bind(str(path))
        changed: list[str] = []
        chmod, rename = os.chmod, os.rename

        def chmod_unseen(of: str, mode: int) -> None:
            assert os.fspath(of) != str(path)
            changed.append("mode")
            chmod(of, mode)

        def rename_used(of: str, to: str) -> None:
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(of)
            changed.append("name")
            rename(of, to)

        monkeypatch.setattr(os, "chmod", chmod_unseen)
        monkeypatch.setattr(os, "rename", rename_used)

        async def main() -> None:
            sidecar = _idle(tmp_path)
            async with Listeners(sidecar, str(path), ServeOptions()):
                assert changed == ["mode", "name"]
                assert (await asyncio.to_thread(ask, path, "GET", "/v1/status")).status == 200
            await sidecar.stager().aclose()

        _run(main)
        assert [name for name in os.listdir(tmp_path) if not name.endswith(".lock")] == []

    def test_connections_that_idle(self, tmp_path: Path) -> None:
        async def main() -> None:
            async with _listening(tmp_path) as port:
                idle = [await asyncio.open_connection("127.0.0.1", port) for _ in range(3 * listening._MOST_LOOKING)]
                try:
                    # The newest is served, and the oldest are gone.
                    assert b" 200 " in await _first_line(*idle[-1])
                    for reader, _ in idle[: listening._MOST_LOOKING // 2]:
                        assert await reader.read() == b""
                finally:
                    for _, writer in idle:
                        writer.close()
                answer = await asyncio.to_thread(ask_port, port, "/healthz")
                assert answer.status == 200

        _run(main)

    @pytest.mark.parametrize("where", ["port", "socket"])
    def test_a_body_that_does_not_come(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
        monkeypatch.setattr(bodies, "_BODY_S", 0.01)

        async def main() -> None:
            async with _listening(tmp_path) as port:
                if where == "port":
                    reader, writer = await asyncio.open_connection("127.0.0.1", port)
                    asked = b"GET /healthz"
                else:
                    reader, writer = await asyncio.open_unix_connection(tmp_path / "s.sock")
                    asked = b"POST /v1/range"
                writer.write(asked + b" HTTP/1.1\r\nHost: a\r\nContent-Length: 1\r\n\r\n")
                try:
                    assert b" 408 " in await reader.readline()
                finally:
                    writer.close()

        _run(main)
