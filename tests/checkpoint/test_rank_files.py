"""The names of a pre-sharded checkpoint's files: exact, whatever numbers and texts there are."""

from __future__ import annotations

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from streamload.checkpoint.rank_files import (
    PIPELINE_PATTERN,
    RANK_PATTERN,
    check_pattern,
    choose_rank_files,
    files_for,
    name_for,
    without_rank_files,
)
from streamload.errors import CheckpointError, OptionError

TEXT = st.text(st.sampled_from("ab-_.{}0123 *?[]\\+"), max_size=6)
NUMBERS = st.integers(0, 1200)


@st.composite
def patterns(draw: st.DrawFn) -> str:
    """Patterns with a rank, and perhaps a stage and a part, in any order; some of them ambiguous."""
    fields = [draw(st.sampled_from(["{rank}", "{tp_rank}"]))]
    fields += draw(st.lists(st.sampled_from(["{pp_rank}", "{part}", "{rank}"]), max_size=3))
    pattern = ""
    for field in draw(st.permutations(fields)):
        pattern += draw(TEXT).replace("{", "{{").replace("}", "}}") + field
    return pattern + draw(TEXT).replace("{", "{{").replace("}", "}}")


def valid(pattern: str) -> bool:
    try:
        check_pattern(pattern)
    except OptionError:
        return False
    return True


@given(patterns(), st.lists(st.tuples(NUMBERS, NUMBERS), min_size=1, max_size=6, unique=True), st.integers(1, 12))
def test_every_rank_gets_its_own_files_and_no_others(pattern: str, ranks: list[tuple[int, int]], parts: int) -> None:
    assume(valid(pattern))
    if "{pp_rank}" not in pattern:
        ranks = sorted({(rank, 0) for rank, _ in ranks})
    if "{part}" not in pattern:
        parts = 1
    names = {at: [name_for(pattern, rank=at[0], pp_rank=at[1], part=part) for part in range(parts)] for at in ranks}
    everything = sorted(name for files in names.values() for name in files)
    assert len(set(everything)) == len(everything), "two files of the same name"
    for (rank, stage), files in names.items():
        assert files_for(pattern, everything, rank=rank, pp_rank=stage) == tuple(files)


@given(patterns(), NUMBERS, NUMBERS, NUMBERS)
def test_names_are_those_that_format_gives(pattern: str, rank: int, stage: int, part: int) -> None:
    assume(valid(pattern))
    expected = pattern.format(rank=rank, tp_rank=rank, pp_rank=stage, part=part)
    assert name_for(pattern, rank=rank, pp_rank=stage, part=part) == expected


def test_rank_1_gets_nothing_of_rank_11() -> None:
    keys = [f"model-rank-{rank}-part-{part}.safetensors" for rank in (1, 11, 111) for part in (0, 1, 2, 10)]
    keys += [f"model-rank-1-part-{part}.safetensors" for part in range(3, 10)]
    assert files_for(RANK_PATTERN, keys, rank=1) == tuple(f"model-rank-1-part-{part}.safetensors" for part in range(11))
    others = [
        "xmodel-rank-1-part-0.safetensors",
        "model-rank-01-part-0.safetensors",
        "model-rank-1-part-0.safetensors~",
    ]
    assert files_for(RANK_PATTERN, others, rank=1) == ()


@pytest.mark.parametrize(
    ("pattern", "cause"),
    [
        ("model-{part}.safetensors", "cannot tell ranks apart: it has neither {rank} nor {tp_rank}"),
        ("model-{pp_rank}-{part}.safetensors", "cannot tell ranks apart"),
        ("model.safetensors", "cannot tell ranks apart"),
        ("{{rank}}.safetensors", "cannot tell ranks apart"),
        ("{rank}{part}.safetensors", "something other than digits must stand before {part}"),
        ("{part}0{rank}.safetensors", "something other than digits must stand before {rank}"),
        ("{rank}-{layer}.safetensors", "has no field {layer}: there are rank, tp_rank, pp_rank, part"),
        ("{rank}-{}.safetensors", "has no field {}"),
        ("{0}.safetensors", "has no field {0}"),
        ("{rank.real}.safetensors", "has no field {rank.real}"),
        ("{rank:05d}.safetensors", "{rank} takes no format specification and no conversion"),
        ("{rank!r}.safetensors", "takes no format specification and no conversion"),
        ("{rank:{part}}.safetensors", "takes no format specification and no conversion"),
        ("{rank", "expected '}' before end of string"),
        ("rank}", "Single '}' encountered"),
        ("{rank}/model.safetensors", "is no name of a file in the checkpoint's own folder"),
        ("", "is no name of a file"),
    ],
)
def test_patterns_without_meaning_are_refused(pattern: str, cause: str) -> None:
    with pytest.raises(OptionError) as caught:
        check_pattern(pattern)
    assert cause in caught.value.cause


