"""What an HTTP server's refusal means for a request."""

from __future__ import annotations

import time
from collections.abc import Mapping
from datetime import UTC
from email.utils import parsedate_to_datetime

from streamload.errors import (
    AccessError,
    CredentialsError,
    NotFoundError,
    ObjectChangedError,
    SourceError,
    TransientError,
)
from streamload.wire import Head

__all__ = ["parse_http_date", "refusal"]

_KINDS: dict[int, type[SourceError]] = {
    401: CredentialsError,
    403: AccessError,
    404: NotFoundError,
    407: AccessError,
    408: TransientError,
    410: NotFoundError,
    412: ObjectChangedError,
    416: ObjectChangedError,
    425: TransientError,
    429: TransientError,
    451: AccessError,
    500: TransientError,
    502: TransientError,
    503: TransientError,
    504: TransientError,
}

# With these the server asks for fewer requests.
_THROTTLED = {408, 429, 503}

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
        return TransientError(cause, throttled=head.status in _THROTTLED, retry_after_s=_retry_after_s(head.headers))
    return kind(cause)


def parse_http_date(text: str | None) -> float | None:
    """Seconds since 1970 of an HTTP date; None where it is none."""
    try:
        date = None if text is None else parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    # One that names no zone means UTC: HTTP knows no other.
    return None if date is None else (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """How long the server asks to be left alone, in seconds; None where it does not say so, or not clearly."""
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    until_s = parse_http_date(text)
    if until_s is None:
        return None
    # By the server's own clock, where it tells the time: ours may differ.
    now_s = parse_http_date(headers.get("date"))
    return max(0.0, until_s - (time.time() if now_s is None else now_s))
