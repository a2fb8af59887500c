"""The header reader takes pieces of any size; the parser's results and its errors."""

from __future__ import annotations

import json
import pickle
import re
import sys
import tracemalloc
from math import prod

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError

from streamload.checkpoint import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    HeaderReader,
    ShardFile,
    TensorInfo,
    parse_header,
)
from streamload.errors import HeaderError
from tests.checkpoint.files import EIGHT, KEY, agree, deserialize, entry, file_of, header_of, judge, reference
from tests.checkpoint.generators import damaged_files, valid_files


def read_in_pieces(content: bytes, cuts: list[int]) -> bytes | str | None:
    """The header that a reader finds in a file cut at these places, or its error's text."""
    try:
        reader = HeaderReader(len(content), key=KEY)
        for start, end in zip([0, *cuts], [*cuts, len(content)], strict=True):
            before = reader.received
            reader.feed(content[start:end])
            assert before <= reader.received <= end
            assert (reader.needed is None) == (reader.header is not None)
            if reader.needed is not None:
                assert reader.received == end < reader.needed <= len(content)
        return reader.header
    except HeaderError as error:
        return str(error)


@settings(max_examples=300, deadline=None)
@given(st.data(), valid_files() | damaged_files() | st.binary(max_size=20))
def test_pieces_of_any_size_give_the_same_header(data: st.DataObject, content: bytes) -> None:
    cuts = data.draw(st.lists(st.integers(0, len(content)), max_size=5).map(sorted))
    whole = read_in_pieces(content, [])
    assert read_in_pieces(content, list(range(1, len(content)))) == whole
    assert read_in_pieces(content, cuts) == whole
    if isinstance(whole, bytes):
        assert whole == header_of(content)


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview])
def test_reader_takes_what_it_needs_and_ignores_the_rest(make: type[bytes | bytearray | memoryview]) -> None:
    content = file_of("{}   ", bytes(1000))
    reader = HeaderReader(len(content), key=KEY)
    assert (reader.needed, reader.received, reader.header) == (8, 0, None)
    reader.feed(make(content[:3]))
    assert (reader.needed, reader.received, reader.header) == (8, 3, None)
    reader.feed(make(content[3:9]))
    assert (reader.needed, reader.received, reader.header) == (13, 9, None)
    reader.feed(make(content[9:700]))
    assert (reader.needed, reader.received, reader.header) == (None, 13, b"{}   ")
    reader.feed(make(content[700:]))
    assert (reader.needed, reader.received, reader.header) == (None, 13, b"{}   ")


def test_reader_keeps_nothing_of_what_it_was_fed() -> None:
    memory = bytearray(file_of("{}", bytes(10)))
    reader = HeaderReader(len(memory), key=KEY)
    reader.feed(memory)
    memory.clear()
    assert reader.header == b"{}"


def test_reader_refuses_a_length_again_and_allocates_nothing_for_it() -> None:
    tracemalloc.start()
    try:
        reader = HeaderReader(2**62, key=KEY)
        for _ in range(2):
            with pytest.raises(HeaderError, match=f"claims {2**61} bytes"):
                reader.feed((2**61).to_bytes(8, "little") + b"{}")
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_header_is_told_in_file_order_with_absolute_offsets() -> None:
    text = json.dumps(
        {
            "late": entry("F16", [1, 2], 3, 7),
            "__metadata__": {"format": "pt"},
            "none": entry("F64", [0], 3, 3),
            "early": entry("U8", [3], 0, 3),
            "nothing": entry("U8", [0, 9], 3, 3),
        }
    )
    base = 8 + len(text)
    assert judge(file_of(text, bytes(7))) == ShardFile(
        KEY,
        base + 7,
        base,
        (
            TensorInfo("early", "U8", (3,), base, base + 3),
            TensorInfo("none", "F64", (0,), base + 3, base + 3),
            TensorInfo("nothing", "U8", (0, 9), base + 3, base + 3),
            TensorInfo("late", "F16", (1, 2), base + 3, base + 7),
        ),
        {"format": "pt"},
    )


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_has_the_size_that_the_reference_gives_it(dtype: str) -> None:
    nbytes = DTYPE_BITS[dtype] * prod((2, 4)) // 8
    for size in range(nbytes + 2):
        text = json.dumps({"t": entry(dtype, [2, 4], 0, size)})
        assert agree(file_of(text, bytes(size))) == (size == nbytes)


