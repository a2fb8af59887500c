"""What a load tells while it runs: spans of work, for metrics, traces and progress."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["Event", "EventKind", "OnEvent", "OnProgress", "Progress"]

EventKind: TypeAlias = Literal["list", "header", "read", "copy", "consumer", "retry", "hedge", "limit"]


@dataclass(frozen=True, slots=True)
class Event:
    """One span of work, told when it has ended.

    Attributes:
        kind: ``list`` (objects listed), ``header`` (a file's header read), ``read`` (one ranged read, its retries
            included), ``copy`` (one copy to the device), ``consumer`` (the consumer held a batch), ``retry`` (an
            attempt failed and is made again), ``hedge`` (a late read was asked for a second time), ``limit`` (a tensor
            larger than ``memory_bytes`` raised the limit).
        lane: Who did it: ``engine``, ``worker 3``, ``copy stream``, ``consumer``.
        started_s: When it began, in seconds since the load began.
        seconds: How long it took; zero for an instant.
        object: The object's key, where there is one.
        start: First byte of the range, where there is one.
        end: One past its last byte.
        nbytes: How many bytes it moved.
        detail: Anything else worth reading, such as a failed attempt's cause.
    """

    kind: EventKind
    lane: str
    started_s: float
    seconds: float = 0.0
    object: str | None = None
    start: int | None = None
    end: int | None = None
    nbytes: int = 0
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a load is.

    Attributes:
        read_bytes: Tensor bytes that have arrived.
        taken_bytes: Tensor bytes that the consumer has taken.
        total_bytes: Tensor bytes of the whole load; zero until the headers are known.
        taken_tensors: Tensors that the consumer has taken.
        total_tensors: Tensors of the whole load.
        seconds: Seconds since the load began.
    """

    read_bytes: int
    taken_bytes: int
    total_bytes: int
    taken_tensors: int
    total_tensors: int
    seconds: float


OnEvent: TypeAlias = Callable[[Event], None]
OnProgress: TypeAlias = Callable[[Progress], None]
