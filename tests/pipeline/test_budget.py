"""The budget against a model of it, and its waiting."""

from __future__ import annotations

import asyncio

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from streamload.pipeline.budget import Budget

LIMIT = 100


class BudgetMachine(RuleBasedStateMachine):
    """One dispatcher and one consumer: batches are acquired, taken and released in any order that can happen."""

    def __init__(self) -> None:
        super().__init__()
        self.loop = asyncio.new_event_loop()
        self.budget = Budget(LIMIT)
        self.in_use: list[int] = []
        self.lingering: list[int] = []
        self.waiting: asyncio.Task[None] | None = None
        self.wanted = 0

    def teardown(self) -> None:
        if self.waiting is not None:
            self.waiting.cancel()
            self.loop.run_until_complete(asyncio.wait([self.waiting]))
        self.loop.close()

    def settle(self) -> None:
        """Let the waiter have its turn, and note whether it was granted."""
        for _ in range(3):
            self.loop.run_until_complete(asyncio.sleep(0))
        if self.waiting is not None and self.waiting.done():
            self.waiting.result()
            self.waiting = None
            self.in_use.append(self.wanted)

    @precondition(lambda self: self.waiting is None)
    @rule(nbytes=st.integers(0, 150))
    def acquire(self, nbytes: int) -> None:
        self.wanted = nbytes
        self.waiting = self.loop.create_task(self.budget.acquire(nbytes))
        self.settle()

    @precondition(lambda self: self.in_use)
    @rule(data=st.data())
    def take(self, data: st.DataObject) -> None:
        nbytes = self.in_use.pop(data.draw(st.integers(0, len(self.in_use) - 1)))
        self.budget.taken(nbytes)
        self.lingering.append(nbytes)
        self.settle()

    @precondition(lambda self: self.lingering)
    @rule()
    def move_past(self) -> None:
        self.budget.release(self.lingering.pop(0))
        self.settle()

    @precondition(lambda self: self.in_use)
    @rule()
    def give_back(self) -> None:
        self.budget.give_back(self.in_use.pop())
        self.settle()

    @precondition(lambda self: self.waiting is not None)
    @rule()
    def cancel(self) -> None:
        assert self.waiting is not None
        self.waiting.cancel()
        self.loop.run_until_complete(asyncio.wait([self.waiting]))
        self.waiting = None

    @invariant()
    def counts_agree(self) -> None:
        assert self.budget.outstanding_bytes == sum(self.in_use) + sum(self.lingering)

    @invariant()
    def limit_holds(self) -> None:
        assert sum(self.in_use) <= LIMIT or len([n for n in self.in_use if n]) == 1

    @invariant()
    def nobody_waits_without_reason(self) -> None:
        if self.waiting is not None:
            assert sum(self.in_use) > 0
            assert sum(self.in_use) + sum(self.lingering) + self.wanted > LIMIT


TestBudget = BudgetMachine.TestCase


def test_a_batch_above_the_limit_goes_alone_and_is_named() -> None:
    async def scenario() -> None:
        budget = Budget(LIMIT)
        await budget.acquire(10)
        large = asyncio.create_task(budget.acquire(250))
        await asyncio.sleep(0)
        assert not large.done()
        budget.give_back(10)
        await large
        assert (budget.raised_bytes, budget.peak_bytes) == (250, 250)
        assert not budget.fits(1)

    asyncio.run(scenario())


def test_what_the_consumer_keeps_never_stops_the_load() -> None:
    async def scenario() -> None:
        budget = Budget(LIMIT)
        await budget.acquire(100)
        budget.taken(100)
        await budget.acquire(60)
        assert budget.outstanding_bytes == 160

    asyncio.run(scenario())
