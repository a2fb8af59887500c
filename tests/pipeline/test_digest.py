"""SHA-256 of what arrives in any order."""

from __future__ import annotations

import asyncio
import hashlib
import random
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamload.errors import ChecksumError
from streamload.pipeline.digest import OrderedDigest

CONTENT = bytes(range(256)) * 12_000  # three pieces, the last of them short


@settings(max_examples=30)
@given(st.lists(st.integers(1, len(CONTENT) - 1), unique=True, max_size=12), st.randoms(use_true_random=False))
def test_parts_in_any_order(cuts: list[int], chance: random.Random) -> None:
    spans = list(pairwise(sorted([0, *cuts, len(CONTENT)])))
    chance.shuffle(spans)

    async def body() -> None:
        digest = OrderedDigest(hashlib.sha256(CONTENT).digest(), len(CONTENT))

        async def add(start: int, end: int) -> bool:
            middle = (start + end) // 2
            views = [memoryview(CONTENT)[start:middle], memoryview(CONTENT)[middle:end]]
            return await digest.add(start, views)

        ends = await asyncio.gather(*[add(*span) for span in spans])
        assert [end for end, span in zip(ends, spans, strict=True) if end] == [True]
        assert ends[spans.index(max(spans))]

    asyncio.run(body())


def test_other_content_is_an_error_of_the_last_part() -> None:
    async def body() -> None:
        digest = OrderedDigest(hashlib.sha256(CONTENT).digest(), len(CONTENT))
        spoiled = bytearray(CONTENT)
        spoiled[5] ^= 1
        last = asyncio.create_task(digest.add(100, [memoryview(CONTENT)[100:]]))
        assert not await digest.add(0, [memoryview(spoiled)[:100]])
        with pytest.raises(ChecksumError, match=hashlib.sha256(spoiled).hexdigest()) as caught:
            await last
        assert (caught.value.start, caught.value.end) == (0, len(CONTENT))

    asyncio.run(body())


def test_who_waits_can_be_cancelled() -> None:
    async def body() -> None:
        digest = OrderedDigest(hashlib.sha256(CONTENT).digest(), len(CONTENT))
        waiting = asyncio.create_task(digest.add(100, [memoryview(CONTENT)[100:]]))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert not await digest.add(0, [memoryview(CONTENT)[:100]])

    asyncio.run(body())
