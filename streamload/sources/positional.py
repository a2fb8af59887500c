"""Positional reads of a file into views: what runs on a reader thread."""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Sequence

from streamload.checksums import RunningChecksum
from streamload.errors import ObjectChangedError, TruncatedReadError
from streamload.loan import Rows

__all__ = ["SKIPPED_GAP_BYTES", "OpenFile", "ReadAhead", "ReadJob", "passes_over", "version_of"]

# Linux refuses more views in one call (IOV_MAX in limits.h).
_MAX_VIEWS = 1024

# A cancelled read waits for the call that is under way, so one call must be short: 80 ms on a disk of 100 MB/s. Not
# shorter, because the thread waits for its turn with the interpreter after each.
_MAX_CALL_BYTES = 8 << 20

#: Gaps wider than this are passed over; `LocalSource.skipped_gap_bytes` says why.
SKIPPED_GAP_BYTES = 4096

# Rows shorter than this are read by one thread at a time: a call takes a microsecond, and more than twice that where
# two threads make them, each of which waits for the interpreter's lock behind the other, call by call.
_SHORT_BYTES = 64 << 10
# That only saves time, so nobody waits long for one who may hang in the kernel.
_PATIENCE_S = 0.1

# What the kernel reads ahead by itself after a jump, at its usual setting.
_LEAST_AHEAD_BYTES = 128 << 10

# Without O_NONBLOCK, opening what has become a FIFO since it was listed would wait for a writer; files ignore it.
_OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def version_of(status: os.stat_result) -> str:
    """What pins a file's content: its modification time, size and inode."""
    return f"{status.st_mtime_ns}-{status.st_size}-{status.st_ino}"


def passes_over(rows: Rows) -> bool:
    """Whether rows are read one by one, rather than all that lies between the first and the last."""
    return rows.gap_bytes > SKIPPED_GAP_BYTES and rows.nbytes <= _MAX_CALL_BYTES


class OpenFile:
    """One version of a file, its descriptor shared by the threads that read it.

    The first reader opens it, and it stays open until `close`, or until the last reader has left after that: a
    descriptor closed under a reader that hangs would soon name another file.

    Args:
        path: The file.
        version: What `version_of` gave when it was first seen.
    """

    def __init__(self, path: str, version: str) -> None:
        self._path = path
        self._version = version
        self._lock = threading.Lock()  # held for bookkeeping only, never in a call that could hang
        self._fd: int | None = None
        self._readers = 0
        self._closing = False

    def borrow(self) -> int:
        """The descriptor, the file opened if it was not. Each call that returns is paired with one of `give_back`.

        Raises:
            OSError: It cannot be opened.
        """
        with self._lock:
            if self._fd is not None:
                self._readers += 1
                return self._fd
        # Two threads may get here at once, and the second must not wait for a first that hangs.
        fd = os.open(self._path, _OPEN_FLAGS)
        with self._lock:
            self._readers += 1
            if self._fd is None:
                self._fd = fd
                return fd
            first = self._fd
        os.close(fd)
        return first

    def give_back(self) -> None:
        """Say that a reader has left."""
        with self._lock:
            self._readers -= 1
            self._close_if_unused()

    def status(self) -> os.stat_result | None:
        """What the open file is; None where nobody has opened it.

        Raises:
            OSError: It cannot be told.
        """
        with self._lock:
            if self._fd is None:
                return None
            self._readers += 1
            fd = self._fd
        try:
            return os.fstat(fd)
        finally:
            self.give_back()

    def close(self) -> None:
        """Close the descriptor as soon as nobody reads from it."""
        with self._lock:
            self._closing = True
            self._close_if_unused()

    def check(self, fd: int) -> None:
        """Raise ObjectChangedError unless the open file is still the version first seen."""
        found = version_of(os.fstat(fd))
        if found != self._version:
            raise ObjectChangedError(
                f"the file has changed: its modification time, size and inode were {self._version}, they are {found}"
            )

    def _close_if_unused(self) -> None:
        if self._closing and not self._readers and self._fd is not None:
            os.close(self._fd)
            self._fd = None


