"""What the CUDA sink needs of a device, and CUDA's way of doing it. No other module of the library calls CUDA."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from streamload.errors import DeviceError
from streamload.sinks.dtypes import require_torch

if TYPE_CHECKING:
    import torch

__all__ = ["Completion", "CudaDevice", "Device", "open_device"]

_SUCCESS = 0  # cudaSuccess


class Completion(ABC):
    """A point in the queue of copies."""

    __slots__ = ()

    @abstractmethod
    def wait(self) -> None:
        """Block until every copy queued before this point has been made.

        Raises:
            DeviceError: One of them failed. Which, and what the device still does, is not known.
        """


class Device(ABC):
    """A device's memory, and one queue of copies into it.

    Opened on the consumer's thread, and then used on the engine's, except for `register`, `unregister`, `close` and
    `Completion.wait`, which block and are called on a thread of the sink's. Errors are translated here: only
    `streamload.errors` leaves a device.

    Attributes:
        name: The device's full name, such as ``cuda:0``.
    """

    name: str

    @property
    @abstractmethod
    def torch_device(self) -> torch.device:
        """What torch calls the device."""

    @abstractmethod
    def allocate(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        """Allocate device memory that copies may be made into.

        Whatever the consumer has queued that still uses the memory, from before it was free, is over before any copy
        queued after this call begins.

        Args:
            sizes: Bytes, each at least one.

        Returns:
            A one-dimensional tensor of bytes for each size, at an address that is a multiple of 256. It must be kept
            until the copies into it have been made: freed, its memory may be handed to somebody else at once.

        Raises:
            DeviceError: There is not enough memory.
        """

    @abstractmethod
    def register(self, memory: torch.Tensor) -> bool:
        """Page-lock host memory, so that copies from it are made by the device itself.

        Args:
            memory: All of a mapping, from a page's start to a page's end, as a one-dimensional tensor of bytes.

        Returns:
            Whether it is page-locked. Where the system does not allow it, copies work all the same, but slower and
            with the caller waiting.
        """

    @abstractmethod
    def unregister(self, memory: torch.Tensor) -> None:
        """Undo `register`, where that returned True. No copy from the memory may be queued."""

    @abstractmethod
    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        """Queue a copy, without waiting.

        Args:
            destination: All or a slice of what `allocate` returned.
            source: Host memory of the same size, one-dimensional and of bytes. It must stay as it is until the copy has
                been made.

        Raises:
            DeviceError: The device refused, this copy or an earlier one.
        """

    @abstractmethod
    def record(self) -> Completion:
        """The point in the queue behind all copies queued so far."""

    @abstractmethod
    def close(self) -> None:
        """Give back what the device itself holds. What was allocated stays. May be called twice."""


def open_device(name: str) -> Device:
    """Open a CUDA device, on the consumer's thread.

    Args:
        name: ``cuda``, the current device, or ``cuda:1``.

    Raises:
        MissingDependencyError: torch is not installed.
        DeviceError: There is no such device; the text says which there are.
    """
    return CudaDevice(name)


class CudaDevice(Device):
    """A CUDA device, as seen from the stream that is the consumer's current one when this is made.

    Memory is allocated on the consumer's stream, because the allocator takes it for granted that a block which is free
    is used next on the stream that it was allocated on: it hands the block out while kernels that read its former
    content are still queued there. Copies are made on a stream of their own, which is why it waits, after each
    allocation, for what the consumer's stream had in its queue by then.

    While the consumer captures a graph on that stream, nothing may be loaded.

    Args:
        name: ``cuda`` or ``cuda:1``.
    """

    def __init__(self, name: str) -> None:
        require_torch()
        cuda = _cuda()
        with _translated(f"device {name!r} cannot be used"):
            self._index = _find(name)
            self.name = f"cuda:{self._index}"
            with cuda.device(self._index):
                self._consumer = cuda.current_stream()
                self._copies = cuda.Stream()
                self._fence()

    @property
    def torch_device(self) -> torch.device:
        import torch

        return torch.device("cuda", self._index)

    def allocate(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        import torch

        if not sizes:
            return []
        with _translated(f"{sum(sizes)} bytes cannot be allocated on {self.name}"), self._on(self._consumer):
            blocks = [torch.empty(size, dtype=torch.uint8, device=self.torch_device) for size in sizes]
            # After the allocation, not before: with deterministic algorithms torch fills new memory, on this stream.
            self._fence()
        return blocks

    def register(self, memory: torch.Tensor) -> bool:
        cuda = _cuda()
        # Registering makes and uses the context of the thread's current device.
        with _translated(f"host memory cannot be page-locked for {self.name}"), cuda.device(self._index):
            # A refusal is also left behind as the thread's last error, where torch would find it after the next kernel
            # that the thread starts. The sink's thread starts none.
            return int(cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == _SUCCESS

    def unregister(self, memory: torch.Tensor) -> None:
        cuda = _cuda()
        with _translated(f"host memory cannot be unlocked from {self.name}"), cuda.device(self._index):
            code = int(cuda.cudart().cudaHostUnregister(memory.data_ptr()))
            if code != _SUCCESS:
                raise DeviceError(f"host memory cannot be unlocked from {self.name}: CUDA error {code}")

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        with _translated(f"copying {source.nbytes} bytes to {self.name} failed"), self._on(self._copies):
            destination.copy_(source, non_blocking=True)

    def record(self) -> Completion:
        cuda = _cuda()
        with _translated(f"copying to {self.name} failed"), cuda.device(self._index):
            # Blocking: who waits sleeps, and does not poll.
            event = cuda.Event(blocking=True)
            event.record(self._copies)
        return _CudaCompletion(event, self._index)

    def close(self) -> None:
        # torch keeps its streams in a pool of its own, and events go with their last reference.
        pass

    def _fence(self) -> None:
        """Let the copies queued from here on wait for what the consumer's stream has in its queue."""
        cuda = _cuda()
        event = cuda.Event()
        event.record(self._consumer)
        self._copies.wait_event(event)

    @contextmanager
    def _on(self, stream: torch.cuda.Stream) -> Iterator[None]:
        cuda = _cuda()
        # The device first: the stream's own context, on leaving, would otherwise make this thread's former device
        # current in a way that gives that device a context, and half a gigabyte of its memory with it.
        with cuda.device(self._index), cuda.stream(stream):
            yield


