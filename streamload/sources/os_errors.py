"""What an error of the operating system means for a read."""

from __future__ import annotations

import errno
import os

from streamload.errors import AccessError, NotFoundError, ObjectChangedError, SourceError, TransientError

__all__ = ["translate_os_error"]

_KINDS: dict[int, type[SourceError]] = {
    errno.ENOENT: NotFoundError,
    errno.ENOTDIR: NotFoundError,
    errno.ENAMETOOLONG: NotFoundError,
    errno.ENXIO: NotFoundError,
    errno.EACCES: AccessError,
    errno.EPERM: AccessError,
    # NFS: the server has replaced the file that the handle was for.
    errno.ESTALE: ObjectChangedError,
    # What mounts over a network (FUSE, NFS) answer while the far side is away; a broken disk answers EIO as well, and
    # then a few more attempts do no harm.
    errno.EIO: TransientError,
    errno.EAGAIN: TransientError,
    errno.EINTR: TransientError,
    errno.ETIMEDOUT: TransientError,
    errno.EREMOTEIO: TransientError,
    errno.ECONNABORTED: TransientError,
    errno.ECONNREFUSED: TransientError,
    errno.ECONNRESET: TransientError,
    errno.EHOSTDOWN: TransientError,
    errno.EHOSTUNREACH: TransientError,
    errno.ENETDOWN: TransientError,
    errno.ENETUNREACH: TransientError,
    errno.ENOTCONN: TransientError,
}


def translate_os_error(
    error: OSError,
    *,
    uri: str,
    object: str | None = None,
    start: int | None = None,
    end: int | None = None,
    valid_bytes: int = 0,
) -> SourceError:
    """The error of ours that says the same, located."""
    kind = SourceError if error.errno is None else _KINDS.get(error.errno, SourceError)
    if error.errno is None:
        cause = str(error) or type(error).__name__
    else:
        cause = f"{os.strerror(error.errno)} ({errno.errorcode.get(error.errno, error.errno)})"
    return kind(cause, uri=uri, object=object, start=start, end=end, valid_bytes=valid_bytes)
