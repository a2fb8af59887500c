"""The head of an HTTP/1.1 response, parsed by llhttp."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import httptools

from streamload.errors import SourceError

__all__ = ["MAX_HEAD_BYTES", "ErrorBody", "Head", "parse_head"]

# What servers and clients commonly allow; S3's heads have less than 2 KiB.
MAX_HEAD_BYTES = 64 << 10

# Of an error's explanation; S3's have less than 1 KiB.
_MAX_ERROR_BYTES = 64 << 10

# Of a number of 64 bits.
_MAX_LENGTH_DIGITS = 20

# Two of one of these, and two readers may take two different ones for the truth.
_SINGLE = ("content-length", "content-range", "content-encoding", "etag", "transfer-encoding")


@dataclass(frozen=True, slots=True)
class Head:
    """A response without its body.

    Attributes:
        status: 206, for example.
        headers: Their values by lower-case name; of several with one name, joined by a comma and a space.
        keep_alive: Whether the server lets the connection be used again.
    """

    status: int
    headers: Mapping[str, str]
    keep_alive: bool

    @property
    def body_bytes(self) -> int | None:
        """How long the body is; None where the head does not tell, or tells it in pieces."""
        text = self.headers.get("content-length")
        return None if text is None or "transfer-encoding" in self.headers else int(text)


class _Fields:
    def __init__(self) -> None:
        self.headers: dict[str, str] = {}
        self.complete = False

    def on_header(self, name: bytes, value: bytes) -> None:
        key, text = name.decode("latin-1").lower(), value.decode("latin-1").strip()
        if key in self.headers:
            if key in _SINGLE:
                raise ValueError(f"two headers {key!r}")
            text = f"{self.headers[key]}, {text}"
        self.headers[key] = text

    def on_headers_complete(self) -> None:
        self.complete = True


def parse_head(data: bytes) -> Head:
    """Parse a response's head, the empty line at its end included.

    Raises:
        SourceError: It is none.
    """
    fields = _Fields()
    parser = httptools.HttpResponseParser(fields)
    try:
        parser.feed_data(data)
    except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
        raise SourceError(f"the server's answer is not HTTP: {error.__context__ or error}") from None
    if not fields.complete:
        raise SourceError("the server's answer is not HTTP: its head does not end")
    if parser.get_http_version() not in {"1.1", "1.0"}:
        raise SourceError(f"the server answered in HTTP/{parser.get_http_version()}")
    length = fields.headers.get("content-length", "0")
    if not (length.isascii() and length.isdigit() and len(length) <= _MAX_LENGTH_DIGITS):
        raise SourceError(f"the server's answer is not HTTP: its length is {length[:40]!r}")
    return Head(parser.get_status_code(), fields.headers, bool(parser.should_keep_alive()))


class ErrorBody:
    """The explanation in an answer that is an error: of a known length, in chunks, or until the connection ends.

    Args:
        head: The head's bytes, the empty line included.
    """

    def __init__(self, head: bytes) -> None:
        self.content = b""
        self.complete = False
        self._parser = httptools.HttpResponseParser(self)
        self.feed(head)

    def on_body(self, data: bytes) -> None:
        if not self.complete:  # what follows is none of it
            self.content += data

    def on_message_complete(self) -> None:
        self.complete = True

    def feed(self, data: bytes) -> None:
        """Take what has come; past the limit, or where it makes no sense, the rest is done without."""
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self.complete = True
        if len(self.content) > _MAX_ERROR_BYTES:
            self.content = self.content[:_MAX_ERROR_BYTES]
            self.complete = True