class ReadAhead:
    """Has the kernel bring ranges into the page cache that it would not read ahead by itself.

    It reads ahead where it sees a sequence. After a jump it begins with a few pages, and a thread would wait for the
    disk again and again; within a range of which pieces are passed over, at every one of them. Ranges are named when
    they are asked for, on the event loop; the first reader thread that begins a read gives the advice about all of
    them.
    """

    def __init__(self) -> None:
        self._ends: dict[OpenFile, int] = {}  # where the last range ended
        self._ranges: deque[tuple[OpenFile, int, int]] = deque()

    def ask(self, file: OpenFile, start: int, nbytes: int, *, gaps: bool) -> None:
        """Name a range that will be read, and whether only parts of it will."""
        # About: the first tensor begins a header behind the file's beginning, and some are left out.
        follows = abs(start - self._ends.get(file, 0)) <= 2 * _LEAST_AHEAD_BYTES
        self._ends[file] = start + nbytes
        if nbytes >= _LEAST_AHEAD_BYTES and (gaps or not follows):
            self._ranges.append((file, start, nbytes))

    def advise(self) -> None:
        """Give the advice; on a reader thread."""
        while True:
            try:
                file, start, nbytes = self._ranges.popleft()
            except IndexError:
                return
            try:
                fd = file.borrow()
            except OSError:
                continue  # which the read itself will tell
            try:
                _bring(fd, start, nbytes)
            finally:
                file.give_back()


def _bring(fd: int, start: int, nbytes: int) -> None:
    try:
        # Advice about 8 MiB that are in the page cache takes 100 µs; to ask for their last byte takes one.
        if os.preadv(fd, (bytearray(1),), start + nbytes - 1, os.RWF_NOWAIT):
            return
    except OSError:  # not there yet, or the file system cannot say
        pass
    try:
        os.posix_fadvise(fd, start, nbytes, os.POSIX_FADV_WILLNEED)
    except OSError:  # advice is no more than that
        return


