"""Which files are chosen, and how they are cut: no I/O."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamload.sources import SourceObject
from streamload.stage.journal import Landed
from streamload.stage.names import choose, identity, unfinished_name, version_digest, version_name
from streamload.stage.pieces import Ranges, pieces_of

_KEYS = [
    "config.json",
    "model.safetensors",
    "pytorch_model.bin",
    "original.safetensors",
    ".hidden",
    "READY",
    "a/b.safetensors",
]


@pytest.mark.parametrize(
    ("include", "exclude", "shards", "chosen"),
    [
        ((), (), None, {"config.json", "model.safetensors", "original.safetensors", "a/b.safetensors"}),
        ((), (), ("model.safetensors", "a/b.safetensors"), {"config.json", "model.safetensors", "a/b.safetensors"}),
        ((), ("*.json",), None, {"model.safetensors", "original.safetensors", "a/b.safetensors"}),
        (("*",), (), None, {*_KEYS} - {"READY"}),
        (("*.bin", ".h*"), (), None, {"pytorch_model.bin", ".hidden"}),
        (("*.json", "*.bin"), ("*.bin",), None, {"config.json"}),
    ],
)
def test_chosen(
    include: tuple[str, ...], exclude: tuple[str, ...], shards: tuple[str, ...] | None, chosen: set[str]
) -> None:
    assert set(choose(_KEYS, include=include, exclude=exclude, shards=shards)) == chosen


def test_what_staging_has_left_is_never_staged() -> None:
    own = [".streamload-stage.lock", ".streamload-stage.journal", unfinished_name("config.json"), "READY"]
    assert choose([*own, "config.json"], include=("*",), exclude=(), shards=None) == ["config.json"]


def test_other_formats_alone_are_staged() -> None:
    assert choose(["pytorch_model.bin"], include=(), exclude=(), shards=None) == ["pytorch_model.bin"]


def test_versions() -> None:
    object = SourceObject("a", 1, "v")
    others = [SourceObject("b", 1, "v"), SourceObject("a", 2, "v"), SourceObject("a", 1, "w")]
    found = {identity("s3://x", object), identity("s3://y", object), *(identity("s3://x", each) for each in others)}
    assert len(found) == 5
    assert version_digest(["a", "b"]) == version_digest(["b", "a"]) != version_digest(["a"])
    assert version_name("s3://bucket/models/llama 3/").startswith("llama-3-")
    assert version_name("s3://bucket/a/llama") != version_name("s3://bucket/b/llama")
    assert "/" not in version_name("s3://..")


@given(
    size=st.integers(0, 500),
    noted=st.lists(st.tuples(st.integers(0, 600), st.integers(1, 200)), max_size=8),
    piece=st.integers(1, 100),
)
def test_every_byte_is_in_one_piece(size: int, noted: list[tuple[int, int]], piece: int) -> None:
    said = [Landed("CRC64NVME", start, nbytes, 0) for start, nbytes in noted]
    pieces = list(pieces_of(size, said, piece_bytes=piece))
    position = 0
    for each in pieces:
        assert each.start == position < each.end
        assert each.noted in said if each.noted is not None else each.end - each.start <= piece
        position = each.end
    assert position == size


@given(order=st.permutations(range(12)))
def test_ranges(order: list[int]) -> None:
    ranges = Ranges()
    for number in order:
        ranges.add(number * 10, number * 10 + 10)
    # All of it in the end; before, what touches something that is missing is not covered.
    for number in range(12):
        assert ranges.cover(number * 10 + 3, number * 10 + 7)
    assert ranges.cover(0, 120)
    assert not ranges.cover(0, 121)


@given(there=st.sets(st.integers(0, 11)), start=st.integers(0, 120), length=st.integers(0, 120))
def test_ranges_with_gaps(there: set[int], start: int, length: int) -> None:
    ranges = Ranges()
    for number in there:
        ranges.add(number * 10, number * 10 + 10)
    assert ranges.cover(start, start + length) == all(at // 10 in there for at in range(start, start + length))
