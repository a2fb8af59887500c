"""The names of a pre-sharded checkpoint's files: which of them are one rank's. No I/O.

A pattern is text with fields in braces: ``rank`` and ``tp_rank`` are both the rank among those that share each layer
(tensor parallelism), ``pp_rank`` is the pipeline stage, ``part`` counts a rank's files. ``{{`` and ``}}`` are braces.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from string import Formatter

from streamload.checkpoint.index import SHARD_SUFFIX
from streamload.checkpoint.text import brief
from streamload.errors import CheckpointError, OptionError

__all__ = [
    "PIPELINE_PATTERN",
    "RANK_PATTERN",
    "check_pattern",
    "choose_rank_files",
    "default_pattern",
    "files_for",
    "name_for",
    "without_rank_files",
]

RANK_PATTERN = "model-rank-{rank}-part-{part}.safetensors"
"""What vLLM's sharded_state calls its files."""
PIPELINE_PATTERN = "model-pp-{pp_rank}-tp-{tp_rank}-part-{part}.safetensors"
"""The same, with more than one pipeline stage."""

_FIELDS = ("rank", "tp_rank", "pp_rank", "part")
# Without this many digits: Python refuses to convert longer ones, and nobody counts that far.
_MOST_DIGITS = 18


def default_pattern(pp_size: int | None) -> str:
    """The pattern where none is given."""
    return PIPELINE_PATTERN if (pp_size or 1) > 1 else RANK_PATTERN


def check_pattern(pattern: str, *, pp_size: int | None = None) -> None:
    """Refuse a pattern that does not tell ranks apart, or that does not mean anything.

    Args:
        pattern: The pattern.
        pp_size: How many pipeline stages there are.

    Raises:
        OptionError: An unknown field, a format specification or a conversion, a name in a deeper folder, no field for
            the rank (or, with several stages, for the stage), or fields that run into each other: with
            ``{rank}{part}``, ``12`` could be the second part of rank 1 or the first file of rank 12.
    """
    fields = [field for _, field in _parse(pattern) if field is not None]
    if "rank" not in fields and "tp_rank" not in fields:
        raise OptionError(f"pattern={brief(pattern)} cannot tell ranks apart: it has neither {{rank}} nor {{tp_rank}}")
    if (pp_size or 1) > 1 and "pp_rank" not in fields:
        raise OptionError(
            f"pattern={brief(pattern)} cannot tell {pp_size} pipeline stages apart: it has no {{pp_rank}}"
        )


def name_for(pattern: str, *, rank: int, pp_rank: int = 0, part: int = 0) -> str:
    """The name of one file.

    Args:
        pattern: One that `check_pattern` accepts.
        rank: Counted from 0; what ``{rank}`` and ``{tp_rank}`` stand for.
        pp_rank: The pipeline stage, counted from 0.
        part: Which of the rank's files, counted from 0.

    Raises:
        OptionError: The pattern has no meaning.
    """
    values = {"rank": rank, "tp_rank": rank, "pp_rank": pp_rank, "part": part}
    return "".join(text + ("" if field is None else str(values[field])) for text, field in _parse(pattern))


def files_for(pattern: str, keys: Iterable[str], *, rank: int, pp_rank: int = 0) -> tuple[str, ...]:
    """One rank's files among those that are there.

    The whole name must match, and numbers are compared as a whole: rank 1 gets nothing of rank 11's.

    Args:
        pattern: One that `check_pattern` accepts.
        keys: What lies in the folder.
        rank: As for `name_for`.
        pp_rank: As for `name_for`.

    Returns:
        The keys, by the number of their part; empty where there are none.

    Raises:
        OptionError: The pattern has no meaning.
        CheckpointError: A part is there twice (``part-1`` and ``part-01``), or one is missing between others.
    """
    values = {"rank": str(rank), "tp_rank": str(rank), "pp_rank": str(pp_rank)}
    match = _expression(pattern, values).fullmatch
    parts: dict[int, str] = {}
    for key in keys:
        found = match(key)
        if found is None:
            continue
        part = int(found.groupdict().get("part", "0"))
        if part in parts:
            raise CheckpointError(f"part {part} of rank {rank} is there twice: {brief(sorted([parts[part], key]))}")
        parts[part] = key
    numbers = sorted(parts)
    for number, following in itertools.pairwise(numbers):
        if following != number + 1:
            raise CheckpointError(
                f"part {number + 1} of rank {rank} is missing: there is {brief(parts[number])}, "
                f"and then {brief(parts[following])}"
            )
    return tuple(parts[number] for number in numbers)