def test_the_dtypes_are_exactly_those_of_the_reference() -> None:
    with pytest.raises(SafetensorError) as caught:
        deserialize(file_of(json.dumps({"t": entry("F0", [], 0, 0)})))
    assert set(re.findall("`(.*?)`", str(caught.value))) - {"F0"} == set(DTYPE_BITS)
    assert len(DTYPE_BITS) == 22


ONE = '"dtype":"F32","shape":[2],"data_offsets":[0,8]'


def changed(old: str, new: str) -> bytes:
    """A file of one tensor, with something in its entry changed."""
    return file_of(f'{{"t":{{{ONE.replace(old, new)}}}}}', EIGHT)


CAUSES = [
    (b"abc", "the file has 3 bytes; the length of a header alone takes 8"),
    (file_of("{}", length=200_000_000), "the header claims 200000000 bytes; the limit is 100000000"),
    (file_of("{}", length=9), "the header claims 9 bytes, but 2 follow its length"),
    (file_of("{]"), "the header cannot be read: byte 1 is not valid JSON: "),
    (file_of('{"é":]}'), "the header cannot be read: byte 6 is not valid JSON: "),
    (file_of(b'{"\xff"'), "the header cannot be read: byte 2 is not UTF-8: "),
    (file_of("[1]"), "the header cannot be read: it is not a JSON object"),
    (file_of('{"a":NaN}'), "the header cannot be read: NaN is not JSON"),
    (file_of('{"a":1e999}'), "the header cannot be read: a number in it is out of range"),
    (file_of('{"a":"\\uD800"}'), "the header cannot be read: a string in it holds the lone surrogate \\uD800"),
    (file_of("{" + '"a":{' * 130), "the header cannot be read: it nests deeper than 127 levels"),
    (file_of(f'{{"t":{{{ONE}}},"t":1}}'), "the name 't' stands more than once in the header"),
    (file_of('{"__metadata__":1}'), "__metadata__ is not an object of strings but 1"),
    (file_of('{"__metadata__":{"a":[]}}'), "__metadata__ has no string under 'a' but []"),
    (file_of('{"__metadata__":{"a":"","a":""}}'), "the name 'a' stands more than once in __metadata__"),
    (file_of('{"t":[1,"x",[2],{}]}'), "tensor 't' is not described by an object but by [1, 'x', [...], {}]"),
    (file_of('{"t":{"dtype":"F32","shape":[]}}'), "tensor 't' has no data_offsets"),
    (file_of(f'{{"t":{{{ONE},"shape":[2]}}}}'), "tensor 't' has more than one shape"),
    (changed("[2]", "2"), "the shape of tensor 't' is not an array but 2"),
    (changed("F32", "F31"), "tensor 't' has the dtype 'F31', which the format does"),
    (changed("[2]", "[2,-3]"), "tensor 't' has a dimension that is no size: -3"),
    (changed("0,", ""), "the data_offsets of tensor 't' are not two numbers but [8]"),
    (changed("0,", "0.5,"), "tensor 't' has a data offset that is none: 0.5"),
    (
        changed("[2]", "[3]"),
        "tensor 't' should have 12 bytes by its dtype and shape, but its data_offsets, 0 and 8, are 8 apart",
    ),
    (
        file_of(json.dumps({"a": entry("U8", [3], 0, 3), "b": entry("U8", [1], 5, 6)}), bytes(6)),
        "no tensor owns the 2 bytes before tensor 'b', whose data_offsets begin at 5 instead of 3",
    ),
    (
        file_of(json.dumps({"a": entry("U8", [3], 0, 3), "b": entry("U8", [2], 2, 4)}), bytes(4)),
        "tensor 'b' overlaps the one before it: its data_offsets begin at 2 instead of 3",
    ),
    (
        file_of(f'{{"t":{{{ONE}}}}}', bytes(5)),
        "the file has 67 bytes, but its last tensor, 't', ends at byte 70: it is cut short",
    ),
    (file_of("{}", b"x"), "the file has 11 bytes, but it holds no tensor and ends at byte 10: it is too long"),
]


