"""The other ranks of a load: one that fails tells the others, by way of torch.distributed's store.

A collective would wait for a rank that is gone until its own timeout, half an hour perhaps. So nothing here is one:
keys in the store of the default process group are set and looked at, never waited for.

::

    failure     who failed first, and with what          rank/R     who rank R is, from the moment it takes part
    done        how many have loaded everything          alive/R    counts up while rank R is there
    seen        how many know of the failure             left       how many have seen that all have loaded everything
    version/K   which version of object K is read
"""

from __future__ import annotations

import itertools
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from streamload.errors import DeadlineError, ObjectChangedError, PeerError, StreamloadError
from streamload.sinks.dtypes import require_torch
from streamload.units import format_seconds

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

__all__ = ["Peers", "join_peers"]

# How often a rank looks whether another one failed: much less than what a person notices, and for a thousand ranks
# together some thousand small requests a second, a tenth of what the store answers.
_LOOK_S = 0.5
# The same at the end, when a rank has nothing else to do.
_LEAST_WAIT_S, _MOST_WAIT_S = 0.002, 0.1
# After so long without a sign of life a rank on another machine counts as gone. The sign comes from a thread that asks
# for the interpreter's lock each time; an import or a compilation that keeps it for some seconds must not count.
_SILENCE_S = 30.0
# How long a rank that knows of a failure stays, so that the others still find the store where it was.
_LINGER_S = 5.0
_JOIN_S = 5.0
_STORE_TIMEOUT = timedelta(minutes=30)  # where the store does not say

# What the store raises when the process that holds it is gone.
_STORE_ERRORS = (RuntimeError, OSError)

# Every load has keys of its own. All ranks load the same number of times, hence count alike.
_numbers = itertools.count()


@dataclass(frozen=True, slots=True)
class _Identity:
    """A process, for those that share a machine with it."""

    host: str
    pid_namespace: str
    pid: int
    started: str

    @classmethod
    def own(cls) -> _Identity:
        pid = os.getpid()
        return cls(_host(), _pid_namespace(), pid, _started(pid) or "")

    @property
    def visible(self) -> bool:
        """Whether the process could be seen from here, if it is there."""
        return bool(self.host) and (self.host, self.pid_namespace) == (_host(), _pid_namespace())

    @property
    def gone(self) -> bool:
        return _started(self.pid) != self.started


