"""Staging from folder to folder: what is copied, what is kept, what is in the way, and what goes wrong."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import streamload
from streamload.errors import (
    CheckpointError,
    ChecksumError,
    IndexFileError,
    ManifestError,
    NotFoundError,
    ObjectChangedError,
    OptionError,
    SourceError,
)
from streamload.options import resolve
from streamload.stage import StageOptions, Stager, files, stager
from streamload.stage.files import StagedFile
from streamload.stage.journal import read_journal
from streamload.stage.locks import FileLock
from streamload.stage.names import USE_NAME, unfinished_name
from streamload.stage.ready import read_ready
from streamload.stage.volume import check_space, in_memory, sync_folder
from tests.stage.models import FIRST, INDEX, PIECE, SECOND, STAGED, names, same, shard_of, source_of, total_bytes

_SMALL = {"read_bytes": PIECE, "memory_bytes": 1 << 20}


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Every test leaves no thread of ours and no open file behind."""
    files = len(os.listdir("/proc/self/fd"))
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith("streamload")] == []
    assert len(os.listdir("/proc/self/fd")) <= files + 2  # libuv's own, for the process's first loop


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return source_of(tmp_path / "source")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "new" / "folder"


def _stage(source: Path, folder: Path | None, **options: object) -> streamload.Staged:
    return streamload.stage_checkpoint(source, folder, **(_SMALL | options))  # type: ignore[arg-type]


def _last_bytes(path: str | Path) -> bytes:
    return Path(path).read_bytes()[-10:]


class TestStaged:
    def test_all_that_a_loader_needs(self, source: Path, folder: Path) -> None:
        staged = _stage(source, folder)
        assert same(source, folder)
        assert (staged.state, staged.files, staged.nbytes) == ("staged", 6, total_bytes(source))
        assert (staged.fetched_bytes, staged.kept_bytes) == (staged.nbytes, 0)
        assert sum(staged.unverified.values()) == staged.nbytes
        assert staged.first_request_s is not None
        assert staged.first_request_s > 0
        assert set(staged.phases) == {"list", "wait", "check", "read", "finish"}

    def test_again_it_is_all_there(self, source: Path, folder: Path) -> None:
        _stage(source, folder)
        before = {name: os.stat(folder / name) for name in os.listdir(folder)}
        staged = _stage(source, folder)
        assert (staged.state, staged.fetched_bytes, staged.kept_bytes) == ("present", 0, staged.nbytes)
        assert {name: os.stat(folder / name).st_mtime_ns for name in os.listdir(folder)} == {
            name: status.st_mtime_ns for name, status in before.items()
        }

    def test_some(self, source: Path, folder: Path) -> None:
        _stage(source, folder, include=["*.json", "tok*"], exclude=[INDEX])
        assert names(folder) == {"config.json", "tokenizer.model", "READY"}
        # Another choice is another version: what is there stays, what is missing comes.
        staged = _stage(source, folder)
        assert same(source, folder)
        assert staged.fetched_bytes == total_bytes(source) - len("{}") - 600
        # And what is not chosen any more goes.
        _stage(source, folder, include=["config.json"])
        assert names(folder) == {"config.json", "READY"}

    def test_one_file(self, source: Path, folder: Path) -> None:
        staged = _stage(source / FIRST, folder)
        assert names(folder) == {FIRST, "READY"}
        assert staged.files == 1

    def test_shards_in_deeper_folders(self, source: Path, folder: Path) -> None:
        (source / "deep").mkdir()
        (source / SECOND).rename(source / "deep" / SECOND)
        (source / INDEX).write_text(json.dumps({"weight_map": {"first": FIRST, "second": f"deep/{SECOND}"}}))
        assert _stage(source, folder).state == "staged"
        assert (folder / "deep" / SECOND).read_bytes() == (source / "deep" / SECOND).read_bytes()
        assert _stage(source, folder).state == "present"
        with (source / "deep" / SECOND).open("ab") as file:
            file.write(b"changed")
        assert _stage(source, folder).fetched_bytes == (source / "deep" / SECOND).stat().st_size

    def test_a_staged_copy_can_be_staged(self, source: Path, folder: Path, tmp_path: Path) -> None:
        _stage(source, folder)
        _stage(folder, tmp_path / "copy")
        assert same(source, tmp_path / "copy")

    def test_verified_by_a_manifest(self, source: Path, folder: Path) -> None:
        (source / "consolidated.safetensors").unlink()
        streamload.write_manifest(source)
        staged = _stage(source, folder, include=["*.safetensors", "*-manifest.json"], exclude=["*-manifest.json"])
        (by,) = staged.verified
        assert "manifest" in by
        assert staged.verified[by] == staged.nbytes
        assert streamload.verify(source, progress=False).ok

    def test_what_has_to_be_verified(self, source: Path, folder: Path) -> None:
        """Weights; nothing can vouch for the small files beside them on a disk."""
        with pytest.raises(ChecksumError, match=r"verify is 'require'"):
            _stage(source, folder, verify="require")
        assert names(folder) == set()
        (source / "consolidated.safetensors").unlink()
        streamload.write_manifest(source)
        assert _stage(source, folder, verify="require", include=["*.safetensors"]).unverified == {}
        staged = _stage(source, folder, verify="require")
        small = [path for path in folder.iterdir() if path.suffix != ".safetensors" and path.name in names(source)]
        assert sum(staged.unverified.values()) == sum(path.stat().st_size for path in small)
        with pytest.raises(ChecksumError, match=r"verify is 'require'.*pytorch_model|pytorch_model.*require"):
            _stage(source, folder, verify="require", include=["*.bin"])

    def test_memory_stays_within_its_limit(self, source: Path, folder: Path) -> None:
        staged = _stage(source, folder, memory_bytes=1 << 20, read_bytes=1 << 20)
        assert staged.concurrency == 3  # a read is of a quarter of it at most, and one quarter is for late ones
        assert same(source, folder)


