"""Rank-sharded checkpoints on a disk: what is written, and what is left when it fails."""

from __future__ import annotations

import asyncio
import errno
import fcntl
import os
import resource
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

import streamload
from streamload.errors import AccessError, OptionError, SourceError, UnsupportedDtypeError
from streamload.pipeline.verify import BY_MANIFEST
from streamload.save.sharded import split
from streamload.shared_memory import covering
from tests.checkpoints import freed, same_tensor, wrapped
from tests.save.sharded import MIB, cancelling, check_folder, load_as_vllm, read_folder, state, threads_of_ours


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Every test leaves no thread of ours and no open file behind."""
    files = len(os.listdir("/proc/self/fd"))
    yield
    assert threads_of_ours() == []
    assert len(os.listdir("/proc/self/fd")) <= files + 2  # libuv's own, for the process's first loop


def _names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


@pytest.mark.parametrize("max_file_bytes", [None, 1, MIB, 5 * MIB])
@pytest.mark.parametrize("memory_bytes", [MIB, 256 * MIB])
def test_every_tensor_is_there_bit_for_bit(tmp_path: Path, max_file_bytes: int | None, memory_bytes: int) -> None:
    tensors = state()
    saved = streamload.save_sharded(
        tensors, tmp_path / "new" / "folder", max_file_bytes=max_file_bytes, memory_bytes=memory_bytes
    )
    folder = tmp_path / "new" / "folder"
    check_folder(folder, tensors)
    assert list(saved.files) == [f"model-rank-0-part-{part}.safetensors" for part in range(len(saved.files))]
    assert saved.manifest == "streamload-manifest-model-rank-0-part-all.json"
    assert _names(folder) == sorted([*saved.files, saved.manifest])
    assert saved.tensors == len(tensors)
    assert saved.nbytes == sum((folder / name).stat().st_size for name in saved.files)
    if max_file_bytes == 1:
        assert len(saved.files) == len(tensors)
    with streamload.stream(folder, verify="require") as stream:
        found = dict(stream)
    assert stream.report.verified == {BY_MANIFEST: stream.report.total_bytes}
    assert stream.report.unverified == {}
    assert all(same_tensor(found[name], tensor.detach().resolve_conj()) for name, tensor in tensors.items())


class _Tied(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = torch.nn.Linear(8, 8)
        self.two = torch.nn.Linear(8, 8)
        self.two.weight = self.one.weight
        self.register_buffer("view", self.one.weight.detach()[2:4])


def test_a_module_and_its_shared_memory(tmp_path: Path) -> None:
    model = _Tied()
    saved = streamload.save_sharded(model, tmp_path, rank=1, world_size=2)
    assert saved.tensors == 3
    check_folder(tmp_path, covering(model.state_dict()))

    restored = _Tied()
    load_as_vllm(tmp_path, 1, covering(restored.state_dict()))
    for name, tensor in model.state_dict().items():
        assert torch.equal(restored.state_dict()[name], tensor)


def test_ranks_save_side_by_side_into_one_folder(tmp_path: Path) -> None:
    ranks = {rank: {f"w.{rank}": torch.full((1000,), float(rank))} for rank in (1, 11)}
    threads = [
        threading.Thread(target=streamload.save_sharded, args=(tensors, tmp_path), kwargs={"rank": r, "world_size": 12})
        for r, tensors in ranks.items()
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    check_folder(tmp_path, ranks[1], "model-rank-1-*")
    check_folder(tmp_path, ranks[11], "model-rank-11-*")
    load_as_vllm(tmp_path, 1, {"w.1": torch.empty(1000)})
    for rank in ranks:
        with streamload.stream(tmp_path, rank=rank, world_size=12, verify="require") as stream:
            assert set(dict(stream)) == {f"w.{rank}"}


def test_a_second_save_replaces_the_first(tmp_path: Path) -> None:
    streamload.save_sharded(state(1), tmp_path, max_file_bytes=MIB)
    streamload.save_sharded({"other": torch.ones(3)}, tmp_path, rank=1, world_size=2)
    (tmp_path / ".model-rank-0-part-9.safetensors.streamload-unfinished").write_bytes(b"left by a save that was killed")
    (tmp_path / "model-rank-0-part-x.safetensors").write_bytes(b"somebody else's")
    second = {"few": torch.ones(10)}
    saved = streamload.save_sharded(second, tmp_path, manifest=False)
    assert saved.manifest is None
    assert _names(tmp_path) == [
        "model-rank-0-part-0.safetensors",
        "model-rank-0-part-x.safetensors",
        "model-rank-1-part-0.safetensors",
        "streamload-manifest-model-rank-1-part-all.json",
    ]
    check_folder(tmp_path, second, "model-rank-0-part-0.*")


def test_with_a_running_event_loop(tmp_path: Path) -> None:
    async def main() -> None:
        streamload.save_sharded({"a": torch.ones(3)}, tmp_path)

    asyncio.run(main())
    check_folder(tmp_path, {"a": torch.ones(3)})


def test_no_tensor_at_all(tmp_path: Path) -> None:
    streamload.save_sharded({"empty": torch.empty(0, 3)}, tmp_path)
    assert read_folder(tmp_path) == {}
    assert _names(tmp_path) == [
        "model-rank-0-part-0.safetensors",
        "streamload-manifest-model-rank-0-part-all.json",
    ]


def test_a_name_and_a_uri_of_ones_own(tmp_path: Path) -> None:
    streamload.save_sharded(
        {"a": torch.ones(3)}, f"file://{tmp_path}/a%20b", rank=3, world_size=4, pp_size=2, pattern=None
    )
    assert "model-pp-1-tp-1-part-0.safetensors" in _names(tmp_path / "a b")


@pytest.mark.parametrize(
    ("model", "options", "error", "words"),
    [
        ({"a": 3}, {}, OptionError, "'a' is not a tensor but int"),
        (3, {}, OptionError, "neither a module nor a mapping"),
        ({"a": torch.ones(2, device="meta")}, {}, OptionError, "meta"),
        ({"a": torch.ones(2).to_sparse()}, {}, OptionError, "not dense"),
        ({"a": wrapped()}, {}, OptionError, "no memory of its own"),
        ({"a": freed()}, {}, OptionError, "no memory of its own"),
        (torch.nn.LazyLinear(2), {}, OptionError, "'weight' has no shape"),
        ({"a": torch.ones(2, dtype=torch.complex128)}, {}, UnsupportedDtypeError, "complex128"),
        ({"__metadata__": torch.ones(2)}, {}, OptionError, "means something else"),
        ({"a": torch.ones(2)}, {"max_file_bytes": 0}, OptionError, "max_file_bytes=0"),
        ({"a": torch.ones(2)}, {"memory_bytes": 1}, OptionError, "memory_bytes=1"),
        ({"a": torch.ones(2)}, {"rank": 1}, OptionError, "rank=1"),
        (
            {"a": torch.ones(2), "b": torch.ones(2)},
            {"pattern": "m.safetensors", "max_file_bytes": 8},
            OptionError,
            "part",
        ),
    ],
)
def test_what_makes_no_sense(
    tmp_path: Path, model: Any, options: dict[str, Any], error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        streamload.save_sharded(model, tmp_path, **options)
    assert _names(tmp_path) == []


def test_only_disks_and_s3_are_written_to(tmp_path: Path) -> None:
    with pytest.raises(OptionError, match="known are: file, s3"):
        streamload.save_sharded({"a": torch.ones(2)}, "memory://x")
    with pytest.raises(OptionError, match="name the prefix"):
        streamload.save_sharded({"a": torch.ones(2)}, "s3://bucket/a.safetensors")
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(SourceError) as caught:
        streamload.save_sharded({"a": torch.ones(2)}, tmp_path / "file" / "x")
    assert caught.value.uri == str(tmp_path / "file" / "x")


def test_files_are_split_at_the_limit() -> None:
    entries = [
        (name, "U8", (nbytes,)) for name, nbytes in [("a", 4), ("b", 6), ("c", 1), ("d", 20), ("e", 0), ("f", 3)]
    ]
    files = split([(name, dtype, tuple(shape)) for name, dtype, shape in entries], 10)
    assert [[name for name, _, _ in file] for file in files] == [["a", "b"], ["c"], ["d"], ["e", "f"]]


class _Faults:
    """Fails, or does something else, at the k-th call of any of the system's calls that write."""

    CALLS = ("open", "pwrite", "fsync", "rename")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int, then: Callable[[], object]) -> None:
        self.calls = 0
        self._at = at
        self._then = then
        self._lock = threading.Lock()
        for name in self.CALLS:
            monkeypatch.setattr("streamload.save.local.os." + name, self._counting(getattr(os, name)))

    def _counting(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any, **options: Any) -> Any:
            if threading.current_thread().name.startswith("streamload-write"):
                with self._lock:
                    self.calls += 1
                    now = self.calls
                if now == self._at:
                    self._then()
            return call(*arguments, **options)

        return counted


