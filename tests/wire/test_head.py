"""Heads of answers, and explanations of errors.

Invariants:

1. `parse_head` returns a head or raises SourceError, whatever it is given; never anything else.
2. It returns no head of which two readers could think differently: where the body ends, or whether another may follow.
3. An `ErrorBody` keeps the bytes of the error's body and no others, and never more than its limit.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamload.errors import SourceError
from streamload.wire.head import MAX_HEAD_BYTES, ErrorBody, Head, parse_head

_LIMIT = 64 << 10


def _head(*lines: str, status: str = "HTTP/1.1 206 Partial Content") -> bytes:
    return "\r\n".join([status, *lines, "", ""]).encode("latin-1")


def test_a_head() -> None:
    head = parse_head(_head("Content-Length: 12", 'ETag: "a"', "X-Twice: 1", "x-twice: 2", "Empty:", "Name: \xe9"))
    assert head.status == 206
    assert head.headers == {
        "content-length": "12",
        "etag": '"a"',
        "x-twice": "1, 2",
        "empty": "",
        "name": "\xe9",
    }
    assert head.keep_alive
    assert head.body_bytes == 12


@pytest.mark.parametrize(
    ("data", "keep_alive"),
    [
        (_head("Content-Length: 1"), True),
        (_head("Content-Length: 1", "Connection: close"), False),
        (_head("Content-Length: 0", "Connection: close"), False),
        (_head("Content-Length: 1", "Connection: CLOSE"), False),
        (_head("Content-Length: 1", "Connection: x, close"), False),
        (_head(), False),
        (_head("Transfer-Encoding: chunked"), True),
        (_head("Content-Length: 1", status="HTTP/1.0 206 Said"), False),
        (_head("Content-Length: 0", status="HTTP/1.0 206 Said"), False),
        (_head("Content-Length: 1", "Connection: keep-alive", status="HTTP/1.0 206 Said"), True),
    ],
)
def test_whether_the_connection_may_serve_again(data: bytes, keep_alive: bool) -> None:
    assert parse_head(data).keep_alive is keep_alive


@pytest.mark.parametrize(
    ("lines", "nbytes"),
    [
        ((), None),
        (("Transfer-Encoding: chunked",), None),
        (("Content-Length: 0",), 0),
        (("Content-Length:   7  ",), 7),
        (("Content-Length: 007",), 7),
        (("Content-Length: 18446744073709551615",), (1 << 64) - 1),
    ],
)
def test_how_long_the_body_is(lines: tuple[str, ...], nbytes: int | None) -> None:
    assert parse_head(_head(*lines)).body_bytes == nbytes


def test_a_length_with_more_digits_than_python_converts() -> None:
    # 4300 is where int() refuses; llhttp does not count leading zeros. Refused or understood, and no other error.
    try:
        nbytes = parse_head(_head(f"Content-Length: {'0' * 5000}7")).body_bytes
    except SourceError:
        return
    assert nbytes == 7


@pytest.mark.parametrize(
    "lines",
    [
        ("Content-Length: -1",),
        ("Content-Length: +1",),
        ("Content-Length: 1.0",),
        ("Content-Length: 0x1",),
        ("Content-Length: 1_0",),
        ("Content-Length: \xb2",),
        ("Content-Length: ten",),
        ("Content-Length:",),
        ("Content-Length: 1 1",),
        ("Content-Length: 1, 1",),
        ("Content-Length: 1", "Content-Length: 1"),
        ("Content-Length: 1", "content-length: 2"),
        ("Content-Length: 18446744073709551616",),
        ("Content-Length: 1", "Transfer-Encoding: chunked"),
        ("Transfer-Encoding: chunked", "Content-Length: 1"),
        ("Transfer-Encoding: chunked", "Transfer-Encoding: chunked"),
        ("Content-Range: bytes 0-1/2", "Content-Range: bytes 1-2/3"),
        ("ETag: 1", "ETag: 2"),
        ("Content-Encoding: gzip", "Content-Encoding: br"),
        ("Content-Length : 1",),
        ("Content-Length\t: 1",),
        ("A: b", " Content-Length: 1"),
        ("A: b\rContent-Length: 1",),
        ("A: b\nContent-Length: 1",),
        ("A: b\n", "Content-Length: 1"),
        ("A: \0",),
        ("no colon",),
        (": no name",),
    ],
)
def test_headers_that_can_be_read_in_two_ways(lines: tuple[str, ...]) -> None:
    with pytest.raises(SourceError) as caught:
        parse_head(_head(*lines))
    assert not caught.value.retryable


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\r\n\r\n",
        b"SSH-2.0-OpenSSH_9.6\r\n\r\n",
        b"PRI * HTTP/2.0\r\n\r\n",
        b"\0\0\x12\x04\0\0\0\0\0\0\x03\0\0\0\x80\r\n\r\n",
        b"GET / HTTP/1.1\r\n\r\n",
        b"<html>\r\n\r\n",
        b"\x15\x03\x01\0\x02\x02\x46\r\n\r\n",
        b"HTTP/1.1 206",
        b"HTTP/1.1 206 Said\r\n",
        b"HTTP/1.1 206 Said\r\nContent-Length: 3\r\n",
        b"HTTP/1.1 206 Said\n\n",
        b"HTTP/1.1 twohundred Said\r\n\r\n",
        b"HTTP/1.1 20 Said\r\n\r\n",
        b"HTTP/1.1 2066 Said\r\n\r\n",
        b"HTTP/2.0 206 Said\r\n\r\n",
        b"HTTP/0.9 206 Said\r\n\r\n",
        b"HTTP/3.0 206 Said\r\n\r\n",
        b"HTTP/1.10 206 Said\r\n\r\n",
    ],
)
def test_what_is_no_head(data: bytes) -> None:
    with pytest.raises(SourceError) as caught:
        parse_head(data)
    assert not caught.value.retryable


def test_switching_protocols() -> None:
    # llhttp reports an upgrade with an exception that is no parser error.
    data = _head("Connection: upgrade", "Upgrade: h2c", status="HTTP/1.1 101 Switching Protocols")
    try:
        head = parse_head(data)
    except SourceError:
        return
    assert head.status == 101


_lines = st.sampled_from(
    [
        b"HTTP/1.1 206 Said\r\n",
        b"HTTP/1.0 404 Said\r\n",
        b"HTTP/1.1 101 Said\r\n",
        b"HTTP/1.1 100 Said\r\n",
        b"HTTP/1.1 304\r\n",
        b"Content-Length: 3\r\n",
        b"Content-Length: 0\r\n",
        b"Transfer-Encoding: chunked\r\n",
        b"Transfer-Encoding: gzip, chunked\r\n",
        b"Connection: close\r\n",
        b"Connection: upgrade\r\nUpgrade: x\r\n",
        b"ETag: a\r\n",
        b"\r\n",
        b"\n",
        b"\r",
        b" ",
        b"abc",
        b"3\r\nabc\r\n0\r\n\r\n",
    ]
)
_answers = st.binary(max_size=200) | st.lists(_lines | st.binary(max_size=3), max_size=10).map(b"".join)


@given(_answers | _answers.map(lambda data: data + b"\r\n\r\n"))
def test_any_bytes_are_a_head_or_an_error(data: bytes) -> None:
    try:
        head = parse_head(data)
        nbytes = head.body_bytes
    except SourceError:
        return
    assert isinstance(head, Head)
    assert nbytes is None or nbytes >= 0
    assert b"\r\n\r\n" in data


# Error bodies

_BODY = b"<Error><Code>SlowDown</Code></Error>"
_PLAIN = _head(f"Content-Length: {len(_BODY)}", status="HTTP/1.1 503 Slow Down")
_CHUNKED = _head("Transfer-Encoding: chunked", status="HTTP/1.1 503 Slow Down")
_UNTIL_CLOSE = _head("Connection: close", status="HTTP/1.1 503 Slow Down")


def _chunks(body: bytes, size: int) -> bytes:
    pieces = [body[start : start + size] for start in range(0, len(body), size)]
    return b"".join(b"%x;x=y\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])


@pytest.mark.parametrize(
    ("head", "body", "ends"),
    [(_PLAIN, _BODY, True), (_CHUNKED, _chunks(_BODY, 7), True), (_UNTIL_CLOSE, _BODY, False)],
    ids=["length", "chunked", "until close"],
)
def test_an_explanation_in_any_two_pieces_and_byte_by_byte(head: bytes, body: bytes, ends: bool) -> None:
    cuts = [[body[:cut], body[cut:]] for cut in range(len(body) + 1)]
    for pieces in [*cuts, [body[at : at + 1] for at in range(len(body))]]:
        explained = ErrorBody(head)
        for piece in pieces:
            explained.feed(piece)
        assert explained.content == _BODY
        assert explained.complete is ends


@pytest.mark.parametrize("status", ["HTTP/1.1 304 Not Modified", "HTTP/1.1 404 Not Found"])
def test_an_error_without_an_explanation(status: str) -> None:
    explained = ErrorBody(_head("Content-Length: 0", status=status))
    assert explained.complete
    assert explained.content == b""


@pytest.mark.parametrize("piece_bytes", [1 << 10, 8 << 10, 300 << 10])
@pytest.mark.parametrize("chunked", [True, False])
def test_a_long_explanation_is_kept_up_to_the_limit(chunked: bool, piece_bytes: int) -> None:
    body = bytes(range(1, 251)) * 1200
    sent = _chunks(body, 5000) if chunked else body
    explained = ErrorBody(_CHUNKED if chunked else _UNTIL_CLOSE)
    for start in range(0, len(sent), piece_bytes):
        explained.feed(sent[start : start + piece_bytes])
        if explained.complete:
            break
    assert explained.complete
    assert explained.content == body[:_LIMIT]


def test_a_damaged_explanation_is_kept_as_far_as_it_made_sense() -> None:
    explained = ErrorBody(_CHUNKED)
    explained.feed(b"3\r\nabc\r\nnot a length\r\ndef")
    assert explained.complete
    assert explained.content == b"abc"


def test_what_follows_an_explanation_is_none_of_it() -> None:
    explained = ErrorBody(_PLAIN)
    explained.feed(_BODY + _PLAIN + _BODY)
    assert explained.complete
    assert explained.content == _BODY


@given(st.sampled_from([_PLAIN, _CHUNKED, _UNTIL_CLOSE]), st.lists(_answers, max_size=5))
def test_any_bytes_after_the_head_of_an_error(head: bytes, pieces: list[bytes]) -> None:
    explained = ErrorBody(head)
    for piece in pieces:
        if explained.complete:
            break
        explained.feed(piece)
    assert len(explained.content) <= sum(map(len, pieces))
    assert len(explained.content) <= _LIMIT


def test_the_limit_of_a_head_is_what_the_tests_think() -> None:
    assert MAX_HEAD_BYTES == 64 << 10
