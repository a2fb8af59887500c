"""Reading everything only to sum it up."""

from __future__ import annotations

import asyncio
import itertools
import random

from hypothesis import given
from hypothesis import strategies as st

from streamload.checksums import RunningChecksum
from streamload.errors import ObjectChangedError
from streamload.pipeline.fetch import Fetcher
from streamload.pipeline.scan import Scan, scan
from streamload.report import Recorder
from streamload.sources.memory import MemorySource


def _sum(content: bytes) -> int:
    running = RunningChecksum("CRC32C")
    running.add(memoryview(content))
    return running.value


@given(
    st.lists(st.lists(st.integers(1, 50), max_size=6), min_size=1, max_size=3), st.integers(1, 60), st.integers(1, 4)
)
def test_each_stretch_is_summed_up(stretches: list[list[int]], read_bytes: int, concurrency: int) -> None:
    objects = {str(number): random.Random(number).randbytes(sum(sizes)) for number, sizes in enumerate(stretches)}
    progress: list[int] = []

    async def main() -> list[Scan]:
        source = MemorySource(objects)
        recorder = Recorder("memory://", "none", 1 << 20)
        scans = []
        for key, sizes in zip(objects, stretches, strict=True):
            ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
            scans.append(Scan(await source.stat(key), "CRC32C", ends))
        await scan(
            Fetcher(source, recorder),
            recorder,
            scans,
            read_bytes=read_bytes,
            concurrency=concurrency,
            progressed=progress.append,
        )
        return scans

    found = asyncio.run(main())
    for each, sizes in zip(found, stretches, strict=True):
        content = objects[each.object.key]
        ends = [0, *each.ends]
        assert each.values == [_sum(content[a:b]) for a, b in itertools.pairwise(ends)]
        assert each.error is None
        assert each.nbytes == sum(sizes)
    assert sum(progress) == sum(map(len, objects.values()))
    assert max(progress, default=0) <= read_bytes


def test_an_object_that_cannot_be_read_does_not_end_the_others() -> None:
    async def main() -> list[Scan]:
        objects = {"a": bytes(100), "b": bytes(100)}
        source = MemorySource(objects)
        recorder = Recorder("memory://", "none", 1 << 20)
        scans = [Scan(await source.stat(key), "CRC32C", [50, 100]) for key in objects]
        objects["a"] = bytes(101)
        await scan(Fetcher(source, recorder), recorder, scans, read_bytes=10, concurrency=2)
        return scans

    broken, whole = asyncio.run(main())
    assert isinstance(broken.error, ObjectChangedError)
    assert broken.values == [None, None]
    assert whole.error is None
    assert whole.values == [_sum(bytes(50))] * 2