def choose_rank_files(
    keys: Sequence[str],
    *,
    rank: int,
    world_size: int | None = None,
    pp_rank: int = 0,
    pp_size: int | None = None,
    pattern: str | None = None,
) -> tuple[str, ...] | None:
    """Say which files are a rank's, where the checkpoint is a pre-sharded one.

    Args:
        keys: What lies in the checkpoint's folder.
        rank: As for `name_for`.
        world_size: How many ranks share each layer; None: not known.
        pp_rank: As for `name_for`.
        pp_size: How many pipeline stages there are; None: not known.
        pattern: The files' names. None: `default_pattern`, and the checkpoint may be an ordinary one.

    Returns:
        The rank's files, in the order of their parts; None where the checkpoint is an ordinary one.

    Raises:
        OptionError: The pattern has no meaning.
        CheckpointError: There are files of other ranks and none of this one; files of ranks that there should not be,
            since the checkpoint was made for more of them; a part is missing; or a pattern was given and nothing
            matches it.
    """
    looked_for = default_pattern(pp_size) if pattern is None else pattern
    check_pattern(looked_for, pp_size=pp_size)
    ranks = _ranks(looked_for, keys)
    if not ranks and pattern is None:
        _refuse_other_default(looked_for, keys)
        return None
    shown = {"rank": str(rank), "tp_rank": str(rank), "pp_rank": str(pp_rank)}
    wanted = brief(
        "".join(text + shown.get(field or "", f"{{{field}}}" if field else "") for text, field in _parse(looked_for))
    )
    if not ranks:
        there_is = f"only {brief(sorted(keys))}" if keys else "nothing at all"
        raise CheckpointError(f"no file is called {wanted}, as pattern={brief(pattern)} says; there is {there_is}")
    for limit, at, what in ((world_size, 0, "rank"), (pp_size, 1, "pipeline stage")):
        beyond = sorted({found[at] for found in ranks if limit is not None and found[at] >= limit})
        if beyond:
            key = next(key for found, key in ranks.items() if found[at] == beyond[0])
            raise CheckpointError(
                f"the checkpoint was made for more than {limit} {what}s: there is {brief(key)}", object=key
            )
    files = files_for(looked_for, keys, rank=rank, pp_rank=pp_rank)
    if not files:
        raise CheckpointError(f"no file is called {wanted}; there is {brief(sorted(ranks.values()))}")
    return files


def without_rank_files(keys: Sequence[str]) -> tuple[str, ...]:
    """What counts in a folder without an index for who names no rank: an ordinary checkpoint's files.

    Args:
        keys: What lies in the folder.

    Returns:
        The keys; where several ranks have files under the default patterns, those are left out.

    Raises:
        CheckpointError: There is nothing else: the checkpoint is pre-sharded, and it takes a rank to load it.
    """
    for pattern in (RANK_PATTERN, PIPELINE_PATTERN):
        ranks = _ranks(pattern, keys)
        if len(ranks) < 2:
            continue
        match = _expression(pattern, {}).fullmatch
        others = tuple(key for key in keys if not match(key))
        if not any(key.endswith(SHARD_SUFFIX) for key in others):
            raise CheckpointError(
                f"each file is one rank's ({len(ranks)} ranks, such as {brief(next(iter(ranks.values())))}): give rank "
                f"and world_size{', pp_rank and pp_size' if pattern == PIPELINE_PATTERN else ''}"
            )
        keys = others
    return tuple(keys)


def _refuse_other_default(pattern: str, keys: Sequence[str]) -> None:
    """Where the checkpoint is pre-sharded in the other way, it is no ordinary one."""
    other = RANK_PATTERN if pattern == PIPELINE_PATTERN else PIPELINE_PATTERN
    found = _ranks(other, keys)
    if found:
        how = "without pp_size" if other == RANK_PATTERN else "with pp_rank and pp_size"
        raise CheckpointError(
            f"no file is called as {pattern} says, but there is {brief(next(iter(found.values())))}: load it {how}"
        )


def _ranks(pattern: str, keys: Iterable[str]) -> dict[tuple[int, int], str]:
    """All ranks of which there are files, as rank and stage; and a file of each."""
    match = _expression(pattern, {}).fullmatch
    ranks: dict[tuple[int, int], str] = {}
    for key in sorted(keys):
        found = match(key)
        if found is not None:
            groups = found.groupdict()
            rank = groups.get("rank") or groups.get("tp_rank") or "0"
            ranks.setdefault((int(rank), int(groups.get("pp_rank") or "0")), key)
    return ranks


def _expression(pattern: str, values: Mapping[str, str]) -> re.Pattern[str]:
    """What matches the pattern's names; fields without a value become groups."""
    written: set[str] = set()
    expression = ""
    for text, field in _parse(pattern):
        expression += re.escape(text)
        if field is None:
            continue
        # The rank has two names, and stands for the same number under both.
        group = "rank" if field == "tp_rank" else field
        if field in values:
            expression += re.escape(values[field])
        elif group in written:
            expression += f"(?P={group})"
        else:
            written.add(group)
            # A rank's number is as `name_for` writes it; a part's may have zeros in front.
            digits = rf"[0-9]{{1,{_MOST_DIGITS}}}"
            expression += f"(?P<{group}>{digits if field == 'part' else f'(?:0|(?!0){digits})'})"
    return re.compile(expression)


def _parse(pattern: str) -> list[tuple[str, str | None]]:
    """The pattern as pieces of text, each with the field behind it."""
    try:
        pieces = list(Formatter().parse(pattern))
    except ValueError as error:
        raise OptionError(f"pattern={brief(pattern)}: {error}") from error
    if not pattern or "/" in pattern:
        raise OptionError(f"pattern={brief(pattern)} is no name of a file in the checkpoint's own folder")
    parsed: list[tuple[str, str | None]] = []
    between: str | None = None  # the text since the last field
    for text, field, specification, conversion in pieces:
        if field is not None and field not in _FIELDS:
            raise OptionError(f"pattern={brief(pattern)} has no field {{{field}}}: there are {', '.join(_FIELDS)}")
        if specification or conversion:
            raise OptionError(f"pattern={brief(pattern)}: {{{field}}} takes no format specification and no conversion")
        if between is not None:
            between += text
        if field is not None:
            if between is not None and not re.search("[^0-9]", between):
                raise OptionError(
                    f"pattern={brief(pattern)} cannot tell ranks apart: something other than digits must stand "
                    f"before {{{field}}}, or it runs into the field before it"
                )
            between = ""
        parsed.append((text, field))
    return parsed
