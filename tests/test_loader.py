"""The three ways to load, against what safetensors itself reads."""

from __future__ import annotations

import asyncio
import gc
import os
import subprocess
import sys
import textwrap
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

import streamload
from streamload.errors import ClosedError, DeviceError, HeaderError, NotFoundError, OptionError, UnsupportedDtypeError
from streamload.pipeline.engine import new_event_loop
from streamload.sinks import Delivery, NamedTensor
from streamload.sinks.host import HostLease, HostSink
from tests.checkpoints import (
    dtypes_in_torch,
    raw_checkpoint,
    read_with_safetensors,
    same_tensor,
    varied_tensors,
    write_sharded,
)

MIB = 1 << 20


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sharded(tmp_path_factory.mktemp("varied"), varied_tensors())


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> dict[str, torch.Tensor]:
    return read_with_safetensors(checkpoint)


@pytest.fixture(autouse=True)
def nothing_left() -> Iterator[None]:
    """Every test leaves no thread of ours and no open file behind."""
    new_event_loop().close()  # libuv opens a pipe for the whole process with its first loop
    files = len(os.listdir("/proc/self/fd"))
    yield
    gc.collect()
    for thread in threading.enumerate():
        if thread.name.startswith("streamload"):
            thread.join(10)
            assert not thread.is_alive(), f"{thread.name} is left"
    assert len(os.listdir("/proc/self/fd")) <= files


def check(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert same_tensor(tensor, expected[name]), name
        assert tensor.is_contiguous()
        if tensor.numel():
            assert tensor.data_ptr() % 8 == 0, name


@pytest.mark.parametrize("memory_bytes", [MIB, 8 * MIB, 256 * MIB])
@pytest.mark.parametrize("read_bytes", [4096, 100_000, 8 * MIB])
@pytest.mark.parametrize("concurrency", [1, 5])
def test_load_is_what_safetensors_reads(
    checkpoint: Path, expected: dict[str, torch.Tensor], memory_bytes: int, read_bytes: int, concurrency: int
) -> None:
    check(
        streamload.load(checkpoint, memory_bytes=memory_bytes, read_bytes=read_bytes, concurrency=concurrency),
        expected,
    )


def test_stream_gives_each_tensor_once(checkpoint: Path, expected: dict[str, torch.Tensor]) -> None:
    found = list(streamload.stream(checkpoint))
    assert len(found) == len(expected)
    check(dict(found), expected)


def test_open_gives_each_tensor_once(checkpoint: Path, expected: dict[str, torch.Tensor]) -> None:
    async def scenario() -> None:
        async with streamload.open(checkpoint, memory_bytes=2 * MIB) as stream:
            check({name: tensor async for name, tensor in stream}, expected)
        assert stream.report.state == "done"

    asyncio.run(scenario())


def test_file_order_is_the_order_of_the_files_bytes(checkpoint: Path) -> None:
    with streamload.stream(checkpoint, order="file", read_bytes=50_000, concurrency=7) as stream:
        wanted = [tensor.name for file in stream.catalog.files for tensor in file.tensors]
        assert [name for name, _ in stream] == wanted


def test_a_single_file(checkpoint: Path, tmp_path: Path) -> None:
    tensors = {"a": torch.arange(10.0), "b": torch.ones(3, dtype=torch.int64)}
    save_file(tensors, tmp_path / "one.safetensors")
    check(streamload.load(tmp_path / "one.safetensors"), tensors)


def test_include_and_exclude_choose_by_name(checkpoint: Path, expected: dict[str, torch.Tensor]) -> None:
    found = streamload.load(checkpoint, include=["model.layers.*"], exclude=["*.scale"])
    wanted = {name for name in expected if name.startswith("model.layers.") and not name.endswith(".scale")}
    assert found.keys() == wanted


def test_only_what_is_wanted_is_read(tmp_path: Path) -> None:
    tensors = {f"{number:02d}": torch.full((MIB,), number, dtype=torch.uint8) for number in range(10)}
    save_file(tensors, tmp_path / "model.safetensors")
    with streamload.stream(tmp_path, include=["03", "07"]) as stream:
        assert {name: int(tensor[0]) for name, tensor in stream} == {"03": 3, "07": 7}
    report = stream.report
    assert report.fetched_bytes - report.header_bytes == 2 * MIB == report.nbytes
    assert report.reads == 2


@pytest.mark.parametrize("dtype", dtypes_in_torch())
@pytest.mark.parametrize("padding", [0, 1, 7])
def test_every_dtype_that_torch_has(dtype: str, padding: int, tmp_path: Path) -> None:
    content = raw_checkpoint(
        {"small": (dtype, (2, 4)), "large": (dtype, (64, 4096)), "none": (dtype, (0, 2))}, padding=padding
    )
    (tmp_path / "model.safetensors").write_bytes(content)
    check(streamload.load(tmp_path), read_with_safetensors(tmp_path))


@pytest.mark.parametrize("dtype", ["F6_E2M3", "F6_E3M2"])
def test_a_dtype_that_torch_lacks_is_named_with_its_tensor(dtype: str, tmp_path: Path) -> None:
    content = raw_checkpoint({"fine": ("F32", (4,)), "odd.weight": (dtype, (4, 4))})
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UnsupportedDtypeError, match=rf"'odd\.weight' has dtype {dtype}") as caught:
        streamload.load(tmp_path)
    assert caught.value.object == "model.safetensors"
    assert streamload.load(tmp_path, exclude=["odd.*"]).keys() == {"fine"}


