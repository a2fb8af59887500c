"""Memory lent by a sink to a source, for one read."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["Loan"]


class Loan:
    """Writable views that a source fills in order, together as long as the range it was asked for.

    The source may write into ``views`` until its `read` returns or raises, and never after. Where it cannot promise
    that in time (a thread that hangs inside the kernel, a library whose requests cannot be called back), it calls
    `quarantine` before it raises: the memory is then never lent again and never freed while the process lives.

    Attributes:
        views: One-dimensional writable byte views; none of them is empty.
        nbytes: Their length together, in bytes.
    """

    __slots__ = ("_parent", "_quarantined", "nbytes", "views")

    def __init__(self, views: Sequence[memoryview], *, parent: Loan | None = None) -> None:
        self.views: tuple[memoryview, ...] = tuple(view for view in views if view.nbytes)
        self.nbytes = sum(view.nbytes for view in self.views)
        self._parent = parent
        self._quarantined = False

    @property
    def quarantined(self) -> bool:
        """Whether something may still write into the views."""
        return self._quarantined

    def quarantine(self) -> None:
        """Say that something may still write into the views."""
        self._quarantined = True
        if self._parent is not None:
            self._parent.quarantine()

    def after(self, nbytes: int) -> Loan:
        """The same loan without its first `nbytes` bytes: where a retry goes on."""
        return Loan(_split(self.views, nbytes), parent=self)


def _split(views: Sequence[memoryview], skip: int) -> list[memoryview]:
    """The views with their first `skip` bytes left out."""
    rest: list[memoryview] = []
    for view in views:
        if skip >= view.nbytes:
            skip -= view.nbytes
        else:
            rest.append(view[skip:] if skip else view)
            skip = 0
    return rest
