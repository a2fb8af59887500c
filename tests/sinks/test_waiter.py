from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import weakref
from collections.abc import Callable

import pytest

from streamload.sinks.waiter import Waiter


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == name]


def test_calls_run_in_order_and_their_ends_are_told_on_the_loop() -> None:
    ran: list[tuple[int, str]] = []
    told: list[tuple[int, BaseException | None, str]] = []

    def call(number: int) -> Callable[[], None]:
        def run() -> None:
            ran.append((number, threading.current_thread().name))
            if number == 1:
                raise ValueError("one")

        return run

    def done(number: int) -> Callable[[BaseException | None], None]:
        return lambda error: told.append((number, error, threading.current_thread().name))

    async def main() -> bool:
        waiter = Waiter("in order")
        for number in range(3):
            waiter.submit(call(number), done(number))
        return await waiter.aclose(60)

    here = threading.current_thread().name
    assert asyncio.run(main())
    assert ran == [(0, "in order"), (1, "in order"), (2, "in order")]
    assert [(number, where) for number, _, where in told] == [(0, here), (1, here), (2, here)]
    assert [repr(error) for _, error, _ in told] == ["None", "ValueError('one')", "None"]
    assert not threads("in order")


def test_closing_gives_up_in_time_and_the_thread_ends_when_it_can() -> None:
    gate = threading.Event()
    ran: list[str] = []

    def stuck() -> None:
        gate.wait()
        ran.append("first")

    async def main() -> bool:
        waiter = Waiter("stuck")
        waiter.submit(stuck, lambda error: None)
        waiter.submit(lambda: ran.append("second"), lambda error: None)
        return await waiter.aclose(0)

    assert not asyncio.run(main())
    (thread,) = threads("stuck")
    gate.set()
    thread.join()
    # The loop is gone by now; what was submitted is done all the same.
    assert ran == ["first", "second"]


def test_closing_may_be_cancelled() -> None:
    gate = threading.Event()

    def wait() -> None:
        gate.wait()

    async def main() -> None:
        waiter = Waiter("cancelled")
        waiter.submit(wait, lambda error: None)
        closing = asyncio.create_task(waiter.aclose(60))
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing

    asyncio.run(main())
    (thread,) = threads("cancelled")
    gate.set()
    thread.join()


def test_the_thread_ends_with_its_waiter() -> None:
    async def main() -> threading.Thread:
        Waiter("forgotten")
        (thread,) = threads("forgotten")
        return thread

    thread = asyncio.run(main())
    gc.collect()
    thread.join()


def test_what_a_call_held_is_let_go() -> None:
    class Held:
        def call(self) -> None:
            pass

    async def main() -> None:
        waiter = Waiter("let go")
        held = Held()
        gone = threading.Event()
        weakref.finalize(held, gone.set)
        waiter.submit(held.call, lambda error: None)
        del held
        # The thread has no other call to go on to.
        assert gone.wait(60)
        await waiter.aclose(60)

    asyncio.run(main())


def test_a_call_that_never_returns_does_not_keep_the_interpreter() -> None:
    script = (
        "import asyncio, threading\n"
        "from streamload.sinks.waiter import Waiter\n"
        "async def main():\n"
        "    global waiter\n"
        "    waiter = Waiter('for ever')\n"
        "    waiter.submit(threading.Event().wait, print)\n"
        "    assert not await waiter.aclose(0)\n"
        "asyncio.run(main())\n"
        "print('end')\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "end\n", "")
