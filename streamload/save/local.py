"""Files on disks: written under a temporary name, made durable, renamed."""

from __future__ import annotations

import asyncio
import ctypes
import errno
import fcntl
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any, TypeVar

from streamload.checksums import BlockSums
from streamload.errors import SourceError
from streamload.save.base import NOTHING_KEPT, Ask, Destination, NewFile
from streamload.sources.local import path_of
from streamload.sources.os_errors import translate_os_error
from streamload.sources.threads import DaemonExecutor, ThreadCall

__all__ = ["LocalDestination"]

T = TypeVar("T")

# Neither a shard file nor hidden from who looks for what takes the room; nothing else is called so.
_PREFIX, _SUFFIX = ".", ".streamload-unfinished"

# A cancelled save waits for the call that is under way, so one call must be short.
_MAX_CALL_BYTES = 8 << 20

# Long enough that a disk writes it in one go.
_FLUSHED_BYTES = 8 << 20
_SYNC_FILE_RANGE_WRITE = 2
# Not in every C library.
_sync_file_range = getattr(ctypes.CDLL(None), "sync_file_range", None)

# How long to wait for a call that hangs, on a mount that is dead perhaps.
_GRACE_S = 10.0
_THREAD_EXIT_S = 1.0

# Some mounts know no locks.
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
# And some cannot make a folder's entries durable by themselves.
_NO_SYNC = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class LocalDestination(Destination):
    """A folder of this machine, mounts included.

    What is written lies under a name that no loader looks at until it is durable. That file is locked meanwhile: a
    second save of the same name fails, and what a killed one has left is written over.

    Args:
        uri: A path, or a ``file://`` URI.
        memory_bytes: Nothing is held here.
        ask: Nothing is tried twice here: a disk that is full stays so.
        files: Any number is written at the same time.
    """

    def __init__(self, uri: str, *, memory_bytes: int, ask: Ask, files: int = 1) -> None:
        super().__init__(uri)
        self._path = path_of(uri)
        self._claimed: _LocalFile | None = None
        self._threads = DaemonExecutor(self.concurrency, name="streamload-write")

    async def claim(self, name: str) -> None:
        if self._claimed is not None:
            await self._claimed.discard()
        await self.run(lambda: os.makedirs(self._path, exist_ok=True), None)
        # A file that is locked until the end, and never published.
        self._claimed = _LocalFile(self, self._path, name, 0)
        await self.run(self._claimed.open, None)

    async def prepare(
        self, mine: Callable[[str], bool], kept: Mapping[str, dict[str, Any]] = NOTHING_KEPT
    ) -> list[str]:
        return await self.run(lambda: _prepare(self._path, mine, kept), None)

    def check_fits(self, sizes: Sequence[int]) -> None:
        # What is written takes no memory here.
        pass

    async def create(self, name: str, size_bytes: int) -> NewFile:
        file = _LocalFile(self, self._path, name, size_bytes)
        try:
            await self.run(file.open, name)
        except BaseException:
            await file.discard()
            raise
        return file

    async def reopen(
        self, name: str, size_bytes: int, kept: Mapping[str, Any], sums: Sequence[tuple[int, int]] = ()
    ) -> NewFile | None:
        file = _LocalFile(self, self._path, name, size_bytes)
        try:
            if not await self.run(lambda: file.reopen(kept), name):
                return None
            # Inodes are given out again: by its number alone, another save's file may pass for one that is not
            # finished and has no time of its own.
            if not file.published and kept["bytes"] < size_bytes and not await file.holds(sums):
                await file.leave()
                return None
        except BaseException:
            await file.leave()
            raise
        return file

    async def write_all(self, pieces: Sequence[tuple[NewFile, memoryview]]) -> None:
        def write() -> None:
            for file, data in pieces:
                assert isinstance(file, _LocalFile)
                try:
                    file.append(data)
                except OSError as error:
                    raise translate_os_error(error, uri=self.uri, object=file.name) from error

        # On one thread: to wake one for each piece takes longer than to write it.
        await self.run(write, None)

    async def remove(self, name: str) -> None:
        await self.run(lambda: _unlink(os.path.join(self._path, name)), name)

    async def run(self, call: Callable[[], T], name: str | None) -> T:
        """Make a call on a thread; returns or raises only when the thread has left it, unless it hangs.

        Raises:
            SourceError: What the system's error means.
        """
        running = ThreadCall(self._threads, call)
        try:
            return await running.result()
        except asyncio.CancelledError:
            if not running.take_back():
                await running.left(_GRACE_S)
            raise
        except OSError as error:
            if isinstance(error, SourceError):
                raise error.locate(uri=self.uri, object=name) from None
            raise translate_os_error(error, uri=self.uri, object=name) from error
        except ValueError as error:  # a path with a null byte
            raise SourceError(str(error), uri=self.uri, object=name) from error

    async def aclose(self) -> None:
        claimed, self._claimed = self._claimed, None
        if claimed is not None:
            await claimed.discard()
        self._threads.shutdown(wait=False, cancel_futures=True)
        ended = asyncio.wrap_future(self._threads.ended)
        await asyncio.wait({ended}, timeout=_GRACE_S)
        if self._threads.ended.done():
            self._threads.join(_THREAD_EXIT_S)
        else:
            ended.cancel()