class TestNewVersions:
    def test_only_what_has_changed_is_read(self, source: Path, folder: Path) -> None:
        _stage(source, folder)
        (source / SECOND).write_bytes(shard_of("second", PIECE, 9))
        (source / "tokenizer.model").unlink()
        staged = _stage(source, folder)
        assert staged.fetched_bytes == (source / SECOND).stat().st_size
        assert (folder / SECOND).read_bytes() == (source / SECOND).read_bytes()
        assert names(folder) == {*STAGED, "READY"} - {"tokenizer.model"}

    def test_an_object_that_changes_meanwhile(self, source: Path, folder: Path) -> None:
        def change(event: streamload.Event) -> None:
            if event.kind == "read" and event.object == SECOND and event.start == PIECE:
                os.utime(source / SECOND)

        with pytest.raises(ObjectChangedError) as caught:
            _stage(source, folder, on_event=change, concurrency=1)
        assert caught.value.object == SECOND
        assert "READY" not in names(folder)
        assert SECOND not in names(folder)
        staged = _stage(source, folder)
        assert same(source, folder)
        # What was whole before stays, and nothing of the old version is mixed with the new one.
        assert (source / SECOND).stat().st_size <= staged.fetched_bytes < staged.nbytes

    def test_back_to_an_older_version(self, source: Path, folder: Path) -> None:
        """Whoever has read of it before reads a file that is gone: what he knew it by must not count any more."""
        at = (source / FIRST).stat().st_mtime_ns
        for piece, then in ((2, at + 1), (5, at)):

            def change(event: streamload.Event, piece: int = piece, then: int = then) -> None:
                if event.kind == "read" and event.object == FIRST and event.start == piece * PIECE:
                    os.utime(source / FIRST, ns=(then, then))

            with pytest.raises(ObjectChangedError):
                _stage(source, folder, on_event=change, concurrency=1)
            if then != at:
                told = {stamp for stamps in read_journal(str(folder)).stamps.values() for stamp in stamps}
        _stage(source, folder)
        assert same(source, folder)
        ready = read_ready(str(folder))
        assert ready is not None
        (stamps,) = [file.stamps for file in ready.files if file.key == FIRST]
        assert stamps
        assert not told & {*stamps}

    def test_content_that_is_not_what_the_manifest_says(self, source: Path, folder: Path) -> None:
        (source / "consolidated.safetensors").unlink()
        streamload.write_manifest(source)
        content = bytearray((source / SECOND).read_bytes())
        content[-1] ^= 1
        (source / SECOND).write_bytes(content)
        with pytest.raises(ChecksumError, match="the manifest") as caught:
            _stage(source, folder)
        assert caught.value.object == SECOND
        assert not {SECOND, "READY"} & names(folder)
        content[-1] ^= 1
        (source / SECOND).write_bytes(content)
        assert _stage(source, folder).state == "staged"
        assert (folder / SECOND).read_bytes() == content

    def test_a_manifest_for_another_file(self, source: Path, folder: Path) -> None:
        (source / "consolidated.safetensors").unlink()
        streamload.write_manifest(source)
        (source / SECOND).write_bytes(shard_of("second", PIECE, 1))
        with pytest.raises(ManifestError, match="another file"):
            _stage(source, folder)


