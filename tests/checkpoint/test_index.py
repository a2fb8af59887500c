"""The index file: which one counts, and what it may say."""

from __future__ import annotations

import json
import pickle
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamload.checkpoint import MAX_INDEX_BYTES, Index, choose_index, parse_index
from streamload.errors import IndexFileError

KEY = "model.safetensors.index.json"


def index_of(weight_map: object, **more: object) -> bytes:
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map, **more}).encode()


def refused(raw: bytes) -> str:
    with pytest.raises(IndexFileError) as caught:
        parse_index(raw, key=KEY)
    assert caught.value.object == KEY
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
    return caught.value.cause


def test_an_index_names_the_file_of_each_tensor() -> None:
    weight_map = {
        "b": "model-00010-of-00010.safetensors",
        "a": "model-00002-of-00010.safetensors",
        "c": "model-00010-of-00010.safetensors",
        "": "deeper/x.safetensors",
    }
    for raw in (index_of(weight_map), bytearray(index_of(weight_map, weights=None))):
        index = parse_index(raw, key=KEY)
        assert index == Index(
            KEY,
            weight_map,
            ("deeper/x.safetensors", "model-00002-of-00010.safetensors", "model-00010-of-00010.safetensors"),
        )


def test_files_are_in_natural_order() -> None:
    names = [
        "m.safetensors",
        "m2.safetensors",
        "m10.safetensors",
        "m010.safetensors",
        "m" + "9" * 6000 + ".safetensors",
    ]
    index = parse_index(index_of({str(at): name for at, name in enumerate(reversed(names))}), key=KEY)
    assert index.shards == ("m2.safetensors", "m010.safetensors", "m10.safetensors", names[-1], "m.safetensors")


@pytest.mark.parametrize(
    "shard",
    [
        "model.safetensors",
        "a/b/model.safetensors",
        "..model.safetensors",
        "model..safetensors",
        "mod el-é.safetensors",
        ".safetensors",
    ],
)
def test_a_plain_path_below_the_folder_is_taken(shard: str) -> None:
    assert parse_index(index_of({"t": shard}), key=KEY).shards == (shard,)


@pytest.mark.parametrize(
    ("shard", "cause"),
    [
        ("", "is empty"),
        ("/etc/model.safetensors", "is absolute"),
        ("//host/model.safetensors", "is absolute"),
        ("../model.safetensors", "has a part that is empty, '.' or '..'"),
        ("a/../../model.safetensors", "has a part that is empty, '.' or '..'"),
        ("./model.safetensors", "has a part that is empty, '.' or '..'"),
        ("a//model.safetensors", "has a part that is empty, '.' or '..'"),
        ("s3://bucket/model.safetensors", "has a part that is empty, '.' or '..'"),
        ("..\\model.safetensors", "holds a backslash"),
        ("C:\\model.safetensors", "holds a backslash"),
        ("model.safetensors\0", "holds a control character"),
        ("model\n.safetensors", "holds a control character"),
        ("model.bin", "does not end in .safetensors"),
        ("model.safetensors/", "has a part that is empty, '.' or '..'"),
        ("model.SAFETENSORS", "does not end in .safetensors"),
        ("model.safetensors.index.json", "does not end in .safetensors"),
    ],
)
def test_any_other_path_is_refused(shard: str, cause: str) -> None:
    found = refused(index_of({"good": "model.safetensors", "bad": shard}))
    assert found.startswith("the weight_map names the file ")
    assert found.endswith(f", which {cause}")


