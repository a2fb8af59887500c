"""What staging has come to, for who asked for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

__all__ = ["Place", "Staged", "StagedState"]

StagedState: TypeAlias = Literal["staged", "present"]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a file can be read that has landed in part.

    Attributes:
        path: Its path now; it changes when the file is whole.
        stamp: What a reader knows it by from now on, see `Stager.knows`.
        landed: The first byte, and one past the last, of the range around the one that was asked for that has landed.
        mtime_ns: When it was changed last; None while it is not whole.
        verified: What it was compared with; None while it is not whole, and where there was nothing.
    """

    path: str
    stamp: str
    landed: tuple[int, int]
    mtime_ns: int | None = None
    verified: str | None = None


@dataclass(frozen=True, slots=True)
class Staged:
    """What staging has come to.

    Attributes:
        uri: Where the files come from, without credentials.
        folder: Where they are.
        state: ``present``: all of it was there already; ``staged``: not so.
        files: How many there are.
        nbytes: Their bytes.
        fetched_bytes: Of these, what was read from the source this time.
        kept_bytes: What was not, because it was there already.
        requests: Requests sent to the source.
        retries: Attempts that failed and were made again.
        hedged_bytes: Bytes of late reads that were asked for a second time.
        concurrency: Reads in flight at most, at the end.
        seconds: All of it, from the call on.
        phases: Where that time went: ``list`` (the import of the source's client included), ``wait`` (for another
            process), ``check`` (what is there, and what it has to sum up to), ``read`` (reading and writing),
            ``finish`` (what was left to make durable, and the marker).
        verified: Bytes that were compared with something, by what it was.
        unverified: Bytes that were not, by the reason.
        asked_at_s: When the source was asked first, by `time.monotonic`; None where it was not.
        first_request_s: The same, counted from the process's start.
        peak_rss_bytes: The most memory that the process ever had; None where the system does not tell.
    """

    uri: str
    folder: str
    state: StagedState
    files: int
    nbytes: int
    fetched_bytes: int
    kept_bytes: int
    requests: int
    retries: int
    hedged_bytes: int
    concurrency: int
    seconds: float
    phases: dict[str, float]
    verified: dict[str, int] = field(default_factory=dict)
    unverified: dict[str, int] = field(default_factory=dict)
    asked_at_s: float | None = None
    first_request_s: float | None = None
    peak_rss_bytes: int | None = None

    @property
    def gb_per_s(self) -> float:
        """Bytes read a second while reading, in units of 10^9."""
        seconds = self.phases.get("read", 0.0) + self.phases.get("finish", 0.0)
        return self.fetched_bytes / seconds / 1e9 if seconds else 0.0
