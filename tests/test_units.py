"""Amounts as people read and write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamload.units import format_bytes, format_count, format_seconds, parse_bytes


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (1536, "1.5 KiB"),
        ((1 << 20) - 1, "1.0 MiB"),
        (256 << 20, "256.0 MiB"),
        (3 << 30, "3.0 GiB"),
        (5 << 40, "5.0 TiB"),
        (5 << 50, "5120.0 TiB"),
    ],
)
def test_format_bytes(nbytes: int, text: str) -> None:
    assert format_bytes(nbytes) == text


@pytest.mark.parametrize(("number", "text"), [(0, "0 files"), (1, "1 file"), (2, "2 files")])
def test_format_count(number: int, text: str) -> None:
    assert format_count(number, "file") == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0 ms"),
        (0.0454, "45 ms"),
        (1.0, "1.00 s"),
        (9.87, "9.87 s"),
        (12.34, "12.3 s"),
        (119.0, "119.0 s"),
        (120.0, "2 min 0 s"),
        (200.9, "3 min 20 s"),
    ],
)
def test_format_seconds(seconds: float, text: str) -> None:
    assert format_seconds(seconds) == text


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("0", 0),
        ("268435456", 256 << 20),
        ("256MiB", 256 << 20),
        (" 256 mib ", 256 << 20),
        ("256M", 256 << 20),
        ("256MB", 256_000_000),
        ("1.5GB", 1_500_000_000),
        ("1.5GiB", 3 << 29),
        ("1.1TB", 1_100_000_000_000),
        ("7B", 7),
        ("0.5", 0),
        ("2T", 2 << 40),
    ],
)
def test_parse_bytes(text: str, nbytes: int) -> None:
    assert parse_bytes(text) == nbytes


@pytest.mark.parametrize("text", ["", "MiB", "-1", "+1", "1e9", "1.", ".5", "1 2", "1PiB", "1Mi", "0x10", "auto"])
def test_parse_bytes_refuses(text: str) -> None:
    with pytest.raises(ValueError, match="is not a number of bytes"):
        parse_bytes(text)


@given(st.integers(0, 1 << 62))
def test_a_plain_number_is_itself(nbytes: int) -> None:
    assert parse_bytes(str(nbytes)) == nbytes


@given(st.text())
def test_any_text_is_a_number_or_a_value_error(text: str) -> None:
    try:
        assert parse_bytes(text) >= 0
    except ValueError:
        pass


def test_more_digits_than_a_float_holds() -> None:
    assert parse_bytes("9" * 400 + ".5") == int("9" * 400)


@given(st.integers(0, 1 << 62))
def test_what_is_shown_can_be_read_again(nbytes: int) -> None:
    # One decimal is shown: the error is at most a twentieth of the unit.
    assert parse_bytes(format_bytes(nbytes)) == pytest.approx(nbytes, rel=0.05)