def test_pipeline_stages_must_be_told_apart() -> None:
    check_pattern(RANK_PATTERN, pp_size=1)
    check_pattern(PIPELINE_PATTERN, pp_size=4)
    with pytest.raises(OptionError, match="cannot tell 4 pipeline stages apart"):
        check_pattern(RANK_PATTERN, pp_size=4)


def test_missing_and_repeated_parts_are_errors() -> None:
    keys = ["r0-0", "r0-1", "r0-3", "r1-0", "r1-1", "r1-01"]
    with pytest.raises(CheckpointError, match=r"part 2 of rank 0 is missing: there is 'r0-1', and then 'r0-3'"):
        files_for("r{rank}-{part}", keys, rank=0)
    with pytest.raises(CheckpointError, match=r"part 1 of rank 1 is there twice: \['r1-01', 'r1-1'\]"):
        files_for("r{rank}-{part}", keys, rank=1)
    # A user's own may count from anywhere.
    assert files_for("r{rank}-{part}", ["r0-7", "r0-8"], rank=0) == ("r0-7", "r0-8")


def rank_keys(ranks: int, parts: int = 2) -> list[str]:
    return [f"model-rank-{rank}-part-{part}.safetensors" for rank in range(ranks) for part in range(parts)]


def test_a_checkpoint_is_pre_sharded_where_there_are_ranks_files() -> None:
    both = [*rank_keys(2), "model.safetensors", "config.json"]
    assert choose_rank_files(both, rank=1, world_size=2) == tuple(rank_keys(2)[2:])
    assert choose_rank_files(["model.safetensors"], rank=1, world_size=2) is None
    assert choose_rank_files([], rank=1, world_size=2) is None


def test_pipeline_stages_have_names_of_their_own() -> None:
    keys = [name_for(PIPELINE_PATTERN, rank=rank, pp_rank=stage) for stage in range(2) for rank in range(2)]
    assert choose_rank_files(keys, rank=1, world_size=2, pp_rank=0, pp_size=2) == (
        "model-pp-0-tp-1-part-0.safetensors",
    )
    with pytest.raises(CheckpointError, match="load it with pp_rank and pp_size"):
        choose_rank_files(keys, rank=1, world_size=2)
    with pytest.raises(CheckpointError, match="load it without pp_size"):
        choose_rank_files(rank_keys(2), rank=1, world_size=2, pp_size=2)
    with pytest.raises(CheckpointError, match=r"for more than 1 pipeline stages: there is 'pp1-0'"):
        choose_rank_files(["pp0-0", "pp1-0"], rank=0, pp_size=1, pattern="pp{pp_rank}-{rank}")


def test_what_was_made_for_more_ranks_is_refused() -> None:
    """Its pieces are smaller, and would be taken for padded ones."""
    with pytest.raises(CheckpointError, match="made for more than 4 ranks: there is 'model-rank-4-part-0") as caught:
        choose_rank_files(rank_keys(8), rank=0, world_size=4)
    assert caught.value.object == "model-rank-4-part-0.safetensors"
    # Fewer are no matter: a node may hold only what its own ranks need.
    assert choose_rank_files(rank_keys(8)[:2], rank=0, world_size=8) is not None


def test_no_file_found_says_what_was_looked_for_and_what_is_there() -> None:
    with pytest.raises(CheckpointError) as caught:
        choose_rank_files(rank_keys(2, parts=1), rank=3, world_size=4)
    assert caught.value.cause == (
        "no file is called 'model-rank-3-part-{part}.safetensors'; there is "
        "['model-rank-0-part-0.safetensors', 'model-rank-1-part-0.safetensors']"
    )
    with pytest.raises(CheckpointError) as caught:
        choose_rank_files(["b.safetensors", "a.json"], rank=3, pattern="mine-{rank}.safetensors")
    assert caught.value.cause == (
        "no file is called 'mine-3.safetensors', as pattern='mine-{rank}.safetensors' says; "
        "there is only ['a.json', 'b.safetensors']"
    )
    with pytest.raises(CheckpointError, match="there is nothing at all"):
        choose_rank_files([], rank=3, pattern="mine-{rank}.safetensors")


def test_who_names_no_rank_gets_the_ordinary_files() -> None:
    assert without_rank_files([*rank_keys(2), "model.safetensors"]) == ("model.safetensors",)
    # One rank's are a whole checkpoint.
    assert without_rank_files(rank_keys(1)) == tuple(rank_keys(1))
    with pytest.raises(CheckpointError, match=r"each file is one rank's \(2 ranks, .*: give rank and world_size$"):
        without_rank_files([*rank_keys(2), "config.json"])
    with pytest.raises(CheckpointError, match="give rank and world_size, pp_rank and pp_size"):
        without_rank_files([name_for(PIPELINE_PATTERN, rank=0, pp_rank=stage) for stage in range(2)])
