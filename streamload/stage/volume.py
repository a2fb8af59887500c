"""What a volume is, how much it has left, and what it takes for something to stay on it.

Source: proc(5) for mountinfo; fallocate(2) and sync_file_range(2).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import os
from collections.abc import Callable
from pathlib import Path

from streamload.errors import SourceError
from streamload.host import host_limits
from streamload.units import format_bytes

__all__ = ["check_space", "in_memory", "reserve", "start_writeback", "sync_folder"]

_SYNC_FILE_RANGE_WRITE = 2
_IN_MEMORY = {"tmpfs", "ramfs"}
# Some file systems cannot make a folder's entries durable by themselves.
_NO_SYNC = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_NOT_RESERVED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}

# The marker, the journal and folders, beside the files themselves.
_OVERHEAD_BYTES = 4 << 20


def in_memory(folder: str, root: Path = Path("/")) -> bool:
    """Whether what is written into a folder stays in memory, which is charged to whoever writes it.

    Args:
        folder: It is there.
        root: Where ``proc`` is mounted.
    """
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    try:
        lines = (root / "proc/self/mountinfo").read_text().splitlines()
    except OSError:
        return False
    for line in lines:
        fields, _, more = line.partition(" - ")
        if fields.split()[2:3] == [number] and more.split()[:1]:
            return more.split()[0] in _IN_MEMORY
    return False


def check_space(folder: str, nbytes: int, *, memory_bytes: int, root: Path = Path("/")) -> None:
    """See that a volume has room for so many bytes more, and the container for them where that is memory.

    Args:
        folder: Where they will be written.
        nbytes: How many.
        memory_bytes: How much memory is needed apart from them.
        root: Where ``proc`` and ``sys`` are mounted.

    Raises:
        SourceError: There is no room.
    """
    if not nbytes:
        return
    needed = nbytes + _OVERHEAD_BYTES
    status = os.statvfs(folder)
    free = status.f_bavail * status.f_frsize
    if needed > free:
        raise SourceError(f"no room: {format_bytes(needed)} are needed, and the volume has {format_bytes(free)} left")
    if in_memory(folder, root):
        limits = host_limits(root)
        if needed + memory_bytes > limits.available_bytes:
            raise SourceError(
                f"no room: this volume is memory, {format_bytes(needed + memory_bytes)} are needed (memory_bytes "
                f"included), and the {limits.bound_by} leaves {format_bytes(limits.available_bytes)}"
            )


def reserve(fd: int, nbytes: int, *, memory: bool) -> None:
    """Make an open file so long, its room on a disk reserved where the file system can.

    Not in memory: pages would be cleared there, only to be written over.

    Raises:
        OSError: There is no room.
    """
    allocate = None if memory else _function("fallocate")
    # Not posix_fallocate, which writes to every block where the file system cannot.
    if allocate is not None and nbytes:
        if allocate(fd, 0, 0, nbytes) == 0:
            return
        number = ctypes.get_errno()
        if number not in _NOT_RESERVED:
            raise OSError(number, os.strerror(number))
    os.ftruncate(fd, nbytes)


def start_writeback(fd: int, start: int, nbytes: int) -> None:
    """Have the kernel begin to write a range to the disk, without waiting for it.

    Left to itself it begins when much is there, and the final fsync waits for all of that. A failure shows at that
    fsync; this is only advice.
    """
    function = _function("sync_file_range")
    if function is not None:
        function(fd, start, nbytes, _SYNC_FILE_RANGE_WRITE)


def sync_folder(path: str) -> None:
    """Make a folder's entries durable, where the file system can.

    Raises:
        OSError: It failed.
    """
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise
    finally:
        os.close(fd)


@functools.cache
def _function(name: str) -> Callable[..., int] | None:
    """A function of the C library's, where it has it."""
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        return None
    function.restype = ctypes.c_int
    offset = ctypes.c_int64
    function.argtypes = {
        "fallocate": [ctypes.c_int, ctypes.c_int, offset, offset],
        "sync_file_range": [ctypes.c_int, offset, offset, ctypes.c_uint],
    }[name]
    found: Callable[..., int] = function
    return found
