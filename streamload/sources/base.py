"""What a source is: something that lists objects and reads byte ranges of them into lent memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from types import TracebackType
from typing import ClassVar, Self

from streamload.checksums import Checksum, PartChecksums, Sha256
from streamload.loan import Loan
from streamload.uris import scrub_uri

__all__ = ["Source", "SourceObject"]


@dataclass(frozen=True, slots=True)
class SourceObject:
    """One object under a source's URI, at one version.

    Attributes:
        key: Its name relative to the source's root, with ``/`` between parts: ``model-00001-of-00002.safetensors``.
        size_bytes: Its length.
        version: What pins its content: an ETag, a version id, or modification time, size and inode of a file.
    """

    key: str
    size_bytes: int
    version: str


class Source(ABC):
    """Where a checkpoint's bytes come from: one URI, opened on the event loop that reads.

    A source is an async context manager. It is entered and used on one event loop; entering makes no request. Its
    methods may be awaited concurrently, and each may be cancelled at any moment. Errors are translated here, once: only
    `streamload.errors` leaves a source, located by the source with at least the object's key.

    Attributes:
        uri: The URI as the caller gave it, without credentials.
        scheme: The first scheme that this source serves, for reports.
        request_cost_bytes: A gap of up to so many bytes is cheaper to read through than to ask around.
        skipped_gap_bytes: The gaps of a loan that are wider than this are passed over without reading them; None: the
            source reads all of a range.
        read_bytes: How large a read should be where the caller says nothing.
        concurrency: How many reads should be in flight where the caller says nothing: to begin with, where more may be.
        most_concurrency: How many there may be where more of them bring more; None where `concurrency` is the best.
        lists_folders: Whether `list` shows all that is there; else only what says what else is there.
        hedged: Whether a read that is late should be asked for a second time.
        shared_versions: Whether an object has the same version for whoever asks, on whatever machine.
        congruence_bytes: Reads are fastest into addresses that are congruent to the bytes' place in the object modulo
            this power of two; 1 where it makes no difference.
        companions: Whether what lies beside an object, such as a manifest, is of the version that is read.
        requests: How many requests (or system calls that read) have been sent so far.
        checksum_trips: How many requests one after another `checksum` took at most, so far.
        asked_at_s: When the first request was sent, by `time.monotonic`; None before, and where nobody notes it.
        paths: Bytes read so far by the way they came, where there is more than one.
    """

    scheme: ClassVar[str]
    request_cost_bytes: ClassVar[int]
    skipped_gap_bytes: ClassVar[int | None] = None
    read_bytes: ClassVar[int]
    concurrency: ClassVar[int]
    most_concurrency: ClassVar[int | None] = None
    lists_folders: ClassVar[bool] = True
    hedged: ClassVar[bool] = False
    shared_versions: ClassVar[bool] = False
    congruence_bytes: ClassVar[int] = 1

    def __init__(self, uri: str) -> None:
        self.uri = scrub_uri(uri)
        self.companions = True
        self.requests = 0
        self.checksum_trips = 1
        self.asked_at_s: float | None = None
        self.paths: dict[str, int] = {}

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @abstractmethod
    async def list(self) -> list[SourceObject]:
        """List the objects directly under the URI (not in deeper folders), or the one object that it names.

        Where a folder cannot be listed, it is the index file in it or, without one, ``model.safetensors``.

        Returns:
            The objects in order of their keys; never empty.

        Raises:
            NotFoundError: There is no such place, or nothing is in it.
            AccessError: Listing is refused.
        """

    @abstractmethod
    async def stat(self, key: str) -> SourceObject:
        """Find one object under the root, in a deeper folder perhaps.

        Raises:
            NotFoundError: There is none.
        """

    @abstractmethod
    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        """Fill `loan` with bytes `start` up to, not including, `end` of `object` at its pinned version.

        What it does with the loan's gaps is its own choice.

        Returns or raises (CancelledError included) only when nothing can write into the loan any more; where that
        cannot be had in time it calls ``loan.quarantine()`` first.

        Args:
            object: As `list` or `stat` returned it.
            start: First byte.
            end: One past the last byte; ``end - start == loan.nbytes``. An empty range returns at once.
            loan: The memory to fill.

        Raises:
            ObjectChangedError: The object is not the version that `object` pins.
            TransientError: Worth another try; ``valid_bytes`` says how many leading bytes are in place.
            SourceError: Anything else, a range past the object's end included.
        """

    async def conclude(self) -> dict[str, str]:
        """All that was wanted has been read: wait for the last word on whether it is what it should be.

        For sources that give out bytes before the object that they belong to was verified as a whole.

        Returns:
            What vouches for an object's content, by its key, beyond what `checksum` gave to compare with.

        Raises:
            SourceError: What was read does not hold.
        """
        return {}

    async def describe(self) -> dict[str, str]:
        """What a person needs to know who asks why this source is slow or refuses: a name and a value each.

        May make a request; what goes wrong with it is told in the values, not raised. Never holds a credential.

        Raises:
            ClosedError: The source was closed.
        """
        return {}

    async def checksum(self, object: SourceObject) -> Checksum | PartChecksums | None:
        """What the store keeps as an object's checksum, at its pinned version; None where it keeps none.

        It is that of the whole object, or those of the parts that the object was uploaded in.

        Raises:
            SourceError: It cannot be had.
        """
        return None

    async def sha256(self, object: SourceObject) -> bytes | Sha256 | None:
        """The SHA-256 of an object's content, at its pinned version; None where the store does not keep it.

        It is that of the whole object, or those of the parts that the object was uploaded in.

        Raises:
            SourceError: It cannot be had.
        """
        return None

    @abstractmethod
    async def aclose(self) -> None:
        """End everything that the source started: connections, threads, open files. May be called twice."""
