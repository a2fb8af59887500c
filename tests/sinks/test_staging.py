from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Awaitable, Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from streamload.errors import ClosedError, DeviceError
from streamload.sinks.staging import Slot, Staging

PAGE = 4096


async def quiet() -> None:
    """Let everything happen that happens by itself."""
    for _ in range(5):
        await asyncio.sleep(0)


def run(main: Callable[[Staging], Awaitable[None]], pages: int = 4) -> None:
    async def body() -> None:
        async with asyncio.timeout(60):
            await main(Staging(pages * PAGE))

    asyncio.run(body())


def test_slots_are_whole_pages_and_do_not_overlap() -> None:
    async def main(staging: Staging) -> None:
        first, second = await staging.take(1), await staging.take(PAGE + 1)
        assert (first.nbytes, second.nbytes) == (PAGE, 2 * PAGE)
        assert staging.used_bytes == 3 * PAGE
        first.view[:] = b"\1" * PAGE
        second.view[:] = b"\2" * 2 * PAGE
        assert bool((first.memory == 1).all())
        assert bool((second.memory == 2).all())
        assert first.memory.data_ptr() % PAGE == second.memory.data_ptr() % PAGE == 0

    run(main)


def test_who_waits_is_served_first_come_first_served() -> None:
    async def main(staging: Staging) -> None:
        slots = [await staging.take(PAGE) for _ in range(4)]
        order: list[str] = []

        async def take(name: str, nbytes: int) -> None:
            await staging.take(nbytes)
            order.append(name)

        large = asyncio.create_task(take("large", 2 * PAGE))
        await quiet()
        small = asyncio.create_task(take("small", PAGE))
        staging.give_back(slots[0])
        await quiet()
        assert order == [], "a small one would be served before a large one for ever"
        staging.give_back(slots[1])
        await large
        assert order == ["large"]
        staging.give_back(slots[3])
        await small

    run(main)


def test_a_cancelled_wait_lets_those_behind_it_through() -> None:
    async def main(staging: Staging) -> None:
        slots = [await staging.take(PAGE) for _ in range(4)]
        large = asyncio.create_task(staging.take(4 * PAGE))
        await quiet()
        small = asyncio.create_task(staging.take(PAGE))
        staging.give_back(slots[0])
        await quiet()
        assert not small.done()
        large.cancel()
        slot = await small
        assert staging.used_bytes == 4 * PAGE
        for used in (slot, *slots[1:]):
            staging.give_back(used)
        assert staging.used_bytes == 0

    run(main)


def test_a_slot_granted_to_a_task_that_is_cancelled_at_once_is_not_lost() -> None:
    async def main(staging: Staging) -> None:
        slot = await staging.take(4 * PAGE)
        waiting = asyncio.create_task(staging.take(PAGE))
        await quiet()
        staging.give_back(slot)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        assert staging.used_bytes == 0

    run(main)


def test_more_than_there_is_gets_a_mapping_of_its_own() -> None:
    async def main(staging: Staging) -> None:
        slot = await staging.take(5 * PAGE)
        assert slot.start is None
        assert slot.nbytes == slot.memory.nbytes == 5 * PAGE
        assert staging.used_bytes == 0
        staging.give_back(slot)
        assert staging.used_bytes == 0
        staging.quarantine(await staging.take(5 * PAGE))
        assert staging.quarantined_bytes == 5 * PAGE
        assert (await staging.take(4 * PAGE)).start == 0

    run(main)


def test_quarantined_slots_are_not_lent_again() -> None:
    async def main(staging: Staging) -> None:
        slots = [await staging.take(PAGE) for _ in range(4)]
        waiting = asyncio.create_task(staging.take(2 * PAGE))
        await quiet()
        staging.quarantine(slots[1])
        assert (staging.quarantined_bytes, staging.used_bytes) == (PAGE, 3 * PAGE)
        for slot in (slots[0], slots[2], slots[3]):
            staging.give_back(slot)
        assert (await waiting).start == 2 * PAGE
        with pytest.raises(DeviceError, match="staging memory"):
            await staging.take(3 * PAGE)

    run(main)


def test_quarantined_memory_outlives_everybody() -> None:
    kept: list[weakref.ref[torch.Tensor]] = []

    async def main(staging: Staging) -> None:
        for nbytes in (PAGE, 5 * PAGE):
            slot = await staging.take(nbytes)
            kept.append(weakref.ref(slot.memory))
            staging.quarantine(slot)

    run(main)
    gc.collect()
    assert all(memory() is not None for memory in kept)


def test_who_waits_for_what_is_not_to_be_had_any_more_is_told() -> None:
    async def main(staging: Staging) -> None:
        slots = [await staging.take(2 * PAGE) for _ in range(2)]
        waiting = asyncio.create_task(staging.take(3 * PAGE))
        await quiet()
        staging.quarantine(slots[0])
        with pytest.raises(DeviceError, match="8192 bytes"):
            await waiting
        staging.quarantine(slots[1])
        with pytest.raises(DeviceError):
            await staging.take(1)

    run(main)


def test_after_a_failure_nothing_is_lent() -> None:
    async def main(staging: Staging) -> None:
        await staging.take(4 * PAGE)
        waiting = [asyncio.create_task(staging.take(PAGE)) for _ in range(2)]
        await quiet()
        staging.fail(ClosedError("closed for good"))
        for task in waiting:
            with pytest.raises(ClosedError, match="closed for good"):
                await task
        with pytest.raises(ClosedError, match="closed for good"):
            await staging.take(1)

    run(main)


@given(st.lists(st.tuples(st.sampled_from(["take", "give", "cancel", "turn", "quarantine"]), st.integers(0, 7))))
def test_nothing_is_lost_whatever_happens_when(steps: list[tuple[str, int]]) -> None:
    pages = 8

    async def main(staging: Staging) -> None:
        waiting: list[asyncio.Task[Slot]] = []
        held: list[Slot] = []
        lost: list[Slot] = []

        def collect() -> None:
            for task in waiting.copy():
                if task.done():
                    waiting.remove(task)
                    if not task.cancelled() and task.exception() is None:
                        held.append(task.result())

        for what, number in steps:
            collect()
            if what == "take":
                waiting.append(asyncio.create_task(staging.take((number + 1) * PAGE)))
            elif what == "turn":
                await asyncio.sleep(0)
            elif what == "cancel" and waiting:
                waiting[number % len(waiting)].cancel()
            elif what == "give" and held:
                staging.give_back(held.pop(number % len(held)))
            elif what == "quarantine" and held and not lost:
                lost.append(held.pop(number % len(held)))
                staging.quarantine(lost[0])
            spans = sorted((slot.start, slot.start + slot.nbytes) for slot in held + lost if slot.start is not None)
            assert all(before[1] <= after[0] for before, after in pairwise(spans))
        # Who waits gets it in the end, or is told that it cannot be had.
        while waiting or held:
            for slot in held:
                staging.give_back(slot)
            held.clear()
            await quiet()
            collect()
        assert staging.used_bytes == 0
        assert staging.quarantined_bytes == sum(slot.nbytes for slot in lost)

    run(main, pages)


def test_a_forked_child_does_not_have_it() -> None:
    staging = Staging(PAGE)
    assert "dc" in flags_of(staging.memory.data_ptr()), "the mapping is not marked as left out of forks"


def flags_of(address: int) -> list[str]:
    """The kernel's flags for the mapping at an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        field, _, rest = line.partition(" ")
        if not field.endswith(":"):
            start, end = (int(bound, 16) for bound in field.split("-"))
            inside = start <= address < end
        elif inside and field == "VmFlags:":
            return rest.split()
    return []
