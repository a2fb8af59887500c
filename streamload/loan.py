"""Memory lent by a sink to a source, for one read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Self

from streamload.checksums import RunningChecksum

__all__ = ["Loan", "Rows"]


class Rows(NamedTuple):
    """Ranges of one length at equal distances in the object, which belong one behind the other.

    Attributes:
        memory: Where they belong, all of them.
        nbytes: Each one's length.
        gap_bytes: How many bytes lie between two of them, needed by nobody.
        scratch: Where those may go, a piece at a time.
    """

    memory: memoryview
    nbytes: int
    gap_bytes: int
    scratch: memoryview


class Loan:
    """Writable views that a source fills in order, together as long as the range it was asked for.

    The source may write into ``views`` until its `read` returns or raises, and never after. Where it cannot promise
    that in time (a thread that hangs inside the kernel, a library whose requests cannot be called back), it calls
    `quarantine` before it raises: the memory is then never lent again and never freed while the process lives.

    A source that learns of bytes as they land says so with `landed`: then they are summed up while the processor still
    has them at hand, and it is known how far the read is.

    Some views may be *gaps*: what belongs there is needed by nobody, and several of them may share their memory. A
    source may fill them or leave them as they are.

    Attributes:
        views: One-dimensional writable byte views; none of them is empty.
        gaps: For each view, whether it is a gap; None where there is none.
        rows: The same in few words, where views are so regular; a source may go by this, and need not look at them.
        nbytes: Their length together, in bytes.
        checksum: Of what has landed so far, where it is wanted; it may stay behind what is in place.
        landed_bytes: How many bytes the source has said to be in place.
    """

    __slots__ = ("_gaps", "_parent", "_quarantined", "_views", "checksum", "landed_bytes", "nbytes", "rows")

    def __init__(
        self, views: Sequence[memoryview], *, gaps: Sequence[bool] | None = None, parent: Loan | None = None
    ) -> None:
        """Lend views.

        Args:
            views: Empty ones are left out.
            gaps: For each of them, whether it is a gap; None where there is none.
            parent: The loan of which this is the rest.
        """
        sizes = [view.nbytes for view in views]
        self.rows: Rows | None = None
        self._gaps: tuple[bool, ...] | None = None
        if all(sizes):
            self._views = tuple(views)
            self._gaps = None if gaps is None else tuple(gaps)
        else:
            self._views = tuple(view for view in views if view.nbytes)
            if gaps is not None:
                self._gaps = tuple(gap for gap, size in zip(gaps, sizes, strict=True) if size)
        self.nbytes = sum(sizes)
        self._parent = parent
        self._quarantined = False
        self.checksum: RunningChecksum | None = None if parent is None else parent.checksum
        self.landed_bytes = 0

    @classmethod
    def of_rows(cls, rows: Rows) -> Self:
        """Lend rows. Views are made of them only where somebody looks at them: there may be thousands."""
        loan = cls(())
        count = rows.memory.nbytes // rows.nbytes
        loan.rows = rows
        loan.nbytes = rows.memory.nbytes + (count - 1) * rows.gap_bytes
        return loan

    @property
    def views(self) -> tuple[memoryview, ...]:
        """See the class."""
        if not self._views and self.rows is not None:
            self._spread(self.rows)
        return self._views

    @property
    def gaps(self) -> tuple[bool, ...] | None:
        """See the class."""
        if not self._views and self.rows is not None:
            self._spread(self.rows)
        return self._gaps

    def _spread(self, rows: Rows) -> None:
        size = rows.scratch.nbytes
        whole, rest = divmod(rows.gap_bytes, size)
        between = [rows.scratch] * whole + ([rows.scratch[:rest]] if rest else [])
        views: list[memoryview] = []
        for start in range(0, rows.memory.nbytes, rows.nbytes):
            views += (rows.memory[start : start + rows.nbytes], *between)
        gaps = [False, *[True] * len(between)] * (rows.memory.nbytes // rows.nbytes)
        # None behind the last.
        end = len(views) - len(between)
        self._views, self._gaps = tuple(views[:end]), tuple(gaps[:end])

    @property
    def quarantined(self) -> bool:
        """Whether something may still write into the views."""
        return self._quarantined

    def quarantine(self) -> None:
        """Say that something may still write into the views."""
        self._quarantined = True
        if self._parent is not None:
            self._parent.quarantine()

    def landed(self, view: memoryview) -> None:
        """Say that these bytes, the next ones in order, are in place and stay there."""
        loan: Loan | None = self
        while loan is not None:
            loan.landed_bytes += view.nbytes
            loan = loan._parent
        if self.checksum is not None:
            self.checksum.add(view)

    def after(self, nbytes: int) -> Loan:
        """The same loan without its first `nbytes` bytes: where a retry goes on."""
        if self.checksum is not None and self.checksum.nbytes != nbytes:
            # What was summed up is not what counts as being in place: it is summed up again at the end.
            self.checksum = None
        views = self.views_after(nbytes)
        return Loan(views, gaps=None if self.gaps is None else self.gaps[len(self.gaps) - len(views) :], parent=self)

    def views_after(self, nbytes: int) -> list[memoryview]:
        """The views without their first `nbytes` bytes."""
        skip = nbytes
        rest: list[memoryview] = []
        for view in self.views:
            if skip >= view.nbytes:
                skip -= view.nbytes
            else:
                rest.append(view[skip:] if skip else view)
                skip = 0
        return rest
