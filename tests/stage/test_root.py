"""Volumes that are full, read-only or gone, and a container's memory limit: what only root can make."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import streamload
from streamload.errors import SourceError
from streamload.sources.local import LocalSource
from streamload.stage.locks import FileLock
from tests.cli.programs import TIMEOUT_S
from tests.stage.models import PIECE, names, same, shard_of, source_of

pytestmark = pytest.mark.root

_MIB = 1 << 20


@contextmanager
def _mounted(folder: Path, options: str) -> Iterator[Path]:
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=False, capture_output=True)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return source_of(tmp_path / "source")


def _stage(source: Path, folder: Path, on_event: Callable[[streamload.Event], None] | None = None) -> streamload.Staged:
    return streamload.stage_checkpoint(source, folder, read_bytes=PIECE, memory_bytes=_MIB, on_event=on_event)


def test_no_room_is_seen_before_the_first_byte(source: Path, tmp_path: Path) -> None:
    with _mounted(tmp_path / "volume", "size=5M") as volume:
        with pytest.raises(SourceError, match=r"no room: .* the volume has"):
            _stage(source, volume)
        assert names(volume) == set()


def test_a_volume_that_others_fill(source: Path, tmp_path: Path) -> None:
    with _mounted(tmp_path / "volume", "size=6M") as volume:

        def fill(event: streamload.Event) -> None:
            if event.kind == "read" and event.start == 3 * PIECE:
                with pytest.raises(OSError, match="No space"), (volume / "theirs").open("wb") as file:
                    file.write(bytes(8 * _MIB))

        with pytest.raises(SourceError, match="ENOSPC"):
            _stage(source, volume, fill)
        assert "READY" not in names(volume)
        (volume / "theirs").unlink()
        _stage(source, volume)
        assert same(source, volume)


def test_a_volume_that_is_read_only(source: Path, tmp_path: Path) -> None:
    with _mounted(tmp_path / "volume", "size=20M") as volume:
        subprocess.run(["mount", "-o", "remount,ro", volume], check=True)
        with pytest.raises(SourceError, match="EROFS"):
            _stage(source, volume)
        subprocess.run(["mount", "-o", "remount,rw", volume], check=True)
        _stage(source, volume)
        subprocess.run(["mount", "-o", "remount,ro", volume], check=True)
        assert _stage(source, volume).state == "present"


def test_a_cache_that_is_read_only(source: Path, tmp_path: Path) -> None:
    with _mounted(tmp_path / "volume", "size=20M") as volume:
        subprocess.run(["mount", "-o", "remount,ro", volume], check=True)
        with pytest.raises(SourceError, match="EROFS"):
            streamload.stage_checkpoint(source, tmp_path / "link", cache=str(volume))
        subprocess.run(["mount", "-o", "remount,rw", volume], check=True)
        streamload.stage_checkpoint(source, None, cache=str(volume))
        subprocess.run(["mount", "-o", "remount,ro", volume], check=True)
        assert streamload.stage_checkpoint(source, tmp_path / "link", cache=str(volume)).state == "present"
        assert same(source, tmp_path / "link")


def test_nothing_is_marked_below_a_volume_that_vanishes_last(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with _mounted(tmp_path / "volume", "size=20M") as volume:

        async def vanish(self: LocalSource) -> None:
            subprocess.run(["umount", "--lazy", volume], check=False)  # noqa: ASYNC221

        monkeypatch.setattr(LocalSource, "conclude", vanish)
        with pytest.raises(SourceError, match="the lock on this folder was removed"):
            _stage(source, volume)
        assert os.listdir(volume) == []


def test_a_volume_that_vanishes(source: Path, tmp_path: Path) -> None:
    with _mounted(tmp_path / "volume", "size=20M") as volume:

        def vanish(event: streamload.Event) -> None:
            if event.kind == "read" and event.start == 3 * PIECE:
                subprocess.run(["umount", "--lazy", volume], check=False)

        with pytest.raises(SourceError):
            _stage(source, volume, vanish)
        assert os.listdir(volume) == []  # what was below the mount


def test_another_users_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pods of several users wait for each other."""
    monkeypatch.chdir(tmp_path)  # the folders above are not for others
    os.chmod(tmp_path, 0o755)
    ours = FileLock("lock")
    assert ours.take()

    def taken_by_nobody() -> bool:
        child = os.fork()
        if child == 0:
            code = 2
            try:
                os.setuid(65534)
                lock = FileLock("lock")
                code = int(lock.take(shared=True))
                if code:
                    lock.touch()
            finally:
                os._exit(code)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 1

    os.utime("lock", (1, 1))
    assert not taken_by_nobody()
    ours.release()
    assert taken_by_nobody()
    # And note their use.
    assert os.stat("lock").st_mtime > 1
    os.chmod("lock", 0o644)
    os.utime("lock", (1, 1))
    # One that an older version has made can be locked, though not noted on.
    assert taken_by_nobody()
    assert os.stat("lock").st_mtime == 1


class _Container:
    """A memory control group of version 1, as a container has one."""

    def __init__(self, limit_bytes: int) -> None:
        self._path = Path("/sys/fs/cgroup/memory") / f"streamload-test-{uuid.uuid4().hex}"
        self._limit_bytes = limit_bytes

    def __enter__(self) -> _Container:
        self._path.mkdir()
        (self._path / "memory.limit_in_bytes").write_text(str(self._limit_bytes))
        return self

    def __exit__(self, *_: object) -> None:
        self._path.rmdir()

    def run(self, *command: object) -> subprocess.CompletedProcess[str]:
        """Run the command line in it."""
        shell = f'echo $$ > {self._path}/cgroup.procs; exec "$0" -m streamload "$@"'
        return subprocess.run(
            ["sh", "-c", shell, sys.executable, *map(str, command)], capture_output=True, text=True, timeout=TIMEOUT_S
        )


def test_a_container_of_256_mib(tmp_path: Path) -> None:
    big = tmp_path / "big"
    big.mkdir()
    header = shard_of("big", 0, 0)
    nbytes = 400 * _MIB
    text = header[8:].replace(b"[0]", b"[%d]" % nbytes).replace(b"[0, 0]", b"[0, %d]" % nbytes)
    with (big / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(file.tell() + nbytes)
    words = tmp_path / "words"
    with _Container(256 * _MIB) as container:
        done = container.run("stage", big, tmp_path / "disk", "--memory-bytes", "64MiB", "--quiet", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["peak_rss_bytes"] < 200 * _MIB
        with _mounted(tmp_path / "memory", "size=1G") as volume:
            assert container.run("stage", big, volume, "--termination-log", words).returncode == 1
            assert "this volume is memory" in words.read_text()
            assert "the cgroup v1 leaves" in words.read_text()
            assert names(volume) == set()
    assert streamload.verify(tmp_path / "disk", progress=False).files[0].bad == ()
    assert (tmp_path / "disk" / "model.safetensors").stat().st_size == (big / "model.safetensors").stat().st_size
