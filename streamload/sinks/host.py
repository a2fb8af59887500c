"""Tensors in host memory: the source reads into their final place, and nothing is copied.

Except for small tensors. A region of their own would cost each a page, and a region shared between them would be kept
alive as a whole by whoever keeps one of them; so they arrive in memory that their batch shares, and are copied out of
it one by one as the consumer takes them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from streamload.checkpoint import Catalog, TensorInfo
from streamload.errors import MemoryLimitError
from streamload.loan import Loan
from streamload.plan import Batch, Read
from streamload.sinks.base import Delivery, Lease, NamedTensor, Sink
from streamload.sinks.dtypes import check_dtypes, torch_dtypes, torch_shape
from streamload.sinks.pool import HostPool, round_to_pages

if TYPE_CHECKING:
    import torch

__all__ = ["HostDelivery", "HostLease", "HostSink"]

# Below this a tensor is copied out: rounding a region up to pages wastes at most a sixteenth from here on.
_SMALL_BYTES = 64 << 10

# Memory that something may still write into. It outlives every sink: nothing else can be done with it.
_QUARANTINED: list[memoryview] = []


class HostLease(Lease):
    """A batch's memory on the host: a region for each large tensor, and one that the small ones and the gaps share."""

    __slots__ = ("quarantined", "regions", "shared", "shared_starts")

    def __init__(self, batch: Batch, pool: HostPool) -> None:
        super().__init__(batch)
        self.regions: dict[int, memoryview] = {}
        self.shared_starts: dict[int, int] = {}
        self.quarantined = False
        shared_bytes = _shared_bytes(batch)
        self.shared = pool.take(shared_bytes) if shared_bytes else memoryview(b"")
        for place, tensor in enumerate(batch.tensors):
            if _is_large(tensor):
                self.regions[place] = pool.take(tensor.end - tensor.start)

    def views(self, read: Read) -> list[memoryview]:
        """The memory for one read, in the order of its bytes."""
        if len(self.batch.reads) > 1:
            # Several reads mean a single tensor with bytes.
            ((place, start, _, nbytes),) = read.pieces
            self.shared_starts[place] = 0
            return [self.regions.get(place, self.shared)[start : start + nbytes]]
        views: list[memoryview] = []
        shared_start = shared_end = 0  # the run of small tensors and gaps that is not yet in `views`
        position = 0
        for piece in read.pieces:
            shared_end += piece.read_start - position
            position = piece.read_start + piece.nbytes
            region = self.regions.get(piece.tensor)
            if region is None:
                self.shared_starts[piece.tensor] = shared_end
                shared_end += piece.nbytes
            else:
                views += (self.shared[shared_start:shared_end], region)
                shared_start = shared_end
        views.append(self.shared[shared_start:shared_end])
        return views


class HostDelivery(Delivery):
    """A batch whose bytes lie in host memory."""

    __slots__ = ("_lease",)

    def __init__(self, lease: HostLease) -> None:
        self._lease = lease

    def tensors(self) -> Iterator[NamedTensor]:
        lease = self._lease
        for place, tensor in enumerate(lease.batch.tensors):
            nbytes = tensor.end - tensor.start
            if nbytes == 0:
                yield tensor.name, _empty(tensor)
            elif place in lease.regions:
                # Popped, so that from here on the tensor alone keeps its region.
                yield tensor.name, _tensor(tensor, lease.regions.pop(place))
            else:
                start = lease.shared_starts[place]
                yield tensor.name, _tensor(tensor, bytearray(lease.shared[start : start + nbytes]))


class HostSink(Sink[HostLease]):
    """Tensors in host memory.

    Args:
        memory_bytes: The load's memory limit; how much address space the pool sets aside at a time.
    """

    def __init__(self, memory_bytes: int) -> None:
        self._memory_bytes = memory_bytes
        self._pool = HostPool(memory_bytes)
        self._quarantined_bytes = 0

    def check(self, catalog: Catalog) -> None:
        check_dtypes(catalog)

    def credit_bytes(self, batch: Batch) -> int:
        large = sum(round_to_pages(tensor.end - tensor.start) for tensor in batch.tensors if _is_large(tensor))
        return large + round_to_pages(_shared_bytes(batch))

    def begin(self, batch: Batch, spare_bytes: int) -> HostLease:
        try:
            lease = HostLease(batch, self._pool)
        except (MemoryError, OSError, OverflowError) as error:
            nbytes, name = self.credit_bytes(batch), batch.tensors[0].name
            raise MemoryLimitError(f"the system does not give {nbytes} bytes for tensor {name!r}: {error}") from error
        # While nothing is kept, the pool is no larger than the limit and all of it is used again and again. Tensors
        # that the consumer keeps make it grow: then what is unused must not come on top.
        if self._pool.resident_bytes > self._memory_bytes:
            self._pool.trim(spare_bytes)
        return lease

    async def lend(self, lease: HostLease, read: Read) -> Loan:
        return Loan(lease.views(read))

    def landed(self, lease: HostLease, read: Read, loan: Loan) -> None:
        pass

    def failed(self, lease: HostLease, read: Read, loan: Loan) -> None:
        if loan.quarantined and not lease.quarantined:
            lease.quarantined = True
            kept = [lease.shared, *lease.regions.values()]
            _QUARANTINED.extend(kept)
            self._quarantined_bytes += sum(view.nbytes for view in kept)

    def abandon(self, lease: HostLease) -> None:
        lease.regions.clear()
        lease.shared = memoryview(b"")

    async def finish(self, lease: HostLease) -> HostDelivery:
        return HostDelivery(lease)

    @property
    def quarantined_bytes(self) -> int:
        return self._quarantined_bytes

    async def aclose(self) -> None:
        self._pool.close()


def _is_large(tensor: TensorInfo) -> bool:
    return tensor.end - tensor.start >= _SMALL_BYTES


def _shared_bytes(batch: Batch) -> int:
    """How much of what the batch reads has no region of its own."""
    large = sum(tensor.end - tensor.start for tensor in batch.tensors if _is_large(tensor))
    return sum(read.nbytes for read in batch.reads) - large


def _tensor(tensor: TensorInfo, memory: memoryview | bytearray) -> torch.Tensor:
    import torch

    flat = torch.frombuffer(memory, dtype=torch.uint8)
    return flat.view(torch_dtypes()[tensor.dtype]).view(torch_shape(tensor))


def _empty(tensor: TensorInfo) -> torch.Tensor:
    import torch

    return torch.empty(torch_shape(tensor), dtype=torch_dtypes()[tensor.dtype])
