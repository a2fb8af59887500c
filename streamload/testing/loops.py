"""Running a test's coroutine on each kind of event loop."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from typing import Any

import uvloop

__all__ = ["run_on_each_loop"]

# What a body may take before it is taken to hang.
_PATIENCE_S = 60.0


def run_on_each_loop(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    """Run a coroutine function once on asyncio's own event loop and once on uvloop's, both in debug mode.

    Raises:
        AssertionError: It left a task or a thread behind.
        TimeoutError: It hangs.
    """
    for loop_factory in (asyncio.new_event_loop, uvloop.new_event_loop):
        threads = set(threading.enumerate())
        with asyncio.Runner(debug=True, loop_factory=loop_factory) as runner:
            runner.run(_watched(body))
        left = [thread.name for thread in threading.enumerate() if thread not in threads]
        assert not left, f"threads are left over: {left}"


async def _watched(body: Callable[[], Coroutine[Any, Any, None]]) -> None:
    async with asyncio.timeout(_PATIENCE_S):
        await body()
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, f"tasks are left over: {left}"