class _LocalFile(NewFile):
    def __init__(self, folder: LocalDestination, path: str, name: str, size_bytes: int) -> None:
        super().__init__(name, size_bytes)
        self._folder = folder
        self._parent = path
        self._final = os.path.join(path, name)
        self._unfinished = os.path.join(path, f"{_PREFIX}{name}{_SUFFIX}")
        self._fd: int | None = None
        self._position = 0
        # Up to where the disk was asked to begin.
        self._flushing = 0
        # Whether the unfinished file is ours: after `leave` too.
        self._begun = False

    def open(self, kept_bytes: int = 0) -> None:
        """On a thread: have the file, locked, and without what lies beyond some first bytes."""
        while self._fd is None:
            fd = os.open(self._unfinished, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                if not _lock(fd):
                    raise SourceError("another save is writing this file")
                # Who had it locked may have renamed or removed it meanwhile.
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), os.stat(self._unfinished)):
                        if os.fstat(fd).st_size != kept_bytes:  # else it would be changed, for who looks at its time
                            os.ftruncate(fd, kept_bytes)
                        self._fd, fd = fd, -1
                        self._position, self._begun = kept_bytes, True
            finally:
                if fd >= 0:
                    os.close(fd)

    def reopen(self, kept: Mapping[str, Any]) -> bool:
        """On a thread: have the file as it was kept, or as it was published since; whether it is there."""
        nbytes, inode, time = kept.get("bytes"), kept.get("inode"), kept.get("mtime_ns")
        if type(nbytes) is not int or not 0 <= nbytes <= self.size_bytes:
            return False
        with suppress(FileNotFoundError):
            status = os.stat(self._unfinished, follow_symlinks=False)
            whole = status.st_size == nbytes == self.size_bytes
            if status.st_ino == inode and (status.st_mtime_ns == time if whole else status.st_size >= nbytes):
                self.open(nbytes)
                return True
        with suppress(FileNotFoundError):
            status = os.stat(self._final)
            whole = status.st_size == nbytes == self.size_bytes
            self.published = whole and (status.st_ino, status.st_mtime_ns) == (inode, time)
        return self.published

    async def holds(self, sums: Sequence[tuple[int, int]]) -> bool:
        """Whether what was written so far is stretches of these lengths and checksums."""
        if sum(nbytes for nbytes, _ in sums) != self._position:
            return False
        found = BlockSums(nbytes for nbytes, _ in sums)
        for start in range(0, self._position, _MAX_CALL_BYTES):
            nbytes = min(_MAX_CALL_BYTES, self._position - start)
            await self._folder.run(lambda at=start, nbytes=nbytes: found.add(self._read(at, nbytes)), self.name)  # type: ignore[misc]
        return list(found.values) == [value for _, value in sums]

    def _read(self, start: int, nbytes: int) -> memoryview:
        assert self._fd is not None
        data = os.pread(self._fd, nbytes, start)
        if len(data) != nbytes:
            raise SourceError(f"the file has become shorter than {start + nbytes} bytes")
        return memoryview(data)

    async def write(self, data: memoryview) -> None:
        for start in range(0, data.nbytes, _MAX_CALL_BYTES):
            piece = data[start : start + _MAX_CALL_BYTES]
            await self._folder.run(lambda piece=piece: self.append(piece), self.name)  # type: ignore[misc]

    def append(self, data: memoryview) -> None:
        """On a thread: write the next bytes."""
        assert self._fd is not None
        while data.nbytes:
            written = os.pwrite(self._fd, data, self._position)
            self._position += written
            data = data[written:]
        if self._position - self._flushing >= _FLUSHED_BYTES:
            _begin_flush(self._fd, self._flushing, self._position - self._flushing)
            self._flushing = self._position

    async def finish(self) -> None:
        if self._position != self.size_bytes:
            raise AssertionError(f"{self._position} of {self.size_bytes} bytes were written")
        await self._folder.run(self._finish, self.name)

    def _finish(self) -> None:
        assert self._fd is not None
        os.fsync(self._fd)

    async def publish(self) -> None:
        if not self.published:
            await self._folder.run(self._publish, self.name)

    def _publish(self) -> None:
        os.rename(self._unfinished, self._final)
        self.published = True
        self._close()
        _sync_folder(self._parent)

    async def keep(self) -> dict[str, Any] | None:
        return await self._folder.run(self._keep, self.name)

    def _keep(self) -> dict[str, Any]:
        assert self._fd is not None
        os.fsync(self._fd)
        status = os.fstat(self._fd)
        return {"bytes": self._position, "inode": status.st_ino, "mtime_ns": status.st_mtime_ns}

    async def leave(self) -> None:
        await self._folder.run(self._close, self.name)

    async def discard(self) -> None:
        await self._folder.run(self._discard, self.name)

    def _discard(self) -> None:
        if self.published:
            self.published = False
            _unlink(self._final)
        elif self._begun:
            try:
                # Before it is unlocked: afterwards it may be another save's.
                _unlink(self._unfinished)
            finally:
                self._close()
        self._begun = False

    def _close(self) -> None:
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)