@pytest.mark.parametrize(
    ("raw", "cause"),
    [
        (b"", "the index cannot be read: it is not a JSON object"),
        (b"[]", "the index cannot be read: it is not a JSON object"),
        (b"{} {}", "the index cannot be read: byte 3 is not valid JSON: "),
        (b'{"weight_map":{"a":"\xff"}}', "the index cannot be read: byte 20 is not UTF-8: "),
        (b'{"weight_map":{"a":"\\ud800.safetensors"}}', "the index cannot be read: a string in it holds the lone surr"),
        (b'{"metadata":{"total_size":NaN}}', "the index cannot be read: NaN is not JSON"),
        (b'{"metadata":' + b"[" * 1000 + b"]" * 1000 + b"}", "the index cannot be read: it nests deeper than 127"),
        (b"{}", "the index has no weight_map"),
        (b'{"weight_map":{"a":"a.safetensors"},"weight_map":{}}', "the index has more than one weight_map"),
        (index_of(None), "the weight_map is not an object but None"),
        (index_of(["a.safetensors"]), "the weight_map is not an object but ['a.safetensors']"),
        (index_of({}), "the weight_map is empty"),
        (index_of({"a": 1}), "the weight_map names no file for tensor 'a' but 1"),
        (index_of({"a": ["a.safetensors"]}), "the weight_map names no file for tensor 'a' but ['a.safetensors']"),
        (
            b'{"weight_map":{"a":"a.safetensors","a":"a.safetensors"}}',
            "the name 'a' stands more than once in the weight_map",
        ),
    ],
)
def test_a_bad_index_is_refused(raw: bytes, cause: str) -> None:
    assert refused(raw).startswith(cause)


def test_names_that_repeat_outside_of_the_weight_map_do_no_harm() -> None:
    raw = b'{"x":1,"x":2,"metadata":{"total_size":1,"total_size":2},"weight_map":{"a":"a.safetensors"}}'
    assert parse_index(raw, key=KEY).shards == ("a.safetensors",)


def test_an_index_has_a_limit() -> None:
    raw = index_of({"t": "model.safetensors"})
    assert parse_index(raw + b" " * (MAX_INDEX_BYTES - len(raw)), key=KEY).shards == ("model.safetensors",)
    tracemalloc.start()
    try:
        assert (
            refused(bytes(MAX_INDEX_BYTES + 1)) == f"the index has {MAX_INDEX_BYTES + 1} bytes; the limit is 67108864"
        )
        assert tracemalloc.get_traced_memory()[1] < 2 * MAX_INDEX_BYTES
    finally:
        tracemalloc.stop()


@settings(max_examples=400, deadline=None)
@given(
    st.binary(max_size=30)
    | st.text('{}[]:,"\\weight_map .', max_size=30).map(str.encode)
    | st.dictionaries(st.text(max_size=3), st.text("/.\\\0safetensors", max_size=8) | st.none()).map(index_of)
    | st.text("/.\\\0a", max_size=6).map(lambda path: index_of({"t": f"{path}.safetensors"}))
)
def test_no_other_error_and_no_path_that_leads_away(raw: bytes) -> None:
    try:
        index = parse_index(raw, key=KEY)
    except IndexFileError:
        return
    for shard in index.shards:
        assert not {"", ".", ".."} & set(shard.split("/"))
        assert not set("\\\0") & set(shard)
        assert shard.endswith(".safetensors")


@pytest.mark.parametrize(
    ("listed", "chosen"),
    [
        ([], None),
        (["model.safetensors", "config.json"], None),
        (["model.safetensors.index.json.bak", "pytorch_model.bin.index.json"], None),
        (["a.safetensors.index.json", "model.safetensors"], "a.safetensors.index.json"),
        (["consolidated.safetensors.index.json", KEY], KEY),
        ([KEY, "x.safetensors.index.json", "y.safetensors.index.json"], KEY),
    ],
)
def test_one_index_counts(listed: list[str], chosen: str | None) -> None:
    assert choose_index(listed) == chosen


def test_several_indexes_of_which_none_is_preferred_are_an_error() -> None:
    with pytest.raises(IndexFileError, match=r"\['a\.safetensors\.index\.json', 'b\.safetensors\.index\.json'\]"):
        choose_index(["b.safetensors.index.json", "a.safetensors.index.json", "c.safetensors"])
