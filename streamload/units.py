"""Amounts as people read and write them."""

from __future__ import annotations

import re

__all__ = ["format_bytes", "format_count", "format_range", "format_seconds", "parse_bytes"]

_BINARY = ("B", "KiB", "MiB", "GiB", "TiB")
_FACTORS = {"": 1, "B": 1} | {
    unit: factor
    for power, letter in enumerate("KMGT", start=1)
    for unit, factor in ((letter, 1024**power), (f"{letter}IB", 1024**power), (f"{letter}B", 1000**power))
}


def format_bytes(nbytes: int) -> str:
    """`nbytes` in the largest binary unit that leaves a number of at least one: ``1.5 GiB``."""
    amount = float(nbytes)
    for unit in _BINARY:
        if round(amount, 1) < 1024 or unit == _BINARY[-1]:
            return f"{nbytes} B" if unit == "B" else f"{amount:.1f} {unit}"
        amount /= 1024
    raise AssertionError("unreachable")


def format_count(number: int, thing: str) -> str:
    """`number` of a thing whose plural ends in s: ``1 file``, ``2 files``."""
    return f"{number} {thing}" if number == 1 else f"{number} {thing}s"


def format_range(least: int, most: int) -> str:
    """From `least` to `most`, or the one number where they are the same: ``8``, ``8 to 64``."""
    return str(least) if least == most else f"{least} to {most}"


def format_seconds(seconds: float) -> str:
    """`seconds` with three digits or so: ``12.3 s``, ``45 ms``, ``3 min 20 s``."""
    if seconds >= 120:
        return f"{int(seconds // 60)} min {int(seconds % 60)} s"
    if seconds >= 1:
        return f"{seconds:.1f} s" if seconds >= 10 else f"{seconds:.2f} s"
    return f"{seconds * 1000:.0f} ms"


def parse_bytes(text: str) -> int:
    """A number of bytes, with a unit if wanted: ``268435456``, ``256MiB``, ``256M`` (binary), ``1.5GB`` (decimal).

    Raises:
        ValueError: It is no such thing.
    """
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text)
    factor = _FACTORS.get(match[2].upper()) if match else None
    if match is None or factor is None:
        raise ValueError(f"{text!r} is not a number of bytes such as 268435456, 256MiB or 1.5GB")
    whole, _, decimals = match[1].partition(".")
    nbytes: int = int(whole + decimals) * factor // 10 ** len(decimals)
    return nbytes
