"""Files for property tests: valid ones in every spelling that JSON allows, and ones with something wrong in them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from math import prod
from random import Random

from hypothesis import strategies as st

from streamload.checkpoint import DTYPE_BITS
from tests.checkpoint.files import entry, file_of, header_of

__all__ = ["damaged_files", "mutant", "valid_files"]

Entries = dict[str, object]

_names = st.text(max_size=6) | st.sampled_from(["", "\0", "__metadata_", "dtype", "a.0.weight", "layer-0", "é", "😀"])
_dims = st.sampled_from([0, 1, 1, 2, 2, 3, 4, 4, 8])
_json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def _entries(draw: st.DrawFn) -> tuple[Entries, int]:
    """The entries of a valid header, in any order, and how many bytes they describe."""
    entries: list[tuple[str, object]] = []
    position = 0
    for name in draw(st.lists(_names, max_size=5, unique=True)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(st.lists(_dims, max_size=3))
        bits = DTYPE_BITS[dtype] * prod(shape)
        if bits % 8:
            shape.append(4)
            bits *= 4
        tensor = entry(dtype, shape, position, position + bits // 8)
        if draw(st.integers(0, 9)) == 0:
            tensor = draw(st.dictionaries(st.text(max_size=4), _json_values, max_size=2)) | tensor
        entries.append((name, dict(draw(st.permutations(list(tensor.items()))))))
        position += bits // 8
    if draw(st.booleans()):
        metadata = st.none() | st.dictionaries(st.text(max_size=4), st.text(max_size=4), max_size=3)
        entries.append(("__metadata__", draw(metadata)))
    return dict(draw(st.permutations(entries))), position


@st.composite
def _spelled(draw: st.DrawFn, value: object) -> bytes:
    """A JSON text of a value."""
    text = json.dumps(
        value,
        ensure_ascii=draw(st.booleans()),
        separators=draw(st.sampled_from([(",", ":"), (", ", ": "), (" ,\n", "\t: ")])),
        indent=draw(st.sampled_from([None, None, 1])),
    )
    padding = st.text(" \t\r\n", max_size=3)
    return (draw(padding) + text + draw(padding)).encode()


@st.composite
def valid_files(draw: st.DrawFn) -> bytes:
    entries, nbytes = draw(_entries())
    return file_of(draw(_spelled(entries)), _body(nbytes))


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A file in which one thing is wrong, or at least unusual."""
    entries, nbytes = draw(_entries())
    tensors = [value for name, value in entries.items() if name != "__metadata__" and isinstance(value, dict)]
    size, lie = nbytes, 0
    kinds = ["field", "field", "offset", "drop", "entry", "metadata", "size", "length", "append"]
    fields = st.sampled_from(["dtype", "shape", "data_offsets"])
    match draw(st.sampled_from(kinds)):
        case "field" if tensors:
            draw(st.sampled_from(tensors))[draw(fields)] = draw(_json_values)
        case "offset" if tensors:
            offsets = draw(st.sampled_from(tensors))["data_offsets"]
            offsets[draw(st.integers(0, 1))] += draw(st.sampled_from([-2, -1, 1, 2, 2**64]))
        case "drop" if tensors:
            del draw(st.sampled_from(tensors))[draw(fields)]
        case "entry":
            entries[draw(_names)] = draw(_json_values)
        case "metadata":
            entries["__metadata__"] = draw(_json_values)
        case "size":
            size += draw(st.integers(-3, 3))
        case "length":
            lie = draw(st.sampled_from([-8, -1, 1, 8, 2**32]))
        case _:
            return file_of(draw(_spelled(entries)) + draw(st.binary(max_size=3)), _body(size))
    header = draw(_spelled(entries))
    return file_of(header, _body(max(0, size)), length=max(0, len(header) + lie))


