"""Tensors in host memory: the source reads into their final place, and nothing is copied.

Except for small tensors. A region of their own would cost each a page, and a region shared between them would be kept
alive as a whole by whoever keeps one of them; so they arrive in memory that their batch shares, and are copied out of
it one by one as the consumer takes them.

Where slices are read together with the gaps between them, `scatter` says what becomes of the gaps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from streamload.checkpoint import Catalog, TensorInfo
from streamload.errors import MemoryLimitError
from streamload.loan import Loan
from streamload.plan import Batch, Piece, Read
from streamload.sinks.base import Delivery, Lease, NamedTensor, Sink
from streamload.sinks.dtypes import check_dtypes, torch_dtypes, torch_shape
from streamload.sinks.pool import HostPool, round_to_pages
from streamload.sinks.scatter import SCRATCH_BYTES, Bounces, is_bounced, is_sliced, scattered

if TYPE_CHECKING:
    import torch

__all__ = ["HostDelivery", "HostLease", "HostSink"]

# Below this a tensor is copied out: rounding a region up to pages wastes at most a sixteenth from here on.
_SMALL_BYTES = 64 << 10


# Memory that something may still write into. It outlives every sink: nothing else can be done with it.
_QUARANTINED: list[memoryview] = []


# Everything that a tensor's elements need, and what memory from elsewhere has at least.
_ALIGNMENT_BYTES = 8


class HostLease(Lease):
    """A batch's memory on the host: a region for each large tensor, and one that the small ones and the gaps share.

    Of a batch with slices, the gaps are not in the shared region, and some regions more are for receiving whole reads.
    """

    __slots__ = ("bounces", "quarantined", "regions", "shared", "shared_starts")

    def __init__(
        self, batch: Batch, pool: HostPool, offset: Callable[[int, int], int], bounces: tuple[int, int]
    ) -> None:
        super().__init__(batch)
        self.regions: dict[int, _Region] = {}
        self.shared_starts: dict[int, int] = {}
        self.quarantined = False
        self.bounces = Bounces(pool.take, bounces)
        shared_bytes = _shared_bytes(batch)
        self.shared = _NO_REGION
        if shared_bytes:
            self.shared = _Region(pool, shared_bytes, offset(batch.reads[0].start, shared_bytes))
        for place, tensor in enumerate(batch.tensors):
            if _is_large(tensor):
                self.regions[place] = _Region(pool, tensor.nbytes, offset(tensor.start, tensor.nbytes))
        if batch.sliced:
            start = 0
            for place, tensor in enumerate(batch.tensors):
                if place not in self.regions:
                    self.shared_starts[place] = start
                    start += tensor.nbytes

    def place(self, piece: Piece) -> tuple[memoryview, int]:
        """The memory that a piece of a slice belongs in, and where in it."""
        region = self.regions.get(piece.tensor)
        if region is not None:
            return region.memory, region.offset + piece.tensor_start
        start = self.shared_starts[piece.tensor]
        return self.shared.memory, self.shared.offset + start + piece.tensor_start

    def views(self, read: Read) -> list[memoryview]:
        """The memory for one read, in the order of its bytes."""
        if len(self.batch.reads) > 1:
            # Several reads mean a single tensor with bytes.
            ((place, start, _, nbytes),) = read.pieces
            self.shared_starts[place] = 0
            return [self.regions.get(place, self.shared).view(start, start + nbytes)]
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
                views += (self.shared.view(shared_start, shared_end), region.view(0, region.nbytes))
                shared_start = shared_end
        views.append(self.shared.view(shared_start, shared_end))
        return views


class _Region:
    """The part of a region of the pool's that begins at an offset."""

    __slots__ = ("memory", "nbytes", "offset")

    def __init__(self, pool: HostPool | None, nbytes: int, offset: int) -> None:
        # The object that the pool gave is what keeps the region; a slice of it does not.
        self.memory = memoryview(b"") if pool is None else pool.take(offset + nbytes)
        self.nbytes = nbytes
        self.offset = offset

    def view(self, start: int, end: int) -> memoryview:
        return self.memory[self.offset + start : self.offset + end]


_NO_REGION = _Region(None, 0, 0)


class HostDelivery(Delivery):
    """A batch whose bytes lie in host memory."""

    __slots__ = ("_lease",)

    def __init__(self, lease: HostLease) -> None:
        self._lease = lease

    def tensors(self) -> Iterator[NamedTensor]:
        lease = self._lease
        for place, tensor in enumerate(lease.batch.tensors):
            nbytes = tensor.nbytes
            if nbytes == 0:
                yield tensor.name, _empty(tensor)
            elif place in lease.regions:
                # Popped, so that from here on the tensor alone keeps its region.
                yield tensor.name, _own(tensor, lease.regions.pop(place))
            else:
                start = lease.shared_starts[place]
                yield tensor.name, _tensor(tensor, bytearray(lease.shared.view(start, start + nbytes)))


