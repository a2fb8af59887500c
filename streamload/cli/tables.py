"""Tables as text.

Not rich's: it takes a millisecond for each row, and a checkpoint can have 100,000 tensors.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence

from streamload.cli.console import printable

__all__ = ["table", "terminal_width"]

_GAP = "  "

# A column that is folded is at least so wide, however narrow the terminal.
_LEAST_FOLDED = 20


def terminal_width() -> int | None:
    """How many columns stdout's terminal has; None where stdout is no terminal."""
    return shutil.get_terminal_size().columns if sys.stdout is not None and sys.stdout.isatty() else None


def table(
    headings: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    right: Sequence[int] = (),
    fold: int = 0,
    indent: str = "",
    width: int | None = None,
) -> str:
    """Lay out a table; nothing is ever cut off.

    Args:
        headings: One for each column.
        rows: Their cells.
        right: The columns that are aligned to the right.
        fold: The column that is folded over several lines where the table is too wide.
        indent: Stands before every line.
        width: How many columns there are to fill; None where lines may be of any length.

    Returns:
        The lines, without an end of line after the last.
    """
    cells = [tuple(headings), *(tuple(map(printable, row)) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    if width is not None:
        excess = len(indent) + sum(widths) + len(_GAP) * (len(widths) - 1) - width
        if excess > 0:
            widths[fold] = min(widths[fold], max(_LEAST_FOLDED, widths[fold] - excess))
    lines: list[str] = []
    for row in cells:
        first, *others = _folded(row[fold], widths[fold])
        shown = [*row[:fold], first, *row[fold + 1 :]]
        lines.append(indent + _line(shown, widths, right))
        margin = " " * sum(cell + len(_GAP) for cell in widths[:fold])
        lines += [indent + margin + other for other in others]
    return "\n".join(lines)


def _folded(text: str, width: int) -> list[str]:
    return [text[start : start + width] for start in range(0, len(text), width)] or [""]


def _line(cells: Sequence[str], widths: Sequence[int], right: Sequence[int]) -> str:
    padded = (
        cell.rjust(width) if number in right else cell.ljust(width)
        for number, (cell, width) in enumerate(zip(cells, widths, strict=True))
    )
    return _GAP.join(padded).rstrip()
