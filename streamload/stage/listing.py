"""What there is to stage: listed, and chosen."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable
from dataclasses import dataclass

from streamload.checkpoint import MAX_INDEX_BYTES, choose_index, parse_index
from streamload.errors import AccessError, CheckpointError, IndexFileError, NotFoundError
from streamload.loan import Loan
from streamload.pipeline.fetch import Fetcher
from streamload.pipeline.manifests import is_one_file
from streamload.sources import SourceObject
from streamload.sources.keys import check_key
from streamload.stage.checks import Check
from streamload.stage.files import StagedFile
from streamload.stage.names import USUAL_NAMES, choose, identity, version_digest
from streamload.stage.options import StageOptions
from streamload.stage.pieces import Piece, Ranges
from streamload.stage.ready import Ready, ReadyFile

__all__ = ["FileState", "Lister", "Listing"]

_logger = logging.getLogger("streamload.stage")

# A web server may be a small one.
_LOOKED_FOR_AT_ONCE = 8


class FileState:
    """One file, and how far it is.

    Args:
        object: As its source knows it.
        of: What tells it from all others, see `names.identity`.

    Attributes:
        object: As above.
        identity: As above.
        ready: What the marker will say, once it is whole and under its name.
        staged: The file on the volume, while it is being brought.
        check: What it has to sum up to.
        landed: What is in its place.
        pending: Pieces that nobody has begun, by their first byte.
        missing: How many pieces have not landed.
        waiters: Who waits for a range.
        wholly: Who waits for all of it.
        stamps: What readers know it by, the last one first told now; see `journal.Journal.stamp`.
    """

    def __init__(self, object: SourceObject, of: str) -> None:
        self.object = object
        self.identity = of
        self.ready: ReadyFile | None = None
        self.staged: StagedFile | None = None
        self.check: Check | None = None
        self.landed = Ranges()
        self.pending: dict[int, Piece] = {}
        self.missing = 0
        self.waiters: list[tuple[int, int, asyncio.Future[None]]] = []
        self.wholly: list[asyncio.Future[None]] = []
        self.stamps: list[str] = []


@dataclass(frozen=True, slots=True)
class Listing:
    """What there is to stage, at which versions.

    Attributes:
        files: What is chosen, by key.
        listed: What lies under the URI, chosen or not.
        digest: Of this version and choice.
        index: Identity of the index file; None where there is none.
        shards: What it names.
    """

    files: dict[str, FileState]
    listed: dict[str, SourceObject]
    digest: str
    index: str | None
    shards: tuple[str, ...]


class Lister:
    """Asks a source what there is.

    Args:
        uri: What it is asked about, as it is told from others.
        fetcher: Asks it.
        options: Which files are wanted.
    """

    def __init__(self, uri: str, fetcher: Fetcher, options: StageOptions) -> None:
        self._uri = uri
        self._fetcher = fetcher
        self._options = options

    async def ask(self, said: Ready | None) -> Listing:
        """List, and choose.

        Args:
            said: What is known of an earlier version: what the same index names need not be read again.

        Raises:
            CheckpointError: Nothing is chosen, or the index does not fit.
            SourceError: The source's.
        """
        fetcher = self._fetcher
        listed = {object.key: object for object in await fetcher.ask(fetcher.source.list)}
        for name in listed:
            check_key(name, uri=self._uri)
        if not fetcher.source.lists_folders and not is_one_file(fetcher.source.uri, listed):
            listed |= await self._look_for(
                name for name in (*USUAL_NAMES, *self._options.include) if name not in listed
            )
        key = choose_index(tuple(listed))
        shards: tuple[str, ...] | None = None
        index = None if key is None else identity(self._uri, listed[key])
        if key is not None:
            # The index is what it was: so is what it names.
            shards = said.shards if said is not None and said.index == index else await self._read_index(listed[key])
        options = self._options
        keys = choose(listed, include=options.include, exclude=options.exclude, shards=shards)
        if not keys:
            raise CheckpointError(f"none of the {len(listed)} files there is to be staged: include and exclude say so")
        async with asyncio.TaskGroup() as group:
            deeper = {name: group.create_task(self._stat(name)) for name in keys if name not in listed}
        objects = [deeper[name].result() if name in deeper else listed[name] for name in keys]
        files = {object.key: FileState(object, identity(self._uri, object)) for object in objects}
        digest = version_digest(file.identity for file in files.values())
        return Listing(files, listed, digest, index, shards or ())

    async def _look_for(self, names: Iterable[str]) -> dict[str, SourceObject]:
        """Those of some files that are there, where the source cannot list what is."""

        async def look(name: str) -> SourceObject | None:
            async with slots:
                try:
                    return await self._fetcher.ask(lambda: self._fetcher.source.stat(name), key=name)
                except (AccessError, NotFoundError) as error:
                    # Stores that list nothing refuse what is not there as well.
                    _logger.debug("%s: %s is not staged: %s", self._uri, name, error.cause)
                    return None

        slots = asyncio.Semaphore(_LOOKED_FOR_AT_ONCE)
        async with asyncio.TaskGroup() as group:
            looking = [group.create_task(look(name)) for name in dict.fromkeys(names) if not set(name) & set("*?[")]
        return {object.key: object for object in (task.result() for task in looking) if object is not None}

    async def _stat(self, key: str) -> SourceObject:
        try:
            return await self._fetcher.ask(lambda: self._fetcher.source.stat(key), key=key)
        except NotFoundError as error:
            raise IndexFileError(f"the index names {key!r}, and there is no such file", object=key) from error

    async def _read_index(self, object: SourceObject) -> tuple[str, ...]:
        if object.size_bytes > MAX_INDEX_BYTES:
            raise IndexFileError(
                f"the index has {object.size_bytes} bytes, more than the {MAX_INDEX_BYTES} that are read",
                object=object.key,
            )
        content = bytearray(object.size_bytes)
        await self._fetcher.read(object, 0, object.size_bytes, Loan([memoryview(content)]))
        return parse_index(content, key=object.key).shards
