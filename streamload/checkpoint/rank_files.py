"""The names of a pre-sharded checkpoint's files: which of them are one rank's. No I/O.

A pattern is text with fields in braces: ``tp_rank`` is the rank among those that share each layer (tensor parallelism),
and ``rank`` is another name for it, as in vLLM; ``pp_rank`` is the pipeline stage; ``part`` counts a rank's files.
``{{`` and ``}}`` are braces.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from string import Formatter

from streamload.checkpoint.index import SHARD_SUFFIX
from streamload.checkpoint.manifest import is_manifest, manifest_name, manifested_key
from streamload.checkpoint.text import brief
from streamload.errors import CheckpointError, OptionError

__all__ = ["PIPELINE_PATTERN", "RANK_PATTERN", "RankFiles", "without_rank_files"]

RANK_PATTERN = "model-rank-{rank}-part-{part}.safetensors"
"""What vLLM's sharded_state calls its files."""

PIPELINE_PATTERN = "model-pp-{pp_rank}-tp-{tp_rank}-part-{part}.safetensors"
"""The same, with more than one pipeline stage."""

_FIELDS = ("rank", "tp_rank", "pp_rank", "part")
# Without this many digits: Python refuses to convert longer ones, and nobody counts that far.
_MOST_DIGITS = 18


