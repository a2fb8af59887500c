"""What a sidecar and who asks it say to each other: JSON over HTTP on a Unix socket.

::

    GET  /v1/status      how far it is
    GET  /v1/progress    the same again and again, as server-sent events
    GET  /v1/objects     what is staged; waits until that is known
    POST /v1/range       {"key", "version", "start", "end", "stamp"}: where a range can be read; waits until it can
    POST /v1/verdict     {"key", "version", "stamp"}: waits until a file is whole and verified
    POST /v1/start       begin again, where staging has failed or was cancelled
    POST /v1/cancel      stop staging

200 is an answer; 202 says that it is not yet time, ask again; 503 that this sidecar is about to end, and another one
will go on; all else has ``{"error": …}``. Paths in answers are relative to the socket's folder, since a volume is
mounted elsewhere in another container.
"""

from __future__ import annotations

from typing import Any

from streamload.errors import (
    AccessError,
    CheckpointError,
    ChecksumError,
    CredentialsError,
    DeadlineError,
    IndexFileError,
    ManifestError,
    MissingDependencyError,
    NotFoundError,
    ObjectChangedError,
    OptionError,
    SourceError,
    StreamloadError,
)

__all__ = [
    "ASK_AGAIN_S",
    "CANCEL",
    "MAX_SOCKET_PATH_BYTES",
    "OBJECTS",
    "PROGRESS",
    "RANGE",
    "START",
    "STATUS",
    "VERDICT",
    "error_from",
    "error_to_json",
]

STATUS = "/v1/status"
PROGRESS = "/v1/progress"
OBJECTS = "/v1/objects"
RANGE = "/v1/range"
VERDICT = "/v1/verdict"
START = "/v1/start"
CANCEL = "/v1/cancel"

ASK_AGAIN_S = 20.0
"""After so long a sidecar says 202: who hears nothing for much longer asks one that hangs."""

MAX_SOCKET_PATH_BYTES = 107
"""unix(7): 108 with the null byte at the end."""


# All others are told as a SourceError: one that is worth another try has had that.
_KINDS: dict[str, type[StreamloadError]] = {
    kind.__name__: kind
    for kind in (
        AccessError,
        CheckpointError,
        ChecksumError,
        CredentialsError,
        DeadlineError,
        IndexFileError,
        ManifestError,
        MissingDependencyError,
        NotFoundError,
        ObjectChangedError,
        OptionError,
    )
}


def error_to_json(error: StreamloadError) -> dict[str, Any]:
    """An error as it is told."""
    return {
        "kind": type(error).__name__,
        "cause": error.cause,
        "uri": error.uri,
        "object": error.object,
        "start": error.start,
        "end": error.end,
    }


def error_from(said: object, *, uri: str) -> StreamloadError:
    """The error that a sidecar tells of, of the same kind; not one to try again, since the sidecar has done that.

    Args:
        said: What `error_to_json` made.
        uri: The sidecar's.
    """
    if not isinstance(said, dict) or not isinstance(said.get("cause"), str):
        return SourceError("the sidecar's answer makes no sense", uri=uri)
    kind = _KINDS.get(str(said.get("kind")), SourceError)
    origin, object = said.get("uri"), said.get("object")
    start, end = said.get("start"), said.get("end")
    located = type(start) is int and type(end) is int
    return kind(
        f"the sidecar could not stage {origin}: {said['cause']}" if isinstance(origin, str) else said["cause"],
        uri=uri,
        object=object if isinstance(object, str) else None,
        start=start if located else None,
        end=end if located else None,
    )