def _no_space() -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _small_save(folder: Path) -> None:
    tensors = {"a": torch.ones(1000), "b": torch.ones(50, 50).t(), "c": torch.ones(7)}
    streamload.save_sharded(tensors, folder, max_file_bytes=10_000, memory_bytes=MIB)


def _calls_of_a_save(folder: Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        faults = _Faults(patch, 0, lambda: None)
        _small_save(folder)
    return faults.calls


def test_a_save_that_fails_anywhere_leaves_nothing(tmp_path: Path) -> None:
    calls = _calls_of_a_save(tmp_path / "whole")
    assert calls > 15
    for at in range(1, calls + 1):
        folder = tmp_path / f"{at}"
        with pytest.MonkeyPatch.context() as patch:
            _Faults(patch, at, _no_space)
            with pytest.raises(SourceError, match="ENOSPC") as caught:
                _small_save(folder)
        assert caught.value.uri == str(folder)
        assert _names(folder) == [], f"at call {at}"
        assert threads_of_ours() == []


def test_a_save_that_is_cancelled_anywhere_leaves_nothing(tmp_path: Path) -> None:
    """As by Ctrl-C, while the k-th call is under way."""
    calls = _calls_of_a_save(tmp_path / "whole")
    for at in range(1, calls + 1):
        folder = tmp_path / f"{at}"
        with pytest.MonkeyPatch.context() as patch:
            _Faults(patch, at, cancelling(patch))
            with pytest.raises(asyncio.CancelledError):
                _small_save(folder)
        assert _names(folder) == [], f"at call {at}"
        assert threads_of_ours() == []


def test_a_save_that_is_killed_leaves_nothing_under_its_names_and_the_next_one_clears_up(tmp_path: Path) -> None:
    program = """
import os, signal, sys, torch, streamload
def kill(*_): os.kill(os.getpid(), signal.SIGKILL)
os.rename = kill
streamload.save_sharded({"a": torch.ones(1000), "b": torch.ones(1000)}, sys.argv[1], max_file_bytes=4000)
"""
    result = subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False)
    assert result.returncode == -9
    assert _names(tmp_path) == [
        ".model-rank-0-part-0.safetensors.streamload-unfinished",
        ".model-rank-0-part-1.safetensors.streamload-unfinished",
    ]
    streamload.save_sharded({"a": torch.ones(3)}, tmp_path, manifest=False)
    assert _names(tmp_path) == ["model-rank-0-part-0.safetensors"]


