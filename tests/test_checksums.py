"""Checksums of parts, put together in any order, against the whole's."""

from __future__ import annotations

import base64
import random
import zlib
from itertools import pairwise

import pytest
from awscrt import checksums as crt
from hypothesis import given
from hypothesis import strategies as st

from streamload.checksums import ALGORITHMS, Algorithm, Checksum, PartialChecksum, RunningChecksum

CONTENT = random.Random(5).randbytes(5000)


def whole(algorithm: Algorithm, content: bytes) -> int:
    if algorithm == "CRC32":
        return zlib.crc32(content)
    value: int = crt.crc32c(content) if algorithm == "CRC32C" else crt.crc64nvme(content)
    return value


@given(st.sampled_from(ALGORITHMS), st.lists(st.integers(0, 5000)), st.randoms(use_true_random=False))
def test_parts_in_any_order_sum_up_to_the_whole(algorithm: Algorithm, cuts: list[int], chance: random.Random) -> None:
    edges = [0, *sorted(cuts), len(CONTENT)]
    parts = list(pairwise(edges))
    chance.shuffle(parts)
    sum_ = PartialChecksum(algorithm, len(CONTENT))
    for start, end in parts:
        assert not sum_.complete or start == end
        view = memoryview(CONTENT)[start:end]
        sum_.add(start, [view[:7], view[7:]])
    assert sum_.complete
    assert sum_.result() == Checksum(algorithm, whole(algorithm, CONTENT))


@given(
    st.sampled_from(ALGORITHMS),
    st.sets(st.integers(1, len(CONTENT) - 1)),
    st.lists(st.integers(0, len(CONTENT))),
    st.integers(0, len(CONTENT) - 1),
)
def test_a_sum_for_each_part(algorithm: Algorithm, ends: set[int], pieces: list[int], start: int) -> None:
    """Whatever the pieces in which the bytes come, and wherever the first of them lies."""
    cuts = [end - start for end in sorted(ends) if end > start]
    running = RunningChecksum(algorithm, cuts)
    for low, high in pairwise([start, *sorted(piece for piece in pieces if piece > start), len(CONTENT)]):
        running.add(memoryview(CONTENT)[low:high])
    edges = [start, *(start + cut for cut in cuts), len(CONTENT)]
    assert running.sums() == [(high - low, whole(algorithm, CONTENT[low:high])) for low, high in pairwise(edges)]
    assert running.nbytes == len(CONTENT) - start


def test_missing_and_overlapping_parts_are_noticed() -> None:
    missing = PartialChecksum("CRC32C", 10)
    missing.add(0, [b"12345"])
    assert not missing.complete
    with pytest.raises(ValueError, match="end at 5 of 10"):
        missing.result()
    overlapping = PartialChecksum("CRC32C", 10)
    overlapping.add(0, [b"12345"])
    overlapping.add(4, [b"12345"])
    with pytest.raises(ValueError, match="begins at 4"):
        overlapping.result()


def test_s3s_way_of_writing_them() -> None:
    text = base64.b64encode((0x0102030405060708).to_bytes(8, "big")).decode()
    found = Checksum.from_base64("CRC64NVME", text)
    assert found == Checksum("CRC64NVME", 0x0102030405060708)
    assert str(found) == "CRC64NVME 0102030405060708"


@pytest.mark.parametrize("text", ["", "AAAA", "not base64!", "AAAAAA==-3"])
def test_what_is_no_checksum_is_none(text: str) -> None:
    assert Checksum.from_base64("CRC64NVME", text) is None
