"""Local files: what the system can do to a read, and what a read leaves behind."""

from __future__ import annotations

import asyncio
import errno
import gc
import logging
import os
import random
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from streamload.errors import (
    AccessError,
    ClosedError,
    NotFoundError,
    ObjectChangedError,
    OptionError,
    SourceError,
    TransientError,
    TruncatedReadError,
)
from streamload.loan import Loan, Rows
from streamload.sources import SourceObject, local
from streamload.sources.local import LocalSource
from streamload.sources.positional import OpenFile, ReadJob, version_of
from streamload.testing import run_on_each_loop

_KEY = "model.safetensors"

_HUNG_PROCESS = """
import asyncio, logging, os, sys, threading
logging.basicConfig()
from streamload.loan import Loan
from streamload.sources.local import LocalSource

inside = threading.Event()

def preadv(*_):
    inside.set()
    threading.Event().wait()

os.preadv = preadv

async def main():
    loan = Loan([memoryview(bytearray(10))])
    async with LocalSource(sys.argv[1], grace_s=0.0) as source:
        (object,) = await source.list()
        reading = asyncio.create_task(source.read(object, 0, 10, loan))
        while not inside.is_set():
            await asyncio.sleep(0)
        reading.cancel()
        await asyncio.wait([reading])
    print(reading.cancelled(), loan.quarantined)

asyncio.run(main())
"""


class _Memory(bytearray):
    """A bytearray that weak references can point to."""


