"""The catalog: which files count, how they fit together, and the choice of tensors by name."""

from __future__ import annotations

import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamload.checkpoint import Catalog, Index, ShardFile, TensorInfo, build_catalog, select, shard_keys
from streamload.errors import CheckpointError, IndexFileError, OptionError


def shard(key: str, *names: str) -> ShardFile:
    """A file of byte tensors; the one at place k has k + 1 bytes."""
    tensors, position = [], 100
    for at, name in enumerate(names):
        tensors.append(TensorInfo(name, "U8", (at + 1,), position, position + at + 1))
        position += at + 1
    return ShardFile(key, position, 100, tuple(tensors), {"of": key})


def index_of(**weight_map: str) -> Index:
    return Index("model.safetensors.index.json", weight_map, tuple(sorted(set(weight_map.values()))))


ONE, TWO = "model-1.safetensors", "model-2.safetensors"


def names(catalog: Catalog) -> list[list[str]]:
    return [[tensor.name for tensor in file.tensors] for file in catalog.files]


def test_without_an_index_all_shard_files_count_in_natural_order() -> None:
    listed = ("model-10.safetensors", "config.json", TWO, "a.safetensors.bak", ONE, "model.safetensors.index.json")
    assert shard_keys(listed, None) == (ONE, TWO, "model-10.safetensors")


def test_with_an_index_only_its_files_count() -> None:
    index = Index(
        "model.safetensors.index.json", {"a": TWO, "b": "deeper/x.safetensors"}, ("deeper/x.safetensors", TWO)
    )
    assert shard_keys(("consolidated.safetensors", TWO), index) == ("deeper/x.safetensors", TWO)


@pytest.mark.parametrize(
    ("listed", "cause"),
    [
        ((), "no file ends in .safetensors; there is nothing at all"),
        (("b.bin", "a.json"), "no file ends in .safetensors; there is only ['a.json', 'b.bin']"),
        (tuple(f"{at:02}.bin" for at in range(30)), "'06.bin', '07.bin', ...]"),
    ],
)
def test_no_shard_file_is_an_error_that_tells_what_is_there(listed: tuple[str, ...], cause: str) -> None:
    with pytest.raises(CheckpointError) as caught:
        shard_keys(listed, None)
    assert caught.value.cause.endswith(cause)


def test_a_file_that_the_index_names_has_to_be_there() -> None:
    index = index_of(a=ONE, b=TWO, c=TWO, d="model-3.safetensors")
    with pytest.raises(IndexFileError) as caught:
        shard_keys((ONE,), index)
    assert caught.value.object == index.key
    assert caught.value.cause == (
        "the index names 'model-2.safetensors' for tensor 'b', but that file is not there,"
        " nor are 1 more of the files that it names"
    )
    with pytest.raises(IndexFileError, match=r"for tensor 'd', but that file is not there$"):
        shard_keys((ONE, TWO), index)
    assert shard_keys((index.key,), index, all_listed=False) == index.shards, "who cannot list believes the index"


def test_files_keep_their_order_in_the_catalog() -> None:
    files = [shard(TWO, "c", "a"), shard(ONE, "b"), shard("none.safetensors")]
    for index in (None, index_of(a=TWO, b=ONE, c=TWO)):
        catalog = build_catalog(files, index)
        assert catalog.files == tuple(files)
        assert (catalog.tensors, catalog.nbytes) == (3, 1 + 2 + 1)


def test_a_tensor_in_two_files_is_an_error_that_names_both() -> None:
    files = [shard(ONE, "a", "b"), shard(TWO, "c", "b")]
    for index in (None, index_of(a=ONE, b=ONE, c=TWO)):
        with pytest.raises(CheckpointError) as caught:
            build_catalog(files, index)
        assert caught.value.cause == f"tensor 'b' lies in two files, '{ONE}' and '{TWO}'"
        assert caught.value.object == TWO
    with pytest.raises(CheckpointError, match="lies in two files"):
        build_catalog([files[0], files[0]], None)


