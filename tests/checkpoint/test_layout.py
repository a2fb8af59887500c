"""The header that is written, against the reference's and our own reader."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamload.checkpoint import DTYPE_BITS, Entry, lay_out, parse_header, tensor_bytes
from streamload.errors import OptionError
from tests.checkpoint.files import deserialize

_NAMES = st.text(st.characters(codec="utf-8"), max_size=8).filter(lambda name: name != "__metadata__")


@st.composite
def _entries(draw: st.DrawFn) -> list[Entry]:
    found: list[Entry] = []
    for name in draw(st.lists(_NAMES, unique=True, max_size=8)):
        dtype = draw(st.sampled_from(sorted(DTYPE_BITS)))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        if DTYPE_BITS[dtype] < 8:
            shape.append(8)
        found.append((name, dtype, tuple(shape)))
    return found


@given(_entries(), st.sampled_from([None, {"format": "pt"}, {"é": '"\n'}]))
def test_both_readers_read_it(entries: list[Entry], metadata: dict[str, str] | None) -> None:
    raw, file = lay_out("f.safetensors", entries, metadata=metadata)
    assert len(raw) == file.header_bytes
    assert len(raw) % 8 == 0
    assert parse_header(raw[8:], key="f.safetensors", size_bytes=file.size_bytes) == file
    for tensor in file.tensors:
        # Wide ones come first, so each begins where its elements may.
        assert tensor.start % max(1, DTYPE_BITS[tensor.dtype] // 8) == 0
    theirs = deserialize(raw + bytes(file.size_bytes - len(raw)))
    assert {(name, found["dtype"], tuple(found["shape"])) for name, found in theirs} == set(entries)
    assert file.size_bytes - len(raw) == sum(tensor_bytes(dtype, shape) for _, dtype, shape in entries)


@pytest.mark.parametrize(("name", "words"), [("__metadata__", "means something else"), ("a\ud800", "Unicode")])
def test_names_that_cannot_be(name: str, words: str) -> None:
    with pytest.raises(OptionError, match=words):
        lay_out("f.safetensors", [("b", "U8", (1,)), (name, "U8", (1,))])
