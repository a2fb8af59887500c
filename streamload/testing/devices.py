"""A device without a GPU, as unhelpful as a GPU may be: for testing sinks."""

from __future__ import annotations

import ctypes
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from streamload.errors import DeviceError
from streamload.sinks.device import Completion, Device

if TYPE_CHECKING:
    import torch

__all__ = ["LateDevice"]

# Repeated, none of them makes a number that a test would write.
_FRESH = 0xA5  # device memory that was allocated and not written
_FREED = 0xDE  # device memory that was given back
_STAGED = 0xDB  # staging memory that was copied from

_ALIGNMENT_BYTES = 256


class LateDevice(Device):
    """Device memory on the CPU, written as late as can be.

    - A copy is made when somebody waits for it, and reads its source only then: staging memory that is lent again too
      early ends up, with its new content, in the old destination.
    - Once made, a copy's source is poisoned: nothing may be read from staging memory twice.
    - Memory is poisoned when it is allocated and when its last tensor is gone, and handed out again at once, the way a
      caching allocator does: a copy into memory that was given back hits the next owner.
    - Memory may not be unregistered while copies from it are to be made. It is poisoned when it is unregistered.

    With ``held=True`` nobody's wait returns before `advance` lets it, so that a test decides how late is late.

    Args:
        held: Whether waiting blocks until `advance` or `release`.
        page_lock: What `register` returns.
        fail_copy: The copy, counted from zero, that fails. All that come after it fail too.
        fail_late: Whether it fails when it is waited for, not when it is queued.
        fail_allocation: The call of `allocate`, counted from zero, that fails for lack of memory.

    Attributes:
        copies: How many copies were queued.
        registered: Whether memory is registered.
        closed: How often it was closed.
    """

    def __init__(
        self,
        *,
        held: bool = False,
        page_lock: bool = True,
        fail_copy: int | None = None,
        fail_late: bool = False,
        fail_allocation: int | None = None,
    ) -> None:
        self.name = "late"
        self.copies = 0
        self.registered = False
        self.closed = 0
        self._page_lock = page_lock
        self._fail_copy = fail_copy
        self._fail_late = fail_late
        self._fail_allocation = fail_allocation
        self._allocations = 0
        self._memory = _Memory()
        self._changed = threading.Condition()
        self._queue: deque[_Copy] = deque()
        self._made = 0
        self._failed = False
        self._held = held
        self._recorded = 0
        self._permitted = 0

    @property
    def allocated_bytes(self) -> int:
        """How much memory was allocated and is still in somebody's hands."""
        return self._memory.used_bytes

    @property
    def pending_copies(self) -> int:
        """How many copies were queued and not made yet."""
        return len(self._queue)

    @property
    def torch_device(self) -> torch.device:
        import torch

        return torch.device("cpu")

    def advance(self, completions: int = 1) -> None:
        """Let so many more of the completions recorded up to now be waited for. From any thread."""
        with self._changed:
            self._permitted = min(self._permitted + completions, self._recorded)
            self._changed.notify_all()

    def release(self) -> None:
        """Hold nothing back any more. From any thread."""
        with self._changed:
            self._held = False
            self._changed.notify_all()

    def allocate(self, sizes: Sequence[int]) -> list[torch.Tensor]:
        number, self._allocations = self._allocations, self._allocations + 1
        if number == self._fail_allocation:
            raise DeviceError(f"{sum(sizes)} bytes cannot be allocated on {self.name}: out of memory")
        if any(size < 1 for size in sizes):
            raise ValueError(f"a block has at least one byte: {sizes}")
        return [self._memory.allocate(size) for size in sizes]

    def register(self, memory: torch.Tensor) -> bool:
        if memory.data_ptr() % mmap.PAGESIZE or memory.nbytes % mmap.PAGESIZE:
            raise DeviceError("only whole pages can be registered")
        if self.registered:
            raise DeviceError("memory is registered already")
        self.registered = self._page_lock
        return self._page_lock

    def unregister(self, memory: torch.Tensor) -> None:
        if not self.registered:
            raise DeviceError("the memory is not registered")
        if self._queue:
            raise DeviceError(f"the memory is unregistered while {len(self._queue)} copies from it are to be made")
        memory.fill_(_STAGED)
        self.registered = False

    def copy(self, destination: torch.Tensor, source: torch.Tensor) -> None:
        number = self.copies
        self.copies += 1
        if destination.nbytes != source.nbytes:
            raise ValueError(f"{source.nbytes} bytes cannot fill {destination.nbytes}")
        failing = self._fail_copy is not None and number >= self._fail_copy
        if failing and not self._fail_late:
            raise DeviceError(f"copy {number} to {self.name} was refused")
        # By address: a device does not keep alive what it writes to. The pool never unmaps what it once had.
        self._queue.append(_Copy(number, destination.data_ptr(), source, failing, self._memory))

    def record(self) -> Completion:
        with self._changed:
            self._recorded += 1
            return _LateCompletion(self, self._recorded, self.copies)

    def close(self) -> None:
        self.closed += 1

    def _wait(self, completion: int, copies: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._permitted >= completion)
            while self._queue and self._queue[0].number < copies:
                copy = self._queue.popleft()
                self._failed = self._failed or copy.failing
                if not self._failed:
                    copy.make()
            if self._failed:
                raise DeviceError(f"copying to {self.name} failed")


class _LateCompletion(Completion):
    __slots__ = ("_completion", "_copies", "_device")

    def __init__(self, device: LateDevice, completion: int, copies: int) -> None:
        self._device = device
        self._completion = completion
        self._copies = copies

    def wait(self) -> None:
        self._device._wait(self._completion, self._copies)


@dataclass(frozen=True, slots=True)
class _Copy:
    number: int
    address: int
    source: torch.Tensor
    failing: bool
    memory: _Memory  # keeps the address valid

    def make(self) -> None:
        ctypes.memmove(self.address, self.source.data_ptr(), self.source.nbytes)
        self.source.fill_(_STAGED)


class _Memory:
    """Blocks of memory that are used again, and never given back to the system while this lives."""

    def __init__(self) -> None:
        self._mappings: list[mmap.mmap] = []
        self._free: dict[int, list[mmap.mmap]] = {}
        # Filled by the garbage collector, on any thread and at any moment; hence a deque and nothing more.
        self._returned: deque[mmap.mmap] = deque()
        self._used_bytes = 0

    @property
    def used_bytes(self) -> int:
        self._reclaim()
        return self._used_bytes

    def allocate(self, nbytes: int) -> torch.Tensor:
        import torch

        self._reclaim()
        # A power of two, so that blocks of about the same size follow each other in the same memory.
        size = max(_ALIGNMENT_BYTES, 1 << (nbytes - 1).bit_length())
        free = self._free.setdefault(size, [])
        if free:
            mapping = free.pop()
        else:
            mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            self._mappings.append(mapping)
        self._used_bytes += size
        # A ctypes array: it lends its buffer like the mapping, can be referred to weakly, and is gone when the tensor's
        # storage is.
        block = (ctypes.c_ubyte * nbytes).from_buffer(mapping)
        weakref.finalize(block, self._returned.append, mapping).atexit = False
        return torch.frombuffer(block, dtype=torch.uint8).fill_(_FRESH)

    def _reclaim(self) -> None:
        while self._returned:
            mapping = self._returned.popleft()
            size = len(mapping)
            mapping[:] = bytes([_FREED]) * size
            self._free[size].append(mapping)
            self._used_bytes -= size
