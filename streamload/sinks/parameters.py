"""Into tensors that are there already: the source reads into their own memory where it can, and nothing is copied.

Where it cannot (a target that is not contiguous, of another dtype, on another device), the bytes arrive in memory of
the sink's, and are copied into the target on the consumer's thread when it takes the tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from streamload.checkpoint import Catalog, TensorInfo
from streamload.errors import MemoryLimitError
from streamload.loan import Loan
from streamload.plan import Batch, Piece, Read
from streamload.sinks.base import Delivery, Lease, NamedTensor, Sink
from streamload.sinks.dtypes import check_dtypes
from streamload.sinks.pool import HostPool, round_to_pages
from streamload.sinks.scatter import SCRATCH_BYTES, Bounces, is_bounced, is_sliced, scattered
from streamload.sinks.staging import keep
from streamload.sinks.targets import Target

__all__ = ["ParametersDelivery", "ParametersLease", "ParametersSink"]

# What the widest elements need, and vectorized copies like.
_ALIGNMENT_BYTES = 64

_NOTHING = memoryview(b"")


class _Layout:
    """Where a batch's tensors arrive: in their targets, or one behind the other in staged memory."""

    __slots__ = ("batch", "staged_bytes", "starts", "targets")

    def __init__(self, batch: Batch, find: Callable[[TensorInfo], Target], congruence_bytes: int) -> None:
        self.batch = batch
        self.targets = [find(tensor) for tensor in batch.tensors]
        self.starts: dict[int, int] = {}
        self.staged_bytes = 0
        for place, (tensor, target) in enumerate(zip(batch.tensors, self.targets, strict=True)):
            if not target.direct and tensor.nbytes:
                offset = tensor.start % min(congruence_bytes, _ALIGNMENT_BYTES)
                start = -(-self.staged_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES + (0 if offset % 16 else offset)
                self.starts[place] = start
                self.staged_bytes = start + tensor.nbytes


class ParametersLease(Lease):
    """A batch's targets, and the memory in which it arrives; it keeps both."""

    __slots__ = ("bounces", "memory", "region", "scratch", "starts", "targets")

    def __init__(self, layout: _Layout, region: memoryview, bounces: Bounces) -> None:
        super().__init__(layout.batch)
        self.bounces = bounces
        self.targets = layout.targets
        self.starts = layout.starts
        # The object that the pool gave is what keeps the region; a slice of it does not.
        self.region = region
        self.scratch: dict[Loan, memoryview] = {}
        self.memory: dict[int, memoryview] = {}
        for place, (tensor, target) in enumerate(zip(self.batch.tensors, self.targets, strict=True)):
            if not tensor.nbytes:
                continue
            if target.direct:
                self.memory[place] = target.memory()
            else:
                start = self.starts[place]
                self.memory[place] = region[start : start + tensor.nbytes]

    def place(self, piece: Piece) -> tuple[memoryview, int]:
        """The memory that a piece of a slice belongs in, and where in it."""
        return self.memory[piece.tensor], piece.tensor_start

    def clear(self) -> None:
        """Let go of everything."""
        self.bounces.clear()
        self.targets = []
        self.memory = {}
        self.region = _NOTHING
        self.scratch = {}


class ParametersDelivery(Delivery):
    """A batch whose bytes are in their targets, or ready to be copied there."""

    __slots__ = ("_lease", "_sink")

    def __init__(self, lease: ParametersLease, sink: ParametersSink) -> None:
        self._lease = lease
        self._sink = sink

    def tensors(self) -> Iterator[NamedTensor]:
        """Fill the targets, one after the other, and yield each tensor as the checkpoint has it.

        What needed no copy is the target itself. What did is what was staged; nobody else will use its memory.
        """
        lease = self._lease
        for place, (tensor, target) in enumerate(zip(lease.batch.tensors, lease.targets, strict=True)):
            if target.direct:
                yield tensor.name, target.filled[0]
                continue
            self._sink.touched = self._sink.touched or bool(target.filled)
            yield tensor.name, target.fill(tensor, lease.region, lease.starts.get(place, 0))


class ParametersSink(Sink[ParametersLease]):
    """Tensors that are there already.

    Memory is counted only where it is the sink's own: a read that goes into its target takes none, and how much is in
    flight is then bounded by the number of reads. Gaps are read into scratch memory, which each read has for itself;
    those between slices into memory that all share.

    Whether a load ends well is known at its end only: until then, and after a failure, the targets' content is
    undefined. When the load has ended nothing writes into them any more, unless a read is quarantined: a target's
    memory is then kept until the process ends, though its tensor may be garbage.

    Args:
        find: Where a tensor goes.
        memory_bytes: The load's memory limit; how much address space the pool sets aside at a time.
        congruence_bytes: What is staged is placed congruently to its place in the file modulo this power of two, where
            that leaves it aligned.

    Attributes:
        touched: Whether something may have been written into a target.
    """

    def __init__(self, find: Callable[[TensorInfo], Target], memory_bytes: int, *, congruence_bytes: int = 1) -> None:
        self.touched = False
        self._find = find
        self._congruence_bytes = congruence_bytes
        self._memory_bytes = memory_bytes
        self._pool = HostPool(memory_bytes)
        self._scratch = memoryview(bytearray(SCRATCH_BYTES))
        self._quarantined_bytes = 0
        self._layout: _Layout | None = None

    def check(self, catalog: Catalog) -> None:
        check_dtypes(catalog)

    def credit_bytes(self, batch: Batch) -> int:
        staged_bytes = round_to_pages(self._lay_out(batch).staged_bytes)
        bounces, bounce_bytes = Bounces.sizes(batch, self._memory_bytes)
        gap_bytes = sum(round_to_pages(read.gap_bytes) for read in batch.reads if not is_sliced(read))
        return staged_bytes + gap_bytes + bounces * round_to_pages(bounce_bytes)

    def begin(self, batch: Batch, spare_bytes: int) -> ParametersLease:
        layout = self._lay_out(batch)
        self._layout = None
        region = self._take(layout.staged_bytes, batch)
        bounces = Bounces(lambda nbytes: self._take(nbytes, batch), Bounces.sizes(batch, self._memory_bytes))
        self._pool.trim(spare_bytes)
        return ParametersLease(layout, region, bounces)

    async def lend(self, lease: ParametersLease, read: Read) -> Loan:
        if is_sliced(read):
            loan = await lease.bounces.lend(read) if is_bounced(read) else scattered(read, lease.place, self._scratch)
            self.touched = self.touched or any(target.direct for target in lease.targets)
            return loan
        scratch = self._take(read.gap_bytes, lease.batch)
        views: list[memoryview] = []
        position = used = 0
        for piece in read.pieces:
            gap_bytes = piece.read_start - position
            views.append(scratch[used : used + gap_bytes])
            used += gap_bytes
            views.append(lease.memory[piece.tensor][piece.tensor_start : piece.tensor_start + piece.nbytes])
            position = piece.read_start + piece.nbytes
        views.append(scratch[used:])
        loan = Loan(views)
        if scratch.nbytes:
            lease.scratch[loan] = scratch
        self.touched = self.touched or any(lease.targets[piece.tensor].direct for piece in read.pieces)
        return loan

    def landed(self, lease: ParametersLease, read: Read, loan: Loan) -> None:
        lease.scratch.pop(loan, None)
        lease.bounces.landed(loan, read, lease.place)

    def failed(self, lease: ParametersLease, read: Read, loan: Loan) -> None:
        scratch = lease.scratch.pop(loan, None)
        received = lease.bounces.failed(loan)
        if loan.quarantined:
            # All that the read may write into, the gaps' memory too, which other reads would be given next.
            keep(scratch, received, self._scratch, lease.region, *(target.filled for target in lease.targets))
            self._scratch = memoryview(bytearray(SCRATCH_BYTES))
            self._quarantined_bytes += loan.nbytes

    def abandon(self, lease: ParametersLease) -> None:
        lease.clear()

    async def finish(self, lease: ParametersLease) -> ParametersDelivery:
        lease.bounces.clear()
        return ParametersDelivery(lease, self)

    @property
    def quarantined_bytes(self) -> int:
        return self._quarantined_bytes

    async def aclose(self) -> None:
        self._layout = None
        self._pool.close()

    def _lay_out(self, batch: Batch) -> _Layout:
        # Credit is asked for and the batch begun right after each other, as a rule.
        if self._layout is None or self._layout.batch is not batch:
            self._layout = _Layout(batch, self._find, self._congruence_bytes)
        return self._layout

    def _take(self, nbytes: int, batch: Batch) -> memoryview:
        if not nbytes:
            return _NOTHING
        try:
            return self._pool.take(nbytes)
        except (MemoryError, OSError, OverflowError) as error:
            name = batch.tensors[0].name
            raise MemoryLimitError(f"the system does not give {nbytes} bytes for tensor {name!r}: {error}") from error
