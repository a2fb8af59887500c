"""Locks that end with whoever holds them: flock on a file of the volume, across processes and containers."""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from contextlib import suppress

__all__ = ["FileLock"]

_logger = logging.getLogger("streamload.stage")

# Another user's, or on a volume that is read-only.
_ONLY_TO_READ = {errno.EACCES, errno.EPERM, errno.EROFS}
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
        fd = self._open()
        try:
            # Who had it may have removed the file, with all that is around it.
            if self._lock(fd, fcntl.LOCK_SH if shared else fcntl.LOCK_EX) and self._is_at_its_path(fd):
                self._fd, fd = fd, -1
            return self.held
        finally:
            if fd >= 0:
                os.close(fd)

    @property
    def counts(self) -> bool:
        """Whether it is held, and still the file that others look at: what was removed keeps nobody out."""
        return self._fd is not None and self._is_at_its_path(self._fd)

    @property
    def touched_s(self) -> float:
        """When `touch` was called last, by whomever, in seconds since 1970."""
        assert self._fd is not None
        return os.fstat(self._fd).st_mtime

    def touch(self) -> None:
        """Note the time on the file; where it cannot be, a log line says so."""
        assert self._fd is not None
        try:
            os.utime(self._fd)
        except OSError as error:
            # Nobody removes anything from a volume that is read-only.
            if error.errno != errno.EROFS:
                _logger.warning("%s: that this is in use cannot be noted: %s", self.path, error.strerror)

    def release(self) -> None:
        """Let go; the kernel does it where the process ends first."""
        fd, self._fd = self._fd, None
        if fd is not None:
            os.close(fd)

    def _open(self) -> int:
        flags = os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            fd = os.open(self.path, os.O_RDWR | os.O_CREAT | flags, 0o666)
        except OSError as error:
            if error.errno not in _ONLY_TO_READ:
                raise
            # To lock it, and to wait for it, reading is enough.
            with suppress(FileNotFoundError):
                return os.open(self.path, os.O_RDONLY | flags)
            raise
        # Whatever the umask: other users note their use on it, too.
        with suppress(PermissionError):
            if os.fstat(fd).st_mode & 0o666 != 0o666:
                os.fchmod(fd, 0o666)
        return fd

    def _is_at_its_path(self, fd: int) -> bool:
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self.path))
        except FileNotFoundError:
            return False

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