class TestInTheWay:
    @pytest.mark.parametrize("what", ["changed", "shorter", "foreign", "link", "marker"])
    def test_refused_or_replaced(self, source: Path, folder: Path, what: str, tmp_path: Path) -> None:
        folder.mkdir(parents=True)
        theirs = tmp_path / "theirs"
        theirs.write_bytes(b"keep this")
        if what in ("changed", "shorter"):
            _stage(source, folder)
            content = (folder / FIRST).read_bytes()
            (folder / FIRST).write_bytes(content if what == "changed" else content[:-1])
        elif what == "foreign":
            (folder / FIRST).write_bytes(b"mine")
        elif what == "link":
            (folder / FIRST).symlink_to(theirs)
        else:
            (folder / "READY").write_bytes(b"")
        before = {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}
        with pytest.raises(SourceError, match="on-conflict replace") as caught:
            _stage(source, folder)
        assert caught.value.object == ("READY" if what == "marker" else FIRST)
        assert {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")} == before
        _stage(source, folder, on_conflict="replace")
        assert same(source, folder)
        assert theirs.read_bytes() == b"keep this"

    def test_a_folder_is_never_replaced(self, source: Path, folder: Path) -> None:
        (folder / "config.json").mkdir(parents=True)
        with pytest.raises(SourceError, match="a folder is in the way"):
            _stage(source, folder, on_conflict="replace")

    def test_others_files_stay(self, source: Path, folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "notes.txt").write_text("mine")
        _stage(source, folder)
        assert (folder / "notes.txt").read_text() == "mine"

    def test_an_unfinished_file_that_is_a_link(self, source: Path, folder: Path, tmp_path: Path) -> None:
        folder.mkdir(parents=True)
        (tmp_path / "theirs").write_bytes(b"keep this")
        (folder / unfinished_name(FIRST)).symlink_to(tmp_path / "theirs")
        _stage(source, folder)
        assert same(source, folder)
        assert (tmp_path / "theirs").read_bytes() == b"keep this"

    @pytest.mark.parametrize(
        "content", ["", "{}", "[]", "null", '{"format": "streamload-stage", "version": 1}', "\x00"]
    )
    def test_a_marker_that_makes_no_sense(self, source: Path, folder: Path, content: str) -> None:
        _stage(source, folder)
        (folder / "READY").write_text(content)
        _stage(source, folder, on_conflict="replace")
        assert same(source, folder)


class TestRoom:
    def test_none_is_seen_before_the_first_byte(self, tmp_path: Path) -> None:
        with pytest.raises(SourceError, match="no room"):
            check_space(str(tmp_path), 1 << 60, memory_bytes=0)

    @pytest.mark.parametrize(("limit", "fits"), [(64 << 20, False), (1 << 30, True)])
    def test_memory_counts_where_the_volume_is_memory(self, tmp_path: Path, limit: int, fits: bool) -> None:
        """A control group of version 2, from files that look like the kernel's."""
        device = os.stat(tmp_path).st_dev
        for name, text in {
            "proc/self/mountinfo": f"1 0 {os.major(device)}:{os.minor(device)} / /x rw shared:1 - tmpfs tmpfs rw\n",
            "proc/self/cgroup": "0::/pod\n",
            "proc/meminfo": "MemAvailable: 99999999 kB\n",
            "sys/fs/cgroup/pod/memory.max": f"{limit}\n",
            "sys/fs/cgroup/pod/memory.current": "0\n",
        }.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        assert in_memory(str(tmp_path), tmp_path)
        if fits:
            check_space(str(tmp_path), 64 << 20, memory_bytes=32 << 20, root=tmp_path)
            return
        with pytest.raises(SourceError, match=r"this volume is memory.*the cgroup v2 leaves 64.0 MiB"):
            check_space(str(tmp_path), 64 << 20, memory_bytes=32 << 20, root=tmp_path)

    def test_a_write_that_fails(self, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real, count = os.pwritev, [0]

        def fail(fd: int, data: tuple[memoryview], at: int) -> int:
            count[0] += 1
            if count[0] == 5:
                raise OSError(errno.ENOSPC, "full")
            return real(fd, data, at)

        monkeypatch.setattr(os, "pwritev", fail)
        with pytest.raises(SourceError, match="ENOSPC"):
            _stage(source, folder)
        assert "READY" not in names(folder)
        staged = _stage(source, folder)
        assert same(source, folder)
        assert staged.fetched_bytes < staged.nbytes

    def test_an_fsync_that_fails(self, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """The kernel tells of pages that it could not write once, and drops them; they are in memory still."""
        real = StagedFile.sync
        failed: list[str] = []

        def fail(self: StagedFile) -> int:
            if self.key == SECOND and not failed:
                failed.append(self.key)
                raise OSError(errno.EIO, "lost")
            return real(self)

        monkeypatch.setattr(StagedFile, "sync", fail)
        with pytest.raises(SourceError, match="EIO"):
            _stage(source, folder, concurrency=1)
        staged = _stage(source, folder)
        assert same(source, folder)
        assert staged.fetched_bytes >= (source / SECOND).stat().st_size


class TestBadInput:
    def test_nothing_there(self, tmp_path: Path, folder: Path) -> None:
        with pytest.raises(NotFoundError) as caught:
            _stage(tmp_path / "missing", folder)
        assert caught.value.uri == str(tmp_path / "missing")
        assert not folder.exists()

    def test_the_index_names_what_is_not_there(self, source: Path, folder: Path) -> None:
        (source / SECOND).unlink()
        with pytest.raises(IndexFileError, match="no such file"):
            _stage(source, folder)

    def test_nothing_is_chosen(self, source: Path, folder: Path) -> None:
        with pytest.raises(CheckpointError, match="none of the"):
            _stage(source, folder, include=["nothing"])

    @pytest.mark.parametrize(
        "options",
        [
            {"include": "*.json"},
            {"on_conflict": "maybe"},
            {"offline": "yes"},
            {"keep_bytes": 1},
            {"cache": "x", "keep_bytes": -1},
            {"keep_s": -1.0},
            {"nonsense": 1},
        ],
    )
    def test_options(self, source: Path, folder: Path, options: dict[str, object]) -> None:
        with pytest.raises(OptionError):
            _stage(source, folder, **options)

    def test_no_folder(self, source: Path) -> None:
        with pytest.raises(OptionError, match="neither a folder"):
            _stage(source, None)
        with pytest.raises(OptionError, match="no folder of this machine"):
            streamload.stage_checkpoint(source, "s3://bucket/prefix")


class TestOffline:
    def test_only_what_is_there(self, source: Path, folder: Path, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError, match="no complete copy"):
            _stage(source, folder, offline="only")
        _stage(source, folder)
        shutil.move(source, tmp_path / "away")
        staged = _stage(source, folder, offline="only")
        assert (staged.state, staged.requests, staged.asked_at_s) == ("present", 0, None)
        # Gone is not out of reach.
        with pytest.raises(NotFoundError):
            _stage(source, folder, offline="fallback")
        with pytest.raises(NotFoundError, match="no complete copy"):
            _stage(source, folder, offline="only", include=["*.json"])
        (folder / FIRST).unlink()
        with pytest.raises(NotFoundError, match="no complete copy"):
            _stage(source, folder, offline="only")


class TestCache:
    def _versions(self, cache: Path) -> set[Path]:
        return {path.parent for path in cache.glob("*/*/READY")}

    def test_versions_side_by_side(self, source: Path, tmp_path: Path) -> None:
        cache, link = tmp_path / "cache", tmp_path / "models" / "llama"
        first = Path(_stage(source, link, cache=str(cache)).folder)
        assert link.resolve() == first
        assert same(source, link)
        assert _stage(source, link, cache=str(cache)).state == "present"
        (source / "config.json").write_text('{"new": 1}')
        second = Path(_stage(source, link, cache=str(cache)).folder)
        assert link.resolve() == second != first
        assert self._versions(cache) == {first, second}
        assert same(source, second)
        # Without a link, and without the source.
        shutil.rmtree(source)
        assert _stage(source, None, cache=str(cache), offline="only").folder == str(second)

    def test_what_is_no_link_stays(self, source: Path, tmp_path: Path) -> None:
        (tmp_path / "folder").mkdir()
        with pytest.raises(SourceError, match="is no link"):
            _stage(source, tmp_path / "folder", cache=str(tmp_path / "cache"))

    def _fill(self, source: Path, cache: Path, count: int) -> list[Path]:
        """Versions that were used an hour ago and more, the first one longest ago."""
        folders = []
        for number in range(count):
            (source / "config.json").write_text(json.dumps(number))
            folders.append(Path(_stage(source, None, cache=str(cache)).folder))
            used_s = os.stat(folders[-1] / USE_NAME).st_mtime - 36000 + number
            os.utime(folders[-1] / USE_NAME, (used_s, used_s))
        return folders

    def test_the_least_recently_used_go(self, source: Path, tmp_path: Path) -> None:
        cache = tmp_path / "cache"
        first, second, third = self._fill(source, cache, 3)
        _stage_first = FileLock(str(first / USE_NAME))  # somebody reads it
        assert _stage_first.take(shared=True)
        try:
            (source / "config.json").write_text("new")
            new = Path(_stage(source, None, cache=str(cache), keep_bytes=int(3.5 * total_bytes(source))).folder)
        finally:
            _stage_first.release()
        assert self._versions(cache) == {first, third, new}
        assert sorted(new.parent.iterdir()) == sorted([first, third, new])
        assert not second.exists()

    def test_what_was_used_lately_stays(self, source: Path, tmp_path: Path) -> None:
        cache = tmp_path / "cache"
        first, second = self._fill(source, cache, 2)
        os.utime(first / USE_NAME)
        (source / "config.json").write_text("new")
        new = Path(_stage(source, None, cache=str(cache), keep_bytes=0).folder)
        assert self._versions(cache) == {first, new}
        (source / "config.json").write_text("newer")
        newer = Path(_stage(source, None, cache=str(cache), keep_bytes=0, keep_s=0.0).folder)
        assert self._versions(cache) == {newer}
        assert not second.exists()


class TestWhileItRuns:
    """What the one who serves the files asks."""

    def test_what_is_wanted_comes_first_and_can_be_read(self, source: Path, folder: Path) -> None:
        order: list[tuple[str | None, int | None]] = []

        def note(event: streamload.Event) -> None:
            if event.kind == "read":
                order.append((event.object, event.start))

        async def main() -> None:
            reading = resolve({**_SMALL, "concurrency": 1, "on_event": note})[0]
            async with Stager(str(source), str(folder), StageOptions(), reading) as stager:
                running = asyncio.create_task(stager.run())
                objects = await stager.objects()
                size = objects[SECOND].size_bytes
                assert not stager.landed(SECOND, size - 10, size)
                stager.want(SECOND, size - 10, size)
                await stager.wait(SECOND, size - 10, size)
                assert stager.landed(SECOND, size - 10, size)
                place = stager.place(SECOND, size - 10, size)
                assert _last_bytes(place.path) == _last_bytes(source / SECOND)
                assert (place.landed, place.mtime_ns) == ((size - size % PIECE, size), None)
                await stager.whole(SECOND)
                whole = stager.place(SECOND, size - 10, size)
                assert (whole.path, whole.landed) == (str(folder / SECOND), (0, size))
                assert stager.knows(SECOND, place.stamp)
                assert not stager.knows(SECOND, "another")
                assert (await running).state == "staged"
                await stager.whole(FIRST)
                await stager.wait(FIRST, 0, objects[FIRST].size_bytes)

        asyncio.run(main())
        assert order[0] == (SECOND, 10 * PIECE)
        assert same(source, folder)

    def test_who_waits_is_told_of_a_failure(self, source: Path, folder: Path) -> None:
        def change(event: streamload.Event) -> None:
            if event.kind == "read" and event.object == FIRST:
                os.utime(source / FIRST)

        async def main() -> None:
            reading = resolve({**_SMALL, "concurrency": 1, "on_event": change})[0]
            async with Stager(str(source), str(folder), StageOptions(), reading) as stager:
                running = asyncio.create_task(stager.run())
                size = (await stager.objects())[FIRST].size_bytes
                with pytest.raises(ObjectChangedError):
                    await stager.wait(FIRST, 0, size)
                with pytest.raises(ObjectChangedError):
                    await running
                with pytest.raises(ObjectChangedError):
                    await stager.whole(SECOND)

        asyncio.run(main())

    def test_a_name_is_told_at_once(self, source: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """However long it takes to make it durable: meanwhile nobody finds the file under its old one."""
        key = "deep/er.safetensors"
        (source / "deep").mkdir()
        (source / SECOND).rename(source / key)
        (source / INDEX).write_text(json.dumps({"weight_map": {"first": FIRST, "second": key}}))
        reading = resolve(_SMALL)[0]
        stagers: list[Stager] = []
        told: list[tuple[str, bool, bool]] = []

        def sync(path: str) -> None:
            told.append((path, stagers[0].is_whole(key), (folder / "READY").exists()))
            sync_folder(path)

        monkeypatch.setattr(files, "sync_folder", sync)
        monkeypatch.setattr(stager, "in_memory", lambda folder: False)

        async def main() -> None:
            async with Stager(str(source), str(folder), StageOptions(), reading) as staging:
                stagers.append(staging)
                await staging.run()

        asyncio.run(main())
        assert told == [(str(folder / "deep"), True, False)]
