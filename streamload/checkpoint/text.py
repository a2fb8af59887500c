"""How the checkpoint's names are ordered, and how anything read from a file is quoted in an error."""

from __future__ import annotations

import re

__all__ = ["brief", "natural_key"]

# ASCII digits only: `\d` would also take digits of other scripts, which no writer numbers its files with.
_DIGITS = re.compile(r"([0-9]+)")

# An error is one line for a person: neither a hostile name of 100 MB nor a million numbers may make it longer.
_SHOWN_CHARACTERS = 160
_SHOWN_ITEMS = 8


def brief(value: object) -> str:
    """A JSON value, or a list of names, as an error quotes it: cut to a length that a person reads."""
    if isinstance(value, list | tuple):
        shown = [_brief_item(item) for item in value[:_SHOWN_ITEMS]]
        if len(value) > _SHOWN_ITEMS:
            shown.append("...")
        return f"[{', '.join(shown)}]"
    return _brief_item(value)


def _brief_item(value: object) -> str:
    if isinstance(value, str) and len(value) > _SHOWN_CHARACTERS:
        return f"{value[:_SHOWN_CHARACTERS]!r}..."
    if isinstance(value, list | tuple):
        return "[...]" if value else "[]"
    if isinstance(value, dict):
        return "{...}" if value else "{}"
    return repr(value)


def natural_key(name: str) -> tuple[tuple[tuple[int, str], ...], str]:
    """A sort key that puts ``part-2`` before ``part-10``.

    Digits are compared by length and then as text, which is the order of the numbers without making numbers of them:
    Python refuses to convert very long ones.
    """
    parts = _DIGITS.split(name)
    parts[1::2] = [digits.lstrip("0") for digits in parts[1::2]]
    return tuple((len(part) if at % 2 else 0, part) for at, part in enumerate(parts)), name
