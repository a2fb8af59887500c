"""What the files of a checkpoint that is saved per rank are called. Pure."""

from __future__ import annotations

import string
from dataclasses import dataclass
from itertools import pairwise

from streamload.checkpoint.index import SHARD_SUFFIX
from streamload.checkpoint.manifest import manifest_name
from streamload.checkpoint.text import brief
from streamload.errors import OptionError

__all__ = ["PIPELINE_PATTERN", "RANK_PATTERN", "RankNames", "names_of_rank"]

RANK_PATTERN = "model-rank-{rank}-part-{part}.safetensors"
"""vLLM's, where there is no pipeline parallelism."""

PIPELINE_PATTERN = "model-pp-{pp_rank}-tp-{tp_rank}-part-{part}.safetensors"
"""vLLM's, where there is."""

_FIELDS = ("rank", "tp_rank", "pp_rank", "part")


@dataclass(frozen=True, slots=True)
class RankNames:
    """What one rank's files are called.

    Attributes:
        before: What stands before the part's number, with the rank's fields filled in.
        after: What stands after it; None where the pattern has no part, and the rank one file.
    """

    before: str
    after: str | None

    def name(self, part: int) -> str:
        """The name of a part, counted from 0.

        Raises:
            OptionError: There is a second part, and the pattern has no field for it.
        """
        if self.after is None:
            if part:
                raise OptionError(
                    f"the pattern for {brief(self.before)} has no {{part}}, and the tensors do not fit one file: add "
                    "it, or raise max_file_bytes"
                )
            return self.before
        return f"{self.before}{part}{self.after}"

    @property
    def manifest(self) -> str:
        """What the manifest of all parts is called."""
        return manifest_name(self.before if self.after is None else f"{self.before}all{self.after}")

    def is_mine(self, name: str) -> bool:
        """Whether a file is one of this rank's."""
        if self.after is None:
            return name == self.before
        if not (name.startswith(self.before) and name.endswith(self.after)):
            return False
        part = name[len(self.before) : len(name) - len(self.after)]
        return part.isascii() and part.isdigit()


def names_of_rank(
    *, rank: int, world_size: int, pp_size: int = 1, pp_rank: int | None = None, pattern: str | None = None
) -> RankNames:
    """Fill a rank into a pattern.

    Ranks of a tensor-parallel group follow one another: with pipeline parallelism, rank ``r`` is
    ``pp_rank = r // tp_size`` and ``tp_rank = r % tp_size``, as torchrun and vLLM count.

    Args:
        rank: Of all.
        world_size: How many ranks there are.
        pp_size: How many stages the pipeline has.
        pp_rank: The stage, where it should be checked; it follows from the rank.
        pattern: A file name over the fields ``rank``, ``tp_rank``, ``pp_rank`` and ``part``; ``{{`` and ``}}`` are
            braces. None: vLLM's.

    Raises:
        OptionError: The numbers contradict each other; or the pattern has an unknown field, cannot tell ranks apart, is
            no name of a file, or has a field next to a digit or to another field.
    """
    _check_number("world_size", world_size, 1)
    _check_number("pp_size", pp_size, 1)
    if world_size % pp_size:
        raise OptionError(f"world_size={world_size} ranks cannot be divided into pp_size={pp_size} stages")
    _check_number("rank", rank, 0, world_size - 1)
    tp_size = world_size // pp_size
    if pp_rank is not None and pp_rank != rank // tp_size:
        raise OptionError(
            f"pp_rank={pp_rank}, but rank {rank} of {world_size} in {pp_size} stages is of stage {rank // tp_size}: "
            "ranks of one stage follow one another"
        )
    values = {"rank": rank, "tp_rank": rank % tp_size, "pp_rank": rank // tp_size}
    if pattern is None:
        pattern = RANK_PATTERN if pp_size == 1 else PIPELINE_PATTERN
    fields, texts = _parse(pattern)
    told = set(fields)
    if world_size > 1 and "rank" not in told:
        needed = {name for name, size in (("tp_rank", tp_size), ("pp_rank", pp_size)) if size > 1}
        if not needed <= told:
            missing = " and ".join(f"{{{name}}}" for name in sorted(needed - told))
            raise OptionError(f"the pattern {brief(pattern)} cannot tell ranks apart: it needs {{rank}}, or {missing}")
    filled = [texts[0]]
    for field, text in zip(fields, texts[1:], strict=True):
        if field == "part":
            filled.append(text)
        else:
            filled[-1] += f"{values[field]}{text}"
    return RankNames(filled[0], filled[1] if len(filled) > 1 else None)


def _parse(pattern: str) -> tuple[list[str], list[str]]:
    """A pattern's fields, and the texts around them: one more than there are fields."""
    try:
        parsed = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise OptionError(f"the pattern {brief(pattern)} cannot be read: {error}") from None
    fields: list[str] = []
    texts = [""]
    for text, field, spec, conversion in parsed:
        texts[-1] += text
        if field is None:
            continue
        if field not in _FIELDS or spec or conversion:
            known = ", ".join(f"{{{name}}}" for name in _FIELDS)
            raise OptionError(f"the pattern {brief(pattern)} has a field that is none: there are {known}")
        fields.append(field)
        texts.append("")
    _check_texts(pattern, fields, texts)
    return fields, texts


def _check_texts(pattern: str, fields: list[str], texts: list[str]) -> None:
    if fields.count("part") > 1:
        raise OptionError(f"the pattern {brief(pattern)} has {{part}} more than once")
    if not texts[-1].endswith(SHARD_SUFFIX):
        raise OptionError(f"the pattern {brief(pattern)} does not end in {SHARD_SUFFIX}")
    whole = "".join(texts)
    if "/" in whole or "\\" in whole or not whole.isprintable() or whole.startswith("."):
        raise OptionError(f"the pattern {brief(pattern)} is no plain name of a file")
    for before, after in pairwise(texts):
        # Rank 1's part 11 and rank 11's part 1 must not be called the same.
        if before[-1:].isdigit() or after[:1].isdigit():
            raise OptionError(f"the pattern {brief(pattern)} has a field next to a digit")
    if any(not text for text in texts[1:-1]):
        raise OptionError(f"the pattern {brief(pattern)} has two fields with nothing between them")


def _check_number(name: str, value: int, least: int, most: int | None = None) -> None:
    if type(value) is not int or value < least or (most is not None and value > most):
        bounds = f"of at least {least}" if most is None else f"from {least} to {most}"
        raise OptionError(f"{name}={value!r} is not a whole number {bounds}")