class ReadJob:
    """One read: fills views, in order, from a file.

    Args:
        file: Where to read.
        views: What to fill.
        offset: Where in the file the first view's bytes are.
        gaps: For each view, whether nobody needs it; wide ones are passed over. None: all are needed.
        rows: What to fill instead of views, one call for each row.
        turn: What reads of short rows take turns by.
        checksum: Told of what is in place, piece by piece; None where nobody wants it summed up, as with gaps.
        ahead: What is to be read ahead, before this read begins.

    Attributes:
        stop: Set by the loop's thread to end the read between two calls.
        filled: How many bytes are in place.
        calls: How many times the kernel was asked to read.
    """

    __slots__ = (
        "_ahead",
        "_checksum",
        "_file",
        "_gaps",
        "_offset",
        "_rows",
        "_turn",
        "_views",
        "calls",
        "filled",
        "stop",
    )

    def __init__(
        self,
        file: OpenFile,
        views: Sequence[memoryview],
        offset: int,
        *,
        gaps: Sequence[bool] | None = None,
        rows: Rows | None = None,
        turn: threading.Lock | None = None,
        checksum: RunningChecksum | None = None,
        ahead: ReadAhead | None = None,
    ) -> None:
        self._ahead = ahead
        self._checksum = checksum
        self._file = file
        self._views = views
        self._gaps = gaps
        self._rows = rows
        self._turn = turn
        self._offset = offset
        self.stop = False
        self.filled = 0
        self.calls = 0

    def run(self) -> OSError | None:
        """Read. Returns what went wrong, so that nobody need be there to catch it when the reader has left."""
        try:
            fd = self._file.borrow()
        except OSError as error:
            return error
        try:
            self._file.check(fd)
            if self._ahead is not None:
                self._ahead.advise()
            complete = self._fill_all(fd)
            self._check_again(fd)
        except OSError as error:
            return error
        finally:
            self._file.give_back()
        if not complete and not self.stop:
            return TruncatedReadError("the file ended before its size said so", valid_bytes=self.filled)
        return None

    def _check_again(self, fd: int) -> None:
        """See that what was read is of the version first seen; where that cannot be told, nothing was read."""
        try:
            self._file.check(fd)
        except OSError:
            self.filled = 0
            raise

    def _fill_all(self, fd: int) -> bool:
        """Fill what was lent; False where it was stopped, or the file ended."""
        rows = self._rows
        if rows is None:
            return self._fill(fd, self._views) if self._gaps is None else self._fill_around(fd, self._gaps)
        if self._turn is None or rows.nbytes >= _SHORT_BYTES:
            return self._fill_rows(fd, rows)
        has_turn = self._turn.acquire(timeout=_PATIENCE_S)
        try:
            return self._fill_rows(fd, rows)
        finally:
            if has_turn:
                self._turn.release()

    def _fill_rows(self, fd: int, rows: Rows) -> bool:
        """Fill rows; as `_fill`. There may be thousands of them, and each is worth a microsecond."""
        memory, nbytes = rows.memory, rows.nbytes
        step = nbytes + rows.gap_bytes
        preadv, offset, began = os.preadv, self._offset, self._offset
        try:
            for start in range(0, memory.nbytes, nbytes):
                if self.stop:
                    return False
                got = preadv(fd, (memory[start : start + nbytes],), offset)
                while got < nbytes:
                    more = preadv(fd, (memory[start + got : start + nbytes],), offset + got) if got else 0
                    self.calls += 1
                    if not more:
                        offset += got
                        return False
                    got += more
                offset += step
            offset -= rows.gap_bytes
        finally:
            # The gaps before what is in place count as well.
            self.filled = offset - began
            self.calls += -(-self.filled // step)
        return True

    def _fill_around(self, fd: int, gaps: Sequence[bool]) -> bool:
        """Fill the views that are needed; False where it was stopped, or the file ended."""
        views = self._views
        count = len(views)
        passed = [gap and view.nbytes > SKIPPED_GAP_BYTES for gap, view in zip(gaps, views, strict=True)]
        first = 0
        while first < count:
            if passed[first]:
                self.filled += views[first].nbytes
                first += 1
                continue
            last = first + 1
            while last < count and not passed[last]:
                last += 1
            # A single view, as of each row of a matrix, without the detours of the general case.
            view = views[first]
            if last == first + 1 and view.nbytes <= _MAX_CALL_BYTES:
                if self.stop:
                    return False
                got = os.preadv(fd, (view,), self._offset + self.filled)
                self.calls += 1
                self.filled += got
                complete = got == view.nbytes or (got > 0 and self._fill(fd, (view[got:],)))
            else:
                complete = self._fill(fd, views[first:last])
            if not complete:
                return False
            first = last
        return True

    def _fill(self, fd: int, views: Sequence[memoryview]) -> bool:
        """Fill these views; False where it was stopped, or the file ended."""
        first = 0  # the first view that is not full
        inside = 0  # how much of it is
        while first < len(views):
            if self.stop:
                return False
            batch = _batch(views, first, inside)
            got = os.preadv(fd, batch, self._offset + self.filled)
            self.calls += 1
            if not got:
                return False
            self.filled += got
            inside += got
            if self._checksum is not None:
                _sum_up(self._checksum, batch, got)
            while first < len(views) and inside >= views[first].nbytes:
                inside -= views[first].nbytes
                first += 1
        return True


def _sum_up(checksum: RunningChecksum, views: Sequence[memoryview], nbytes: int) -> None:
    """Add the first so many bytes of some views."""
    for view in views:
        if nbytes < view.nbytes:
            view = view[:nbytes]
        checksum.add(view)
        nbytes -= view.nbytes
        if not nbytes:
            return


def _batch(views: Sequence[memoryview], first: int, inside: int) -> list[memoryview]:
    """The views for one call: from a byte inside the first of them on, within the bounds of a call."""
    room = _MAX_CALL_BYTES
    batch: list[memoryview] = []
    for index in range(first, min(len(views), first + _MAX_VIEWS)):
        view = views[index][inside:] if inside else views[index]
        inside = 0
        if view.nbytes >= room:
            batch.append(view[:room])
            break
        batch.append(view)
        room -= view.nbytes
    return batch
