"""What an HTTP server's refusal means for a request."""

from __future__ import annotations

from streamload.errors import (
    AccessError,
    NotFoundError,
    ObjectChangedError,
    SourceError,
    TransientError,
)
from streamload.sources.http_answers import ERRORS, THROTTLED, retry_after_s
from streamload.wire import Head

__all__ = ["refusal"]

_KINDS: dict[int, type[SourceError]] = {
    **ERRORS,
    407: AccessError,
    410: NotFoundError,
    416: ObjectChangedError,
    425: TransientError,
    451: AccessError,
}

_MEANINGS = {
    401: "it wants credentials, or others than it got",
    403: "access is refused",
    404: "there is no such object",
    407: "the proxy wants credentials",
    410: "the object is gone",
    412: "the object is no longer the version that was seen first",
    416: "the object is shorter than it was",
    451: "access is refused for legal reasons",
}


def refusal(head: Head, host: str) -> SourceError:
    """The error that an answer means which brings no content; the caller locates it.

    The answer's body is left out: it is a page for people mostly, and some servers repeat a signature in it.

    Args:
        head: The answer's, with a status of 300 or more.
        host: Who answered.
    """
    kind = _KINDS.get(head.status, SourceError)
    said = f"{host} answered {head.status}"
    cause = f"{_MEANINGS[head.status]} ({said})" if head.status in _MEANINGS else said
    if kind is TransientError:
        return TransientError(cause, throttled=head.status in THROTTLED, retry_after_s=retry_after_s(head.headers))
    return kind(cause)
