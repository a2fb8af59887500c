"""Strict JSON where it is stricter, or more exact, than Python's own."""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamload.checkpoint.strict_json import MAX_DEPTH, InvalidJson, RepeatingObject, decode_object
from streamload.checkpoint.text import brief, natural_key


def number(text: str, name: str = "a") -> object:
    document = decode_object(f'{{"{name}":{text}}}'.encode())
    assert isinstance(document, dict)
    return document[name]


@pytest.mark.parametrize("name", ["a", "layer-0", "1" * 30])
@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0", 0),
        ("-0", -0.0),
        ("-1", -1),
        ("999999999999999999", 10**18 - 1),
        ("1000000000000000000", 10**18),
        ("18446744073709551615", 2**64 - 1),
        ("18446744073709551616", 2.0**64),
        ("-9223372036854775808", -(2**63)),
        ("-9223372036854775809", -(2.0**63)),
        ("1" + "0" * 300, 1e300),
        ("1e3", 1000.0),
        ("-0.0", -0.0),
        ("1e-999", 0.0),
    ],
)
def test_numbers(text: str, value: float, name: str) -> None:
    found = number(text, name)
    assert type(found) is type(value)
    assert found == value
    assert isinstance(found, int | float)
    assert math.copysign(1, found) == math.copysign(1, value)


@pytest.mark.parametrize("text", ["1e309", "-1e309", "1" * 310, "-" + "1" * 310, "1" * 5000, "1" * 5000 + ".5"])
def test_numbers_out_of_range(text: str) -> None:
    with pytest.raises(InvalidJson, match="out of range"):
        number(text)


def test_names_that_repeat_are_told() -> None:
    document = decode_object(b'{"b":1,"a":{"x":1},"c":2,"a":3,"b":4,"b":5}')
    assert isinstance(document, RepeatingObject)
    assert document == {"b": 5, "a": 3, "c": 2}
    assert document.repeated == ("b", "a")


_texts = st.text(max_size=4) | st.text('[]{}"\\', max_size=4)
_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(_texts, _values, max_size=3), st.booleans())
def test_what_json_writes_is_read_back(document: dict[str, object], ascii_only: bool) -> None:
    text = json.dumps(document, ensure_ascii=ascii_only)
    assert decode_object(text.encode()) == document
    assert decode_object(bytearray(text.encode())) == document


@settings(max_examples=200, deadline=None)
@given(st.integers(MAX_DEPTH - 2, MAX_DEPTH + 1), st.integers(min_value=0), st.text('[]{}"\\', max_size=5))
def test_the_depth_is_measured_exactly(levels: int, kinds: int, noise: str) -> None:
    value: object = noise
    for level in range(levels):
        value = {noise: value} if kinds >> level & 1 else [noise, value, [], {}]
    document = {"a": value}
    if _depth(document) <= MAX_DEPTH:
        assert decode_object(json.dumps(document).encode()) == document
    else:
        with pytest.raises(InvalidJson, match="nests deeper than 127 levels"):
            decode_object(json.dumps(document).encode())


def test_the_depth_is_measured_over_a_long_text() -> None:
    def nested(levels: int) -> bytes:
        return b'{"a":' + (b"[" + b"[]," * 1000) * levels + b"[]" + b"]" * levels + b"}"

    assert isinstance(decode_object(nested(MAX_DEPTH - 2)), dict)
    with pytest.raises(InvalidJson, match="nests deeper"):
        decode_object(nested(MAX_DEPTH - 1))


def _depth(value: object) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


@given(st.lists(st.integers(0, 10**6), min_size=2))
def test_natural_order_is_that_of_the_numbers(numbers: list[int]) -> None:
    assert sorted((f"m-{n}.x" for n in numbers), key=natural_key) == [f"m-{n}.x" for n in sorted(numbers)]


_ORDERED = ["", "0", "00", "a", "a0", "a00", "a01", "a1", "a1.", "a1.2", "a1.10", "a10", "b"]


@given(st.permutations(_ORDERED))
def test_natural_order_is_total(listed: list[str]) -> None:
    assert sorted(listed, key=natural_key) == _ORDERED


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\nb", r"'a\nb'"),
        ("n" * 1000, f"'{'n' * 160}'..."),
        (None, "None"),
        (2**64, "18446744073709551616"),
        ([1, "x", [2], [], {"a": 1}, {}], "[1, 'x', [...], [], {...}, {}]"),
        (tuple(range(9)), "[0, 1, 2, 3, 4, 5, 6, 7, ...]"),
        ({"a": 1}, "{...}"),
        (RepeatingObject(a=1), "{...}"),
    ],
)
def test_what_is_quoted_stays_short(value: object, text: str) -> None:
    assert brief(value) == text