class _CudaCompletion(Completion):
    __slots__ = ("_event", "_index")

    def __init__(self, event: torch.cuda.Event, index: int) -> None:
        self._event = event
        self._index = index

    def wait(self) -> None:
        cuda = _cuda()
        with _translated(f"copying to cuda:{self._index} failed"), cuda.device(self._index):
            self._event.synchronize()


def _cuda() -> Any:
    """What torch has for CUDA; half of it is untyped."""
    import torch

    return torch.cuda


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Turn torch's errors (out of memory, CUDA errors, no initialization in a forked child) into ours."""
    try:
        yield
    except DeviceError:
        raise
    except (AssertionError, RuntimeError) as error:
        raise DeviceError(f"{what}: {error}") from error


def _find(name: str) -> int:
    """The index of the device that a name means."""
    import torch

    cuda = _cuda()
    # Not torch's own parser: it takes an index modulo 256.
    match = re.fullmatch(r"cuda(?::(?P<index>[0-9]{1,9}))?", name)
    if match is None:
        raise DeviceError(f"device {name!r} is neither cuda nor cuda:N")
    if torch.version.cuda is None and torch.version.hip is None:
        raise DeviceError(f"no device {name!r}: torch {torch.__version__} was built without CUDA")
    count = cuda.device_count()
    if count == 0:
        raise DeviceError(f"no device {name!r}: {_why_none()}")
    index = cuda.current_device() if match["index"] is None else int(match["index"])
    if index >= count:
        there = ", ".join(f"cuda:{number} ({cuda.get_device_name(number)})" for number in range(count))
        raise DeviceError(f"no device {name!r}: there is {there}")
    return index


def _why_none() -> str:
    cuda = _cuda()
    try:
        cuda.init()
    except (AssertionError, RuntimeError) as error:
        return str(error)
    return "no GPU is visible to this process"