def test_f4_of_an_odd_last_dimension_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw_checkpoint({"odd": ("F4", (2, 3))}))
    with pytest.raises(UnsupportedDtypeError, match="'odd' is F4"):
        streamload.load(tmp_path)


def test_nothing_is_yielded_where_one_header_does_not_stand(tmp_path: Path) -> None:
    folder = write_sharded(tmp_path, varied_tensors())
    last = sorted(folder.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-1])
    with pytest.raises(HeaderError) as caught:
        next(streamload.stream(folder))
    assert caught.value.object == last.name
    assert caught.value.uri == str(folder)


def test_tensors_are_the_consumers_own(checkpoint: Path, expected: dict[str, torch.Tensor]) -> None:
    kept = {}
    for name, tensor in streamload.stream(checkpoint, memory_bytes=MIB, read_bytes=65_536):
        kept[name] = tensor
        if tensor.dtype == torch.float16:
            tensor.zero_()
    for name, tensor in kept.items():
        if tensor.dtype == torch.float16:
            assert not tensor.any()
        else:
            assert same_tensor(tensor, expected[name])


@pytest.mark.parametrize("device", ["cuda", "cuda:0"])
def test_a_device_that_does_not_exist(device: str, checkpoint: Path) -> None:
    if device.startswith("cuda") and torch.cuda.is_available():
        device = "cuda:99"
    with pytest.raises(DeviceError, match=device):
        streamload.load(checkpoint, device=device)


def test_leaving_early_ends_the_load(checkpoint: Path) -> None:
    with streamload.stream(checkpoint, memory_bytes=MIB) as stream:
        next(stream)
    assert stream.report.state == "closed"
    with pytest.raises(ClosedError, match="closed"):
        next(stream)
    stream.close()


def test_a_stream_that_nobody_refers_to_ends(checkpoint: Path) -> None:
    stream = streamload.stream(checkpoint, memory_bytes=MIB)
    next(stream)
    engine = stream._load.engine
    del stream
    gc.collect()
    assert engine.join(10)


def test_breaking_out_of_an_async_loop_ends_the_load(checkpoint: Path) -> None:
    async def scenario() -> None:
        async with streamload.open(checkpoint, memory_bytes=MIB) as stream:
            async for _ in stream:
                break
        assert stream.report.state == "closed"
        with pytest.raises(ClosedError):
            await anext(stream)

    asyncio.run(scenario())


