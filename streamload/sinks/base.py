"""What a sink is: something that lends memory for reads, and turns what landed into tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import TYPE_CHECKING, Generic, TypeAlias, TypeVar

from streamload.checkpoint import Catalog
from streamload.loan import Loan
from streamload.plan import Batch, Read

if TYPE_CHECKING:
    import torch

__all__ = ["Delivery", "Lease", "NamedTensor", "Sink"]

NamedTensor: TypeAlias = "tuple[str, torch.Tensor]"


class Lease:
    """One batch's memory, from the moment its credit is taken until its tensors are handed over.

    Dropping the last reference gives the memory back, except for what was quarantined.
    """

    __slots__ = ("batch",)

    def __init__(self, batch: Batch) -> None:
        self.batch = batch


class Delivery(ABC):
    """A batch whose bytes are all in place, waiting for the consumer."""

    __slots__ = ()

    @abstractmethod
    def tensors(self) -> Iterator[NamedTensor]:
        """The batch's tensors, in the batch's order, each made when it is asked for.

        Called once, on the consumer's thread. Every tensor is the consumer's own: contiguous, writable, and nothing
        else will ever write into its memory.
        """


LeaseT = TypeVar("LeaseT", bound=Lease)


class Sink(ABC, Generic[LeaseT]):
    """Where tensors go. Used on the engine's event loop, deliveries apart.

    The pipeline takes credit for `credit_bytes(batch)`, calls `begin`, and for each of the batch's reads `lend`, then
    the source fills the loan, then `landed` (or `failed`); after the last one `finish`. A batch without reads goes from
    `begin` to `finish` at once.
    """

    @abstractmethod
    def check(self, catalog: Catalog) -> None:
        """Refuse what this sink cannot hold, before anything is read.

        Raises:
            UnsupportedDtypeError: A tensor's dtype has no equivalent; the error names the tensor.
            DeviceError: The device does not exist or cannot be used.
            MissingDependencyError: torch is not installed.
        """

    @abstractmethod
    def credit_bytes(self, batch: Batch) -> int:
        """How much memory `begin` will need for the batch, in bytes; what the budget counts."""

    @abstractmethod
    def begin(self, batch: Batch, spare_bytes: int) -> LeaseT:
        """Set the batch's memory aside. Its credit has been taken.

        Args:
            batch: What will be read.
            spare_bytes: How much memory beyond what is lent the sink may keep for reuse; the rest is given back to
                the system now.
        """

    @abstractmethod
    async def lend(self, lease: LeaseT, read: Read) -> Loan:
        """Lend memory for one of the lease's reads, waiting for staging memory where there is some.

        No two of its views share memory, those of gaps included: a read is summed up from them when it has ended. Only
        of a batch with scattered slices, of which nothing is summed up, may gaps share theirs.

        Who asks first is lent first: reads may wait for those before them until they give their memory back.

        Cancelled, it has lent nothing.
        """

    @abstractmethod
    def landed(self, lease: LeaseT, read: Read, loan: Loan) -> None:
        """Take the loan back, filled. Whatever copy is needed is started here, not waited for."""

    @abstractmethod
    def failed(self, lease: LeaseT, read: Read, loan: Loan) -> None:
        """Take the loan back, its content worthless. A quarantined loan's memory is kept until the process ends."""

    @abstractmethod
    async def finish(self, lease: LeaseT) -> Delivery:
        """Wait until everything that landed is in its place."""

    @abstractmethod
    def abandon(self, lease: LeaseT) -> None:
        """Give back a lease that will not be finished, and of which no loan is out.

        Dropping it is not enough: an error's traceback keeps what its frames knew for as long as somebody keeps the
        error.
        """

    @property
    @abstractmethod
    def quarantined_bytes(self) -> int:
        """How much memory could not be taken back, because something may still write into it."""

    @abstractmethod
    async def aclose(self) -> None:
        """Give back what the sink still holds. Delivered tensors stay as they are. May be called twice."""
