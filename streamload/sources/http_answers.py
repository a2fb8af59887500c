"""What an HTTP answer says, whoever gives it: a web server, S3, another store, a proxy before them."""

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

__all__ = ["ERRORS", "THROTTLED", "parse_http_date", "retry_after_s"]

ERRORS: Mapping[int, type[SourceError]] = {
    401: CredentialsError,
    403: AccessError,
    404: NotFoundError,
    408: TransientError,
    412: ObjectChangedError,
    429: TransientError,
    500: TransientError,
    502: TransientError,
    503: TransientError,
    504: TransientError,
}
"""What a status means where nothing else is said."""

THROTTLED = frozenset({408, 429, 503})
"""With these the server asks for fewer requests."""


def parse_http_date(text: str | None) -> float | None:
    """Seconds since 1970 of an HTTP date; None where it is none."""
    try:
        date = None if text is None else parsedate_to_datetime(text)
    except (ValueError, OverflowError):
        return None
    # One that names no zone means UTC: HTTP knows no other.
    return None if date is None else (date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp()


def retry_after_s(headers: Mapping[str, str]) -> float | None:
    """How long the server asks to be left alone, in seconds; None where it does not say so, or not clearly.

    Args:
        headers: The answer's, with their names in lower case.
    """
    text = headers.get("retry-after", "").strip()
    if text.isascii() and text.isdigit():
        return float(text)
    until_s = parse_http_date(text)
    if until_s is None:
        return None
    # By the server's own clock, where it tells the time: ours may differ.
    now_s = parse_http_date(headers.get("date"))
    return max(0.0, until_s - (time.time() if now_s is None else now_s))
