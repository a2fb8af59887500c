"""The conformance suite for sources fails on sources that do wrong."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable

import pytest

from streamload.errors import StreamloadError
from streamload.loan import Loan
from streamload.sources import Source, SourceObject
from streamload.sources.memory import MemorySource
from streamload.testing import SourceConformance, run_on_each_loop


class _Scribbles(MemorySource):
    """Goes on writing after its read was cancelled."""

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        try:
            await super().read(object, start, end, loan)
        except asyncio.CancelledError:
            loop = asyncio.get_running_loop()
            # Two turns later: one after whoever cancelled has seen the read end.
            loop.call_soon(loop.call_soon, self._scribble, loan)
            raise

    def _scribble(self, loan: Loan) -> None:
        loan.views[-1][-1] = 0


class _Forgets(MemorySource):
    """Reads whatever version there is."""

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        await super().read(self._describe(object.key), start, end, loan)


class _StopsShort(MemorySource):
    """Leaves the last byte out."""

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        await super().read(object, start, end, loan)
        if loan.nbytes > 1:
            loan.views[-1][-1] = 0


class _Recurses(MemorySource):
    """Lists what lies deeper."""

    async def list(self) -> list[SourceObject]:
        return [self._describe(key) for key in sorted(self.objects)]


class _Unsorted(MemorySource):
    async def list(self) -> list[SourceObject]:
        return (await super().list())[::-1]


class _Untranslated(MemorySource):
    """Lets a foreign error out."""

    async def stat(self, key: str) -> SourceObject:
        try:
            return await super().stat(key)
        except StreamloadError:
            raise KeyError(key) from None


class _LeavesTasks(MemorySource):
    """Leaves a task behind."""

    async def aclose(self) -> None:
        self.task = asyncio.create_task(asyncio.Event().wait())


def _suite_over(kind: Callable[[dict[str, bytes]], Source]) -> SourceConformance:
    class Suite(SourceConformance):
        def __init__(self) -> None:
            self.objects: dict[str, bytes] = {}

        def open(self) -> Source:
            return kind(self.objects)

        def put(self, key: str, content: bytes) -> None:
            self.objects[key] = content

        def remove(self, key: str) -> None:
            del self.objects[key]

    return Suite()


@pytest.mark.parametrize(
    ("kind", "caught_by"),
    [
        (_Scribbles, SourceConformance.test_a_cancelled_read_never_touches_its_memory_again),
        (_Forgets, SourceConformance.test_an_object_replaced_since_it_was_listed_is_an_error),
        (_Forgets, SourceConformance.test_an_object_replaced_between_two_reads_never_gives_bytes_of_both),
        (_StopsShort, SourceConformance.test_reads_exactly_the_range_into_scattered_views),
        (_Recurses, SourceConformance.test_lists_the_objects_of_one_folder_in_order),
        (_Unsorted, SourceConformance.test_lists_the_objects_of_one_folder_in_order),
        (_LeavesTasks, SourceConformance.test_closing_twice_and_use_after_it),
    ],
)
def test_the_suite_catches(
    kind: Callable[[dict[str, bytes]], Source], caught_by: Callable[[SourceConformance], None]
) -> None:
    with pytest.raises(AssertionError):
        caught_by(_suite_over(kind))


def test_the_suite_lets_foreign_errors_through() -> None:
    with pytest.raises(KeyError):
        _suite_over(_Untranslated).test_missing_objects_are_not_found_and_named()


def test_a_thread_left_over_is_noticed() -> None:
    go_on = threading.Event()

    async def body() -> None:
        threading.Thread(target=go_on.wait, name="forgotten", daemon=True).start()

    try:
        with pytest.raises(AssertionError, match="forgotten"):
            run_on_each_loop(body)
    finally:
        go_on.set()