def test_cancelling_a_wait_loses_no_tensor(checkpoint: Path, expected: dict[str, torch.Tensor]) -> None:
    async def scenario() -> None:
        found = {}
        async with streamload.open(checkpoint, memory_bytes=MIB, read_bytes=65_536) as stream:
            for turn in range(100_000):
                waiting = asyncio.ensure_future(anext(stream))
                for _ in range(turn % 3):
                    await asyncio.sleep(0)
                if turn % 2:
                    waiting.cancel()
                await asyncio.wait([waiting])
                if waiting.cancelled():
                    continue
                error = waiting.exception()
                if error is not None:
                    assert isinstance(error, StopAsyncIteration)
                    break
                name, tensor = waiting.result()
                found[name] = tensor
        check(found, expected)

    asyncio.run(scenario())


def test_cancelling_the_consumers_task_ends_the_load(checkpoint: Path) -> None:
    async def scenario() -> None:
        began = asyncio.Event()
        held: list[streamload.AsyncStream] = []

        async def consume() -> None:
            async with streamload.open(checkpoint, memory_bytes=MIB) as stream:
                held.append(stream)
                await anext(stream)
                began.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(consume())
        await began.wait()
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()
        assert held[0].report.state == "closed"
        assert held[0]._load.engine.join(0)

    asyncio.run(scenario())


def test_synchronous_loading_works_in_a_thread_and_inside_a_running_loop(
    checkpoint: Path, expected: dict[str, torch.Tensor]
) -> None:
    async def notebook() -> dict[str, torch.Tensor]:
        return streamload.load(checkpoint)

    check(asyncio.run(notebook()), expected)
    found: list[dict[str, torch.Tensor]] = []
    thread = threading.Thread(target=lambda: found.append(streamload.load(checkpoint)))
    thread.start()
    thread.join()
    check(found[0], expected)


def test_several_loads_at_once(checkpoint: Path, expected: dict[str, torch.Tensor]) -> None:
    streams = [streamload.stream(checkpoint, memory_bytes=MIB) for _ in range(4)]
    found: list[dict[str, torch.Tensor]] = [{} for _ in streams]
    for items in zip(*streams, strict=True):
        for tensors, (name, tensor) in zip(found, items, strict=True):
            tensors[name] = tensor
    for tensors in found:
        check(tensors, expected)


def test_a_forked_child_refuses_its_parents_stream_and_loads_on_its_own(checkpoint: Path) -> None:
    script = """
        import os, sys, streamload
        stream = streamload.stream(sys.argv[1], memory_bytes=1 << 20)
        next(stream)
        pid = os.fork()
        if pid == 0:
            try:
                next(stream)
            except streamload.ClosedError as error:
                assert "forked" in str(error), error
            else:
                os._exit(3)
            stream.close()
            tensors = streamload.load(sys.argv[1])
            sys.exit(0 if len(tensors) > 100 else 4)
        status = os.waitpid(pid, 0)[1]
        assert os.waitstatus_to_exitcode(status) == 0, status
        print(1 + sum(1 for _ in stream))
    """
    done = run_script(script, checkpoint)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{len(varied_tensors())}\n", "")


def test_a_script_that_ends_while_it_holds_an_iterator_exits(checkpoint: Path) -> None:
    script = """
        import sys, streamload
        stream = streamload.stream(sys.argv[1], memory_bytes=1 << 20)
        next(stream)
        other = iter(streamload.stream(sys.argv[1], memory_bytes=1 << 20))
    """
    done = run_script(script, checkpoint)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_script_that_raises_while_it_holds_an_iterator_exits(checkpoint: Path) -> None:
    script = """
        import sys, streamload
        for name, tensor in streamload.stream(sys.argv[1], memory_bytes=1 << 20):
            raise SystemExit(7)
    """
    assert run_script(script, checkpoint).returncode == 7


class InterruptingDelivery(Delivery):
    """Raises before it hands out its n-th tensor, as an interrupt may."""

    def __init__(self, inner: Delivery, at: int) -> None:
        self._inner = inner
        self._at = at

    def tensors(self) -> Iterator[NamedTensor]:
        for number, item in enumerate(self._inner.tensors()):
            if number == self._at:
                raise KeyboardInterrupt
            yield item


