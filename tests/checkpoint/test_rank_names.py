"""What one rank's files are called."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamload.checkpoint import manifest_names, names_of_rank
from streamload.errors import OptionError


def test_vllms_names() -> None:
    assert names_of_rank(rank=3, world_size=8).name(2) == "model-rank-3-part-2.safetensors"
    with_stages = names_of_rank(rank=5, world_size=8, pp_size=2)
    assert with_stages.name(0) == "model-pp-1-tp-1-part-0.safetensors"
    assert with_stages.manifest == "streamload-manifest-model-pp-1-tp-1-part-all.json"


def test_a_pattern_of_ones_own() -> None:
    names = names_of_rank(rank=1, world_size=2, pattern="{{x}}{part}of{rank}.safetensors")
    assert names.name(7) == "{x}7of1.safetensors"
    assert names.is_mine("{x}12of1.safetensors")
    assert not names.is_mine("{x}12of11.safetensors")
    assert not names.is_mine("{x}of1.safetensors")
    assert not names.is_mine("{x}²of1.safetensors")


def test_a_pattern_without_parts_is_for_one_file() -> None:
    names = names_of_rank(rank=0, world_size=1, pattern="model.safetensors")
    assert names.name(0) == "model.safetensors"
    assert names.manifest == "streamload-manifest-model.json"
    assert names.is_mine("model.safetensors")
    with pytest.raises(OptionError, match="part"):
        names.name(1)


@given(st.integers(1, 130), st.data())
def test_ranks_and_parts_never_share_a_name_and_their_manifest_is_found(world_size: int, data: st.DataObject) -> None:
    pattern = data.draw(st.sampled_from([None, "p{part}r{rank}.safetensors", "{rank}-{part}x.safetensors"]))
    ranks = st.tuples(st.integers(0, world_size - 1), st.integers(0, 120))
    (one, part), (other, other_part) = data.draw(st.tuples(ranks, ranks))
    names = names_of_rank(rank=one, world_size=world_size, pattern=pattern)
    others = names_of_rank(rank=other, world_size=world_size, pattern=pattern)
    assert (names.name(part) == others.name(other_part)) == ((one, part) == (other, other_part))
    assert names.is_mine(others.name(other_part)) == (one == other)
    assert names.manifest in manifest_names(names.name(part))
    if one != other:
        assert names.manifest not in manifest_names(others.name(other_part))


@pytest.mark.parametrize(
    ("given_", "words"),
    [
        ({"pattern": "model-{part}.safetensors"}, "cannot tell ranks apart"),
        ({"pattern": "m-{tp_rank}-{part}.safetensors", "pp_size": 2}, "pp_rank"),
        ({"pattern": "m-{layer}.safetensors"}, "a field that is none"),
        ({"pattern": "m-{rank:03d}.safetensors"}, "a field that is none"),
        ({"pattern": "m-{rank!r}.safetensors"}, "a field that is none"),
        ({"pattern": "m-{}.safetensors"}, "a field that is none"),
        ({"pattern": "m-{rank.safetensors"}, "cannot be read"),
        ({"pattern": "m-{rank}-{part}-{part}.safetensors"}, "more than once"),
        ({"pattern": "m-{rank}{part}.safetensors"}, "nothing between"),
        ({"pattern": "m-{rank}-{part}0.safetensors"}, "next to a digit"),
        ({"pattern": "m-{rank}-{part}.pt"}, "does not end"),
        ({"pattern": "x/m-{rank}-{part}.safetensors"}, "no plain name"),
        ({"pattern": ".m-{rank}-{part}.safetensors"}, "no plain name"),
        ({"rank": 4}, "rank=4"),
        ({"rank": -1}, "rank=-1"),
        ({"rank": True}, "rank=True"),
        ({"world_size": 0}, "world_size"),
        ({"pp_size": 3}, "cannot be divided"),
        ({"pp_size": 2, "pp_rank": 1}, "pp_rank=1"),
    ],
)
def test_what_makes_no_sense(given_: dict[str, object], words: str) -> None:
    arguments: dict[str, object] = {"rank": 1, "world_size": 4} | given_
    with pytest.raises(OptionError, match=words):
        names_of_rank(**arguments)  # type: ignore[arg-type]


def test_the_stage_may_be_given_where_it_is_right() -> None:
    assert names_of_rank(rank=3, world_size=4, pp_size=2, pp_rank=1).name(0) == "model-pp-1-tp-1-part-0.safetensors"
