"""What a destination is: a folder in which files appear whole or not at all."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Awaitable, Callable
from types import TracebackType
from typing import Any, Protocol, Self

from streamload.uris import scrub_uri

__all__ = ["Ask", "Destination", "NewFile"]


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
    """

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
    """

    concurrency: int = 4

    def __init__(self, uri: str) -> None:
        self.uri = scrub_uri(uri)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    @abstractmethod
    async def prepare(self, mine: Callable[[str], bool]) -> list[str]:
        """Make the folder where it is missing, and clear up what interrupted saves have left of certain files.

        Args:
            mine: Which names are meant.

        Returns:
            The names of that kind under which there are files.

        Raises:
            SourceError: The folder cannot be written to.
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
    async def remove(self, name: str) -> None:
        """Remove a file; where there is none, nothing happens.

        Raises:
            SourceError: It cannot be done.
        """

    @abstractmethod
    async def aclose(self) -> None:
        """End everything that the destination has started. May be called twice."""
