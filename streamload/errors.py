"""Every error that streamload raises, in one tree.

::

    StreamloadError
    ├── OptionError              (ValueError)         an option has no meaning, or two contradict each other
    ├── MissingDependencyError   (ImportError)        torch, or another optional library, is not installed
    ├── CheckpointError          (ValueError)         the files do not make a checkpoint
    │   ├── HeaderError                               a file is not valid safetensors
    │   ├── IndexFileError                            the index does not fit the files
    │   ├── ManifestError                             the manifest is none, or was written for other files
    │   ├── MismatchError                             its tensors do not fit those that they are to fill
    │   └── UnsupportedDtypeError                     torch has no such dtype
    ├── SourceError              (OSError)            bytes could not be had, or not be put in their place
    │   ├── NotFoundError        (FileNotFoundError)  no such bucket, key, directory or file
    │   ├── AccessError          (PermissionError)    refused
    │   │   └── CredentialsError                      nothing to sign with, or it was not accepted
    │   ├── ChecksumError                             what arrived is not what the source keeps
    │   ├── ObjectChangedError                        the object is no longer the version first seen
    │   └── TransientError                            worth another try; ``retryable`` is true
    │       └── TruncatedReadError                    the bytes ended before the range did
    ├── DeviceError              (RuntimeError)       the device does not exist or refused
    ├── MemoryLimitError         (MemoryError)        a tensor is larger than a strict limit, or no memory is left
    ├── DeadlineError            (TimeoutError)       the load did not end in time
    ├── PeerError                (RuntimeError)       another rank failed, or is gone
    └── ClosedError              (RuntimeError)       the stream was closed, or belongs to another process

Each names where it happened in the attributes ``uri``, ``object``, ``start``, ``end`` and ``attempts``. Errors
survive pickling, and their text passes through `streamload.uris.scrub`, so that no credential shows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Self

from streamload.uris import scrub, scrub_uri

__all__ = [
    "AccessError",
    "CheckpointError",
    "ChecksumError",
    "ClosedError",
    "CredentialsError",
    "DeadlineError",
    "DeviceError",
    "HeaderError",
    "IndexFileError",
    "ManifestError",
    "MemoryLimitError",
    "MismatchError",
    "MissingDependencyError",
    "NotFoundError",
    "ObjectChangedError",
    "OptionError",
    "PeerError",
    "SourceError",
    "StreamloadError",
    "TransientError",
    "TruncatedReadError",
    "UnsupportedDtypeError",
]


class StreamloadError(Exception):
    """The root of all errors that streamload raises.

    Args:
        cause: What went wrong, in words; one line.
        uri: The URI that the caller gave, without credentials.
        object: The object's key, relative to the URI (a file's name, usually).
        start: The first byte of the range that was asked for.
        end: One past its last byte.
        attempts: How many times it was tried, where it was tried at all.
        valid_bytes: How many leading bytes of the range arrived whole before the failure.
    """

    retryable: ClassVar[bool] = False

    def __init__(
        self,
        cause: str,
        *,
        uri: str | None = None,
        object: str | None = None,
        start: int | None = None,
        end: int | None = None,
        attempts: int | None = None,
        valid_bytes: int = 0,
    ) -> None:
        self.cause = scrub(" ".join(cause.split()))
        super().__init__(self.cause)
        self.uri = None if uri is None else scrub_uri(uri)
        self.object = object
        self.start = start
        self.end = end
        self.attempts = attempts
        self.valid_bytes = valid_bytes

    def locate(
        self,
        *,
        uri: str | None = None,
        object: str | None = None,
        start: int | None = None,
        end: int | None = None,
        attempts: int | None = None,
    ) -> Self:
        """Fill in what the place that raised did not know; what it knew stays. Returns the error itself."""
        if self.uri is None and uri is not None:
            self.uri = scrub_uri(uri)
        if self.object is None:
            self.object = object
        if self.start is None and self.end is None:
            self.start, self.end = start, end
        if self.attempts is None:
            self.attempts = attempts
        return self

    def remark(self, text: str) -> Self:
        """Say something more about the cause. Returns the error itself."""
        self.cause = scrub(" ".join(f"{self.cause}; {text}".split()))
        self.args = (self.cause,)
        return self

    def __str__(self) -> str:
        where = [part for part in (self.uri, self.object) if part]
        if self.start is not None and self.end is not None:
            where.append(f"bytes {self.start}-{self.end}")
        text = f"{', '.join(where)}: {self.cause}" if where else self.cause
        if self.attempts is not None and self.attempts > 1:
            text += f" (after {self.attempts} attempts)"
        return text

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild, (type(self), self.cause, self._state()))

    def _state(self) -> dict[str, Any]:
        return {
            "uri": self.uri,
            "object": self.object,
            "start": self.start,
            "end": self.end,
            "attempts": self.attempts,
            "valid_bytes": self.valid_bytes,
        }


def _rebuild(kind: type[StreamloadError], cause: str, state: dict[str, Any]) -> StreamloadError:
    return kind(cause, **state)


class OptionError(StreamloadError, ValueError):
    """An option's value has no meaning, or two options contradict each other."""