def _body(nbytes: int) -> bytes:
    """Bytes of which every window of two is different, so that a wrong offset shows."""
    return b"".join(number.to_bytes(2, "big") for number in range(nbytes // 2 + 1))[:nbytes]


# What a mutation puts in: what decides between one rule and the next.
_TOKENS = (
    *(b"0 1 2 3 4 8 -0 -1 2.0 8e0 1e400 01 18446744073709551615 18446744073709551616 null true false NaN".split()),
    *(b'"" "\\u0000" "\\ud800" "\\ud83d\\ude00" "\\\\" "F32" "U8" "F4" "f32" {"F32":null}'.split()),
    *(b'"t" "dtype" "shape" "data_offsets" "__metadata__" [] {} [0,0] [0,8] , : [ ] { }'.split()),
    *(b'{"a":"b","a":"c"} ["U8",[0],[0,0]] {"dtype":"U8","shape":[0],"data_offsets":[0,0]}'.split()),
    *(b'"t":["U8",[0],[0,0]], "t":{"dtype":"U8","shape":[0],"data_offsets":[0,0]}, "__metadata__":null,'.split()),
    *(b" ", b"\n", b"\0", b"\xff", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\", b'"'),
)
_TOKEN = re.compile(rb'"[^"\\]*"|-?[0-9]+|[\[\]{},:]|[a-z]+')
_LETTER = re.compile(rb"[a-z]")
_NUMBER = re.compile(rb"[0-9]+")
_MEMBER = re.compile(rb'"[^"\\]*":(?:"[^"]*"|\[[^\[\]]*\]|\{[^{}]*\})')


def mutant(random: Random, valid: list[bytes]) -> bytes:
    """A valid file after one to three changes to its bytes; its header's length is true more often than not."""
    content = random.choice(valid)
    header, body = header_of(content), content[8 + len(header_of(content)) :]
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        header = random.choice(_CHANGES)(random, header, header_of(random.choice(valid)))
    if random.random() < 0.15:
        body = body[: random.randrange(len(body) + 1)] + bytes(random.randrange(3))
    content = file_of(header, body)
    if random.random() < 0.1:
        at = random.randrange(8)
        content = content[:at] + bytes([random.randrange(256)]) + content[at + 1 :]
    return content


def _flip(random: Random, header: bytes, _: bytes) -> bytes:
    at = random.randrange(len(header))
    return header[:at] + bytes([header[at] ^ 1 << random.randrange(8)]) + header[at + 1 :]


def _delete(random: Random, header: bytes, _: bytes) -> bytes:
    at = random.randrange(len(header))
    return header[:at] + header[at + random.choice((1, 1, 1, 2, 5, 20)) :] or b" "


def _repeat(random: Random, header: bytes, _: bytes) -> bytes:
    at = random.randrange(len(header))
    end = at + random.choice((1, 1, 2, 5, 20))
    return header[:end] + header[at:end] + header[end:]


def _space(random: Random, header: bytes, _: bytes) -> bytes:
    return _put(random, _TOKEN, header, random.choice((b" ", b"\n", b"\t ")))


def _rename(random: Random, header: bytes, _: bytes) -> bytes:
    """Put a character or an escape into a string, mostly."""
    return _put(random, _LETTER, header, random.choice((b"e", b"[", b"\\u0065", b"\\n", b'\\"', b"\\ud800")))


def _splice(random: Random, header: bytes, other: bytes) -> bytes:
    return header[: random.randrange(1, len(header) + 1)] + other[random.randrange(len(other)) :]


def _insert(random: Random, header: bytes, _: bytes) -> bytes:
    at = random.randrange(len(header) + 1)
    return header[:at] + random.choice(_TOKENS) + header[at:]


def _replace(random: Random, header: bytes, _: bytes) -> bytes:
    return _substitute(random, _TOKEN, header, random.choice(_TOKENS))


def _renumber(random: Random, header: bytes, _: bytes) -> bytes:
    found = [*_NUMBER.finditer(header)]
    if not found:
        return header
    old = random.choice(found)
    new = max(0, int(old[0][:18]) + random.choice((-8, -4, -1, 1, 4, 8)))
    return header[: old.start()] + str(new).encode() + header[old.end() :]


def _repeat_member(random: Random, header: bytes, other: bytes) -> bytes:
    """Put a whole member of this or another header behind one of its own: duplicate names, mostly."""
    members = [*_MEMBER.finditer(header)]
    inserted = [*_MEMBER.finditer(random.choice((header, other)))]
    if not members or not inserted:
        return header
    at = random.choice(members).end()
    return header[:at] + b"," + random.choice(inserted)[0] + header[at:]


def _substitute(random: Random, pattern: re.Pattern[bytes], header: bytes, new: bytes) -> bytes:
    found = [*pattern.finditer(header)]
    if not found:
        return header + new
    old = random.choice(found)
    return header[: old.start()] + new + header[old.end() :]


def _put(random: Random, pattern: re.Pattern[bytes], header: bytes, new: bytes) -> bytes:
    """Put something behind what the pattern matches."""
    at = random.choice([found.end() for found in pattern.finditer(header)] or [0])
    return header[:at] + new + header[at:]


_CHANGES: tuple[Callable[[Random, bytes, bytes], bytes], ...] = (
    *(_flip, _delete, _repeat, _space, _space, _rename, _rename, _splice, _insert, _replace, _replace, _renumber),
    *(_renumber, _repeat_member),
)
