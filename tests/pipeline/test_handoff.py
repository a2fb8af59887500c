"""The handoff between two threads: nothing lost, nothing twice, whatever the consumer does while it waits."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamload.errors import ClosedError, StreamloadError
from streamload.pipeline.handoff import Finished, Handoff, Receipts
from streamload.sinks.base import Delivery, NamedTensor


class Nothing(Delivery):
    """A delivery without tensors."""

    def tensors(self) -> Iterator[NamedTensor]:
        return iter(())


def batch(index: int) -> Finished:
    return Finished(index, Nothing(), 1, 10, 10)


def drain(handoff: Handoff) -> list[int]:
    taken = []
    while not handoff.ended:
        found = handoff.take()
        if found is None:
            handoff.changed().result(timeout=10)
        else:
            taken.append(found.index)
    return taken


@given(st.permutations(range(8)))
def test_in_order_gives_the_plans_order(finished: list[int]) -> None:
    handoff = Handoff(in_order=True)
    for index in finished:
        handoff.put(batch(index))
    handoff.end()
    assert drain(handoff) == list(range(8))


@given(st.permutations(range(8)))
def test_otherwise_batches_come_as_they_finish(finished: list[int]) -> None:
    handoff = Handoff(in_order=False)
    for index in finished:
        handoff.put(batch(index))
    handoff.end()
    assert drain(handoff) == finished


def test_two_threads_hand_over_everything() -> None:
    handoff = Handoff(in_order=False)

    def produce() -> None:
        for index in range(2000):
            handoff.put(batch(index))
        handoff.end()

    producer = threading.Thread(target=produce)
    producer.start()
    assert drain(handoff) == list(range(2000))
    producer.join()


def test_an_error_ends_it_at_once_and_drops_what_lies_there() -> None:
    handoff = Handoff(in_order=False)
    handoff.put(batch(0))
    handoff.end(StreamloadError("broken"))
    handoff.put(batch(1))
    assert len(handoff) == 0
    with pytest.raises(StreamloadError, match="broken") as caught:
        handoff.take()
    with pytest.raises(ClosedError, match="broken") as again:
        handoff.take()
    assert again.value is not caught.value, "the first one's traceback is not kept"


def test_the_first_end_counts() -> None:
    handoff = Handoff(in_order=False)
    handoff.end()
    handoff.end(StreamloadError("too late"))
    assert handoff.ended
    assert handoff.take() is None


def test_an_error_wakes_a_waiter() -> None:
    handoff = Handoff(in_order=False)
    waiting = handoff.changed()
    assert not waiting.done()
    handoff.end(StreamloadError("broken"))
    waiting.result(timeout=0)


def test_a_batch_that_is_early_does_not_wake_an_ordered_consumer() -> None:
    handoff = Handoff(in_order=True)
    waiting = handoff.changed()
    handoff.put(batch(1))
    assert not waiting.done()
    handoff.put(batch(0))
    assert waiting.done()


def test_a_cancelled_wait_loses_nothing() -> None:
    async def scenario() -> None:
        handoff = Handoff(in_order=False)
        for index in range(50):
            waiter = asyncio.ensure_future(asyncio.wrap_future(handoff.changed()))
            await asyncio.sleep(0)
            producer = threading.Thread(target=handoff.put, args=(batch(index),))
            producer.start()
            waiter.cancel()
            await asyncio.wait([waiter])
            producer.join()
            found = handoff.take()
            assert found is not None
            assert found.index == index

    asyncio.run(scenario())


def test_receipts_add_up_and_are_given_once() -> None:
    handoff = Handoff(in_order=False)
    assert handoff.receipts() == Receipts()
    handoff.acknowledge(taken_bytes=10)
    handoff.acknowledge(taken_bytes=5, batches=1)
    handoff.acknowledge(released_bytes=10)
    assert handoff.receipts() == Receipts(taken_bytes=15, released_bytes=10, batches=1)
    assert handoff.receipts() == Receipts()


def test_a_listener_is_told_once() -> None:
    handoff = Handoff(in_order=False)
    told: list[int] = []
    handoff.acknowledge(batches=1)
    handoff.receipts(lambda: told.append(1))
    assert told == [], "what was returned is no news"
    handoff.acknowledge(batches=1)
    handoff.acknowledge(batches=1)
    assert told == [1]
    handoff.receipts(lambda: told.append(2))
    handoff.receipts()
    handoff.acknowledge(batches=1)
    assert told == [1], "who asks without a listener wants no news any more"


def test_no_receipt_is_missed_whenever_it_comes() -> None:
    """The engine sleeps whenever there was nothing, and a receipt may come at any moment before it does."""
    handoff = Handoff(in_order=False)
    total = 5000

    def consume() -> None:
        for _ in range(total):
            handoff.acknowledge(taken_bytes=3, released_bytes=3, batches=1)

    consumer = threading.Thread(target=consume)
    consumer.start()
    batches = 0
    while batches < total:
        news = threading.Event()
        batches += handoff.receipts(news.set).batches
        if batches < total:
            assert news.wait(10), "the engine was not told"
    consumer.join()
    assert batches == total
    assert handoff.receipts() == Receipts()
