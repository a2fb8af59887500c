"""CUDA's errors without CUDA, and what `CudaDevice` asks of it in which order, told by a stand-in for torch.cuda."""

from __future__ import annotations

import mmap
import pickle
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from streamload.errors import DeviceError
from streamload.sinks.device import CudaDevice, open_device
from streamload.testing.devices import LateDevice


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str) -> None:
        self.cuda = cuda
        self.name = name
        self.device = cuda.index

    def wait_event(self, event: FakeEvent) -> None:
        self.cuda.tell(f"{self.name} waits for {event.recorded}")


class FakeEvent:
    def __init__(self, cuda: FakeCuda, blocking: bool) -> None:
        self.cuda = cuda
        self.blocking = blocking
        self.recorded = ""

    def record(self, stream: FakeStream) -> None:
        assert stream.device == self.cuda.index, "the event would be another device's"
        self.recorded = stream.name
        self.cuda.tell(f"event on {stream.name}")

    def synchronize(self) -> None:
        assert self.blocking, "whoever waits would poll"
        self.cuda.tell("synchronized")
        if self.cuda.broken:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")


class FakeCuda:
    """What `CudaDevice` uses of torch.cuda, with two devices of which the first is the current one."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.index = 0
        self.codes = {"cudaHostRegister": 0, "cudaHostUnregister": 0}
        self.broken = False
        self.count = 2
        # Under torch's names.
        self.Stream = lambda: FakeStream(self, "copies")
        self.Event = self.event
        self.cudaHostRegister = self.register
        self.cudaHostUnregister = self.unregister

    def tell(self, what: str) -> None:
        self.log.append(f"{self.index}: {what}")

    def told(self) -> list[str]:
        log, self.log = self.log, []
        return log

    def device_count(self) -> int:
        return self.count

    def current_device(self) -> int:
        return self.index

    def get_device_name(self, index: int) -> str:
        return f"Model {index}"

    def init(self) -> None:
        raise RuntimeError("Found no NVIDIA driver on your system.")

    def current_stream(self) -> FakeStream:
        return FakeStream(self, "consumer")

    def event(self, blocking: bool = False) -> FakeEvent:
        return FakeEvent(self, blocking)

    @contextmanager
    def device(self, index: int) -> Iterator[None]:
        before, self.index = self.index, index
        try:
            yield
        finally:
            self.index = before

    @contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        assert stream.device == self.index, "the device is not the stream's"
        self.tell(f"on {stream.name}")
        yield
        self.tell(f"off {stream.name}")

    def cudart(self) -> FakeCuda:
        return self

    def register(self, address: int, nbytes: int, flags: int) -> int:
        self.tell(f"register {nbytes}")
        return self.codes["cudaHostRegister"]

    def unregister(self, address: int) -> int:
        self.tell("unregister")
        return self.codes["cudaHostUnregister"]


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    # So that tensors can be made where there is no such device.
    monkeypatch.setattr(CudaDevice, "torch_device", torch.device("cpu"))
    return fake


def test_a_torch_without_cuda_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    monkeypatch.setattr(torch.version, "hip", None)
    with pytest.raises(DeviceError, match=r"no device 'cuda': torch .* was built without CUDA") as caught:
        open_device("cuda")
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)


def test_no_device_says_why(cuda: FakeCuda) -> None:
    cuda.count = 0
    with pytest.raises(DeviceError, match="no device 'cuda:0': Found no NVIDIA driver"):
        open_device("cuda:0")


def test_a_device_that_is_not_there_names_those_that_are(cuda: FakeCuda) -> None:
    with pytest.raises(DeviceError) as caught:
        open_device("cuda:2")
    assert str(caught.value) == "no device 'cuda:2': there is cuda:0 (Model 0), cuda:1 (Model 1)"
    # torch's own parser makes this cuda:1.
    with pytest.raises(DeviceError, match="no device 'cuda:257'"):
        open_device("cuda:257")


@pytest.mark.parametrize("name", ["", "cuda:", "cuda:-1", "cuda:x", "cuda:1 ", "mps", "cpu", "cuda:٣"])
def test_what_is_no_cuda_device_is_refused(cuda: FakeCuda, name: str) -> None:
    with pytest.raises(DeviceError, match="neither cuda nor cuda:N"):
        open_device(name)


def test_torch_s_errors_at_open_are_translated(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    def forked() -> FakeStream:
        raise RuntimeError("Cannot re-initialize CUDA in forked subprocess.")

    monkeypatch.setattr(cuda, "current_stream", forked)
    with pytest.raises(DeviceError, match="device 'cuda' cannot be used: Cannot re-initialize"):
        open_device("cuda")


def test_copies_begin_behind_what_the_consumer_had_queued_at_open(cuda: FakeCuda) -> None:
    device = open_device("cuda:1")
    assert device.name == "cuda:1"
    assert cuda.told() == ["1: event on consumer", "1: copies waits for consumer"]
    assert cuda.index == 0, "the consumer's current device has changed"


def test_the_current_device_is_the_default(cuda: FakeCuda) -> None:
    cuda.index = 1
    assert open_device("cuda").name == "cuda:1"


def test_memory_comes_from_the_consumer_s_stream_and_copies_wait_for_it(cuda: FakeCuda) -> None:
    device = open_device("cuda:1")
    cuda.told()
    blocks = device.allocate([100, 7])
    assert [(block.nbytes, block.dtype) for block in blocks] == [(100, torch.uint8), (7, torch.uint8)]
    assert cuda.told() == [
        "1: on consumer",
        "1: event on consumer",
        "1: copies waits for consumer",
        "1: off consumer",
    ]
    assert device.allocate([]) == []
    assert cuda.told() == []


def test_copies_are_made_on_their_own_stream(cuda: FakeCuda) -> None:
    device = open_device("cuda:1")
    (block,) = device.allocate([4])
    cuda.told()
    device.copy(block[1:3], torch.tensor([5, 6], dtype=torch.uint8))
    device.record().wait()
    assert block[1:3].tolist() == [5, 6]
    assert cuda.told() == ["1: on copies", "1: off copies", "1: event on copies", "1: synchronized"]
    device.close()
    device.close()


def test_a_failed_copy_is_our_error(cuda: FakeCuda) -> None:
    device = open_device("cuda:1")
    (block,) = device.allocate([4])
    with pytest.raises(DeviceError, match="copying 3 bytes to cuda:1 failed"):
        device.copy(block, torch.zeros(3, dtype=torch.uint8))
    cuda.broken = True
    with pytest.raises(DeviceError, match="illegal memory access"):
        device.record().wait()


def test_too_little_memory_is_our_error(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    device = open_device("cuda")

    def empty(*size: int, **options: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(DeviceError, match="12 bytes cannot be allocated on cuda:0: CUDA out of memory"):
        device.allocate([4, 8])


def test_page_locking_that_is_refused_is_no_error(cuda: FakeCuda) -> None:
    device = open_device("cuda:1")
    cuda.told()
    memory = torch.zeros(4096, dtype=torch.uint8)
    assert device.register(memory)
    device.unregister(memory)
    assert cuda.told() == ["1: register 4096", "1: unregister"]
    cuda.codes["cudaHostRegister"] = 2
    assert not device.register(memory)
    cuda.codes["cudaHostUnregister"] = 713
    with pytest.raises(DeviceError, match="CUDA error 713"):
        device.unregister(memory)


def test_the_late_device_reads_its_source_when_it_is_waited_for() -> None:
    device = LateDevice()
    (block,) = device.allocate([4])
    source = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)
    device.copy(block, source)
    done = device.record()
    poison = block.tolist()
    source[0] = 9
    assert block.tolist() == poison
    assert device.pending_copies == 1
    done.wait()
    assert block.tolist() == [9, 2, 3, 4]
    assert source.tolist() == [0xDB] * 4, "what was copied from is not to be read again"
    assert device.pending_copies == 0


def test_the_late_device_copies_into_memory_that_was_given_back() -> None:
    device = LateDevice()
    (block,) = device.allocate([256])
    device.copy(block, torch.full((256,), 1, dtype=torch.uint8))
    done = device.record()
    del block
    (other,) = device.allocate([200])
    done.wait()
    assert set(other.tolist()) == {1}, "the copy hits the next owner"


def test_the_late_device_fails_from_the_copy_on_that_it_was_told() -> None:
    for late in (False, True):
        device = LateDevice(fail_copy=1, fail_late=late)
        (block,) = device.allocate([1])
        source = torch.zeros(1, dtype=torch.uint8)
        device.copy(block, source)
        first = device.record()
        if late:
            device.copy(block, source)
            first.wait()
            with pytest.raises(DeviceError):
                device.record().wait()
            with pytest.raises(DeviceError):
                device.record().wait()
        else:
            with pytest.raises(DeviceError, match="copy 1"):
                device.copy(block, source)
            with pytest.raises(DeviceError, match="copy 2"):
                device.copy(block, source)
            first.wait()


def test_the_late_device_watches_over_registered_memory() -> None:
    device = LateDevice()
    staging = torch.frombuffer(memoryview(mmap.mmap(-1, mmap.PAGESIZE)), dtype=torch.uint8)
    with pytest.raises(DeviceError, match="whole pages"):
        device.register(staging[1:])
    assert device.register(staging)
    (block,) = device.allocate([1])
    device.copy(block, staging[:1])
    with pytest.raises(DeviceError, match="copies from it are to be made"):
        device.unregister(staging)
    device.record().wait()
    device.unregister(staging)
    with pytest.raises(DeviceError, match="not registered"):
        device.unregister(staging)
