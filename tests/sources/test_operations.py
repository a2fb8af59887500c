"""Closing a source ends what runs on it, and only that."""

from __future__ import annotations

import asyncio

import pytest

from streamload.errors import ClosedError
from streamload.sources.operations import Operations
from streamload.testing import run_on_each_loop


async def _hold(operations: Operations, begun: asyncio.Event, ends: list[str]) -> None:
    async with operations.running():
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ends.append("cleaned up")


def test_closing_ends_what_runs_with_our_error() -> None:
    async def body() -> None:
        operations = Operations()
        begun = asyncio.Event()
        ends: list[str] = []
        tasks = [asyncio.create_task(_hold(operations, begun, ends)) for _ in range(3)]
        await begun.wait()
        await operations.close()
        assert ends == ["cleaned up"] * 3
        for task in tasks:
            with pytest.raises(ClosedError):
                await task
            assert not task.cancelling()
        await operations.close()

    run_on_each_loop(body)


def test_two_may_close_at_once() -> None:
    async def body() -> None:
        operations = Operations()
        begun = asyncio.Event()
        task = asyncio.create_task(_hold(operations, begun, []))
        await begun.wait()
        await asyncio.gather(operations.close(), operations.close())
        with pytest.raises(ClosedError):
            await task

    run_on_each_loop(body)


def test_a_closed_source_takes_no_operation() -> None:
    async def body() -> None:
        operations = Operations()
        await operations.close()
        with pytest.raises(ClosedError):
            await _hold(operations, asyncio.Event(), [])

    run_on_each_loop(body)


def test_a_cancellation_from_outside_stays_one() -> None:
    async def body() -> None:
        operations = Operations()
        begun = asyncio.Event()
        task = asyncio.create_task(_hold(operations, begun, []))
        await begun.wait()
        task.cancel()
        closing = asyncio.create_task(operations.close())
        with pytest.raises(asyncio.CancelledError):
            await task
        await closing

    run_on_each_loop(body)


def test_a_timeout_inside_stays_one() -> None:
    async def body() -> None:
        operations = Operations()
        with pytest.raises(TimeoutError):
            async with operations.running():
                raise TimeoutError

    run_on_each_loop(body)