@dataclass(frozen=True, slots=True)
class RankFiles:
    """What one rank's files are called.

    Ranks of one stage follow one another: with several stages, rank ``r`` has ``pp_rank = r // tp_size`` and
    ``tp_rank = r % tp_size``, as torchrun and vLLM count.

    Attributes:
        rank: Among all, counted from 0.
        world_size: How many ranks there are.
        pp_size: How many pipeline stages.
        pattern: A file's name. None: vLLM's, and a checkpoint in which nothing is called so may be an ordinary one.

    Raises:
        OptionError: The numbers contradict each other; or the pattern has an unknown field, a format specification or
            a conversion, cannot tell ranks apart, is no plain name of a safetensors file, or has a field next to a
            digit or to another field: with ``{rank}{part}``, ``12`` could be part 2 of rank 1 or the file of rank 12.
    """

    rank: int
    world_size: int
    pp_size: int = 1
    pattern: str | None = None

    def __post_init__(self) -> None:
        _check_number("world_size", self.world_size, 1)
        _check_number("pp_size", self.pp_size, 1)
        if self.world_size % self.pp_size:
            raise OptionError(f"world_size={self.world_size} ranks cannot be pp_size={self.pp_size} stages of one size")
        _check_number("rank", self.rank, 0, self.world_size - 1)
        told = {field for _, field in _parse(self.effective_pattern)}
        missing = []
        if self.pp_size > 1 and "pp_rank" not in told:
            missing.append("{pp_rank}")
        if self.tp_size > 1 and not told & {"rank", "tp_rank"}:
            missing.append("{tp_rank}")
        if missing:
            raise OptionError(
                f"pattern={brief(self.effective_pattern)} cannot tell ranks apart: it needs {' and '.join(missing)}"
            )

    @property
    def effective_pattern(self) -> str:
        """The pattern, or what counts where there is none."""
        if self.pattern is not None:
            return self.pattern
        return RANK_PATTERN if self.pp_size == 1 else PIPELINE_PATTERN

    @property
    def tp_size(self) -> int:
        """How many ranks share each layer."""
        return self.world_size // self.pp_size

    @property
    def tp_rank(self) -> int:
        """The rank among those that share its layers."""
        return self.rank % self.tp_size

    @property
    def pp_rank(self) -> int:
        """The pipeline stage."""
        return self.rank // self.tp_size

    def name(self, part: int) -> str:
        """The name of a file.

        Args:
            part: Which of the rank's files, counted from 0.

        Raises:
            OptionError: It is a second one, and the pattern has no field for it.
        """
        if part and "part" not in {field for _, field in _parse(self.effective_pattern)}:
            raise OptionError(
                f"pattern={brief(self.effective_pattern)} has no {{part}}, and the tensors do not fit one file: add "
                "it, or raise max_file_bytes"
            )
        return self._filled(str(part))

    @property
    def manifest(self) -> str:
        """What the manifest of all of the rank's files is called."""
        return manifest_name(self._filled("all"))

    def is_mine(self, key: str) -> bool:
        """Whether a file is one of this rank's."""
        return self._expression().fullmatch(key) is not None

    def in_order(self, keys: Iterable[str]) -> list[str]:
        """This rank's files among others, in the order of their parts."""
        found = ((self._expression().fullmatch(key), key) for key in keys)
        parts = ((int(match.groupdict().get("part", "0")), key) for match, key in found if match is not None)
        return [key for _, key in sorted(parts)]

    def is_manifest_of_mine(self, key: str) -> bool:
        """Whether a file is called as manifests are that tell of this rank's files and of no other's."""
        return key == self.manifest or (is_manifest(key) and self.is_mine(manifested_key(key)))

    def choose(self, keys: Sequence[str]) -> tuple[str, ...] | None:
        """Say which files are this rank's, where the checkpoint is a pre-sharded one.

        The whole name must match, and numbers are compared as a whole: rank 1 gets nothing of rank 11's.

        Args:
            keys: What lies in the checkpoint's folder.

        Returns:
            The rank's files, in the order of their parts; None where the checkpoint is an ordinary one.

        Raises:
            CheckpointError: There are files of other ranks and none of this one; files of ranks that there should not
                be, since the checkpoint was made for more of them; a part is missing between others, or, under vLLM's
                names, before them; a part is there twice; or a pattern was given and nothing matches it.
        """
        ranks = list(_ranks(self.effective_pattern, keys))
        if not ranks and self.pattern is None:
            self._refuse_other_default(keys)
            return None
        wanted = brief(self._filled("{part}"))
        if not ranks:
            there = f"only {brief(sorted(keys))}" if keys else "nothing at all"
            raise CheckpointError(
                f"no file is called {wanted}, as pattern={brief(self.pattern)} says; there is {there}"
            )
        limits = {"rank": self.tp_size, "tp_rank": self.tp_size, "pp_rank": self.pp_size}
        for key, numbers in ranks:
            for field, number in numbers.items():
                if number >= limits[field]:
                    what = "pipeline stages" if field == "pp_rank" else "ranks"
                    raise CheckpointError(
                        f"the checkpoint was made for more than {limits[field]} {what}: there is {brief(key)}",
                        object=key,
                    )
        files = self._parts(keys)
        if not files:
            raise CheckpointError(f"no file is called {wanted}; there is {brief([key for key, _ in ranks])}")
        return files

    def _parts(self, keys: Iterable[str]) -> tuple[str, ...]:
        match = self._expression().fullmatch
        parts: dict[int, str] = {}
        for key in keys:
            found = match(key)
            if found is None:
                continue
            part = int(found.groupdict().get("part", "0"))
            if part in parts:
                twice = brief(sorted([parts[part], key]))
                raise CheckpointError(f"part {part} of rank {self.rank} is there twice: {twice}")
            parts[part] = key
        numbers = sorted(parts)
        # Under vLLM's names, which begin at 0; a user's own may count from anywhere.
        if numbers and numbers[0] and self.pattern is None:
            raise CheckpointError(
                f"part 0 of rank {self.rank} is missing: the first that is there is {brief(parts[numbers[0]])}"
            )
        for number, following in pairwise(numbers):
            if following != number + 1:
                raise CheckpointError(
                    f"part {number + 1} of rank {self.rank} is missing: there is {brief(parts[number])}, "
                    f"and then {brief(parts[following])}"
                )
        return tuple(parts[number] for number in numbers)

    def _refuse_other_default(self, keys: Sequence[str]) -> None:
        """Where the checkpoint is pre-sharded in vLLM's other way, it is no ordinary one."""
        other = RANK_PATTERN if self.pp_size > 1 else PIPELINE_PATTERN
        for key, _ in _ranks(other, keys):
            how = "without pp_size" if other == RANK_PATTERN else "with pp_size"
            raise CheckpointError(
                f"no file is called as {self.effective_pattern} says, but there is {brief(key)}: load it {how}"
            )

    def _values(self) -> dict[str, str]:
        return {"rank": str(self.tp_rank), "tp_rank": str(self.tp_rank), "pp_rank": str(self.pp_rank)}

    def _filled(self, part: str) -> str:
        values = self._values() | {"part": part}
        return "".join(
            text + ("" if field is None else values[field]) for text, field in _parse(self.effective_pattern)
        )

    def _expression(self) -> re.Pattern[str]:
        return _expression(self.effective_pattern, self._values())


