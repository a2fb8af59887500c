"""The manifest: what is written is read back, nothing else is accepted, and where blocks lie."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamload.checkpoint import (
    BLOCK_BYTES,
    MANIFEST_NAME,
    MAX_MANIFEST_BYTES,
    BlockMap,
    ManifestFile,
    ManifestTensor,
    ShardFile,
    TensorInfo,
    check_manifest,
    encode_manifest,
    is_manifest,
    manifest_name,
    manifest_names,
    parse_manifest,
)
from streamload.checkpoint.ranges import merged, overlap
from streamload.errors import ManifestError

BLOCK = 4096

_NAMES = st.text(st.characters(codec="utf-8"), max_size=8)
_SIZES = st.one_of(st.integers(0, 3), st.integers(BLOCK - 1, BLOCK + 1), st.integers(0, 5 * BLOCK))


@st.composite
def _files(draw: st.DrawFn) -> ManifestFile:
    position = header_bytes = draw(st.integers(8, 500))
    tensors = []
    for name in draw(st.lists(_NAMES, unique=True, max_size=6)):
        nbytes = draw(_SIZES)
        sums = draw(st.binary(min_size=8 * -(-nbytes // BLOCK), max_size=8 * -(-nbytes // BLOCK)))
        tensors.append(ManifestTensor(name, position, position + nbytes, sums))
        position += nbytes
    key = draw(_NAMES)
    # As the reader orders them: tensors without bytes stay where they begin.
    tensors.sort(key=lambda tensor: (tensor.start, tensor.end))
    return ManifestFile(key, position, header_bytes, draw(st.integers(0, 2**64 - 1)), BLOCK, tuple(tensors))


@given(st.lists(_files(), min_size=1, max_size=3, unique_by=lambda file: file.key))
def test_what_is_written_is_read_back(files: list[ManifestFile]) -> None:
    found = parse_manifest(encode_manifest(files), key=MANIFEST_NAME)
    assert found == {file.key: file for file in files}
    for file in files:
        assert sum(nbytes for nbytes, _ in file.sums()) == file.size_bytes


@given(st.binary(max_size=200))
def test_any_bytes_are_a_manifest_or_an_error(raw: bytes) -> None:
    with pytest.raises(ManifestError) as caught:
        parse_manifest(raw, key="m.json")
    assert caught.value.object == "m.json"


def _document() -> dict[str, Any]:
    tensors = (
        ManifestTensor("a", 10, 10 + BLOCK + 1, bytes(16)),
        ManifestTensor("b", 11 + BLOCK, 12 + BLOCK, bytes(8)),
    )
    file = ManifestFile("m.safetensors", 12 + BLOCK, 10, 7, BLOCK, tensors)
    document: dict[str, Any] = json.loads(encode_manifest([file]))
    return document


_FILE = "m.safetensors"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.update(format="other"), "no manifest"),
        (lambda d: d.pop("format"), "no manifest"),
        (lambda d: d.update(version=2), "version 2"),
        (lambda d: d.update(version="1"), "version is '1'"),
        (lambda d: d.update(version=True), "version is True"),
        (lambda d: d.update(algorithm="MD5"), "MD5"),
        (lambda d: d.update(block_bytes=BLOCK_BYTES + 1), "block_bytes"),
        (lambda d: d.update(block_bytes=1), "block_bytes"),
        (lambda d: d.update(files=[]), "not an object"),
        (lambda d: d.update(files={}), "no file"),
        (lambda d: d["files"].update({_FILE: 3}), "not an object"),
        (lambda d: d["files"][_FILE].update(size_bytes=-1), "size_bytes"),
        (lambda d: d["files"][_FILE].update(size_bytes=2**63), "size_bytes"),
        (lambda d: d["files"][_FILE].update(size_bytes=99_999), "end at"),
        (lambda d: d["files"][_FILE].update(header_bytes=7), "header_bytes"),
        (lambda d: d["files"][_FILE].update(header_bytes=11), "begins at"),
        (lambda d: d["files"][_FILE].update(header="AAAA"), "3 bytes"),
        (lambda d: d["files"][_FILE].update(header=None), "base64"),
        (lambda d: d["files"][_FILE].update(header="é==="), "base64"),
        (lambda d: d["files"][_FILE].pop("tensors"), "not an object"),
        (lambda d: d["files"][_FILE]["tensors"].pop("a"), "begins at"),
        (lambda d: d["files"][_FILE]["tensors"]["a"].update(start=9), "begins at"),
        (lambda d: d["files"][_FILE]["tensors"]["a"].update(end=9), "end"),
        (lambda d: d["files"][_FILE]["tensors"]["a"].update(end=10.0), "end"),
        (lambda d: d["files"][_FILE]["tensors"]["a"].update(blocks="AAAAAAAAAAA="), "for each of 2"),
        (lambda d: d["files"][_FILE]["tensors"]["a"].update(blocks=[]), "base64"),
    ],
)
def test_what_makes_no_sense_is_an_error(change: Callable[[dict[str, Any]], object], words: str) -> None:
    document = _document()
    parse_manifest(json.dumps(document).encode(), key="m.json")
    change(document)
    with pytest.raises(ManifestError, match=words) as caught:
        parse_manifest(json.dumps(document).encode(), key="m.json")
    assert caught.value.object == "m.json"


def test_a_name_that_stands_twice_is_an_error() -> None:
    twice = encode_manifest([ManifestFile("f", 8, 8, 1, BLOCK, ())]).replace(b'"f"', b'"f": {}, "f"')
    with pytest.raises(ManifestError, match="more than once"):
        parse_manifest(twice, key="m.json")


def test_unknown_fields_are_ignored_and_long_manifests_are_not_parsed() -> None:
    document = _document() | {"comment": "by hand"}
    assert parse_manifest(json.dumps(document).encode(), key="m.json")
    with pytest.raises(ManifestError, match="the limit is"):
        parse_manifest(bytearray(MAX_MANIFEST_BYTES + 1), key="m.json")


@given(st.lists(_SIZES, max_size=6), st.integers(8, 50), st.data())
def test_pieces_are_the_range_cut_at_the_borders_of_blocks(sizes: list[int], first: int, data: st.DataObject) -> None:
    tensors = []
    position = first
    for size in sizes:
        tensors.append((position, position + size))
        position += size
    start = data.draw(st.integers(0, position))
    end = data.draw(st.integers(start, position))
    found = list(BlockMap(tensors, BLOCK).pieces(start, end))
    # What a byte-by-byte account says.
    borders = {at for low, high in tensors for at in (*range(low, high, BLOCK), high)}
    at = max(start, first)
    for piece in found:
        assert piece.start == at
        assert piece.end > piece.start
        low, high = tensors[piece.tensor]
        assert (piece.block_start - low) % BLOCK == 0
        assert piece.block == (piece.block_start - low) // BLOCK
        assert piece.block_end == min(high, piece.block_start + BLOCK)
        assert piece.block_start <= piece.start < piece.end <= piece.block_end
        assert piece.end == end or piece.end in borders
        at = piece.end
    assert at == max(start, first) if end <= first else at == max(end, first)
    # The part that is made of whole blocks.
    begin, stop = BlockMap(tensors, BLOCK).whole(start, end)
    whole = [piece for piece in found if piece.whole]
    if whole:
        assert (begin, stop) == (whole[0].start, whole[-1].end)
    else:
        assert begin == stop


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 20)), max_size=8), st.integers(0, 80), st.integers(0, 80))
def test_ranges(raw: list[tuple[int, int]], start: int, end: int) -> None:
    start, end = min(start, end), max(start, end)
    ranges = [(low, low + size) for low, size in raw]
    found = merged(ranges)
    inside = {at for low, high in ranges for at in range(low, high)}
    assert {at for low, high in found for at in range(low, high)} == inside
    assert all(left[1] < right[0] for left, right in itertools.pairwise(found))
    assert overlap(found, start, end) == len(inside & set(range(start, end)))


def test_names() -> None:
    assert manifest_names("model-rank-1-part-0.safetensors") == (
        "streamload-manifest-model-rank-1-part-0.json",
        "streamload-manifest-model-rank-all-part-0.json",
        "streamload-manifest-model-rank-1-part-all.json",
        "streamload-manifest.json",
    )
    assert manifest_names("folder/model-1.safetensors") == (MANIFEST_NAME,)
    of_rank_1 = manifest_name("model-rank-1-part-all.safetensors")
    assert of_rank_1 not in manifest_names("model-rank-11-part-0.safetensors")
    assert is_manifest(of_rank_1)
    assert is_manifest(MANIFEST_NAME)
    assert not is_manifest("model.safetensors.index.json")


def _shard(*tensors: tuple[str, int, int], size: int, header: int = 10) -> ShardFile:
    return ShardFile(_FILE, size, header, tuple(TensorInfo(name, "U8", (e - s,), s, e) for name, s, e in tensors))


@pytest.mark.parametrize(
    ("file", "words"),
    [
        (_shard(("a", 10, 13), size=13), "13 bytes"),
        (_shard(("a", 9, 12), size=12, header=9), "header has 9"),
        (_shard(("b", 10, 12), size=12), "'a' is in the manifest and not"),
        (_shard(("a", 10, 12), ("b", 12, 12), size=12), "'b' is not in the manifest"),
        (_shard(("a", 10, 11), ("b", 11, 12), size=12), "'a' lies elsewhere"),
    ],
)
def test_a_stale_manifest_is_an_error(file: ShardFile, words: str) -> None:
    said = ManifestFile(_FILE, 12, 10, 0, BLOCK, (ManifestTensor("a", 10, 12, bytes(8)),))
    check_manifest(said, _shard(("a", 10, 12), size=12))
    with pytest.raises(ManifestError, match=words) as caught:
        check_manifest(said, file)
    assert caught.value.object == _FILE