class _Kernel:
    """Stands in for ``os.preadv``: counts the calls, holds them up, answers short."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.real = os.preadv
        self.calls: list[tuple[int, int, int]] = []  # descriptor, views, bytes
        self.gate = threading.Event()
        self.gate.set()
        self.inside = threading.Event()
        self.answer: Callable[[int, Sequence[memoryview], int], int] = self.real
        monkeypatch.setattr(os, "preadv", self._preadv)

    def _preadv(self, fd: int, views: Sequence[memoryview], offset: int) -> int:
        self.calls.append((fd, len(views), sum(view.nbytes for view in views)))
        self.inside.set()
        assert self.gate.wait(30.0)
        return self.answer(fd, views, offset)

    async def entered(self) -> None:
        """Until a thread is inside the call."""
        for _ in range(10_000_000):
            if self.inside.is_set():
                return
            await asyncio.sleep(0)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> _Kernel:
    return _Kernel(monkeypatch)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / _KEY
    path.write_bytes(b"0123456789" * 10)
    return path


def _lend(nbytes: int) -> tuple[bytearray, Loan]:
    memory = bytearray(nbytes)
    return memory, Loan([memoryview(memory)])


def _touch(file: Path) -> int:
    """Make the file a nanosecond younger. Returns its new modification time."""
    changed_ns = file.stat().st_mtime_ns + 1
    os.utime(file, ns=(changed_ns, changed_ns))
    return changed_ns


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


# Reading


def test_calls_stay_within_the_kernels_limits(tmp_path: Path, kernel: _Kernel) -> None:
    content = random.Random(0).randbytes(9 << 20)
    (tmp_path / _KEY).write_bytes(content)

    async def body() -> None:
        before = len(kernel.calls)
        async with LocalSource(str(tmp_path)) as source:
            (object,) = await source.list()
            memory = bytearray(len(content))
            view = memoryview(memory)
            small = [view[at : at + 3] for at in range(0, 9000, 3)]
            await source.read(object, 0, len(content), Loan([*small, view[9000:]]))
            assert memory == content
            assert source.requests == len(kernel.calls) - before

    run_on_each_loop(body)
    assert max(views for _, views, _ in kernel.calls) == 1024
    assert max(nbytes for _, _, nbytes in kernel.calls) == 8 << 20


def test_short_reads_are_continued(file: Path, kernel: _Kernel) -> None:
    def answer(fd: int, views: Sequence[memoryview], offset: int) -> int:
        return kernel.real(fd, [views[0][:3]], offset)

    kernel.answer = answer

    async def body() -> None:
        async with LocalSource(str(file)) as source:
            (object,) = await source.list()
            memory, loan = _lend(77)
            await source.read(object, 3, 80, loan)
            assert memory == (b"0123456789" * 10)[3:80]

    run_on_each_loop(body)


def test_one_descriptor_for_many_reads_and_none_at_the_end(file: Path, kernel: _Kernel) -> None:
    async def body() -> None:
        before = _open_descriptors()
        async with LocalSource(str(file)) as source:
            (object,) = await source.list()
            await asyncio.gather(*[source.read(object, n, n + 1, _lend(1)[1]) for n in range(50)])
            assert _open_descriptors() <= before + 1
        assert _open_descriptors() == before

    run_on_each_loop(body)


def test_only_so_many_files_stay_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local, "_MAX_OPEN_FILES", 3)
    for n in range(10):
        (tmp_path / f"{n}.safetensors").write_bytes(bytes([n]) * 10)

    async def body() -> None:
        before = _open_descriptors()
        async with LocalSource(str(tmp_path)) as source:
            objects = await source.list()
            for _ in range(2):
                for n, object in enumerate(objects):
                    memory, loan = _lend(10)
                    await source.read(object, 0, 10, loan)
                    assert memory == bytes([n]) * 10
                    assert _open_descriptors() <= before + 3

    run_on_each_loop(body)


@pytest.mark.parametrize("fails", [False, True])
def test_a_finished_read_keeps_no_memory_alive(file: Path, kernel: _Kernel, fails: bool) -> None:
    def answer(fd: int, views: Sequence[memoryview], offset: int) -> int:
        if fails:
            raise OSError(errno.EIO, "spoiled")
        return kernel.real(fd, views, offset)

    kernel.answer = answer

    async def body() -> None:
        async with LocalSource(str(file)) as source:
            (object,) = await source.list()
            memory = _Memory(10)
            gone = weakref.ref(memory)
            reading = asyncio.create_task(source.read(object, 0, 10, Loan([memoryview(memory)])))
            await asyncio.wait([reading])
            assert (reading.exception() is not None) == fails
            del memory, reading
            # The thread that has read it lets go a moment after it has told so. What does not is ended in the end.
            while gone() is not None:
                gc.collect()
                await asyncio.sleep(0)

    run_on_each_loop(body)


# Files that change


def test_a_file_changed_after_it_was_opened(file: Path) -> None:
    async def body() -> None:
        async with LocalSource(str(file)) as source:
            (object,) = await source.list()
            await source.read(object, 0, 10, _lend(10)[1])
            changed_ns = _touch(file)
            with pytest.raises(ObjectChangedError, match=str(changed_ns)) as caught:
                await source.read(object, 0, 10, _lend(10)[1])
            assert (caught.value.object, caught.value.start, caught.value.end) == (_KEY, 0, 10)

    run_on_each_loop(body)


def test_a_file_changed_while_it_is_read(file: Path, kernel: _Kernel) -> None:
    def answer(fd: int, views: Sequence[memoryview], offset: int) -> int:
        got = kernel.real(fd, views, offset)
        _touch(file)
        return got

    kernel.answer = answer

    async def body() -> None:
        async with LocalSource(str(file)) as source:
            (object,) = await source.list()
            with pytest.raises(ObjectChangedError):
                await source.read(object, 0, 10, _lend(10)[1])

    run_on_each_loop(body)


def test_a_file_cut_short_while_it_is_read(file: Path, kernel: _Kernel) -> None:
    def answer(fd: int, views: Sequence[memoryview], offset: int) -> int:
        os.truncate(file, 5)
        return kernel.real(fd, views, offset)

    kernel.answer = answer

    async def body() -> None:
        os.truncate(file, 100)
        async with LocalSource(str(file)) as source:
            (object,) = await source.list()
            with pytest.raises(ObjectChangedError):
                await source.read(object, 0, 100, _lend(100)[1])

    run_on_each_loop(body)


def test_a_file_that_ends_early_although_nothing_changed(file: Path, kernel: _Kernel) -> None:
    def answer(fd: int, views: Sequence[memoryview], offset: int) -> int:
        return kernel.real(fd, [views[0][:30]], offset) if offset < 30 else 0

    kernel.answer = answer

    async def body() -> None:
        async with LocalSource(str(file)) as source:
            (object,) = await source.list()
            memory, loan = _lend(100)
            with pytest.raises(TruncatedReadError) as caught:
                await source.read(object, 0, 100, loan)
            assert caught.value.valid_bytes == 30
            assert memory[:30] == b"0123456789" * 3

    run_on_each_loop(body)


# Errors of the system


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EIO, TransientError),
        (errno.ETIMEDOUT, TransientError),
        (errno.EACCES, AccessError),
        (errno.ESTALE, ObjectChangedError),
        (errno.EISDIR, SourceError),
        (errno.EINVAL, SourceError),
    ],
)
def test_errors_of_a_read_say_how_far_it_came(
    file: Path, kernel: _Kernel, number: int, kind: type[SourceError]
) -> None:
    def answer(fd: int, views: Sequence[memoryview], offset: int) -> int:
        if offset >= 20:
            raise OSError(number, "spoiled")
        return kernel.real(fd, [views[0][:10]], offset)

    kernel.answer = answer

    async def body() -> None:
        async with LocalSource(str(file)) as source:
            (object,) = await source.list()
            with pytest.raises(SourceError, match=errno.errorcode[number]) as caught:
                await source.read(object, 0, 100, _lend(100)[1])
            assert type(caught.value) is kind
            assert caught.value.valid_bytes == 20
            assert (caught.value.uri, caught.value.object) == (str(file), _KEY)

    run_on_each_loop(body)


def test_a_file_that_may_not_be_opened(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str, flags: int) -> int:
        raise PermissionError(errno.EACCES, "no", path)

    async def body() -> None:
        async with LocalSource(str(file)) as source:
            (object,) = await source.list()
            with monkeypatch.context() as patch:
                patch.setattr(os, "open", refuse)
                with pytest.raises(AccessError, match="Permission denied"):
                    await source.read(object, 0, 10, _lend(10)[1])

    run_on_each_loop(body)


def test_a_folder_that_may_not_be_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: str) -> list[str]:
        raise PermissionError(errno.EACCES, "no", path)

    async def body() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", refuse)
            async with LocalSource(str(tmp_path)) as source:
                with pytest.raises(AccessError) as caught:
                    await source.list()
                assert caught.value.uri == str(tmp_path)
                assert caught.value.object is None

    run_on_each_loop(body)


# Places


def test_what_is_no_place(tmp_path: Path, file: Path) -> None:
    os.mkfifo(tmp_path / "pipe")

    async def body() -> None:
        for path in (tmp_path / "none", file / "below", tmp_path / "nul\0byte"):
            async with LocalSource(str(path)) as source:
                with pytest.raises(NotFoundError):
                    await source.list()
                with pytest.raises(NotFoundError):
                    await source.stat(_KEY)
        async with LocalSource(str(tmp_path / "pipe")) as source:
            with pytest.raises(SourceError, match="neither a folder nor a regular file"):
                await source.list()

    run_on_each_loop(body)


def test_one_file_and_its_neighbours(tmp_path: Path, file: Path) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(b"{}")
    (tmp_path / "other").mkdir()
    expected = SourceObject(_KEY, 100, version_of(file.stat()))

    async def body() -> None:
        async with LocalSource(f"{file}/") as source:
            assert await source.list() == [expected]
            assert (await source.stat("model.safetensors.index.json")).size_bytes == 2
            with pytest.raises(NotFoundError, match="not a regular file"):
                await source.stat("other")

    run_on_each_loop(body)


def test_an_object_listed_by_another_source_can_be_read(file: Path) -> None:
    object = SourceObject(_KEY, 100, version_of(file.stat()))

    async def body() -> None:
        async with LocalSource(str(file.parent)) as source:
            memory, loan = _lend(10)
            await source.read(object, 10, 20, loan)
            assert memory == b"0123456789"

    run_on_each_loop(body)


def test_only_regular_files_are_listed(tmp_path: Path, file: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(file)
    (tmp_path / "link to folder").symlink_to(tmp_path / "folder")
    os.mkfifo(tmp_path / "pipe")

    async def body() -> None:
        async with LocalSource(str(tmp_path)) as source:
            assert [object.key for object in await source.list()] == ["link", _KEY]

    run_on_each_loop(body)


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("model.safetensors.index.json", os.mkfifo),
        ("model.safetensors.index.json", os.mkdir),
        ("model-2.safetensors", os.mkfifo),
    ],
)
def test_what_is_called_as_a_part_of_a_checkpoint_and_is_no_file(
    tmp_path: Path, file: Path, name: str, make: Callable[[Path], None]
) -> None:
    """To leave it out would make another checkpoint of this one."""
    make(tmp_path / name)

    async def body() -> None:
        async with LocalSource(str(tmp_path)) as source:
            with pytest.raises(SourceError, match="not a regular file") as caught:
                await source.list()
            assert caught.value.object == name

    run_on_each_loop(body)


def test_a_broken_link_is_an_error_that_names_it(tmp_path: Path, file: Path) -> None:
    (tmp_path / "model-2.safetensors").symlink_to(tmp_path / "gone")

    async def body() -> None:
        async with LocalSource(str(tmp_path)) as source:
            with pytest.raises(NotFoundError, match="link to a file that is not there") as caught:
                await source.list()
            assert caught.value.object == "model-2.safetensors"

    run_on_each_loop(body)


def test_a_file_that_goes_while_its_folder_is_listed(
    tmp_path: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.listdir

    def listdir(path: str) -> list[str]:
        return [*real(path), "gone.tmp"]

    async def body() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(os, "listdir", listdir)
            async with LocalSource(str(tmp_path)) as source:
                assert [object.key for object in await source.list()] == [_KEY]

    run_on_each_loop(body)


def test_file_uris(tmp_path: Path) -> None:
    folder = tmp_path / "a b+c%#?"
    folder.mkdir()
    (folder / _KEY).write_bytes(b"x")

    async def body() -> None:
        for host in ("", "localhost"):
            async with LocalSource(f"file://{host}{tmp_path}/a%20b+c%25%23%3f") as source:
                assert len(await source.list()) == 1

    run_on_each_loop(body)


@pytest.mark.parametrize("uri", ["", "file://", "file://elsewhere/models", "file://models"])
def test_uris_that_make_no_sense(uri: str) -> None:
    with pytest.raises(OptionError):
        LocalSource(uri)


# Cancelled reads


def test_a_cancelled_read_waits_until_its_thread_has_left(tmp_path: Path, kernel: _Kernel) -> None:
    (tmp_path / _KEY).write_bytes(b"x" * (12 << 20))

    async def body() -> None:
        async with LocalSource(str(tmp_path)) as source:
            (object,) = await source.list()
            memory, loan = _lend(12 << 20)
            kernel.inside.clear()
            kernel.gate.clear()
            kernel.calls.clear()
            reading = asyncio.create_task(source.read(object, 0, 12 << 20, loan))
            await kernel.entered()
            for _ in range(3):
                reading.cancel()
                await _turns(5)
                assert not reading.done(), "it gave the memory back while a thread was writing into it"
            kernel.gate.set()
            with pytest.raises(asyncio.CancelledError):
                await reading
            assert not loan.quarantined
            assert len(kernel.calls) == 1, "the thread went on after it was told to stop"
            assert memory.count(b"x") == 8 << 20
            assert source.requests == 1

    run_on_each_loop(body)


def test_a_read_that_hangs_is_quarantined_and_its_descriptor_left_open(
    file: Path, kernel: _Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        caplog.clear()
        kernel.inside.clear()
        kernel.gate.clear()
        kernel.calls.clear()
        source = LocalSource(str(file), concurrency=2, grace_s=0.0)
        try:
            (object,) = await source.list()
            parent = Loan([memoryview(bytearray(100))])
            reading = asyncio.create_task(source.read(object, 50, 100, parent.after(50)))
            await kernel.entered()
            reading.cancel()
            with pytest.raises(asyncio.CancelledError):
                await reading
            assert parent.quarantined
            await source.aclose()
            assert "does not return" in caplog.text
            (fd, _, _) = kernel.calls[0]
            os.fstat(fd)
        finally:
            kernel.gate.set()
        # The thread closes it as it leaves.
        await asyncio.to_thread(_end_reader_threads)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)

    run_on_each_loop(body)
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]


def _end_reader_threads() -> None:
    for thread in threading.enumerate():
        if thread.name.startswith("streamload-read"):
            thread.join(30.0)


def test_a_read_that_hangs_may_end_after_its_loop(
    file: Path, kernel: _Kernel, caplog: pytest.LogCaptureFixture
) -> None:
    async def body() -> None:
        async with LocalSource(str(file), grace_s=0.0) as source:
            (object,) = await source.list()
            reading = asyncio.create_task(source.read(object, 0, 100, _lend(100)[1]))
            await kernel.entered()
            reading.cancel()
            await asyncio.wait([reading])

    kernel.gate.clear()
    asyncio.run(body())
    kernel.gate.set()
    _end_reader_threads()
    assert not [record for record in caplog.records if record.levelno > logging.WARNING]


def test_a_read_cancelled_in_the_queue_never_begins(file: Path, kernel: _Kernel) -> None:
    async def body() -> None:
        async with LocalSource(str(file), concurrency=1) as source:
            (object,) = await source.list()
            kernel.inside.clear()
            kernel.gate.clear()
            kernel.calls.clear()
            first = asyncio.create_task(source.read(object, 0, 100, _lend(100)[1]))
            await kernel.entered()
            memory, loan = _lend(100)
            second = asyncio.create_task(source.read(object, 0, 100, loan))
            await _turns(3)
            second.cancel()
            with pytest.raises(asyncio.CancelledError):
                await second
            kernel.gate.set()
            await first
            await source.read(object, 0, 100, _lend(100)[1])
            assert len(kernel.calls) == 2
            assert not any(memory)
            assert not loan.quarantined

    run_on_each_loop(body)


def test_closing_waits_for_the_threads_of_its_reads(file: Path, kernel: _Kernel) -> None:
    async def body() -> None:
        source = LocalSource(str(file), concurrency=1)
        (object,) = await source.list()
        kernel.inside.clear()
        kernel.gate.clear()
        reads = [asyncio.create_task(source.read(object, 0, 100, _lend(100)[1])) for _ in range(3)]
        await kernel.entered()
        closing = asyncio.create_task(source.aclose())
        await _turns(5)
        assert not closing.done()
        assert [read.done() for read in reads] == [False, True, True]
        kernel.gate.set()
        await closing
        for read in reads:
            with pytest.raises(ClosedError):
                await read
        for call in (source.list(), source.stat(_KEY), source.read(object, 0, 1, _lend(1)[1])):
            with pytest.raises(ClosedError):
                await call

    run_on_each_loop(body)


def test_a_process_ends_although_a_read_hangs(file: Path) -> None:
    command = [sys.executable, "-c", _HUNG_PROCESS, str(file)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.split() == ["True", "True"]
    assert "does not return" in ended.stderr


def test_a_file_that_ends_inside_a_row_and_a_reader_that_is_stopped_between_two(tmp_path: Path) -> None:
    content = bytes(range(256)) * 1000
    path = tmp_path / "rows"
    path.write_bytes(content)
    memory = memoryview(bytearray(5 * 100))
    rows = Rows(memory, 100, 9900, memoryview(bytearray(10)))

    def job(offset: int) -> ReadJob:
        return ReadJob(OpenFile(str(path), version_of(path.stat())), (), offset, rows=rows)

    whole = job(0)
    assert whole.run() is None
    assert (whole.filled, whole.calls) == (4 * 10_000 + 100, 5)
    assert bytes(memory) == b"".join(content[at : at + 100] for at in range(0, 50_000, 10_000))
    cut = job(len(content) - 20_030)
    assert isinstance(cut.run(), TruncatedReadError)
    assert cut.filled == 20_030
    assert bytes(memory[:100]) == content[-20_030:-19_930]
    stopped = job(0)
    stopped.stop = True
    assert (stopped.run(), stopped.filled, stopped.calls) == (None, 0, 0)


def test_a_reader_of_rows_does_not_wait_for_one_that_hangs(tmp_path: Path) -> None:
    path = tmp_path / "rows"
    path.write_bytes(b"x" * 50_000)
    memory = memoryview(bytearray(5 * 100))
    turn = threading.Lock()
    with turn:
        job = ReadJob(
            OpenFile(str(path), version_of(path.stat())),
            (),
            0,
            rows=Rows(memory, 100, 9900, memoryview(bytearray(10))),
            turn=turn,
        )
        assert job.run() is None
        assert turn.locked(), "it gave back a turn that it did not have"
    assert bytes(memory) == b"x" * 500
