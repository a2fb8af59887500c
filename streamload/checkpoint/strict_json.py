"""JSON as its standard has it, where Python's `json` is more lenient, with a bound on the nesting."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from itertools import accumulate
from typing import NoReturn

__all__ = ["MAX_DEPTH", "InvalidJson", "Pairs", "RepeatingObject", "decode_object", "read_object"]

MAX_DEPTH = 127
"""How deep arrays and objects may nest: what serde_json, and with it the reference implementation, accepts."""

Pairs = list[tuple[str, object]]

_WHITESPACE = " \t\n\r"
_BRACKETS = b"[]{}"
_NOT_STRUCTURE = bytes(byte for byte in range(256) if byte not in _BRACKETS + b'"')
_STEP = [(byte in b"[{") - (byte in b"]}") for byte in range(256)]
# Large enough that the loop over blocks costs nothing, small enough that a bomb is seen after its first few bytes.
_DEPTH_BLOCK = 1 << 16

# One escape sequence after the other; `lone` is a surrogate that is not the first or second half of a pair.
_ESCAPE = re.compile(r"\\(?:u[dD][89abAB]..\\u[dD][c-fC-F]..|u(?P<lone>[dD][89a-fA-F]..)|.)")

# Shorter ones fit into 64 bits, with or without a sign.
_LONG_NUMBER = b"0" * 19
_DIGITS_TO_ZERO = bytes(ord("0") if byte in b"0123456789" else ord(" ") for byte in range(256))

_MAX_U64 = 2**64 - 1
_MIN_I64 = -(2**63)


class InvalidJson(Exception):
    """The text is not what `decode_object` accepts; the callers make an error of their own of it."""


class RepeatingObject(dict[str, object]):
    """An object in which a name stands more than once; each has the value that it was given last.

    Attributes:
        repeated: The names that stand more than once, in order.
    """

    repeated: tuple[str, ...]


def read_object(pairs: Pairs) -> dict[str, object]:
    """Make a dict of an object's pairs, or a `RepeatingObject` where a name repeats."""
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    repeating = RepeatingObject(found)
    repeating.repeated = tuple(name for name, times in Counter(name for name, _ in pairs).items() if times > 1)
    return repeating


def decode_object(raw: bytes | bytearray, *, make_object: Callable[[Pairs], object] = read_object) -> object:
    """Decode one JSON document, which has to be an object.

    Beyond what `json.loads` refuses, this refuses a byte order mark and every encoding but strict UTF-8, ``NaN`` and
    ``Infinity``, numbers too large for a double, lone surrogates, and nesting deeper than `MAX_DEPTH`. Integers
    that fit into 64 bits are `int`; all other numbers, ``-0`` among them, are `float`.

    Time and memory grow with the length of `raw` only: the nesting is measured before anything is built, and what is
    built takes some 25 bytes for each byte at worst (arrays full of empty arrays).

    Args:
        raw: The document; whitespace around it is allowed.
        make_object: Makes a value of an object's pairs, duplicate names included.

    Raises:
        InvalidJson: It is not such a document. No other error leaves this function.
    """
    # What is caught is raised anew outside of its handler: each of these errors holds on to the whole text.
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        problem = f"byte {error.start} is not UTF-8: {error.reason}"
    else:
        if _nests_too_deep(raw):
            raise InvalidJson(f"it nests deeper than {MAX_DEPTH} levels")
        if not text.lstrip(_WHITESPACE).startswith("{"):
            raise InvalidJson("it is not a JSON object")
        try:
            value = _decoder(raw, make_object).decode(text)
        except json.JSONDecodeError as error:
            problem = f"byte {len(text[: error.pos].encode())} is not valid JSON: {error.msg}"
        except RecursionError:
            problem = "it nests deeper than what is left of the stack allows"
        except MemoryError:
            problem = "it needs more memory than there is"
        else:
            _refuse_lone_surrogates(text)
            return value
    raise InvalidJson(problem)


def _decoder(raw: bytes | bytearray, make_object: Callable[[Pairs], object]) -> json.JSONDecoder:
    # `int` is built into the scanner and several times as fast as a function of ours. It would read -0 as 0, and a
    # number of any length; only a text that holds one of these, if only in a name, needs the slower way.
    plain = b"-0" not in raw and _LONG_NUMBER not in raw.translate(_DIGITS_TO_ZERO)
    return json.JSONDecoder(
        object_pairs_hook=make_object,
        parse_int=int if plain else _integer,
        parse_float=_real,
        parse_constant=_refuse_constant,
    )


def _nests_too_deep(raw: bytes | bytearray) -> bool:
    """Whether brackets outside of strings nest deeper than `MAX_DEPTH`.

    Exact for valid JSON, and in anything else exact up to the first mistake, which is as far as a decoder gets.
    """
    if b"\\" in raw:
        # Backslashes stand in strings only. Without the doubled ones, each that is left escapes the byte after it.
        raw = raw.replace(b"\\\\", b"").replace(b'\\"', b"")
    structure = raw.translate(None, _NOT_STRUCTURE)
    # Taking out two neighbouring quotes leaves every bracket on the side (inside or outside of strings) on which it
    # was; nearly always no quote is left then.
    structure = structure.replace(b'""', b"")
    brackets = b"".join(structure.split(b'"')[::2])
    depth = 0
    for at in range(0, len(brackets), _DEPTH_BLOCK):
        depths = list(accumulate(map(_STEP.__getitem__, brackets[at : at + _DEPTH_BLOCK]), initial=depth))
        if max(depths) > MAX_DEPTH:
            return True
        depth = depths[-1]
    return False


def _refuse_lone_surrogates(text: str) -> None:
    # Strict UTF-8 holds no surrogates, so that only an escape can have brought one.
    if "\\ud" not in text and "\\uD" not in text:
        return
    for escape in _ESCAPE.finditer(text):
        if escape["lone"]:
            raise InvalidJson(f"a string in it holds the lone surrogate \\u{escape['lone']}")


def _integer(digits: str) -> int | float:
    if len(digits) < len(_LONG_NUMBER):
        return int(digits) if digits != "-0" else -0.0
    real = _real(digits)
    if len(digits) > 20:  # at most 20 characters fit into 64 bits, and `int` refuses more than 4,300
        return real
    integer = int(digits)
    return integer if _MIN_I64 <= integer <= _MAX_U64 else real


def _real(digits: str) -> float:
    real = float(digits)
    if real in (float("inf"), float("-inf")):
        raise InvalidJson("a number in it is out of range")
    return real


def _refuse_constant(name: str) -> NoReturn:
    raise InvalidJson(f"{name} is not JSON")