def without_rank_files(keys: Sequence[str]) -> tuple[str, ...]:
    """What counts in a folder without an index for who names no rank: an ordinary checkpoint's files.

    Args:
        keys: What lies in the folder.

    Returns:
        The keys; where several ranks have files under vLLM's patterns, those are left out.

    Raises:
        CheckpointError: There is nothing else: the checkpoint is pre-sharded, and it takes a rank to load it; or there
            are one rank's files, and a part of them is missing.
    """
    for pattern in (RANK_PATTERN, PIPELINE_PATTERN):
        ranks = {tuple(numbers.values()): key for key, numbers in _ranks(pattern, keys)}
        if len(ranks) == 1:
            ((*stage, rank),) = ranks
            # As many stages and ranks as it takes for this one to be among them.
            stages = stage[0] + 2 if stage else 1
            RankFiles(rank + sum(stage) * (rank + 1), stages * (rank + 1), stages)._parts(keys)
        if len(ranks) < 2:
            continue
        match = _expression(pattern, {}).fullmatch
        others = tuple(key for key in keys if not match(key))
        if not any(key.endswith(SHARD_SUFFIX) for key in others):
            raise CheckpointError(
                f"each file is one rank's ({len(ranks)} ranks, such as {brief(next(iter(ranks.values())))}): give rank "
                f"and world_size{' and pp_size' if pattern == PIPELINE_PATTERN else ''}"
            )
        keys = others
    return tuple(keys)


def _ranks(pattern: str, keys: Iterable[str]) -> Iterator[tuple[str, dict[str, int]]]:
    """All files that are some rank's, in the order of their names, each with the numbers in its name."""
    match = _expression(pattern, {}).fullmatch
    for key in sorted(keys):
        found = match(key)
        if found is not None:
            yield key, {field: int(number) for field, number in found.groupdict().items() if field != "part"}


def _expression(pattern: str, values: dict[str, str]) -> re.Pattern[str]:
    """What matches the pattern's names; fields without a value become groups."""
    written: set[str] = set()
    expression = ""
    for text, field in _parse(pattern):
        expression += re.escape(text)
        if field is None:
            continue
        if field in values:
            expression += re.escape(values[field])
        elif field in written:
            expression += f"(?P={field})"
        else:
            written.add(field)
            # A rank's number is as `RankFiles.name` writes it; a part's may have zeros in front.
            digits = rf"[0-9]{{1,{_MOST_DIGITS}}}"
            expression += f"(?P<{field}>{digits if field == 'part' else f'(?:0|(?!0){digits})'})"
    return re.compile(expression)


def _parse(pattern: str) -> list[tuple[str, str | None]]:
    """The pattern as pieces of text, each with the field behind it; None behind the last."""
    try:
        parsed = list(Formatter().parse(pattern))
    except ValueError as error:
        raise OptionError(f"pattern={brief(pattern)}: {error}") from error
    fields: list[str] = []
    texts = [""]
    for text, field, specification, conversion in parsed:
        texts[-1] += text
        if field is None:
            continue
        if field not in _FIELDS:
            raise OptionError(f"pattern={brief(pattern)} has no field {{{field}}}: there are {', '.join(_FIELDS)}")
        if specification or conversion:
            raise OptionError(f"pattern={brief(pattern)}: {{{field}}} takes no format specification and no conversion")
        fields.append(field)
        texts.append("")
    _check_texts(pattern, fields, texts)
    return list(zip(texts, [*fields, None], strict=True))


def _check_texts(pattern: str, fields: list[str], texts: list[str]) -> None:
    if fields.count("part") > 1:
        raise OptionError(f"pattern={brief(pattern)} has {{part}} more than once")
    whole = "".join(texts)
    if "/" in whole or "\\" in whole or not whole.isprintable() or texts[0].startswith("."):
        raise OptionError(f"pattern={brief(pattern)} is no plain name of a file in the checkpoint's own folder")
    if not texts[-1].endswith(SHARD_SUFFIX):
        raise OptionError(f"pattern={brief(pattern)} does not end in {SHARD_SUFFIX}")
    if any(not text for text in texts[1:-1]):
        raise OptionError(f"pattern={brief(pattern)} has two fields with nothing between them")
    for before, after in pairwise(texts):
        # Rank 1's part 11 and rank 11's part 1 must not be called the same, and a manifest goes by whole numbers.
        if before[-1:].isdigit() or after[:1].isdigit():
            raise OptionError(f"pattern={brief(pattern)} has a field next to a digit")


def _check_number(name: str, value: int, least: int, most: int | None = None) -> None:
    if type(value) is not int or value < least or (most is not None and value > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise OptionError(f"{name}={value!r} is not a whole number {bounds}")