@pytest.mark.parametrize(("content", "cause"), CAUSES, ids=[cause for _, cause in CAUSES])
def test_an_error_says_where_and_why(content: bytes, cause: str) -> None:
    error = judge(content)
    assert isinstance(error, HeaderError)
    assert error.cause.startswith(cause)
    assert (error.object, error.start) == (KEY, 0)
    assert error.end in (8, 8 + len(header_of(content)))
    copy = pickle.loads(pickle.dumps(error))
    assert str(copy) == str(error)
    assert str(error).startswith(f"{KEY}, bytes 0-{error.end}: {cause}")


def test_more_bits_than_64_bits_count_are_refused_whatever_the_file_size() -> None:
    nbytes = 2**61
    raw = json.dumps({"t": entry("U8", [nbytes], 0, nbytes)}).encode()
    with pytest.raises(HeaderError, match=r"too many bits: it is U8 of shape \[2305843009213693952\]"):
        parse_header(raw, key=KEY, size_bytes=8 + len(raw) + nbytes)


def test_an_error_stays_short() -> None:
    name = "n" * 1_000_000
    for content in (
        file_of(f'{{"{name}":{{"dtype":"{name}","shape":[],"data_offsets":[0,0]}}}}'),
        file_of(f'{{"{name}":{{"dtype":"U8","shape":{[7] * 100_000},"data_offsets":[0,0]}}}}'),
        file_of(f'{{"{name}":[{",".join(["[]"] * 100_000)}]}}'),
        file_of(f'{{"__metadata__":{{"{name}":{{"{name}":1}}}}}}'),
    ):
        assert len(str(judge(content))) < 600


BOMB_BYTES = MAX_HEADER_BYTES // 2


@pytest.mark.parametrize(
    "bomb",
    [
        b"[" * BOMB_BYTES,
        b"[" * (BOMB_BYTES // 2) + b"]" * (BOMB_BYTES // 2),
        b'{"a":' * (BOMB_BYTES // 5),
        b'{"a":{"dtype":"U8","shape":[0],"data_offsets":[0,0],"x":' + b"[" * BOMB_BYTES,
        b'{"a":' + b"1" * BOMB_BYTES + b"}",
        b'"' * BOMB_BYTES,
    ],
    ids=["opened", "closed", "objects", "unknown field", "digits", "quotes"],
)
def test_a_bomb_is_refused_in_bounded_memory(bomb: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(HeaderError) as caught:
            parse_header(bomb, key=KEY, size_bytes=8 + len(bomb))
        assert tracemalloc.get_traced_memory()[1] < 4 * len(bomb)
    finally:
        tracemalloc.stop()
    assert len(str(caught.value)) < 600


def test_a_stack_that_is_nearly_used_up_gives_no_other_error() -> None:
    nested = file_of(f'{{"t":{{{ONE},"x":{"[" * 120 + "]" * 120}}}}}', EIGHT)

    def descend(frames: int) -> ShardFile | HeaderError:
        return descend(frames - 1) if frames else judge(nested)

    frame, used = sys._getframe(), 0
    while frame.f_back is not None:
        frame, used = frame.f_back, used + 1
    found = descend(sys.getrecursionlimit() - used - 60)
    assert isinstance(found, ShardFile) or "nests deeper" in found.cause


def test_many_tensors() -> None:
    count = 20_000
    entries = {f"model.layers.{at}.weight": entry("BF16", [at % 3], at, at) for at in range(count)}
    position = 0
    for at, tensor in enumerate(entries.values()):
        tensor["data_offsets"] = [position, position + at % 3 * 2]
        position += at % 3 * 2
    content = file_of(json.dumps(entries), bytes(position))
    found, theirs = judge(content), reference(content)
    assert isinstance(found, ShardFile)
    assert theirs is not None
    assert {t.name: (t.dtype, list(t.shape)) for t in found.tensors} == {k: v[:2] for k, v in theirs.items()}
    assert found.tensors[-1].end == len(content)


@pytest.mark.parametrize(
    ("content", "cause"),
    [
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"PK\x03\x04\x14\x00\x08\x08" + bytes(20), "a ZIP archive, as torch.save writes"),
        (b"<!DOCTYPE html><html></html>", "it begins with '<!DOCTYP'"),
    ],
)
def test_what_is_no_safetensors_file_at_all_is_said_to_be_none(content: bytes, cause: str) -> None:
    reader = HeaderReader(len(content), key="model.safetensors")
    with pytest.raises(HeaderError, match="this is no safetensors file, but") as caught:
        reader.feed(content)
    assert cause in caught.value.cause
