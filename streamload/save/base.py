"""What a destination is: a folder in which files appear whole or not at all."""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol, Self

from streamload.uris import scrub_uri

__all__ = ["NOTHING_KEPT", "Ask", "Destination", "NewFile"]


NOTHING_KEPT: Mapping[str, dict[str, Any]] = {}


class Ask(Protocol):
    """Makes a request, and makes it again where that may help."""

    async def __call__(self, call: Callable[[], Awaitable[Any]], key: str) -> Any:
        """Make the request that `call` stands for.

        Args:
            call: Makes one attempt.
            key: What it is about, for errors.

        Raises:
            StreamloadError: That of the last attempt.
        """


class NewFile(ABC):
    """A file that is being written.

    `write` all of it, `finish`, then `publish`: only then is it under its name. Whatever fails or is cancelled,
    `discard` leaves nothing of it. One task at a time.

    Attributes:
        name: What it will be called.
        size_bytes: How long it will be.
        published: Whether it is under its name; where it is, `publish` does nothing.
        doubtful: Whether nobody knows if it is under its name: it should have come there, and no answer has.
    """

    published = False
    doubtful = False

    def __init__(self, name: str, size_bytes: int) -> None:
        self.name = name
        self.size_bytes = size_bytes

    @abstractmethod
    async def write(self, data: memoryview) -> None:
        """Append bytes. They may change again when this returns.

        Raises:
            SourceError: They cannot be written; located.
        """

    @abstractmethod
    async def finish(self) -> None:
        """Make sure that every byte is in place and stays there; the file is not under its name yet.

        Raises:
            SourceError: It cannot be done; located.
        """

    @abstractmethod
    async def publish(self) -> None:
        """Put the finished file under its name, in place of what was there.

        Raises:
            SourceError: It cannot be done; located.
        """

    @abstractmethod
    async def keep(self) -> dict[str, Any] | None:
        """Make sure that what was written so far outlasts this process.

        Returns:
            What `Destination.reopen` needs to go on with it, ready for JSON; None where the file has to be written from
            its beginning, since it is not finished.

        Raises:
            SourceError: It cannot be done; located.
        """

    @abstractmethod
    async def leave(self) -> None:
        """Let go of the file, but leave there what was kept of it."""

    @abstractmethod
    async def discard(self) -> None:
        """Leave nothing of it, under its name or any other. May be called at any time, and twice.

        Raises:
            SourceError: Something of it is left.
        """


class Destination(ABC):
    """The folder that a URI names. Used on one event loop; an async context manager.

    Attributes:
        uri: The URI as the caller gave it, without credentials.
        concurrency: How many files are worth being written at once.
        held_bytes: How much of the memory each file needs that is being written. One task that writes several in turn
            waits for ever where there is not so much for each of them, and once more.
    """

    concurrency: int = 4
    held_bytes: int = 0

    def __init__(self, uri: str) -> None:
        self.uri = scrub_uri(uri)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @abstractmethod
    async def claim(self, name: str) -> None:
        """Make the folder where it is missing, and have it refuse everybody else who claims it under this name.

        It ends with `aclose`, or with the process. Only some places can refuse: an object store cannot.

        Raises:
            SourceError: Somebody else has claimed it, or the folder cannot be written to.
        """

    @abstractmethod
    async def prepare(
        self, mine: Callable[[str], bool], kept: Mapping[str, dict[str, Any]] = NOTHING_KEPT
    ) -> list[str]:
        """Make the folder where it is missing, and clear up what interrupted saves have left of certain files.

        Args:
            mine: Which names are meant.
            kept: By name, what `NewFile.keep` said of those that are to stay.

        Returns:
            The names of that kind under which there are files.

        Raises:
            SourceError: The folder cannot be written to.
        """

    @abstractmethod
    def check_fits(self, sizes: Sequence[int]) -> None:
        """See that one task can write files of these lengths in turns, and none of them waits for memory for ever.

        Raises:
            OptionError: There is too little memory for that.
        """

    @abstractmethod
    async def create(self, name: str, size_bytes: int) -> NewFile:
        """Begin a file.

        Args:
            name: What it will be called; no part of a path.
            size_bytes: How long it will be.

        Raises:
            SourceError: It cannot be written.
        """

    @abstractmethod
    async def reopen(
        self, name: str, size_bytes: int, kept: Mapping[str, Any], sums: Sequence[tuple[int, int]] = ()
    ) -> NewFile | None:
        """Go on with a file that another process has begun.

        Args:
            name: What it will be called.
            size_bytes: How long it will be.
            kept: What `NewFile.keep` said of it.
            sums: Where it is not finished: length and CRC-64/NVME of the stretches that were written, in order.

        Returns:
            The file as it was then, or published since; None where that is not there any more.

        Raises:
            SourceError: It cannot be said; located.
        """

    async def write_all(self, pieces: Sequence[tuple[NewFile, memoryview]]) -> None:
        """Append bytes to several files, each of them once. They may change again when this returns.

        Raises:
            SourceError: They cannot be written; located.
        """
        async with asyncio.TaskGroup() as group:
            for file, data in pieces:
                group.create_task(file.write(data))

    @abstractmethod
    async def remove(self, name: str) -> None:
        """Remove a file; where there is none, nothing happens.

        Raises:
            SourceError: It cannot be done.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """End everything that the destination has started. May be called twice."""