class HostSink(Sink[HostLease]):
    """Tensors in host memory.

    Args:
        memory_bytes: The load's memory limit; how much address space the pool sets aside at a time.
        congruence_bytes: A tensor's address is congruent to its place in the file modulo this power of two, where that
            leaves it aligned to 8 bytes.
    """

    def __init__(self, memory_bytes: int, *, congruence_bytes: int = 1) -> None:
        self._congruence_bytes = congruence_bytes
        self._memory_bytes = memory_bytes
        self._pool = HostPool(memory_bytes)
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._quarantined_bytes = 0

    def check(self, catalog: Catalog) -> None:
        check_dtypes(catalog)

    def credit_bytes(self, batch: Batch) -> int:
        large = sum(self._region_bytes(tensor.start, tensor.nbytes) for tensor in batch.tensors if _is_large(tensor))
        shared_bytes = _shared_bytes(batch)
        shared = self._region_bytes(batch.reads[0].start, shared_bytes) if shared_bytes else 0
        bounces, bounce_bytes = Bounces.sizes(batch, self._memory_bytes)
        return large + shared + bounces * round_to_pages(bounce_bytes)

    def _region_bytes(self, start: int, nbytes: int) -> int:
        return round_to_pages(self._offset(start, nbytes) + nbytes)

    def _offset(self, start: int, nbytes: int) -> int:
        """Where in its region that begins, and has so many bytes, which begins at `start` in its file."""
        offset = start % self._congruence_bytes
        # What just fits the limit must not exceed it for this.
        exceeds = nbytes <= self._memory_bytes < round_to_pages(offset + nbytes)
        return 0 if exceeds or offset % _ALIGNMENT_BYTES else offset

    def begin(self, batch: Batch, spare_bytes: int) -> HostLease:
        try:
            lease = HostLease(batch, self._pool, self._offset, Bounces.sizes(batch, self._memory_bytes))
        except (MemoryError, OSError, OverflowError) as error:
            nbytes, name = self.credit_bytes(batch), batch.tensors[0].name
            raise MemoryLimitError(f"the system does not give {nbytes} bytes for tensor {name!r}: {error}") from error
        # While nothing is kept, the pool is no larger than the limit and all of it is used again and again. Tensors
        # that the consumer keeps make it grow: then what is unused must not come on top.
        excess = self._pool.resident_bytes - self._memory_bytes
        if excess > 0:
            self._pool.trim(max(spare_bytes, self._pool.cached_bytes - excess))
        return lease

    async def lend(self, lease: HostLease, read: Read) -> Loan:
        if not is_sliced(read):
            return Loan(lease.views(read))
        if not is_bounced(read):
            return scattered(read, lease.place, self._scratch)
        return await lease.bounces.lend(read)

    def landed(self, lease: HostLease, read: Read, loan: Loan) -> None:
        lease.bounces.landed(loan, read, lease.place)

    def failed(self, lease: HostLease, read: Read, loan: Loan) -> None:
        received = lease.bounces.failed(loan)
        if not loan.quarantined:
            return
        if received is not None:
            self._quarantine([received])
        elif not lease.quarantined:
            lease.quarantined = True
            self._quarantine([region.memory for region in (lease.shared, *lease.regions.values())])
            if loan.gaps is not None:
                self._quarantine([self._scratch])
                self._scratch = memoryview(bytearray(SCRATCH_BYTES))

    def _quarantine(self, kept: list[memoryview]) -> None:
        _QUARANTINED.extend(kept)
        self._quarantined_bytes += sum(view.nbytes for view in kept)

    def abandon(self, lease: HostLease) -> None:
        lease.bounces.clear()
        lease.regions.clear()
        lease.shared = _NO_REGION

    async def finish(self, lease: HostLease) -> HostDelivery:
        lease.bounces.clear()
        return HostDelivery(lease)

    @property
    def quarantined_bytes(self) -> int:
        return self._quarantined_bytes

    async def aclose(self) -> None:
        self._pool.close()


def _is_large(tensor: TensorInfo) -> bool:
    return tensor.nbytes >= _SMALL_BYTES


def _shared_bytes(batch: Batch) -> int:
    """How much of what the batch brings has no region of its own."""
    if batch.sliced:
        return sum(tensor.nbytes for tensor in batch.tensors if not _is_large(tensor))
    large = sum(tensor.nbytes for tensor in batch.tensors if _is_large(tensor))
    return sum(read.nbytes for read in batch.reads) - large


def _own(tensor: TensorInfo, region: _Region) -> torch.Tensor:
    return _tensor(tensor, region.memory, region.offset)


def _tensor(tensor: TensorInfo, memory: memoryview | bytearray, offset: int = 0) -> torch.Tensor:
    import torch

    flat = torch.frombuffer(memory, dtype=torch.uint8, offset=offset)
    return flat.view(torch_dtypes()[tensor.dtype]).view(torch_shape(tensor))


def _empty(tensor: TensorInfo) -> torch.Tensor:
    import torch

    # The device is said: within `with torch.device(...)`, as engines load, torch would put it elsewhere.
    return torch.empty(torch_shape(tensor), dtype=torch_dtypes()[tensor.dtype], device="cpu")