class MissingDependencyError(StreamloadError, ImportError):
    """An optional library that this needs is not installed; the text says which and how to get it."""


class CheckpointError(StreamloadError, ValueError):
    """The files do not make a checkpoint."""


class HeaderError(CheckpointError):
    """A file is not valid safetensors."""


class IndexFileError(CheckpointError):
    """The index file is not valid, or names what is not there."""


class ManifestError(CheckpointError):
    """The manifest beside the weights is not valid, or was written for other files than those."""


class MismatchError(CheckpointError):
    """The checkpoint's tensors do not fit those that they are to fill: other names, larger shapes, other dtypes.

    Args:
        cause: As of every error; so are the other arguments.
        missing: All names that the checkpoint lacks.
        unexpected: All names that it has beyond those that are to be filled.
    """

    def __init__(
        self, cause: str, *, missing: Sequence[str] = (), unexpected: Sequence[str] = (), **where: Any
    ) -> None:
        super().__init__(cause, **where)
        self.missing = tuple(missing)
        self.unexpected = tuple(unexpected)

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"missing": self.missing, "unexpected": self.unexpected}


class UnsupportedDtypeError(CheckpointError):
    """A tensor's dtype is valid in the format but the installed torch has none to hold it."""


class SourceError(StreamloadError, OSError):
    """Bytes could not be had from the source, or, where something is saved, not be put in their place."""


class NotFoundError(SourceError, FileNotFoundError):
    """There is no such bucket, key, directory or file."""


class AccessError(SourceError, PermissionError):
    """The source refused."""


class CredentialsError(AccessError):
    """There are no credentials to sign with, or the ones found were not accepted."""


class ChecksumError(SourceError):
    """What arrived is not what the source or the manifest says, or nothing vouches for it and something had to.

    Where it is the source's checksum of a whole object, tensors of it may have been handed out already.
    """


class ObjectChangedError(SourceError):
    """An object is no longer the version that the load began with."""


class TransientError(SourceError):
    """The source failed in a way that another try may mend.

    Args:
        cause: As of every error; so are the other arguments.
        throttled: Whether the source asked for less, or did not answer in time: fewer reads at once may help.
        retry_after_s: How long the source asked to be left alone, in seconds; None where it did not say.
    """

    retryable: ClassVar[bool] = True

    def __init__(
        self, cause: str, *, throttled: bool = False, retry_after_s: float | None = None, **where: Any
    ) -> None:
        super().__init__(cause, **where)
        self.throttled = throttled
        self.retry_after_s = retry_after_s

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"throttled": self.throttled, "retry_after_s": self.retry_after_s}


class TruncatedReadError(TransientError):
    """The bytes ended before the range did."""


class DeviceError(StreamloadError, RuntimeError):
    """The device does not exist, or refused what was asked of it."""


class MemoryLimitError(StreamloadError, MemoryError):
    """A tensor is larger than a strict ``memory_bytes``, or the system has no memory for it."""


class DeadlineError(StreamloadError, TimeoutError):
    """The load did not end within ``deadline_s``."""


class PeerError(StreamloadError, RuntimeError):
    """Another rank's load failed, or that rank is gone, and so this rank's load was ended.

    Args:
        cause: As of every error; so are the other arguments.
        rank: The rank that failed, as torch.distributed counts them; None where it is not known.
    """

    def __init__(self, cause: str, *, rank: int | None = None, **where: Any) -> None:
        super().__init__(cause, **where)
        self.rank = rank

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"rank": self.rank}


class ClosedError(StreamloadError, RuntimeError):
    """The stream was closed already, or belongs to the process that this one was forked from."""