class _Killed:
    """From the k-th call on that changes a folder, nothing changes any more: what a killed save leaves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
        self.calls = 0
        self._at = at
        for name in ("rename", "unlink"):
            monkeypatch.setattr("streamload.save.local.os." + name, self._failing(getattr(os, name)))

    def _failing(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*arguments: Any) -> None:
            self.calls += 1
            if self.calls >= self._at:
                raise OSError(errno.EIO, os.strerror(errno.EIO))
            call(*arguments)

        return counted


@pytest.mark.parametrize(("parts", "more"), [(1, 1), (2, 2), (3, 1), (1, 3), (3, 2)])
@pytest.mark.parametrize("manifest", [True, False])
def test_a_save_that_is_killed_never_leaves_a_mixture(tmp_path: Path, parts: int, more: int, *, manifest: bool) -> None:
    """Wherever it is: what loads is all of the one save or all of the other."""
    earlier = {f"w.{part}": torch.zeros(100) for part in range(parts)}
    later = {f"w.{part}": torch.ones(100) for part in range(more)}

    def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        streamload.save_sharded(tensors, folder, max_file_bytes=400, manifest=manifest)

    seen = set()
    for at in range(1, 20):
        folder = tmp_path / f"{at}"
        save(folder, earlier)
        with pytest.MonkeyPatch.context() as patch:
            killed = _Killed(patch, at)
            with suppress(SourceError):
                save(folder, later)
        for options in ({}, {"rank": 0, "world_size": 1}):
            try:
                found = streamload.load(folder, **options)  # type: ignore[arg-type]
            except streamload.StreamloadError:
                seen.add("neither")
                continue
            expected = later if found["w.0"][0] else earlier
            seen.add("later" if expected is later else "earlier")
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
        if killed.calls < at:
            break
    assert {"earlier", "later"} <= seen
    assert ("neither" in seen) == (parts > 1 or more > 1)


def test_manifests_of_what_is_replaced_are_removed(tmp_path: Path) -> None:
    """They would tell of other content, or of files that are not there any more."""
    streamload.save_sharded({"a": torch.ones(10), "b": torch.ones(10)}, tmp_path, max_file_bytes=40)
    streamload.write_manifest(tmp_path / "model-rank-0-part-0.safetensors")
    streamload.write_manifest(tmp_path)
    (tmp_path / "streamload-manifest-model-rank-1-part-0.json").write_text("another rank's")
    streamload.write_manifest(tmp_path / "model-rank-0-part-0.safetensors")
    streamload.save_sharded({"a": torch.zeros(10)}, tmp_path, manifest=False)
    assert _names(tmp_path) == ["model-rank-0-part-0.safetensors", "streamload-manifest-model-rank-1-part-0.json"]
    assert torch.equal(streamload.load(tmp_path)["a"], torch.zeros(10))


def test_two_saves_of_one_rank_do_not_mix(tmp_path: Path) -> None:
    unfinished = tmp_path / ".model-rank-0-part-0.safetensors.streamload-unfinished"
    with open(unfinished, "wb") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(SourceError, match="another save is writing this file") as caught:
            streamload.save_sharded({"a": torch.ones(3)}, tmp_path)
    assert caught.value.object == "model-rank-0-part-0.safetensors"
    assert _names(tmp_path) == [unfinished.name]


def test_a_folder_that_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> None:
        raise OSError(errno.EACCES, os.strerror(errno.EACCES))

    _Faults(monkeypatch, 1, refuse)
    with pytest.raises(AccessError, match="EACCES"):
        streamload.save_sharded({"a": torch.ones(3)}, tmp_path)


def test_no_second_copy_of_the_model(tmp_path: Path) -> None:
    """What is not contiguous is copied in pieces: 256 MiB of it take a few of them."""
    program = """
import resource, sys, torch, streamload
tensor = torch.ones(8192, 8192).t()
streamload.save_sharded({"warm": torch.ones(3000, 3000).t()}, sys.argv[1] + "/warm")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
streamload.save_sharded({"a": tensor}, sys.argv[1], memory_bytes=32 << 20)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    assert resource.getpagesize()
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=True, stdout=subprocess.PIPE, text=True
    )
    assert int(result.stdout) < 64 << 10  # KiB
    found = read_folder(tmp_path)["a"]
    assert found.shape == (8192, 8192)
