"""The source that fails when it is told to."""

from __future__ import annotations

import asyncio

import pytest

from streamload.errors import AccessError, TransientError, TruncatedReadError
from streamload.loan import Loan
from streamload.sources.memory import MemorySource
from streamload.testing import FaultSource, run_on_each_loop

_OBJECTS = {"a": b"0123456789", "b": b"abcdefghij"}


async def _use(source: FaultSource) -> bytes:
    """Four operations, the third and fourth of them reads."""
    objects = await source.list()
    await source.stat("b")
    memory = bytearray(20)
    for number, object in enumerate(objects):
        view = memoryview(memory)[10 * number :]
        await source.read(object, 0, 10, Loan([view[:4], view[4:10]]))
    return bytes(memory)


def test_without_a_fault_it_only_counts() -> None:
    async def body() -> None:
        inner = MemorySource(_OBJECTS)
        async with FaultSource(inner) as source:
            assert await _use(source) == b"0123456789abcdefghij"
            assert (source.operations, source.running, source.requests) == (4, 0, inner.requests)
        assert source.closed
        assert inner.closed

    run_on_each_loop(body)


@pytest.mark.parametrize("fail_at", [1, 2, 3, 4])
def test_it_fails_at_the_operation_it_was_told(fail_at: int) -> None:
    async def body() -> None:
        async with FaultSource(MemorySource(_OBJECTS), fail_at=fail_at) as source:
            with pytest.raises(TransientError, match="spoiled"):
                await _use(source)
            assert (source.operations, source.running) == (fail_at, 0)
            assert await _use(source) == b"0123456789abcdefghij"

    run_on_each_loop(body)


def test_it_fails_as_often_as_it_was_told() -> None:
    async def body() -> None:
        async with FaultSource(
            MemorySource(_OBJECTS), fail_at=2, times=2, error=lambda: AccessError("refused")
        ) as source:
            await source.list()
            for _ in range(2):
                with pytest.raises(AccessError):
                    await source.list()
            await source.list()
        async with FaultSource(MemorySource(_OBJECTS), fail_at=1, times=None) as source:
            for _ in range(5):
                with pytest.raises(TransientError):
                    await source.list()

    run_on_each_loop(body)


def test_it_cuts_a_read_short() -> None:
    async def body() -> None:
        async with FaultSource(MemorySource(_OBJECTS), fail_at=2, let_through_bytes=7) as source:
            object = (await source.list())[0]
            memory = bytearray(10)
            loan = Loan([memoryview(memory)[:4], memoryview(memory)[4:]])
            with pytest.raises(TruncatedReadError) as caught:
                await source.read(object, 0, 10, loan)
            assert caught.value.valid_bytes == 7
            assert memory == b"0123456\0\0\0"
            await source.read(object, 7, 10, loan.after(7))
            assert memory == b"0123456789"

    run_on_each_loop(body)


def test_it_waits_until_cancelled() -> None:
    async def body() -> None:
        async with FaultSource(MemorySource(_OBJECTS), fail_at=3, block=True) as source:
            using = asyncio.create_task(_use(source))
            await asyncio.wrap_future(source.blocked)
            assert source.running == 1
            using.cancel()
            with pytest.raises(asyncio.CancelledError):
                await using
            assert source.running == 0

    run_on_each_loop(body)


def test_it_waits_until_released() -> None:
    async def body() -> None:
        async with FaultSource(MemorySource(_OBJECTS), fail_at=1, times=None, block=True) as source:
            given_up = asyncio.create_task(source.list())
            using = asyncio.create_task(_use(source))
            await asyncio.wrap_future(source.blocked)
            given_up.cancel()
            await asyncio.wait([given_up])
            assert not using.done()
            source.release()
            source.release()
            assert await using == b"0123456789abcdefghij"

    run_on_each_loop(body)
