"""What other processes, earlier runs and other users do to a folder or a cache that is staged into."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import streamload
from streamload.errors import ChecksumError, SourceError
from streamload.options import resolve
from streamload.sources.local import LocalSource
from streamload.stage import StageOptions, cache, stager
from streamload.stage.journal import Journal, Landed, read_journal
from streamload.stage.locks import FileLock
from streamload.stage.names import JOURNAL_NAME, LOCK_NAME, USE_NAME, unfinished_name
from tests.stage.models import FIRST, PIECE, SECOND, names, same, source_of

_FULL = OSError(errno.ENOSPC, "full")


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return source_of(tmp_path / "source")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "folder"


def _stage(source: Path, folder: Path | None, **options: Any) -> streamload.Staged:
    return streamload.stage_checkpoint(source, folder, read_bytes=PIECE, memory_bytes=1 << 20, **options)


def _at_the_first_read_of(key: str, call: Callable[[], object]) -> Callable[[streamload.Event], None]:
    def on_event(event: streamload.Event) -> None:
        if event.kind == "read" and event.object == key and event.start == 0:
            call()

    return on_event


class TestNoLockKeepsThemOut:
    """On mounts without locks, and where the lock's file is removed."""

    def test_an_empty_file_of_another_process_gets_no_name(self, source: Path, folder: Path) -> None:
        def replace() -> None:
            """As another one does that begins to stage the same."""
            unfinished = folder / unfinished_name(SECOND)
            unfinished.unlink()
            unfinished.write_bytes(bytes((source / SECOND).stat().st_size))

        with pytest.raises(SourceError, match="another process has replaced") as caught:
            _stage(source, folder, on_event=_at_the_first_read_of(SECOND, replace))
        assert caught.value.object == SECOND
        assert not {SECOND, "READY"} & names(folder)

    def test_whose_lock_was_removed_marks_nothing(self, source: Path, folder: Path) -> None:
        with pytest.raises(SourceError, match="the lock on this folder was removed"):
            _stage(source, folder, on_event=_at_the_first_read_of(SECOND, (folder / LOCK_NAME).unlink))
        assert "READY" not in names(folder)
        _stage(source, folder)
        assert same(source, folder)

    def test_what_was_changed_since_is_not_marked(
        self, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def conclude(self: LocalSource) -> None:
            (folder / FIRST).write_bytes(b"")

        monkeypatch.setattr(LocalSource, "conclude", conclude)
        with pytest.raises(SourceError, match="changed or removed since") as caught:
            _stage(source, folder)
        assert caught.value.object == FIRST
        assert "READY" not in names(folder)


class TestAnUpdateThatWasInterrupted:
    def test_what_the_older_version_had_is_still_ours(
        self, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is kept where it is the same, and goes where the new version has no such file."""
        _stage(source, folder)
        (source / SECOND).write_bytes((source / FIRST).read_bytes())
        (source / "tokenizer.model").rename(source / "tokenizer.json")

        def fail(*_: object) -> int:
            raise _FULL

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwritev", fail)
            with pytest.raises(SourceError, match="ENOSPC"):
                _stage(source, folder)
        assert "READY" not in names(folder)
        staged = _stage(source, folder)
        assert staged.fetched_bytes == sum((source / name).stat().st_size for name in (SECOND, "tokenizer.json"))
        assert "tokenizer.model" not in names(folder)
        assert (folder / SECOND).read_bytes() == (source / SECOND).read_bytes()

    def test_what_it_has_left_takes_no_room(self, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """Of files that this version has not, in deeper folders as well; else there would never be room again."""
        left = [folder / ".older.safetensors.streamload-staging", folder / "deeper" / ".x.streamload-staging"]
        (folder / "deeper").mkdir(parents=True)
        for path in left:
            path.write_bytes(b"as large as a model")
        # Another one is at work there, in a folder of its own.
        theirs = folder / "other" / ".theirs.streamload-staging"
        theirs.parent.mkdir()
        theirs.write_bytes(b"")
        (theirs.parent / LOCK_NAME).touch()
        checked: list[bool] = []
        monkeypatch.setattr(stager, "check_space", lambda *_, **__: checked.append(any(path.exists() for path in left)))
        _stage(source, folder)
        assert checked == [False]
        assert theirs.exists()

    def test_a_journal_line_that_was_cut_costs_no_other(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.mkdir()
        journal = Journal(str(folder))
        real = os.write
        with monkeypatch.context() as patch:
            patch.setattr(os, "write", lambda fd, data: real(fd, data[:20]))
            with pytest.raises(OSError, match="could not be written whole"):
                journal.landed("a", Landed("CRC64NVME", 0, 10, 1))
        journal.landed("b", Landed("CRC64NVME", 0, 10, 1))
        journal.close()
        assert read_journal(str(folder)).landed == {"b": [Landed("CRC64NVME", 0, 10, 1)]}

    def test_what_cannot_be_noted_hides_no_error(
        self, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (source / "consolidated.safetensors").unlink()
        streamload.write_manifest(source)
        content = bytearray((source / SECOND).read_bytes())
        content[-1] ^= 1
        (source / SECOND).write_bytes(content)

        def fill() -> None:
            def fail(*_: object) -> None:
                raise _FULL

            monkeypatch.setattr(Journal, "forget", fail)

        with pytest.raises(ChecksumError):
            _stage(source, folder, on_event=_at_the_first_read_of(SECOND, fill))


class TestWhoMayWriteToTheVolume:
    @pytest.mark.parametrize("marker", [True, False])
    @pytest.mark.parametrize("absolute", [True, False])
    def test_nothing_outside_is_removed(
        self, source: Path, folder: Path, tmp_path: Path, marker: bool, absolute: bool
    ) -> None:
        victim = tmp_path / "victim"
        victim.write_bytes(b"keep this")
        status = victim.stat()
        key = str(victim) if absolute else "../victim"
        file = {"key": key, "identity": "x", "size_bytes": status.st_size, "mtime_ns": status.st_mtime_ns}
        _stage(source, folder)
        (source / "config.json").write_text('{"new": 1}')
        if marker:
            ready = json.loads((folder / "READY").read_text())
            (folder / "READY").write_text(json.dumps(ready | {"files": [*ready["files"], file]}))
        else:
            (folder / JOURNAL_NAME).write_text(json.dumps({"whole": file}) + "\n")
        _stage(source, folder, on_conflict="replace")
        assert same(source, folder)
        assert victim.read_bytes() == b"keep this"

    def test_a_pipe_called_as_the_marker_is(self, source: Path, folder: Path) -> None:
        folder.mkdir()
        os.mkfifo(folder / "READY")
        with pytest.raises(SourceError, match="not one of ours"):
            _stage(source, folder)
        _stage(source, folder, on_conflict="replace")
        assert same(source, folder)


class TestRequiredVerification:
    def test_what_nothing_was_compared_with_does_not_count(self, source: Path, folder: Path) -> None:
        _stage(source, folder, verify="off")
        with pytest.raises(ChecksumError, match="verify is 'require'"):
            _stage(source, folder, verify="require")
        with pytest.raises(streamload.NotFoundError):
            _stage(source, folder, verify="require", offline="only")
        (source / "consolidated.safetensors").unlink()
        streamload.write_manifest(source)
        staged = _stage(source, folder, verify="require")
        assert staged.fetched_bytes > (source / FIRST).stat().st_size + (source / SECOND).stat().st_size
        assert _stage(source, folder, verify="require").state == "present"


class TestCaches:
    def _aged(self, source: Path, where: Path, count: int) -> list[Path]:
        """Versions that were used an hour ago and more, the first one longest ago."""
        found = []
        for number in range(count):
            (source / "config.json").write_text(json.dumps(number))
            found.append(Path(_stage(source, None, cache=str(where)).folder))
            used_s = os.stat(found[-1] / USE_NAME).st_mtime - 36000 + number
            os.utime(found[-1] / USE_NAME, (used_s, used_s))
        (source / "config.json").write_text("new")
        return found

    def test_what_was_found_while_another_one_went_stays(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """An init container has found it, and is gone with its lock, before the engine opens the files."""
        first, second = self._aged(source, tmp_path / "cache", 2)
        real = cache._remove

        def remove(path: str) -> None:
            if path.startswith(str(first)):
                use = FileLock(str(second / USE_NAME))
                assert use.take(shared=True)
                use.touch()
                use.release()
            real(path)

        monkeypatch.setattr(cache, "_remove", remove)
        _stage(source, None, cache=str(tmp_path / "cache"), keep_bytes=0)
        assert not first.exists()
        assert (second / "READY").exists()

    @pytest.mark.parametrize("at", ["rename", "rmtree"])
    def test_a_version_that_cannot_be_removed_stops_nobody(
        self, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str, caplog: pytest.LogCaptureFixture
    ) -> None:
        first, second = self._aged(source, tmp_path / "cache", 2)
        module: Any = os if at == "rename" else shutil
        real = getattr(module, at)

        def fail(path: str, *more: Any) -> None:
            if str(path).startswith(str(first)):
                raise OSError(errno.EACCES, "Permission denied")
            real(path, *more)

        with monkeypatch.context() as patch:
            patch.setattr(module, at, fail)
            new = Path(_stage(source, None, cache=str(tmp_path / "cache"), keep_bytes=0).folder)
        assert same(source, new)
        assert not second.exists()
        assert f"{first}" in caplog.text
        assert "cannot be removed" in caplog.text
        # Of what is on its way out, nobody takes it for a version.
        assert {Path(version.path) for version in cache.cached_versions(str(tmp_path / "cache"))} == (
            {first, new} if at == "rename" else {new}
        )

    def test_a_version_is_staged_into_with_its_cache_only(self, source: Path, tmp_path: Path) -> None:
        """Others may be reading it."""
        link = tmp_path / "model"
        version = Path(_stage(source, link, cache=str(tmp_path / "cache")).folder)
        before = {path.name: path.read_bytes() for path in version.iterdir()}
        assert _stage(source, link).state == "present"
        (source / "config.json").write_text("new")
        with pytest.raises(SourceError, match="is a version in a cache"):
            _stage(source, link)
        assert {path.name: path.read_bytes() for path in version.iterdir()} == before | {LOCK_NAME: b""}

    def test_all_users_note_their_use(self, source: Path, tmp_path: Path) -> None:
        mask = os.umask(0o077)
        try:
            version = Path(_stage(source, None, cache=str(tmp_path / "cache")).folder)
        finally:
            os.umask(mask)
        assert (version / USE_NAME).stat().st_mode & 0o666 == 0o666


def test_what_is_stopped_waits_for_no_source_longer_than_a_second(source: Path, folder: Path) -> None:
    """A container's process is promised to end within two."""
    options, _ = resolve({"memory_bytes": 1 << 20})
    for uri in (str(source), "hf://org/model", "sidecar:///run/streamload.sock"):
        made = stager.Stager(uri, str(folder), StageOptions(), options)
        assert vars(made.source)["_grace_s"] == 1.0