def _prepare(path: str, mine: Callable[[str], bool], kept: Collection[str]) -> list[str]:
    os.makedirs(path, exist_ok=True)
    there: list[str] = []
    for name in sorted(os.listdir(path)):
        if mine(name):
            there.append(name)
        elif name.startswith(_PREFIX) and name.endswith(_SUFFIX):
            meant = name[len(_PREFIX) : -len(_SUFFIX)]
            if mine(meant) and meant not in kept:
                _remove_unlocked(os.path.join(path, name))
    return there


def _remove_unlocked(path: str) -> None:
    """Remove what an interrupted save has left; what another one is writing stays."""
    try:
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    except FileNotFoundError:
        return
    try:
        if _lock(fd):
            _unlink(path)
    finally:
        os.close(fd)


def _lock(fd: int) -> bool:
    """Lock an open file; whether nobody else had. The kernel ends the lock with the process."""
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True


def _unlink(path: str) -> None:
    with suppress(FileNotFoundError):
        os.unlink(path)


def _begin_flush(fd: int, start: int, nbytes: int) -> None:
    """Have the kernel begin to write to the disk, and not wait for it: then there is less to wait for at the end."""
    # What it says is of no interest: it is advice, and fsync comes all the same.
    if _sync_file_range is not None:
        _sync_file_range(fd, ctypes.c_int64(start), ctypes.c_int64(nbytes), ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))


def _sync_folder(path: str) -> None:
    """Make a rename durable, where the file system can."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(fd)
