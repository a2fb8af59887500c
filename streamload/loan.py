"""Memory lent by a sink to a source, for one read."""

from __future__ import annotations

from collections.abc import Sequence

from streamload.checksums import RunningChecksum

__all__ = ["Loan"]


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
        nbytes: Their length together, in bytes.
        checksum: Of what has landed so far, where it is wanted; it may stay behind what is in place.
        landed_bytes: How many bytes the source has said to be in place.
    """

    __slots__ = ("_parent", "_quarantined", "checksum", "gaps", "landed_bytes", "nbytes", "views")

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
        self.gaps: tuple[bool, ...] | None = None
        if all(sizes):
            self.views = tuple(views)
            self.gaps = None if gaps is None else tuple(gaps)
        else:
            self.views = tuple(view for view in views if view.nbytes)
            if gaps is not None:
                self.gaps = tuple(gap for gap, size in zip(gaps, sizes, strict=True) if size)
        self.nbytes = sum(sizes)
        self._parent = parent
        self._quarantined = False
        self.checksum: RunningChecksum | None = None if parent is None else parent.checksum
        self.landed_bytes = 0

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