@pytest.mark.parametrize("at", [0, 1, 50])
def test_an_interrupt_while_a_tensor_is_made_never_looks_like_the_end(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    finish = HostSink.finish

    async def interrupting(self: HostSink, lease: HostLease) -> InterruptingDelivery:
        return InterruptingDelivery(await finish(self, lease), at)

    monkeypatch.setattr(HostSink, "finish", interrupting)
    stream = streamload.stream(checkpoint)
    with pytest.raises(KeyboardInterrupt):
        for _ in stream:
            pass
    with pytest.raises(ClosedError, match="KeyboardInterrupt"):
        next(stream)
    assert stream._load.engine.join(10)
    assert stream.report.state == "closed"
    assert stream.report.tensors == at


def test_failed_loads_leave_nothing_that_their_callers_held(tmp_path: Path) -> None:
    """Neither the stream nor the frame that iterated: a server that tries again must not grow with each failure."""
    (tmp_path / "model.safetensors").write_bytes(raw_checkpoint({f"t{n}": ("F32", (1 << 18,)) for n in range(8)}))

    class Held:
        """What the caller's frame holds."""

    alive: list[weakref.ref[object]] = []

    def attempt() -> None:
        held = Held()
        alive.append(weakref.ref(held))
        with streamload.stream(tmp_path, memory_bytes=2 * MIB) as stream:
            alive.append(weakref.ref(stream))
            next(stream)
            os.utime(tmp_path / "model.safetensors")  # another version, to whoever reads on
            for _ in stream:
                pass

    for _ in range(3):
        with pytest.raises(streamload.ObjectChangedError):
            attempt()
    gc.collect()
    assert [reference() for reference in alive] == [None] * 6


def test_iterating_without_opening_says_how() -> None:
    async def scenario() -> None:
        with pytest.raises(ClosedError, match="async with"):
            await anext(streamload.open("/anywhere"))

    asyncio.run(scenario())


def test_a_stream_is_opened_once(checkpoint: Path) -> None:
    async def scenario() -> None:
        stream = streamload.open(checkpoint)
        with pytest.raises(ClosedError, match="not open yet"):
            _ = stream.catalog
        async with stream:
            with pytest.raises(ClosedError, match="opened once"):
                await stream.__aenter__()

    asyncio.run(scenario())


def test_a_cancelled_close_still_ends_the_load_and_can_be_repeated(checkpoint: Path) -> None:
    async def scenario() -> None:
        stream = streamload.open(checkpoint, memory_bytes=MIB)
        await stream.__aenter__()
        closing = asyncio.ensure_future(stream.aclose())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.wait([closing])
        await stream.aclose()
        assert stream._load.engine.join(10)

    asyncio.run(scenario())


def test_the_callers_loop_turns_while_tensors_are_at_hand(checkpoint: Path) -> None:
    async def scenario() -> None:
        turns = 0

        async def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                await asyncio.sleep(0)

        async with streamload.open(checkpoint, read_bytes=4096) as stream:
            counting = asyncio.create_task(count())
            async for _ in stream:
                pass
            counting.cancel()
        assert turns > 50

    asyncio.run(scenario())


def test_a_deadline_names_how_far_it_got(checkpoint: Path) -> None:
    with streamload.stream(checkpoint, memory_bytes=MIB, deadline_s=0.2) as stream:
        next(stream)
        # Nobody takes anything until the time is up.
        stream._load.engine.finished.result(timeout=30)
        with pytest.raises(streamload.DeadlineError, match=r"deadline_s=0\.2: 1 of \d+ tensors"):
            list(stream)
    assert stream.report.state == "failed"
    assert isinstance(stream.report.error, str)


def test_reports_requests_while_it_runs(checkpoint: Path) -> None:
    with streamload.stream(checkpoint, memory_bytes=MIB) as stream:
        next(stream)
        assert stream.report.requests > 3
        assert stream.report.tensors == 1


def test_a_torch_device_is_as_good_as_its_name(checkpoint: Path) -> None:
    device: Any = torch.device("cpu")
    assert streamload.load(checkpoint, device=device, include=["model.scalar"]).keys() == {"model.scalar"}


def run_script(script: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_report_adds_up(checkpoint: Path, expected: dict[str, torch.Tensor]) -> None:
    with streamload.stream(checkpoint) as stream:
        assert stream.report.state == "running"
        for _ in stream:
            pass
    report = stream.report
    assert report.state == "done"
    assert report.error is None
    assert (report.files, report.tensors, report.total_tensors) == (3, len(expected), len(expected))
    assert report.nbytes == report.total_bytes == sum(tensor.nbytes for tensor in expected.values())
    assert report.fetched_bytes >= report.nbytes
    assert report.read_amplification == report.fetched_bytes / report.nbytes
    assert sum(report.unverified.values()) == report.nbytes
    assert 0 < report.peak_staged_bytes <= report.memory_bytes
    assert report.raised_memory_bytes is None
    assert report.first_tensor_s is not None
    assert 0 < report.first_tensor_s <= report.seconds
    assert report.bottleneck is not None
    assert str(checkpoint) in str(report)


def test_a_tensor_above_the_limit_raises_it_and_the_report_says_so(checkpoint: Path) -> None:
    with streamload.stream(checkpoint, memory_bytes=MIB) as stream:
        for _ in stream:
            pass
    # The tensor, rounded up to pages.
    assert stream.report.raised_memory_bytes is not None
    assert 0 <= stream.report.raised_memory_bytes - 3 * MIB <= 4096
    assert stream.report.peak_staged_bytes == stream.report.raised_memory_bytes
    assert "raised to 3.0 MiB" in str(stream.report)


def test_a_strict_limit_is_an_error_that_names_the_tensor(checkpoint: Path) -> None:
    with pytest.raises(streamload.MemoryLimitError, match=r"model\.embed_tokens\.weight.*memory_bytes=1048576"):
        streamload.load(checkpoint, memory_bytes=MIB, strict_memory=True)


def test_events_tell_every_read_and_a_broken_callback_does_not_end_the_load(
    checkpoint: Path, caplog: pytest.LogCaptureFixture
) -> None:
    events: list[streamload.Event] = []
    with streamload.stream(checkpoint, on_event=events.append) as stream:
        for _ in stream:
            pass
    reads = [event for event in events if event.kind == "read"]
    assert len(reads) == stream.report.reads
    assert sum(event.nbytes for event in reads) == stream.report.fetched_bytes - stream.report.header_bytes
    assert {event.kind for event in events} == {"list", "header", "read", "consumer"}

    def broken(event: streamload.Event) -> None:
        raise RuntimeError("spectator")

    assert len(streamload.load(checkpoint, on_event=broken)) == stream.report.tensors
    assert [record.name for record in caplog.records] == ["streamload.events"]


def test_progress_is_told_to_a_callable(checkpoint: Path) -> None:
    seen: list[streamload.Progress] = []
    tensors = streamload.load(checkpoint, progress=seen.append)
    last = seen[-1]
    assert (last.taken_tensors, last.total_tensors) == (len(tensors), len(tensors))
    assert last.read_bytes == last.taken_bytes == last.total_bytes


def test_the_library_prints_nothing(checkpoint: Path, capfd: pytest.CaptureFixture[str]) -> None:
    streamload.load(checkpoint, progress=True)
    assert capfd.readouterr() == ("", "")


def test_bad_options_and_missing_places() -> None:
    with pytest.raises(OptionError, match="memory_bytes"):
        streamload.load("/nowhere", memory_bytes=0)
    with pytest.raises(NotFoundError) as caught:
        streamload.load("/nowhere/at/all")
    assert caught.value.uri == "/nowhere/at/all"
    assert isinstance(caught.value, FileNotFoundError)
