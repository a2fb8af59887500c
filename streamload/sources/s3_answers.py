"""Answers of S3, and of what stands in its place: bounded in size, and told as ours where they make no sense."""

from __future__ import annotations

import re
from collections.abc import Mapping
from http.client import responses
from typing import Any
from xml.etree import ElementTree

from aiobotocore.httpsession import AIOHTTPSession
from aiobotocore.parsers import AioResponseParserFactory
from botocore.parsers import create_parser

from streamload.errors import SourceError

__all__ = ["BoundedSession", "StrictParsers", "parse_refusal"]

_PROTOCOL = "rest-xml"

# A listing of a thousand keys of the greatest length is a quarter of it.
_MAX_ANSWER_BYTES = 16 << 20
# Of a refusal; S3's have less than 1 KiB.
_MAX_REFUSAL_BYTES = 64 << 10
_PIECE_BYTES = 64 << 10

# Of a page, perhaps a proxy's, that stands in a refusal's place: what of it goes into an error's text.
_EXCERPT_LETTERS = 200

_UNSEEN = re.compile(r"<(style|script|!--).*?(</\1>|-->|\Z)", re.DOTALL | re.IGNORECASE)
_TAG = re.compile(r"<[^<>]*>")


class BoundedSession(AIOHTTPSession):  # type: ignore[misc]
    """aiobotocore's connections, but no answer fills the memory."""

    async def send(self, request: Any) -> Any:
        """Send a request and receive its answer; a body that is streamed is left to whoever reads it.

        Raises:
            SourceError: The answer is larger than any that S3 gives.
            aiohttp.ClientError: The connection broke.
        """
        streamed = request.stream_output
        request.stream_output = True  # what it does not read, is read here
        response = await super().send(request)
        refused = response.status_code >= 300
        if not streamed or refused:
            # Where the response keeps what was read; it reads no further then.
            response._content = await _read(response.raw, refused)
        return response


async def _read(raw: Any, refused: bool) -> bytes:
    most = _MAX_REFUSAL_BYTES if refused else _MAX_ANSWER_BYTES
    content = bytearray()
    async for piece in raw.content.iter_chunked(_PIECE_BYTES):
        content += piece
        if len(content) > most:
            raw.close()
            if not refused:
                raise SourceError(f"the server's answer is larger than {most} bytes")
            break
    return bytes(content[:most])


class StrictParsers(AioResponseParserFactory):  # type: ignore[misc]
    """botocore's parsers, behind which nothing but a parsed answer or an error of ours comes out.

    They are made for answers of AWS: a size that is no number, or an error that is a list, comes out of them as
    whatever Python raises.
    """

    def create_parser(self, protocol_name: str) -> Any:
        """A parser for answers in one of botocore's protocols; those that credentials come by are not S3's."""
        parser = super().create_parser(protocol_name)
        return _StrictParser(parser) if protocol_name == _PROTOCOL else parser


class _StrictParser:
    def __init__(self, parser: Any) -> None:
        self._parser = parser

    async def parse(self, response: dict[str, Any], shape: Any) -> Any:
        """What `shape` describes, or the parts of an error.

        Raises:
            SourceError: The answer makes no sense.
        """
        status, body = response["status_code"], response["body"]
        if status >= 300:
            if shape is None or not shape.metadata.get("exception"):
                return parse_refusal(status, response["headers"], body)
        elif response.get("context", {}).get("operation_name") == "ListObjectsV2" and not _is_listing(body):
            raise SourceError(f"the server's answer is no listing: {_excerpt(body) or 'it is empty'}")
        try:
            return await self._parser.parse(response, shape)
        except Exception as error:  # of foreign code, about foreign data
            if status >= 300:
                # The details of an error, whose code is known already.
                return {}
            # botocore shows the whole answer after the first line.
            cause = str(error).partition("\n")[0]
            raise SourceError(f"the server's answer makes no sense: {cause[:_EXCERPT_LETTERS]}") from None


def parse_refusal(status: int, headers: Mapping[str, str], body: bytes) -> dict[str, Any]:
    """What an answer that is an error says, as botocore has it: every detail of it a text, the status in any case."""
    answer = {"status_code": status, "headers": dict(headers), "body": body}
    try:
        details = create_parser(_PROTOCOL).parse(answer, None).get("Error")
    except Exception:  # of foreign code, about foreign data
        details = None
    found = {}
    if isinstance(details, dict):
        found = {name: text for name, text in details.items() if isinstance(text, str)}
    if found.get("Code", "").isdigit() or not found.get("Code"):
        # Not from S3, but from what stands before it, or in its place.
        found |= {"Code": str(status), "Message": _excerpt(body) or responses.get(status, "")}
    metadata = {"HTTPStatusCode": status, "HTTPHeaders": {name.lower(): text for name, text in headers.items()}}
    return {"Error": found, "ResponseMetadata": metadata}


def _is_listing(body: bytes) -> bool:
    try:
        return ElementTree.fromstring(body).tag.endswith("Result")
    except ElementTree.ParseError:
        return False


def _excerpt(body: bytes) -> str:
    """The first words of a page."""
    letters = _TAG.sub(" ", _UNSEEN.sub(" ", body.decode("utf-8", "replace")))
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in letters).split())
    return text if len(text) <= _EXCERPT_LETTERS else f"{text[:_EXCERPT_LETTERS]}…"
