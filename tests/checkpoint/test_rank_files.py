"""The names of a pre-sharded checkpoint's files: exact, whatever numbers and texts there are."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamload.checkpoint import manifest_names
from streamload.checkpoint.rank_files import RankFiles, without_rank_files
from streamload.errors import CheckpointError, OptionError

TEXT = st.text(st.sampled_from("ab-_.{}03 *?[]+"), max_size=6)


@st.composite
def patterns(draw: st.DrawFn) -> str:
    """Patterns over fields that tell ranks apart, in any order, with any text between them."""
    fields = draw(
        st.sampled_from([["{rank}", "{pp_rank}"], ["{tp_rank}", "{pp_rank}"], ["{rank}", "{rank}", "{pp_rank}"]])
    )
    fields = draw(st.permutations([*fields, *draw(st.sampled_from([[], ["{part}"]]))]))
    texts = [draw(TEXT).replace("{", "{{").replace("}", "}}") for _ in fields]
    return "".join(f"x{text}-{field}" for text, field in zip(texts, fields, strict=True)) + "-.safetensors"


@st.composite
def worlds(draw: st.DrawFn) -> tuple[int, int]:
    stages = draw(st.integers(1, 3))
    return draw(st.sampled_from([1, 2, 12])) * stages, stages


@given(patterns(), worlds(), st.sampled_from([1, 2, 11]))
def test_every_rank_gets_its_own_files_and_no_others(pattern: str, world: tuple[int, int], parts: int) -> None:
    size, stages = world
    ranks = [RankFiles(rank, size, stages, pattern) for rank in range(size)]
    if "{part}" not in pattern:
        parts = 1
    names = [[files.name(part) for part in range(parts)] for files in ranks]
    everything = sorted(name for of_rank in names for name in of_rank)
    assert len(set(everything)) == len(everything), "two files of the same name"
    for files, of_rank in zip(ranks, names, strict=True):
        assert files.choose(everything) == tuple(of_rank)
        assert all(files.is_mine(name) == (name in of_rank) for name in everything)
        expected = pattern.format(rank=files.tp_rank, tp_rank=files.tp_rank, pp_rank=files.pp_rank, part=0)
        assert of_rank[0] == expected
        for name in everything:
            assert (files.manifest in manifest_names(name)) == (name in of_rank)


def test_vllms_names() -> None:
    assert RankFiles(3, 8).name(2) == "model-rank-3-part-2.safetensors"
    with_stages = RankFiles(5, 8, pp_size=2)
    assert with_stages.name(0) == "model-pp-1-tp-1-part-0.safetensors"
    assert with_stages.manifest == "streamload-manifest-model-pp-1-tp-1-part-all.json"
    # With a pattern, vLLM counts {rank} within a stage.
    assert RankFiles(5, 8, pp_size=2, pattern="{pp_rank}.{rank}.safetensors").name(0) == "1.1.safetensors"


def test_rank_1_gets_nothing_of_rank_11() -> None:
    keys = [f"model-rank-{rank}-part-{part}.safetensors" for rank in (1, 11, 111) for part in (0, 1, 2, 10)]
    keys += [f"model-rank-1-part-{part}.safetensors" for part in range(3, 10)]
    expected = tuple(f"model-rank-1-part-{part}.safetensors" for part in range(11))
    assert RankFiles(1, 112).choose(keys) == expected
    for other in ("xmodel-rank-1-part-0.safetensors", "model-rank-01-part-0.safetensors", f"{expected[0]}~"):
        assert not RankFiles(1, 112).is_mine(other)
    assert not RankFiles(1, 2, pattern="p{part}of{rank}.safetensors").is_mine("p²of1.safetensors")


def test_a_name_may_begin_with_a_field() -> None:
    files = RankFiles(1, 2, pattern="{rank}.safetensors")
    assert files.choose(["0.safetensors", "1.safetensors", ".safetensors"]) == ("1.safetensors",)
    with pytest.raises(OptionError, match="is no plain name of a file"):
        RankFiles(1, 2, pattern=".hidden-{rank}.safetensors")


def test_a_pattern_without_parts_is_for_one_file() -> None:
    files = RankFiles(0, 1, pattern="model.safetensors")
    assert files.name(0) == "model.safetensors"
    assert files.manifest == "streamload-manifest-model.json"
    assert files.is_mine("model.safetensors")
    with pytest.raises(OptionError, match=r"has no \{part\}, and the tensors do not fit one file"):
        files.name(1)


@pytest.mark.parametrize(
    ("given_", "cause"),
    [
        ({"pattern": "model-{part}.safetensors"}, "cannot tell ranks apart: it needs {tp_rank}"),
        ({"pattern": "{{rank}}.safetensors"}, "cannot tell ranks apart"),
        ({"pattern": "m-{pp_rank}.safetensors"}, "cannot tell ranks apart: it needs {tp_rank}"),
        ({"pattern": "m-{tp_rank}-{part}.safetensors", "pp_size": 2}, "it needs {pp_rank}"),
        ({"pattern": "m-{rank}-{part}.safetensors", "pp_size": 2}, "it needs {pp_rank}"),
        ({"pattern": "m-{part}.safetensors", "pp_size": 2}, "it needs {pp_rank} and {tp_rank}"),
        ({"pattern": "{rank}{part}.safetensors"}, "two fields with nothing between them"),
        ({"pattern": "{part}0{rank}.safetensors"}, "a field next to a digit"),
        ({"pattern": "m-{rank}-{part}0.safetensors"}, "a field next to a digit"),
        ({"pattern": "{rank}-{part}-{part}.safetensors"}, "{part} more than once"),
        ({"pattern": "{rank}-{layer}.safetensors"}, "has no field {layer}: there are rank, tp_rank, pp_rank, part"),
        ({"pattern": "{rank}-{}.safetensors"}, "has no field {}"),
        ({"pattern": "{0}.safetensors"}, "has no field {0}"),
        ({"pattern": "{rank.real}.safetensors"}, "has no field {rank.real}"),
        ({"pattern": "{rank:05d}.safetensors"}, "{rank} takes no format specification and no conversion"),
        ({"pattern": "{rank!r}.safetensors"}, "takes no format specification and no conversion"),
        ({"pattern": "{rank:{part}}.safetensors"}, "takes no format specification and no conversion"),
        ({"pattern": "{rank"}, "expected '}' before end of string"),
        ({"pattern": "rank}"}, "Single '}' encountered"),
        ({"pattern": "{rank}/model.safetensors"}, "is no plain name of a file in the checkpoint's own folder"),
        ({"pattern": ".m-{rank}.safetensors"}, "is no plain name"),
        ({"pattern": "m-{rank}.pt"}, "does not end in .safetensors"),
        ({"pattern": ""}, "does not end in .safetensors"),
        ({"rank": 4}, "rank=4 is not a whole number from 0 to 3"),
        ({"rank": -1}, "rank=-1"),
        ({"rank": True}, "rank=True"),
        ({"world_size": 0}, "world_size=0 is not a whole number of at least 1"),
        ({"pp_size": 3}, "world_size=4 ranks cannot be pp_size=3 stages of one size"),
    ],
)
def test_what_makes_no_sense_is_refused(given_: dict[str, object], cause: str) -> None:
    arguments: dict[str, object] = {"rank": 1, "world_size": 4} | given_
    with pytest.raises(OptionError) as caught:
        RankFiles(**arguments)  # type: ignore[arg-type]
    assert cause in caught.value.cause


def test_missing_and_repeated_parts_are_errors() -> None:
    keys = [f"r{name}.safetensors" for name in ("0-0", "0-1", "0-3", "1-0", "1-1", "1-01")]
    pattern = "r{rank}-{part}.safetensors"
    with pytest.raises(CheckpointError, match=r"part 2 of rank 0 is missing: there is 'r0-1.*', and then 'r0-3.*'"):
        RankFiles(0, 2, pattern=pattern).choose(keys)
    with pytest.raises(CheckpointError, match=r"part 1 of rank 1 is there twice: \['r1-01.*', 'r1-1.*'\]"):
        RankFiles(1, 2, pattern=pattern).choose(keys)
    with pytest.raises(CheckpointError, match="part 0 of rank 1 is missing: the first that is there is 'model-ra"):
        RankFiles(1, 2).choose([*rank_keys(1), *rank_keys(2, parts=3)[4:]])
    # A user's own may count from anywhere.
    from_7 = ("r0-7.safetensors", "r0-8.safetensors")
    assert RankFiles(0, 2, pattern=pattern).choose(from_7) == from_7


def rank_keys(ranks: int, parts: int = 2) -> list[str]:
    return [f"model-rank-{rank}-part-{part}.safetensors" for rank in range(ranks) for part in range(parts)]


def test_a_checkpoint_is_pre_sharded_where_there_are_ranks_files() -> None:
    both = [*rank_keys(2), "model.safetensors", "config.json"]
    assert RankFiles(1, 2).choose(both) == tuple(rank_keys(2)[2:])
    assert RankFiles(1, 2).choose(["model.safetensors"]) is None
    assert RankFiles(1, 2).choose([]) is None


def test_pipeline_stages_have_names_of_their_own() -> None:
    keys = [RankFiles(rank, 4, pp_size=2).name(0) for rank in range(4)]
    assert RankFiles(1, 4, pp_size=2).choose(keys) == ("model-pp-0-tp-1-part-0.safetensors",)
    assert RankFiles(2, 4, pp_size=2).choose(keys) == ("model-pp-1-tp-0-part-0.safetensors",)
    with pytest.raises(CheckpointError, match="load it with pp_size"):
        RankFiles(1, 2).choose(keys)
    with pytest.raises(CheckpointError, match="load it without pp_size"):
        RankFiles(1, 4, pp_size=2).choose(rank_keys(2))
    with pytest.raises(CheckpointError, match=r"for more than 1 pipeline stages: there is 'pp1-0"):
        RankFiles(0, 1, pattern="pp{pp_rank}-{rank}.safetensors").choose(["pp0-0.safetensors", "pp1-0.safetensors"])


def test_what_was_made_for_more_ranks_is_refused() -> None:
    """Its pieces are smaller, and would be taken for padded ones."""
    with pytest.raises(CheckpointError, match="made for more than 4 ranks: there is 'model-rank-4-part-0") as caught:
        RankFiles(0, 4).choose(rank_keys(8))
    assert caught.value.object == "model-rank-4-part-0.safetensors"
    # Fewer are no matter: a node may hold only what its own ranks need.
    assert RankFiles(0, 8).choose(rank_keys(8)[:2]) is not None


def test_no_file_found_says_what_was_looked_for_and_what_is_there() -> None:
    with pytest.raises(CheckpointError) as caught:
        RankFiles(3, 4).choose(rank_keys(2, parts=1))
    assert caught.value.cause == (
        "no file is called 'model-rank-3-part-{part}.safetensors'; there is "
        "['model-rank-0-part-0.safetensors', 'model-rank-1-part-0.safetensors']"
    )
    own = RankFiles(3, 4, pattern="mine-{rank}.safetensors")
    with pytest.raises(CheckpointError) as caught:
        own.choose(["b.safetensors", "a.json"])
    assert caught.value.cause == (
        "no file is called 'mine-3.safetensors', as pattern='mine-{rank}.safetensors' says; "
        "there is only ['a.json', 'b.safetensors']"
    )
    with pytest.raises(CheckpointError, match="there is nothing at all"):
        own.choose([])


def test_who_names_no_rank_gets_the_ordinary_files() -> None:
    assert without_rank_files([*rank_keys(2), "model.safetensors"]) == ("model.safetensors",)
    # One rank's are a whole checkpoint.
    assert without_rank_files(rank_keys(1)) == tuple(rank_keys(1))
    with pytest.raises(CheckpointError, match="part 0 of rank 0 is missing"):
        without_rank_files(rank_keys(1)[1:])
    for rank in range(6):
        names = [RankFiles(rank, 6, pp_size=3).name(part) for part in range(3)]
        assert without_rank_files(names) == tuple(names)
        with pytest.raises(CheckpointError, match=r"part 1 of rank \d+ is missing"):
            without_rank_files([names[0], names[2]])
    with pytest.raises(CheckpointError, match=r"each file is one rank's \(2 ranks, .*: give rank and world_size$"):
        without_rank_files([*rank_keys(2), "config.json"])
    with pytest.raises(CheckpointError, match="give rank and world_size and pp_size"):
        without_rank_files([RankFiles(rank, 2, pp_size=2).name(0) for rank in range(2)])
