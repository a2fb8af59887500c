"""Locks that end with whoever holds them: flock on a file of the volume, across processes and containers."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from contextlib import suppress

__all__ = ["FileLock"]

_logger = logging.getLogger("streamload.stage")

# Some mounts know no locks.
_NO_LOCKS = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}


class FileLock:
    """A lock on a file, which is made where it is missing.

    Args:
        path: The file.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd: int | None = None

    @property
    def held(self) -> bool:
        """Whether this holds it."""
        return self._fd is not None

    def take(self, *, shared: bool = False) -> bool:
        """Take it if nobody has it, or nobody has it for himself alone where it is shared; whether it was.

        Raises:
            OSError: The file cannot be opened.
        """
        flags = os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        except PermissionError:
            # Another user's: to lock it, and to wait for it, reading is enough.
            fd = os.open(self.path, os.O_RDONLY | flags)
        try:
            if self._lock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX):
                # Who had it may have removed the file, with all that is around it.
                with suppress(FileNotFoundError):
                    if os.path.samestat(os.fstat(fd), os.stat(self.path)):
                        self._fd, fd = fd, -1
            return self.held
        finally:
            if fd >= 0:
                os.close(fd)

    def touch(self) -> None:
        """Note the time on the file, where that is ours to do."""
        assert self._fd is not None
        with suppress(PermissionError):
            os.utime(self._fd)

    def release(self) -> None:
        """Let go; the kernel does it where the process ends first."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _lock(self, fd: int, kind: int) -> bool:
        try:
            fcntl.flock(fd, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            _logger.warning("%s: this volume has no locks; nothing else may stage here", self.path)
        return True
