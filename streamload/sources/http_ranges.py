"""One range of one object, out of the answer that a server gives to a request for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from streamload.errors import SourceError, TransientError
from streamload.loan import Loan
from streamload.wire import Head

__all__ = ["RangeRead", "check_identity", "total_bytes"]

# From a server that ignores ranges: how much of an object may be received only to be thrown away. As long as a read.
_MOST_DISCARDED_BYTES = 8 << 20

# What is thrown away lands here, again and again.
_SCRATCH_BYTES = 256 << 10


class RangeRead:
    """Says where the bytes of an answer go: those that were asked for into the loan.

    A server may ignore ranges and answer with the whole object. It is received in one go where all of it was asked for,
    or nearly all; else it is refused.

    Args:
        start: First byte.
        end: One past the last.
        size_bytes: The object's length.
        loan: Where the bytes go.
        check: Looks whether a head belongs to the right version of the object; raises where not.
    """

    def __init__(self, start: int, end: int, size_bytes: int, loan: Loan, check: Callable[[Head], None]) -> None:
        self._start = start
        self._end = end
        self._size_bytes = size_bytes
        self._loan = loan
        self._check = check
        self._before_bytes = 0  # of the body, before the first byte that was asked for
        self._alone = True  # nothing else is in the body
        self.header = f"bytes={start}-{end - 1}"

    def accept(self, head: Head) -> Sequence[memoryview]:
        """Where the body goes.

        Raises:
            SourceError: It is not the range that was asked for.
        """
        self._check(head)
        check_identity(head)
        self._before_bytes, self._alone = 0, True
        if head.status == 206:
            asked = f"bytes {self._start}-{self._end - 1}/"
            found = head.headers.get("content-range")
            if found not in {f"{asked}{self._size_bytes}", f"{asked}*"}:
                raise SourceError(f"asked for {asked}{self._size_bytes}, the answer has {found}")
            return self._loan.views
        if head.status != 200:
            raise SourceError(f"the server answered {head.status} to a request for a range")
        before, after = self._start, self._size_bytes - self._end
        if before + after > _MOST_DISCARDED_BYTES:
            raise SourceError(
                f"the server ignores ranges: all {self._size_bytes} bytes would have to be received for each read"
            )
        self._before_bytes, self._alone = before, before + after == 0
        scratch = memoryview(bytearray(min(_SCRATCH_BYTES, before + after)))
        return [*_repeated(scratch, before), *self._loan.views, *_repeated(scratch, after)]

    def landed(self, piece: memoryview) -> None:
        """Told of each piece of the body that is in place, in order."""
        if self._alone:  # else what has landed is summed up at the end
            self._loan.landed(piece)

    def correct(self, error: TransientError) -> None:
        """Make an error say how much of the range is in place; it says how much of the body is."""
        error.valid_bytes = max(0, min(error.valid_bytes - self._before_bytes, self._end - self._start))


def check_identity(head: Head) -> None:
    """Refuse a body that is not the object's bytes but what they were compressed to.

    Raises:
        SourceError: It is one.
    """
    encoding = head.headers.get("content-encoding", "identity")
    if encoding.lower() != "identity":
        raise SourceError(f"the server sends the object compressed ({encoding}), although it was asked not to")


def total_bytes(head: Head) -> int | None:
    """How long the object is whose range this is the answer for, be it refused; None where that is not said."""
    _, slash, total = head.headers.get("content-range", "").rpartition("/")
    return int(total) if slash and total.isascii() and total.isdigit() and len(total) < 20 else None


def _repeated(scratch: memoryview, nbytes: int) -> list[memoryview]:
    whole, rest = divmod(nbytes, scratch.nbytes) if nbytes else (0, 0)
    return [scratch] * whole + ([scratch[:rest]] if rest else [])