def test_a_tensor_has_to_lie_in_the_file_that_the_index_names() -> None:
    files = [shard(ONE, "a", "b"), shard(TWO, "c")]
    with pytest.raises(IndexFileError) as caught:
        build_catalog(files, index_of(a=ONE, b=TWO, c=TWO))
    assert caught.value.cause == f"the index names '{TWO}' for tensor 'b', but it lies in '{ONE}'"
    assert caught.value.object == "model.safetensors.index.json"
    with pytest.raises(IndexFileError) as caught:
        build_catalog(files, index_of(a=ONE, d=TWO, e="other.safetensors", c=TWO))
    assert caught.value.cause == (
        f"the index names '{TWO}' for tensor 'd', but it is in no file; the same goes for 1 more of its tensors"
    )


def test_a_tensor_that_the_index_does_not_know_belongs_to_the_checkpoint() -> None:
    catalog = build_catalog([shard(ONE, "a", "b"), shard(TWO, "c")], index_of(a=ONE, c=TWO))
    assert names(catalog) == [["a", "b"], ["c"]]


CATALOG = Catalog((shard(ONE, "model.0.w", "model.0.b", "model.1.w"), shard(TWO, "head.w", "HEAD.b"), shard("z")))


@pytest.mark.parametrize(
    ("include", "exclude", "chosen"),
    [
        ([], [], [["model.0.w", "model.0.b", "model.1.w"], ["head.w", "HEAD.b"], []]),
        (["*"], [], [["model.0.w", "model.0.b", "model.1.w"], ["head.w", "HEAD.b"]]),
        (["model.*"], [], [["model.0.w", "model.0.b", "model.1.w"]]),
        (["model.0.*", "head.?"], [], [["model.0.w", "model.0.b"], ["head.w"]]),
        (["model.[!0].w"], [], [["model.1.w"]]),
        ([], ["*.w"], [["model.0.b"], ["HEAD.b"]]),
        ([], ["nothing*", "HEAD*", "model*"], [["head.w"]]),
        (["*.w"], ["model.0.*", "head.w"], [["model.1.w"]]),
        (["head.w"], ["head.w"], []),
        (["h*"], [], [["head.w"]]),
    ],
)
def test_globs_choose_tensors(include: list[str], exclude: list[str], chosen: list[list[str]]) -> None:
    assert names(select(CATALOG, include, exclude)) == chosen


def test_a_selection_keeps_the_files_as_they_are() -> None:
    chosen = select(CATALOG, ["model.0.b", "model.1.w"], [])
    whole, (file,) = CATALOG.files[0], chosen.files
    assert (file.key, file.size_bytes, file.header_bytes) == (whole.key, whole.size_bytes, whole.header_bytes)
    assert file.metadata == whole.metadata
    assert file.tensors == whole.tensors[1:]
    assert (chosen.tensors, chosen.nbytes) == (2, 2 + 3)


@pytest.mark.parametrize("include", [["model"], ["*.w", "modle.*"], ["MODEL.*"], ["*", ""]])
def test_a_glob_that_includes_nothing_is_an_error(include: list[str]) -> None:
    with pytest.raises(OptionError) as caught:
        select(CATALOG, include, [])
    assert caught.value.cause == f"no tensor's name matches {include[-1]!r}, which was to be included"


_some_names = st.lists(st.text("ab.*[]!-\n", max_size=4), max_size=6, unique=True)
_some_globs = st.lists(st.text("ab.*?[]!-\n", max_size=4), max_size=3)


@given(_some_names, _some_globs, _some_globs)
def test_a_choice_is_what_fnmatch_says(listed: list[str], include: list[str], exclude: list[str]) -> None:
    def matches(name: str, globs: list[str]) -> bool:
        return any(fnmatch.fnmatchcase(name, glob) for glob in globs)

    catalog = Catalog((shard(ONE, *listed),))
    if all(fnmatch.filter(listed, glob) for glob in include):
        wanted = [name for name in listed if (not include or matches(name, include)) and not matches(name, exclude)]
        assert names(select(catalog, include, exclude)) == ([wanted] if wanted or not include + exclude else [])
    else:
        with pytest.raises(OptionError):
            select(catalog, include, exclude)