class Peers:
    """All ranks that take part in one load. Used on the caller's thread, but for the thread that watches.

    Args:
        store: What they share.
        rank: This one, as the process group counts.
        size: How many there are.
        number: Which of their loads this is.
        look_s: How often to look whether another rank failed.
        silence_s: After how long without a sign of life a rank on another machine counts as gone.
        linger_s: How long a rank that knows of a failure stays for others to learn of it.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        number: int,
        *,
        look_s: float = _LOOK_S,
        silence_s: float = _SILENCE_S,
        linger_s: float = _LINGER_S,
    ) -> None:
        self._store = store
        self._rank = rank
        self._size = size
        self._prefix = f"streamload/{number}/"
        self._look_s = look_s
        self._silence_s = silence_s
        self._linger_s = linger_s
        # The ranks watch each other in a ring: however many there are, each looks after one.
        self._neighbour = (rank + 1) % size
        self._identity: _Identity | None = None
        self._beat = -1
        self._beat_s = 0.0
        self._lock = threading.Lock()
        self._error: PeerError | None = None
        self._told = False  # whether this rank has said itself that it failed
        self._on_failure: Callable[[PeerError], None] | None = None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="streamload-peers", daemon=True)

    def start(self) -> None:
        """Take part, and begin to watch the others."""
        try:
            self._store.set(self._key(f"rank/{self._rank}"), json.dumps(asdict(_Identity.own())))
            self._store.add(self._key("arrived"), 1)
        except _STORE_ERRORS as error:
            self._notice(_store_gone(error))
        self._thread.start()

    def when_failed(self, call: Callable[[PeerError], None]) -> None:
        """Have `call` called, on the watching thread or at once, when another rank has failed."""
        with self._lock:
            self._on_failure = call
            error = self._error
        if error is not None:
            call(error)

    def finish(self, timeout_s: float | None = None, *, versions: Mapping[str, str] | None = None) -> None:
        """Wait until every rank has loaded everything.

        Args:
            timeout_s: After how long to give up; None: after the process group's own timeout.
            versions: What this rank has read, by the objects' keys: each rank has found it by itself, and half a model
                of one version and half of another would be no error of either.

        Raises:
            ObjectChangedError: Another rank has read another version.
            PeerError: A rank failed, is gone, or did not come.
            DeadlineError: It took longer than `timeout_s`.
        """
        limit_s = _timeout_s(self._store) if timeout_s is None else timeout_s
        give_up_s = time.monotonic() + limit_s
        try:
            self._compare(versions or {})
            self._store.set(self._key(f"done/{self._rank}"), "1")
            self._store.add(self._key("done"), 1)
            wait_s = _LEAST_WAIT_S
            while self._count("done") < self._size:
                self._look_for_failure()
                if self._error is not None:
                    raise _again(self._error)
                if time.monotonic() >= give_up_s:
                    self._give_up(limit_s, ours=timeout_s is not None)
                self._closing.wait(wait_s)
                wait_s = min(2 * wait_s, _MOST_WAIT_S)
        except _STORE_ERRORS as error:
            if isinstance(error, StreamloadError):
                raise
            raise _store_gone(error) from error
        # The process that holds it does not wait for ever: this rank has loaded everything, whether or not it is told.
        with suppress(*_STORE_ERRORS):
            self._store.add(self._key("left"), 1)
        if self._rank == 0:
            # It holds the store, as a rule: the others must have seen that all is done before it may end.
            self._linger("left", self._size)

    def _compare(self, versions: Mapping[str, str]) -> None:
        for key, version in versions.items():
            # Who comes first says which one it is.
            found = self._store.compare_set(self._key(f"version/{key}"), "", version)
            first = found.decode() if isinstance(found, bytes) else found
            if first != version:
                raise ObjectChangedError(f"another rank has read version {first}; this one, {version}", object=key)

    def failed(self, error: BaseException) -> None:
        """Tell the others that this rank's load has failed, and stay until they know, for a few seconds at most."""
        with self._lock:
            told = self._error is not None
        if not told:
            self._told = True
            self._tell(self._rank, str(error) or type(error).__name__)
            self._see()
        if not told or self._rank == 0:
            with suppress(*_STORE_ERRORS):
                self._linger("seen", self._count("arrived"))

    def close(self) -> None:
        """End the watching thread."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(_JOIN_S)

    def _watch(self) -> None:
        while self._error is None:
            try:
                self._store.add(self._key(f"alive/{self._rank}"), 1)
                self._look_for_failure()
                if self._error is None:
                    self._look_for_neighbour()
            except _STORE_ERRORS as error:
                # After a load that all have finished, whoever held the store may be gone.
                if not self._closing.is_set():
                    self._notice(_store_gone(error))
            if self._closing.wait(self._look_s):
                return

    def _look_for_failure(self) -> None:
        key = self._key("failure")
        if self._store.check([key]):
            told = json.loads(self._store.get(key))
            if told["rank"] != self._rank:
                self._notice(PeerError(f"rank {told['rank']} failed: {told['error']}", rank=told["rank"]))
            elif not self._told:
                # This process was stopped for a while, perhaps. Nobody is there any more to wait for.
                problem = f"the other ranks took this one for gone and ended their loads: {told['error']}"
                self._notice(PeerError(problem, rank=self._rank))

    def _look_for_neighbour(self) -> None:
        problem = self._neighbours_problem()
        if problem is None or self._count("done") >= self._size:
            return
        # Where it failed, it said so before it ended; where somebody else failed first, that is what counts.
        self._tell(self._neighbour, problem)
        self._look_for_failure()

    def _neighbours_problem(self) -> str | None:
        if self._identity is None:
            key = self._key(f"rank/{self._neighbour}")
            if not self._store.check([key]):
                return None
            self._identity = _Identity(**json.loads(self._store.get(key)))
            self._beat_s = time.monotonic()
        if self._identity.visible:
            return "its process is gone" if self._identity.gone else None
        beat, now_s = self._count(f"alive/{self._neighbour}"), time.monotonic()
        if beat != self._beat:
            self._beat, self._beat_s = beat, now_s
        elif now_s - self._beat_s > self._silence_s:
            return f"it has given no sign of life for {format_seconds(now_s - self._beat_s)}"
        return None

    def _tell(self, rank: int, error: str) -> None:
        """Say who failed; the first who says so is heard."""
        with suppress(*_STORE_ERRORS):
            self._store.compare_set(self._key("failure"), "", json.dumps({"rank": rank, "error": error}))

    def _notice(self, error: PeerError) -> None:
        """Another rank has failed."""
        with self._lock:
            if self._error is not None:
                return
            self._error = error
            call = self._on_failure
        self._see()
        if call is not None:
            call(error)

    def _see(self) -> None:
        with suppress(*_STORE_ERRORS):
            self._store.add(self._key("seen"), 1)

    def _linger(self, name: str, count: int) -> None:
        """Stay until so many have been counted, within limits."""
        until_s, wait_s = time.monotonic() + self._linger_s, _LEAST_WAIT_S
        with suppress(*_STORE_ERRORS):
            while self._count(name) < count and time.monotonic() < until_s:
                self._closing.wait(wait_s)
                wait_s = min(2 * wait_s, _MOST_WAIT_S)

    def _give_up(self, limit_s: float, *, ours: bool) -> None:
        ranks = range(self._size)
        absent = [rank for rank in ranks if not self._store.check([self._key(f"rank/{rank}")])]
        late = absent or [rank for rank in ranks if not self._store.check([self._key(f"done/{rank}")])]
        what = "did not begin to load" if absent else "did not end"
        text = f"this rank has loaded everything, but of {self._size} ranks {late[:8]} {what} within "
        if ours:
            raise DeadlineError(f"{text}deadline_s")
        raise PeerError(f"{text}{format_seconds(limit_s)}, the process group's timeout", rank=late[0] if late else None)

    def _count(self, name: str) -> int:
        return int(self._store.add(self._key(name), 0))

    def _key(self, name: str) -> str:
        return self._prefix + name


def join_peers() -> Peers | None:
    """The ranks of the default process group; None where there is none, or only one rank.

    To be called once for each load, on every rank.

    Raises:
        MissingDependencyError: torch is not installed.
    """
    require_torch()
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() < 2:
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    peers = Peers(_get_default_store(), dist.get_rank(), dist.get_world_size(), next(_numbers))
    peers.start()
    return peers


def _again(error: PeerError) -> PeerError:
    """The same error, for another traceback."""
    return PeerError(error.cause, rank=error.rank)


def _store_gone(error: BaseException) -> PeerError:
    return PeerError(
        f"the store of torch.distributed does not answer ({type(error).__name__}: {error}): the process that holds it, "
        "that of rank 0 as a rule, is gone"
    )


def _timeout_s(store: Any) -> float:
    timeout: timedelta = getattr(store, "timeout", _STORE_TIMEOUT)
    return timeout.total_seconds()


def _host() -> str:
    """What tells machines apart, from their last start on; empty where it is not known."""
    with suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return ""


def _pid_namespace() -> str:
    """Within it a process is called by the same number."""
    with suppress(OSError):
        return os.readlink("/proc/self/ns/pid")
    return ""


def _started(pid: int) -> str | None:
    """When a process was started, in the kernel's ticks; None where it is gone or about to be."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # Behind the name: the state, and as the twentieth the time of the start. A zombie has nothing left but its number.
    return None if fields[0] in ("Z", "X") else fields[19]
