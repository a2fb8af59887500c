"""Conversions, over generated checkpoints, placements and ranks: every byte is read once and goes where it belongs."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamload.checkpoint import DTYPE_BITS, Catalog, ShardFile, TensorInfo
from streamload.errors import OptionError
from streamload.plan import (
    Absent,
    Conversion,
    Experts,
    PackedShard,
    Placement,
    Placements,
    Ranks,
    Replicate,
    Shard,
)
from streamload.save.conversion import views_of

HEADER_BYTES = 16
PLACEMENTS: list[Placement] = [
    Replicate(),
    Shard(0),
    Shard(-1),
    Shard(0, replicas=2),
    PackedShard(0, 2),
    PackedShard(-1, 2),
    Experts(),
    Experts((0, 2), Shard(-1)),
    Absent(),
]


@st.composite
def catalogs(draw: st.DrawFn) -> tuple[Catalog, dict[str, Placement]]:
    files = []
    rules: dict[str, Placement] = {}
    for number in range(draw(st.integers(1, 3))):
        at = HEADER_BYTES
        tensors = []
        for _ in range(draw(st.integers(0, 5))):
            name = f"t{len(rules)}"
            rules[name] = draw(st.sampled_from(PLACEMENTS))
            dtype = draw(st.sampled_from(["U8", "BF16", "F32", "F64"]))
            # At least three experts.
            shape = tuple(draw(st.lists(st.sampled_from([4, 8, 12]), min_size=2, max_size=3)))
            if draw(st.integers(0, 7)) == 0:
                shape = (0, *shape[1:])
                rules[name] = Replicate()
            end = at + math.prod(shape) * DTYPE_BITS[dtype] // 8
            tensors.append(TensorInfo(name, dtype, shape, at, end))
            at = end
        files.append(ShardFile(f"{number}.safetensors", at, HEADER_BYTES, tuple(tensors)))
    return Catalog(tuple(files)), rules


def conversion_of(
    catalog: Catalog, rules: dict[str, Placement], ranks: int, max_file_bytes: int | None
) -> tuple[Conversion, list[Any]]:
    placements = Placements.from_rules({**rules, "never": Replicate()})
    slicers = [
        placements.slicer([], Ranks(tp_rank=rank, tp_size=ranks, ep_rank=rank, ep_size=ranks), uneven="ceil")
        for rank in range(ranks)
    ]
    return Conversion(catalog, slicers, max_file_bytes=max_file_bytes), slicers


def content_of(part: TensorInfo, file: bytes) -> bytes:
    runs = sorted(part.runs(0, len(file)), key=lambda run: run[1])
    return b"".join(file[start : start + nbytes] for start, _, nbytes in runs)


@given(catalogs(), st.sampled_from([2, 4]), st.sampled_from([1, 7, 64, 1000]), st.sampled_from([None, 1, 300]))
def test_what_reads_bring_is_each_ranks_file_in_order(
    case: tuple[Catalog, dict[str, Placement]], ranks: int, read_bytes: int, max_file_bytes: int | None
) -> None:
    catalog, rules = case
    conversion, slicers = conversion_of(catalog, rules, ranks, max_file_bytes)
    files = [
        bytes((number * 89 + at * 7 + at // 251) % 256 for at in range(file.size_bytes))
        for number, file in enumerate(catalog.files)
    ]
    where = {tensor.name: (number, tensor) for number, file in enumerate(catalog.files) for tensor in file.tensors}
    read: list[list[int]] = [[0] * len(content) for content in files]
    names: list[list[str]] = [[] for _ in range(ranks)]
    parts: list[list[int]] = [[] for _ in range(ranks)]
    for group, numbers in enumerate(conversion.groups):
        found = [bytearray() for _ in range(ranks)]
        for span in conversion.spans(numbers, read_bytes):
            assert 0 < span.end - span.start <= read_bytes
            view = memoryview(files[span.file])[span.start : span.end]
            for at in range(span.start, span.end):
                read[span.file][at] += 1
            for number in range(span.first, span.stop):
                for rank, part in enumerate(conversion.slices(number)):
                    if part is not None:
                        found[rank] += b"".join(views_of(part, view, span))
        for rank in range(ranks):
            entries = list(conversion.entries(rank, group))
            expected = b""
            for name, dtype, shape in entries:
                number, tensor = where[name]
                part = slicers[rank](tensor)
                assert (part.dtype, part.shape) == (dtype, shape)
                expected += content_of(part, files[number])
            assert bytes(found[rank]) == expected
            assert sum(conversion.sizes(rank, numbers)) == len(expected)
            assert max_file_bytes is None or len(expected) <= max_file_bytes or len(entries) == 1
            widths = [DTYPE_BITS[dtype] for _, dtype, _ in entries]
            assert widths == sorted(widths, reverse=True), "readers need the wide ones first"
            names[rank] += [name for name, _, _ in entries]
            part_number = conversion.part(rank, group)
            assert (part_number is None) <= (not entries)
            parts[rank] += [] if part_number is None else [part_number]
    for rank in range(ranks):
        wanted = {name for name, (_, tensor) in where.items() if (part := slicers[rank](tensor)) and part.nbytes}
        assert len(names[rank]) == len(wanted)
        assert set(names[rank]) == wanted
        assert parts[rank] == list(range(len(parts[rank])))
        assert parts[rank]
    needed = {name for each in names for name in each}
    for number, (file, counts) in enumerate(zip(catalog.files, read, strict=True)):
        for tensor in file.tensors:
            assert set(counts[tensor.start : tensor.end]) <= {int(tensor.name in needed)}
        assert sum(counts[:HEADER_BYTES]) == 0
        assert conversion.covered(number) == sum(counts)
    assert conversion.nbytes == sum(map(sum, read)) == conversion.nbytes_before(conversion.tensors)


def test_digests_tell_conversions_apart() -> None:
    tensors = tuple(
        TensorInfo(name, "U8", (4, 4), 16 * number, 16 * number + 16) for number, name in enumerate("ab", 1)
    )
    catalog = Catalog((ShardFile("f", 48, 16, tensors),))
    other = Catalog((ShardFile("g", 48, 16, tensors),))
    digests = [
        conversion_of(catalog, {"*": Shard(0)}, 2, None)[0].digest,
        conversion_of(catalog, {"*": Shard(1)}, 2, None)[0].digest,
        conversion_of(catalog, {"*": Shard(0)}, 4, None)[0].digest,
        conversion_of(catalog, {"*": Shard(0)}, 2, 8)[0].digest,
        conversion_of(other, {"*": Shard(0)}, 2, None)[0].digest,
    ]
    assert len(set(digests)) == len(digests)
    assert conversion_of(catalog, {"*": Shard(0)}, 2, None)[0].digest == digests[0]


def test_experts_in_another_order_cannot_be_written_in_one_go() -> None:
    catalog = Catalog((ShardFile("f", 32, 16, (TensorInfo("t", "U8", (4, 4), 16, 32),)),))
    with pytest.raises(OptionError, match="tensor 't': a rank has its experts in another order"):
        conversion_of(catalog, {"*": Experts((2, 0))}, 1, None)
