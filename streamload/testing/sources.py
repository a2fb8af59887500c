"""What every source must do: one suite of tests, run over each of them."""

from __future__ import annotations

import asyncio
import pickle
import random
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, ClassVar, TypeVar

from streamload.errors import ClosedError, NotFoundError, ObjectChangedError, SourceError, StreamloadError
from streamload.loan import Loan, Rows
from streamload.sources import Source, SourceObject
from streamload.testing.loops import run_on_each_loop

__all__ = ["SourceConformance"]

E = TypeVar("E", bound=BaseException)

# No content has this byte, so memory that is full of it has not been written to.
_POISON = 0xA5
_NO_POISON = bytes(byte if byte != _POISON else 0x5A for byte in range(256))

_KEY = "model.safetensors"


class SourceConformance(ABC):
    """Tests for a source.

    Subclass it in a test module, under a name that begins with ``Test``::

        class TestMySource(SourceConformance):
            @pytest.fixture(autouse=True)
            def _store(self, tmp_path):
                self.store = MyStore(tmp_path)

            def open(self):
                return MySource(self.store.uri)

            def put(self, key, content):
                self.store.write(key, content)

            def remove(self, key):
                self.store.delete(key)

    Each test must find an empty store. The tests are synchronous and need no plugin: each runs its coroutine on
    asyncio's own event loop and on uvloop's, both in debug mode, and fails if a task or a thread is left over.

    Attributes:
        awkward_names: Names of objects that libraries get wrong. A store that cannot have one of them lists fewer.
        keeps_versions: Whether a version that was replaced or removed can still be read, as in a repository.
    """

    keeps_versions: ClassVar[bool] = False

    awkward_names: ClassVar[Sequence[str]] = (
        "100%.safetensors",
        "a b.safetensors",
        "a%20b.safetensors",
        "a+b.safetensors",
        "a&b=c#d?e.safetensors",
        "model~(1)'.safetensors",
        "模型-ü.safetensors",
    )

    @abstractmethod
    def open(self) -> Source:
        """A new source over the store's root, not yet entered."""

    @abstractmethod
    def put(self, key: str, content: bytes) -> None:
        """Put an object into the store, or another version in its place. Deeper folders in the key are made."""

    @abstractmethod
    def remove(self, key: str) -> None:
        """Take an object out of the store."""

    def run(self, body: Callable[[], Coroutine[Any, Any, None]]) -> None:
        """Run a coroutine function once on each kind of event loop."""
        run_on_each_loop(body)

    async def _all(self, source: Source, *keys: str) -> list[SourceObject]:
        """What there is: as it is listed, or each by its name where nothing can be."""
        return await source.list() if source.lists_folders else [await source.stat(key) for key in sorted(keys)]

    def test_entering_makes_no_request(self) -> None:
        async def body() -> None:
            async with self.open() as source:
                assert source.requests == 0

        self.run(body)

    def test_lists_the_objects_of_one_folder_in_order(self) -> None:
        for key in ("b.safetensors", "a.safetensors", "Z.json", "a/c.safetensors", "folder/deeper/d.safetensors"):
            self.put(key, key.encode())

        async def body() -> None:
            async with self.open() as source:
                objects = await self._all(source, "Z.json", "a.safetensors", "b.safetensors")
                assert [object.key for object in objects] == ["Z.json", "a.safetensors", "b.safetensors"]
                assert [object.size_bytes for object in objects] == [6, 13, 13]
                assert all(object.version for object in objects)
                assert source.requests >= 0

        self.run(body)

    def test_an_empty_place_is_not_found(self) -> None:
        async def body() -> None:
            async with self.open() as source:
                error = await _error_of(NotFoundError, source.list())
                assert error.uri, "the error does not name the URI"

        self.run(body)

    def test_awkward_names(self) -> None:
        contents = {name: name.encode() * 3 for name in self.awkward_names}
        for name, content in contents.items():
            self.put(name, content)

        async def body() -> None:
            async with self.open() as source:
                objects = await self._all(source, *contents)
                assert [object.key for object in objects] == sorted(contents)
                for object in objects:
                    assert await source.stat(object.key) == object
                    assert await _read(source, object) == contents[object.key]

        self.run(body)

    def test_stat_finds_what_list_found_and_what_lies_deeper(self) -> None:
        self.put(_KEY, b"x" * 10)
        self.put("folder/deeper/weights.bin", b"y" * 20)

        async def body() -> None:
            async with self.open() as source:
                (listed,) = await source.list()
                assert await source.stat(_KEY) == listed
                deeper = await source.stat("folder/deeper/weights.bin")
                assert (deeper.key, deeper.size_bytes) == ("folder/deeper/weights.bin", 20)
                assert await _read(source, deeper, 5, 15) == b"y" * 10

        self.run(body)

    def test_missing_objects_are_not_found_and_named(self) -> None:
        self.put(_KEY, b"x" * 10)
        self.put("folder/" + _KEY, b"x" * 10)

        async def body() -> None:
            async with self.open() as source:
                for key in ("none.safetensors", "no/such/folder.safetensors", "folder", "", "../" + _KEY, "a\0b"):
                    error = await _error_of(NotFoundError, source.stat(key))
                    assert error.object == key

        self.run(body)

    def test_an_object_removed_since_is_an_error(self) -> None:
        async def body() -> None:
            self.put(_KEY, b"x" * 10)
            async with self.open() as source:
                (object,) = await source.list()
                self.remove(_KEY)
                if self.keeps_versions:
                    assert await _read(source, object) == b"x" * 10
                    return
                error = await _error_of(SourceError, _read(source, object))
                assert isinstance(error, NotFoundError | ObjectChangedError)
                assert error.object == _KEY

        self.run(body)

    def test_reads_exactly_the_range_into_scattered_views(self) -> None:
        content = _content(300_007)
        self.put(_KEY, content)
        chance = random.Random(1)
        ranges = [(0, len(content)), (0, 1), (len(content) - 1, len(content)), (4096, 8192)]
        for _ in range(20):
            start, end = sorted(chance.sample(range(len(content) + 1), 2))
            ranges.append((start, end))

        async def body() -> None:
            async with self.open() as source:
                (object,) = await source.list()
                for start, end in ranges:
                    memory = _Memory(end - start, chance)
                    await source.read(object, start, end, memory.loan)
                    memory.check(content[start:end])
                assert source.requests > 0

        self.run(body)

    def test_reads_into_thousands_of_views(self) -> None:
        content = _content(9_001)
        self.put(_KEY, content)

        async def body() -> None:
            async with self.open() as source:
                (object,) = await source.list()
                memory = _Memory(len(content), random.Random(2), largest=3)
                await source.read(object, 0, len(content), memory.loan)
                memory.check(content)

        self.run(body)

    def test_reads_around_gaps_or_through_them(self) -> None:
        content = _content(300_000)
        self.put(_KEY, content)

        async def body() -> None:
            async with self.open() as source:
                (object,) = await source.list()
                for piece, gap in ((100, 2900), (4_000, 11_000), (10_000, 5), (50_000, 50_000), (7_001, 4_999)):
                    rows = len(content) // (piece + gap)
                    memory, scratch = memoryview(bytearray(rows * piece)), memoryview(bytearray(gap))
                    views = [view for row in range(rows) for view in (memory[row * piece : (row + 1) * piece], scratch)]
                    loan = Loan(views, gaps=[False, True] * rows)
                    await source.read(object, 0, loan.nbytes, loan)
                    rest = loan.after(piece + gap // 2)
                    assert rest.gaps is not None
                    assert list(rest.gaps[:2]) == [True, False]
                    expected = b"".join(content[at : at + piece] for at in range(0, loan.nbytes, piece + gap))
                    assert memory == expected
                    memory[:] = bytes([_POISON]) * memory.nbytes
                    await source.read(object, piece + gap // 2, loan.nbytes, rest)
                    assert memory[piece:] == expected[piece:]
                    memory[:] = bytes([_POISON]) * memory.nbytes
                    in_rows = Loan.of_rows(Rows(memory, piece, gap, scratch[:1000]))
                    await source.read(object, 0, in_rows.nbytes, in_rows)
                    assert memory == expected

        self.run(body)

    def test_empty_ranges_and_empty_objects(self) -> None:
        self.put("empty", b"")
        self.put("full", b"x" * 10)

        async def body() -> None:
            async with self.open() as source:
                empty, full = await self._all(source, "empty", "full")
                assert (empty.size_bytes, full.size_bytes) == (0, 10)
                requests = source.requests
                for object, at in ((empty, 0), (full, 0), (full, 5), (full, 10)):
                    await source.read(object, at, at, Loan([]))
                assert source.requests == requests, "an empty range needs no request"
                await _error_of(SourceError, source.read(empty, 0, 1, Loan([memoryview(bytearray(1))])))

        self.run(body)

    def test_a_range_past_the_end_is_an_error_that_names_it(self) -> None:
        self.put(_KEY, b"x" * 100)

        async def body() -> None:
            async with self.open() as source:
                (object,) = await source.list()
                for start, end in ((0, 101), (99, 110), (100, 101), (1000, 1001)):
                    error = await _error_of(SourceError, _read(source, object, start, end))
                    assert not error.retryable
                    _check_place(error, start, end)

        self.run(body)

    def test_an_object_replaced_since_it_was_listed_is_an_error(self) -> None:
        async def body() -> None:
            self.put(_KEY, b"x" * 1000)
            async with self.open() as source:
                (object,) = await source.list()
                self.put(_KEY, b"y" * 1000)
                if self.keeps_versions:
                    assert await _read(source, object, 100, 200) == b"x" * 100
                    return
                error = await _error_of(ObjectChangedError, _read(source, object, 100, 200))
                assert not error.retryable
                _check_place(error, 100, 200)
                (renewed,) = await source.list()
                assert renewed.version != object.version
                assert await _read(source, renewed) == b"y" * 1000

        self.run(body)

    def test_an_object_replaced_between_two_reads_never_gives_bytes_of_both(self) -> None:
        async def body() -> None:
            self.put(_KEY, b"x" * 1000)
            async with self.open() as source:
                (object,) = await source.list()
                assert await _read(source, object, 0, 500) == b"x" * 500
                self.put(_KEY, b"y" * 1000)
                try:
                    rest = await _read(source, object, 500, 1000)
                except ObjectChangedError:
                    return
                # A source that holds on to what it opened first may read it to the end.
                assert rest == b"x" * 500

        self.run(body)

    def test_a_cancelled_read_never_touches_its_memory_again(self) -> None:
        content = _content(6 << 20)
        self.put(_KEY, content)

        async def body() -> None:
            async with self.open() as source:
                (object,) = await source.list()
                lent = []
                for moment in _moments(len(content)):
                    memory = _Memory(len(content), random.Random(3), largest=1 << 20)
                    reading = asyncio.create_task(source.read(object, 0, len(content), memory.loan))
                    await moment(reading, memory)
                    await _cancel(reading)
                    memory.poison()
                    lent.append(memory)
                for _ in range(3):
                    assert await _read(source, object) == content
                for memory in lent:
                    memory.check_untouched()
            for memory in lent:
                memory.check_untouched()

        self.run(body)

    def test_a_read_cancelled_twice_never_touches_its_memory_again(self) -> None:
        content = _content(6 << 20)
        self.put(_KEY, content)

        async def body() -> None:
            async with self.open() as source:
                (object,) = await source.list()
                memory = _Memory(len(content), random.Random(4), largest=1 << 20)
                reading = asyncio.create_task(source.read(object, 0, len(content), memory.loan))
                await _until_arrived(reading, memory, 0.3)
                reading.cancel()
                await asyncio.sleep(0)
                await _cancel(reading)
                memory.poison()
                assert await _read(source, object) == content
                memory.check_untouched()

        self.run(body)

    def test_cancelling_one_read_leaves_the_others_alone(self) -> None:
        content = _content(1 << 20)
        self.put(_KEY, content)

        async def body() -> None:
            async with self.open() as source:
                (object,) = await source.list()
                staying = [asyncio.create_task(_read(source, object)) for _ in range(4)]
                leaving = [asyncio.create_task(_read(source, object)) for _ in range(4)]
                for task in leaving:
                    await asyncio.sleep(0)
                    await _cancel(task)
                assert await asyncio.gather(*staying) == [content] * 4

        self.run(body)

    def test_list_and_stat_can_be_cancelled(self) -> None:
        self.put(_KEY, b"x" * 10)

        async def body() -> None:
            async with self.open() as source:
                for turns in range(8):
                    listing = asyncio.create_task(source.list())
                    looking = asyncio.create_task(source.stat(_KEY))
                    await _turns(turns)
                    await _cancel(listing)
                    await _cancel(looking)
                (object,) = await source.list()
                assert await _read(source, object) == b"x" * 10

        self.run(body)

    def test_many_reads_at_once(self) -> None:
        content = _content(640_000)
        self.put(_KEY, content)

        async def body() -> None:
            async with self.open() as source:
                (object,) = await source.list()
                starts = range(0, len(content), 10_000)
                pieces = await asyncio.gather(*[_read(source, object, start, start + 10_000) for start in starts])
                assert b"".join(pieces) == content

        self.run(body)

    def test_closing_ends_the_reads_that_run(self) -> None:
        content = _content(4 << 20)
        self.put(_KEY, content)

        async def body() -> None:
            source = self.open()
            async with source:
                (object,) = await source.list()
                memories = [_Memory(len(content), random.Random(5), largest=1 << 20) for _ in range(8)]
                reads = [asyncio.create_task(source.read(object, 0, len(content), m.loan)) for m in memories]
                await _until_arrived(reads[0], memories[0], 0.2)
                await source.aclose()
                ends = await asyncio.gather(*reads, return_exceptions=True)
                for end, memory in zip(ends, memories, strict=True):
                    if end is None:
                        memory.check(content)
                    else:
                        assert isinstance(end, StreamloadError), f"{end!r} left a source that was closed"
                    memory.poison()
            await _turns(10)
            for memory in memories:
                memory.check_untouched()

        self.run(body)

    def test_closing_twice_and_use_after_it(self) -> None:
        self.put(_KEY, b"x" * 10)

        async def body() -> None:
            source = self.open()
            async with source:
                (object,) = await source.list()
                await source.aclose()
                await source.aclose()
            # A source may go on serving what needs nothing open; what it must not do is open anything again.
            for call in (source.list(), source.stat(_KEY), _read(source, object)):
                try:
                    await call
                except ClosedError:
                    pass
            await source.aclose()

        self.run(body)

    def test_a_source_that_was_never_entered_closes(self) -> None:
        async def body() -> None:
            await self.open().aclose()

        self.run(body)

    def test_errors_survive_pickling(self) -> None:
        self.put(_KEY, b"x" * 10)

        async def body() -> None:
            async with self.open() as source:
                (object,) = await source.list()
                for call in (source.stat("none"), _read(source, object, 5, 50)):
                    error = await _error_of(SourceError, call)
                    copy = pickle.loads(pickle.dumps(error))
                    assert type(copy) is type(error)
                    assert str(copy) == str(error)
                    assert (copy.object, copy.start, copy.end) == (error.object, error.start, error.end)
                    assert str(copy.object) in str(copy)

        self.run(body)

    def test_describes_itself_in_words(self) -> None:
        self.put(_KEY, b"x")

        async def body() -> None:
            async with self.open() as source:
                facts = await source.describe()
                assert all(isinstance(part, str) for fact in facts.items() for part in fact)

        self.run(body)


class _Memory:
    """Lent memory: views of odd sizes with gaps between them, full of poison."""

    def __init__(self, nbytes: int, chance: random.Random, *, largest: int = 70_000) -> None:
        self._places: list[tuple[int, int]] = []
        at = 0
        while nbytes:
            at += chance.randrange(1, 9)
            count = min(nbytes, chance.randint(1, largest))
            self._places.append((at, at + count))
            at += count
            nbytes -= count
        self._bytes = bytearray([_POISON]) * (at + 8)
        view = memoryview(self._bytes)
        self.loan = Loan([view[start:end] for start, end in self._places])

    def check(self, content: bytes) -> None:
        """The views hold `content`, and the gaps between them what they held before."""
        assert b"".join(self.loan.views) == content, "other bytes have landed than those asked for"
        for start, end in self._places:
            self._bytes[start:end] = bytes([_POISON]) * (end - start)
        assert self._poisoned(), "something was written outside the views"

    def poison(self) -> None:
        self._bytes[:] = bytes([_POISON]) * len(self._bytes)

    def check_untouched(self) -> None:
        assert self.loan.quarantined or self._poisoned(), "memory was written to after its read had ended"

    def arrived(self, fraction: float) -> bool:
        """Whether the byte at so much of the range is in place."""
        at = int(fraction * (self.loan.nbytes - 1))
        for start, end in self._places:
            if at < end - start:
                return self._bytes[start + at] != _POISON
            at -= end - start
        raise AssertionError("unreachable")

    def _poisoned(self) -> bool:
        return self._bytes.count(_POISON) == len(self._bytes)


_Moment = Callable[["asyncio.Task[None]", _Memory], Awaitable[None]]


def _moments(nbytes: int) -> list[_Moment]:
    """When to cancel a read: after so many turns of the loop, and when so much of it has arrived."""

    def after(turns: int) -> _Moment:
        return lambda reading, memory: _turns(turns)

    def at(fraction: float) -> _Moment:
        return lambda reading, memory: _until_arrived(reading, memory, fraction)

    return [*map(after, (0, 1, 2, 3, 5, 8, 13)), *map(at, (0.0, 0.2, 0.5, 0.8, 1.0))]


async def _until_arrived(reading: asyncio.Task[None], memory: _Memory, fraction: float) -> None:
    for _ in range(10_000_000):
        if reading.done() or memory.arrived(fraction):
            return
        await asyncio.sleep(0)


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


async def _cancel(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait for it; it may have been done already, but not have failed."""
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        pass


async def _read(source: Source, object: SourceObject, start: int = 0, end: int | None = None) -> bytes:
    end = object.size_bytes if end is None else end
    memory = bytearray(end - start)
    await source.read(object, start, end, Loan([memoryview(memory)]))
    return bytes(memory)


async def _error_of(kind: type[E], call: Awaitable[object]) -> E:
    try:
        await call
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


def _check_place(error: StreamloadError, start: int, end: int) -> None:
    """A source names the object at least; what it says of the range is right."""
    assert error.object == _KEY
    assert (error.start, error.end) in {(None, None), (start, end)}


def _content(nbytes: int) -> bytes:
    return random.Random(nbytes).randbytes(nbytes).translate(_NO_POISON)
