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

from streamload.checksums import ALGORITHMS, Algorithm, BlockSums, Checksum, PartialChecksum, RunningChecksum

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


def test_sums_of_blocks_are_the_same_however_the_bytes_come() -> None:
    content = bytes(range(256)) * 5
    lengths = [1, 300, 79, 900]
    expected = []
    at = 0
    for length in lengths:
        running = RunningChecksum("CRC64NVME")
        running.add(memoryview(content[at : at + length]))
        expected.append(running.value)
        at += length
    for step in (1, 7, 300, 5000):
        sums = BlockSums(lengths, [5])
        for start in range(0, len(content), step):
            sums.add(memoryview(content[start : start + step]))
        assert list(sums.values) == [5, *expected]
    with pytest.raises(ValueError, match="more than all blocks"):
        sums.add(memoryview(b"x"))


def test_parts_that_follow_one_another_are_put_together() -> None:
    whole = PartialChecksum("CRC32C", 100)
    content = bytes(range(100))
    for start, end in ((60, 70), (0, 10), (10, 30), (70, 71)):
        whole.add(start, [content[start:end]])
    again = PartialChecksum("CRC32C", 100)
    parts = whole.parts()
    assert [(start, nbytes) for start, nbytes, _ in parts] == [(0, 30), (60, 11)]
    for part in parts:
        again.add_sum(*part)
    for start, end in ((30, 60), (71, 100)):
        again.add(start, [content[start:end]])
    expected = PartialChecksum("CRC32C", 100)
    expected.add(0, [content])
    assert again.result() == expected.result()
