"""Between the engine's thread and the consumer's: finished batches and the load's end one way, receipts the other."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from streamload.errors import ClosedError
from streamload.sinks.base import Delivery

__all__ = ["Finished", "Handoff", "Receipts"]


@dataclass(frozen=True, slots=True)
class Finished:
    """A batch that the consumer may take.

    Attributes:
        index: The batch's place in the plan.
        delivery: Its tensors.
        tensors: How many.
        tensor_bytes: Their bytes.
        credit_bytes: The credit that stands for them until the consumer has moved past.
    """

    index: int
    delivery: Delivery
    tensors: int
    tensor_bytes: int
    credit_bytes: int


@dataclass(frozen=True, slots=True)
class Receipts:
    """What the consumer has done.

    Attributes:
        taken_bytes: Credit of the batches that it took.
        released_bytes: Credit of the batches that it has moved past.
        batches: How many it took to the last tensor.
    """

    taken_bytes: int = 0
    released_bytes: int = 0
    batches: int = 0


_NO_RECEIPTS = Receipts()


class Handoff:
    """A queue with one producer (the engine) and one consumer on another thread or event loop.

    It needs no bound of its own: what lies in it has credit. The consumer looks with `take`, and where there is nothing
    waits for the future that `changed` gives, blocking or awaiting as it likes. The future only says that something has
    changed and carries nothing, so a cancelled wait loses nothing.

    Args:
        in_order: Whether batches come out in the plan's order, rather than as they finish.
    """

    def __init__(self, *, in_order: bool) -> None:
        self._in_order = in_order
        self._lock = threading.Lock()
        self._ready: deque[Finished] = deque()
        self._early: dict[int, Finished] = {}
        self._next = 0
        self._ended = False
        self._error: BaseException | None = None
        self._waiter: Future[None] | None = None
        self._receipts = _NO_RECEIPTS
        self._listener: Callable[[], None] | None = None

    def put(self, batch: Finished) -> None:
        """Called by the engine: a batch has finished."""
        with self._lock:
            if self._ended:
                return
            if self._in_order:
                self._early[batch.index] = batch
                while (early := self._early.pop(self._next, None)) is not None:
                    self._ready.append(early)
                    self._next += 1
            else:
                self._ready.append(batch)
            waiter = self._pop_waiter() if self._ready else None
        _wake(waiter)

    def end(self, error: BaseException | None = None) -> None:
        """Called by the engine: nothing more will come. With an error, what lies here is not handed out any more."""
        with self._lock:
            if self._ended:
                return
            self._ended = True
            self._error = error
            if error is not None:
                self._ready.clear()
                self._early.clear()
            waiter = self._pop_waiter()
        _wake(waiter)

    def take(self) -> Finished | None:
        """Called by the consumer: the next batch, or None where none lies here (yet, or any more: see `ended`).

        Raises:
            BaseException: The load's error, at the first call; a ClosedError that quotes it at later ones.
        """
        with self._lock:
            if self._error is None:
                return self._ready.popleft() if self._ready else None
            # Told once, and not kept: its traceback will know the consumer's frames and what those hold.
            error, self._error = self._error, ClosedError(f"the stream has ended: {self._error}")
            raise error

    @property
    def ended(self) -> bool:
        """Whether everything was taken and nothing more will come."""
        with self._lock:
            return self._ended and self._error is None and not self._ready

    def changed(self) -> Future[None]:
        """A future that is done when `take` is worth calling again."""
        with self._lock:
            future: Future[None] = Future()
            if self._ready or self._ended:
                future.set_result(None)
            else:
                self._waiter = future
            return future

    def acknowledge(self, *, taken_bytes: int = 0, released_bytes: int = 0, batches: int = 0) -> None:
        """Called by the consumer: what it has done since last time, see `Receipts`."""
        with self._lock:
            had = self._receipts
            self._receipts = Receipts(
                had.taken_bytes + taken_bytes, had.released_bytes + released_bytes, had.batches + batches
            )
            listener, self._listener = self._listener, None
        if listener is not None:
            listener()

    def receipts(self, listener: Callable[[], None] | None = None) -> Receipts:
        """Called by the engine: what was acknowledged and not yet returned here.

        Args:
            listener: Called once, on the consumer's thread, when there is more. None: nobody is told.
        """
        with self._lock:
            receipts, self._receipts = self._receipts, _NO_RECEIPTS
            self._listener = listener
        return receipts

    def __len__(self) -> int:
        """How many batches wait for the consumer."""
        return len(self._ready)

    def _pop_waiter(self) -> Future[None] | None:
        waiter, self._waiter = self._waiter, None
        return waiter


def _wake(waiter: Future[None] | None) -> None:
    # Outside the lock: a future's callbacks run here, on the engine's thread. A waiter that was cancelled is let be.
    if waiter is not None and waiter.set_running_or_notify_cancel():
        waiter.set_result(None)
