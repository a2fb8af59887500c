"""One file on its way: of its full length from the start, filled in any order, and under its name when it is whole."""

from __future__ import annotations

import os
from collections.abc import Collection
from contextlib import suppress

from streamload.errors import SourceError
from streamload.stage.names import LOCK_NAME, is_unfinished, unfinished_name
from streamload.stage.volume import reserve, start_writeback, sync_folder

__all__ = ["StagedFile", "remove_unfinished"]

# What is cancelled waits for the call that is under way, so one call must be short.
_MAX_CALL_BYTES = 8 << 20


def remove_unfinished(folder: str, *, but: Collection[str]) -> None:
    """Remove what a killed process has left of files that nobody goes on with; it takes as much room as whole ones.

    Args:
        folder: Where to look, and in the folders below, but for those that are staged into by themselves.
        but: The keys of those that are gone on with.

    Raises:
        OSError: One cannot be removed.
    """
    mine = {os.path.join(folder, unfinished_name(key)) for key in but}
    for parent, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not os.path.lexists(os.path.join(parent, name, LOCK_NAME))]
        for path in (os.path.join(parent, name) for name in names if is_unfinished(name)):
            if path not in mine:
                os.unlink(path)


class StagedFile:
    """A file that is being staged. Its methods block; different ranges may be read and written at once.

    Args:
        folder: What its key is relative to.
        key: Its name.
        size_bytes: Its length.
        memory: Whether the volume is memory: then there is nothing to write back.
    """

    def __init__(self, folder: str, key: str, size_bytes: int, *, memory: bool) -> None:
        self.key = key
        self.size_bytes = size_bytes
        self.path = os.path.join(folder, key)
        self.unfinished = os.path.join(folder, unfinished_name(key))
        self._memory = memory
        self._fd: int | None = None

    def open(self, *, keep: bool) -> bool:
        """Have it, of its full length.

        Args:
            keep: Go on with one of that length that is there, rather than beginning anew.

        Returns:
            Whether one was gone on with.

        Raises:
            OSError: It cannot be made, or there is no room.
        """
        os.makedirs(os.path.dirname(self.path), exist_ok=True)
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW
        if keep:
            with suppress(FileNotFoundError):
                fd = os.open(self.unfinished, flags)
                if os.fstat(fd).st_size == self.size_bytes:
                    self._fd = fd
                    return True
                os.close(fd)
        # Not emptied but removed: somebody may have it open, and read what has landed.
        with suppress(FileNotFoundError):
            os.unlink(self.unfinished)
        self._fd = os.open(self.unfinished, flags | os.O_CREAT | os.O_EXCL, 0o666)
        reserve(self._fd, self.size_bytes, memory=self._memory)
        return False

    def write(self, data: memoryview, start: int) -> None:
        """Put bytes in their place, and have them on their way to the disk.

        Raises:
            OSError: They cannot be written.
        """
        assert self._fd is not None
        position = start
        for at in range(0, data.nbytes, _MAX_CALL_BYTES):
            piece = data[at : at + _MAX_CALL_BYTES]
            while piece.nbytes:
                written = os.pwritev(self._fd, (piece,), position)
                position += written
                piece = piece[written:]
        if not self._memory:
            start_writeback(self._fd, start, data.nbytes)

    def read(self, into: memoryview, start: int) -> bool:
        """Fill memory with what is there; whether there was so much.

        Raises:
            OSError: It cannot be read.
        """
        assert self._fd is not None
        filled = 0
        while filled < into.nbytes:
            got = os.preadv(self._fd, (into[filled:],), start + filled)
            if not got:
                return False
            filled += got
        return True

    def sync(self) -> int:
        """Make what was written durable; the file's time of change, in nanoseconds.

        Raises:
            OSError: It cannot be done.
        """
        assert self._fd is not None
        if not self._memory:
            os.fsync(self._fd)
        status = os.fstat(self._fd)
        # Who truncates it under our hands must not get it a name.
        if status.st_size != self.size_bytes:
            raise SourceError(f"the unfinished file has {status.st_size} bytes, not {self.size_bytes}")
        return status.st_mtime_ns

    def publish(self) -> None:
        """Give it its name, in place of what is there, and close it.

        Raises:
            OSError: It cannot be done.
            SourceError: What would get, or has got, the name is another file.
        """
        # Where locks keep nobody out (none on this mount, or the lock's file was removed), another process may have put
        # its own, which is still empty, in the place of ours.
        self._check_place(self.unfinished)
        os.rename(self.unfinished, self.path)
        self._check_place(self.path)
        self.close()

    def _check_place(self, path: str) -> None:
        assert self._fd is not None
        try:
            ours = os.path.samestat(os.fstat(self._fd), os.lstat(path))
        except FileNotFoundError:
            ours = False
        if not ours:
            raise SourceError(f"{path} is not what was written here: another process has replaced or removed it")

    def sync_name(self) -> None:
        """Make its name durable, where it lies in a folder below the one that the marker is in.

        Raises:
            OSError: It cannot be done.
        """
        if not self._memory and os.path.dirname(self.key):
            sync_folder(os.path.dirname(self.path))

    def close(self) -> None:
        """Close it; what there is of it stays."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)
