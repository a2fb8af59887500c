"""A load whose tensors are asked for by name: in the order that was foreseen, in another one, and beside it."""

from __future__ import annotations

import hashlib
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from streamload import write_manifest
from streamload.asking import AskedLoad
from streamload.checkpoint import TensorInfo
from streamload.errors import AccessError, ChecksumError, ClosedError, MemoryLimitError
from streamload.loader import resolve_options
from streamload.pipeline.verify import BY_MANIFEST, BY_SHA256, OUT_OF_ORDER
from streamload.plan import slice_boxes
from streamload.sinks import MakeSink, OnCopy, Sink, sink_for
from streamload.sources import SourceObject
from streamload.sources.local import LocalSource
from streamload.testing import FaultSource

MIB = 1 << 20
COUNT = 24


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tensors of 512 KiB and small ones, whose names are in the order of the file."""
    folder = tmp_path_factory.mktemp("asking")
    tensors = {f"large.{number:02}": torch.full((256, 512), number, dtype=torch.float32) for number in range(COUNT)}
    tensors |= {f"small.{number:02}": torch.full((7,), number, dtype=torch.float32) for number in range(COUNT)}
    save_file(tensors, folder / "model.safetensors")
    return folder


@contextmanager
def opened(folder: Path, **options: Any) -> Iterator[tuple[AskedLoad, dict[str, TensorInfo]]]:
    """A load whose headers are read, and the tensors that there are."""
    options = {"memory_bytes": 2 * MIB, "read_bytes": MIB // 2, "concurrency": 2, **options}
    load = AskedLoad(str(folder), resolve_options(options))  # type: ignore[arg-type]
    try:
        load.start()
        yield load, {tensor.name: tensor for file in load.found.result().files for tensor in file.tensors}
    finally:
        load.close()
    assert not load.engine.join(0) or not [t for t in threading.enumerate() if t.name == "streamload-engine"]


def check(name: str, tensor: torch.Tensor) -> None:
    assert tensor.eq(int(name.rpartition(".")[2])).all()
    assert tensor.shape == ((256, 512) if name.startswith("large") else (7,))


def interleaved(found: dict[str, TensorInfo]) -> list[TensorInfo]:
    """From the end to the beginning, with small ones between: hardly an order in which to read a file."""
    return [found[f"{kind}.{number:02}"] for number in reversed(range(COUNT)) for kind in ("large", "small")]


def test_reads_run_ahead_in_the_order_that_was_foreseen_within_the_limit(checkpoint: Path) -> None:
    events: list[Any] = []
    with opened(checkpoint, on_event=events.append) as (load, found):
        order = interleaved(found)
        load.foresee(order)
        for info in order:
            check(info.name, load.take(info.name))
        report = load.finish()
    assert report.state == "done"
    assert report.tensors == report.total_tensors == 2 * COUNT
    assert report.peak_staged_bytes <= 2 * MIB
    began = [event.start for event in sorted(events, key=lambda e: e.started_s) if event.kind == "read"]
    large = [start for start in began if any(start == found[f"large.{n:02}"].start for n in range(COUNT))]
    # Two at once: neighbours may begin in either order.
    assert large[0] > large[4] > large[8] > large[-1]
    assert len(began) == len(set(began)) == report.reads


def test_another_order_than_foreseen_does_not_wait_for_ever(checkpoint: Path) -> None:
    with opened(checkpoint) as (load, found):
        order = interleaved(found)
        load.foresee(order)
        for info in reversed(order):
            check(info.name, load.take(info.name))
        assert load.finish().tensors == 2 * COUNT


def test_what_is_never_asked_for_is_read_and_dropped(checkpoint: Path) -> None:
    with opened(checkpoint) as (load, found):
        load.foresee(list(found.values()))
        check("large.05", load.take("large.05"))
        report = load.finish()
    assert report.fetched_bytes > sum(info.nbytes for info in found.values())
    assert report.tensors == 1


def test_what_was_not_foreseen_comes_beside_the_rest(checkpoint: Path) -> None:
    with opened(checkpoint) as (load, found):
        order = interleaved(found)
        load.foresee(order[:10])
        # More is wanted than the limit holds, by more threads than one, while nothing of what was foreseen is taken.
        brought: dict[str, torch.Tensor] = {}

        def bring(info: TensorInfo) -> None:
            brought[info.name] = load.bring(info)

        threads = [threading.Thread(target=bring, args=(info,)) for info in order[10:]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for name, tensor in brought.items():
            check(name, tensor)
        assert len(brought) == 2 * COUNT - 10
        part = load.bring(slice_boxes(found["large.03"], [((3, 5), (100, 200))]))
        assert part.shape == (2, 100)
        assert part.eq(3).all()
        for info in order[:10]:
            check(info.name, load.take(info.name))
        with pytest.raises(KeyError):
            load.take(order[0].name)
        report = load.finish()
    assert report.tensors == report.total_tensors == 2 * COUNT + 1


def test_what_was_not_foreseen_is_compared_with_the_manifest(checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(checkpoint, tmp_path, dirs_exist_ok=True)
    write_manifest(str(tmp_path))
    with opened(tmp_path, verify="require") as (load, found):
        load.foresee([found["large.00"]])
        check("large.01", load.bring(found["large.01"]))
        report = load.finish()
    assert report.verified == {BY_MANIFEST: found["large.00"].nbytes + found["large.01"].nbytes}
    file = tmp_path / "model.safetensors"
    before = file.stat()
    with file.open("r+b") as spoilt:
        spoilt.seek(found["large.01"].start + 1000)
        spoilt.write(b"\x55")
    # Its size and date are what they were: nothing but its content tells.
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    with opened(tmp_path) as (load, found):
        load.foresee([found["large.00"]])
        check("large.00", load.take("large.00"))
        with pytest.raises(ChecksumError, match=r"tensor 'large\.01' sums up to") as raised:
            load.bring(found["large.01"])
        assert (raised.value.object, raised.value.start) == ("model.safetensors", found["large.01"].start)
        with pytest.raises(ChecksumError):
            load.finish()


def test_what_was_not_foreseen_takes_memory_for_itself_only(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits: list[int] = []

    def recording_sink_for(device: str, on_copy: OnCopy) -> MakeSink:
        make = sink_for(device, on_copy)

        def make_sink(*, memory_bytes: int, **more: int) -> Sink[Any]:
            limits.append(memory_bytes)
            return make(memory_bytes=memory_bytes, **more)

        return make_sink

    monkeypatch.setattr("streamload.loader.sink_for", recording_sink_for)
    with opened(checkpoint, memory_bytes=64 * MIB) as (load, found):
        load.foresee([found["large.00"]])
        check("large.00", load.take("large.00"))
        check("small.01", load.bring(found["small.01"]))
        report = load.finish()
    assert limits == [64 * MIB, MIB]
    # Nor does it hide what the rest took.
    assert report.peak_staged_bytes >= found["large.00"].nbytes


def test_an_error_reaches_whoever_asks(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # The listing, the header and the checksum that is asked for; then the first read is let be.
    source = FaultSource(LocalSource(str(checkpoint)), fail_at=5, times=None, error=lambda: AccessError("spoiled"))
    monkeypatch.setattr("streamload.planning.open_source", lambda uri, **_: source)
    with opened(checkpoint, concurrency=1) as (load, found):
        load.foresee([found["large.00"]])
        check("large.00", load.take("large.00"))
        with pytest.raises(AccessError, match="spoiled") as raised:
            load.bring(found["large.01"])
        assert (raised.value.object, raised.value.start) == ("model.safetensors", found["large.01"].start)
        load.engine.join()
        with pytest.raises(ClosedError):
            load.bring(found["large.02"])
        with pytest.raises(AccessError, match="spoiled"):
            load.finish()
    assert source.running == 0


def test_closing_ends_what_is_under_way(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = FaultSource(LocalSource(str(checkpoint)), fail_at=5, block=True)
    monkeypatch.setattr("streamload.planning.open_source", lambda uri, **_: source)
    with opened(checkpoint) as (load, found):
        load.foresee([found["large.00"]])
        check("large.00", load.take("large.00"))
        raised: list[BaseException] = []

        def bring() -> None:
            try:
                load.bring(found["large.01"])
            except ClosedError as error:
                raised.append(error)

        thread = threading.Thread(target=bring)
        thread.start()
        source.blocked.result()
        load.close()
        thread.join()
        assert len(raised) == 1
    assert source.closed
    assert source.running == 0


def test_a_strict_limit_counts_for_what_was_not_foreseen_too(checkpoint: Path, tmp_path: Path) -> None:
    save_file({"huge": torch.zeros(3 * MIB, dtype=torch.uint8)}, tmp_path / "model.safetensors")
    with opened(tmp_path, strict_memory=True) as (load, found):
        load.foresee([])
        with pytest.raises(MemoryLimitError, match="huge"):
            load.bring(found["huge"])


@pytest.mark.parametrize("in_order", [True, False])
def test_a_hash_is_compared_where_the_order_is_that_of_the_bytes(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, in_order: bool
) -> None:
    class Hashed(LocalSource):
        async def sha256(self, object: SourceObject) -> bytes:
            return hashlib.sha256((checkpoint / object.key).read_bytes()).digest()

    monkeypatch.setattr("streamload.planning.open_source", lambda uri, **_: Hashed(uri))
    with opened(checkpoint, verify="sha256") as (load, found):
        order = list(found.values()) if in_order else interleaved(found)
        load.foresee(order)
        for info in order:
            check(info.name, load.take(info.name))
        report = load.finish()
    assert (report.verified, report.unverified) == (
        ({BY_SHA256: report.nbytes}, {}) if in_order else ({}, {OUT_OF_ORDER: report.nbytes})
    )
    with opened(checkpoint, verify="require") as (load, found):
        load.foresee(list(found.values()) if in_order else interleaved(found))
        if in_order:
            load.finish()
        else:
            with pytest.raises(ChecksumError, match=r"verify is 'require'.*another order"):
                load.take("large.00")
