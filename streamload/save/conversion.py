"""All ranks' files of a conversion, written as the source is read."""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from streamload.checkpoint import (
    BLOCK_BYTES,
    MAX_MANIFEST_BYTES,
    ManifestFile,
    ManifestTensor,
    RankFiles,
    TensorInfo,
    encode_header,
    encode_manifest,
)
from streamload.checksums import BlockSums, RunningChecksum
from streamload.errors import ObjectChangedError, SourceError, StreamloadError
from streamload.plan import Conversion, Span
from streamload.save.base import Destination, NewFile
from streamload.save.journal import JOURNAL_NAME, Journal, KeptFile, Made
from streamload.save.sharded import METADATA
from streamload.sources import SourceObject
from streamload.sources.threads import DaemonExecutor, ThreadCall

__all__ = ["ConversionWriter", "Look", "Pieces", "views_of"]

Pieces: TypeAlias = Mapping[int, memoryview]
"""What a read has brought, by rank: the next bytes of that rank's file."""

Look: TypeAlias = Callable[[], Awaitable[tuple[Mapping[str, SourceObject], bytes | bytearray | None]]]
"""Says which files there are, and what is in the journal among them, up to the length that is read."""

_NOTHING_OLDER: Mapping[str, tuple[int, str]] = {}

_log = logging.getLogger("streamload.save")

# How long a cancelled conversion waits for what its thread copies.
_GRACE_S = 10.0


class _RankFile:
    """One file, and what its content sums up to."""

    def __init__(self, file: NewFile, header_bytes: int, header_checksum: int, sums: BlockSums) -> None:
        self.file = file
        self.header_bytes = header_bytes
        self.header_checksum = header_checksum
        self.sums = sums
        self.position = header_bytes
        # So many of the blocks are of tensors that are written whole.
        self.blocks = 0
        # What its destination needs to go on with it, as of a position.
        self.kept: dict[str, Any] | None = None
        self.kept_at = -1

    @property
    def complete(self) -> bool:
        return self.position == self.file.size_bytes

    async def keep(self) -> bool:
        """Have what was written outlast this process; whether it does."""
        if self.kept_at != self.position:
            self.kept, self.kept_at = await self.file.keep(), self.position
        return self.kept is not None

    def described(self) -> KeptFile:
        """For the journal."""
        sums = b"".join(value.to_bytes(8, "big") for value in self.sums.values[: self.blocks]).hex()
        return KeptFile(self.file.size_bytes, self.header_bytes, self.header_checksum, sums, self.kept or {})


class _Views:
    """A rank's bytes in a read, tensor after tensor; neighbours are one piece, which needs no copy."""

    def __init__(self, view: memoryview, span: Span) -> None:
        self.views: list[memoryview] = []
        self._view = view
        self._span = span
        # Where in the file the last piece begins and ends, if another one may follow it.
        self._start = self._end = -1

    def add(self, part: TensorInfo) -> None:
        span = self._span
        if len(part.stripes) > 1 or (part.stripes and part.stripes[0].count > 1):
            self.views += views_of(part, self._view, span)
            self._end = -1
            return
        for start, _, nbytes in part.runs(span.start, span.end):
            if start == self._end:
                self.views.pop()
            else:
                self._start = start
            self._end = start + nbytes
            self.views.append(self._view[self._start - span.start : self._end - span.start])


class ConversionWriter:
    """Writes the files of a conversion, and a journal beside them.

    Files are complete under temporary names, or as uploads that are not completed yet, until `publish`. What the
    journal tells of stays there when the process ends, however it ends. One task at a time; use `aclose` at the end.

    Args:
        destination: Where to, claimed already.
        conversion: What goes where.
        names: What each rank's files are called.
        made: For the journal.
        look: Says what is in the destination, and in the journal there.
        journal: What was in it.
        older: Files of an earlier conversion that are there, and will be replaced or removed, in this order: size and
            version of each.
    """

    def __init__(
        self,
        destination: Destination,
        conversion: Conversion,
        names: Sequence[RankFiles],
        made: Made,
        *,
        look: Look,
        journal: bytes | bytearray | None = None,
        older: Mapping[str, tuple[int, str]] = _NOTHING_OLDER,
    ) -> None:
        self._destination = destination
        self._conversion = conversion
        self._names = names
        self._made = made
        self._look = look
        self._journal = _told(journal)  # as this conversion has found it, or written it
        self._older = dict(older)
        self._group = 0
        self._files: dict[str, _RankFile] = {}  # all of them, those that were finished before included
        self._beside: dict[str, NewFile] = {}
        self._open: dict[int, _RankFile] = {}  # those of the group that is being read, by rank
        self._noted: frozenset[str] = frozenset()
        self._threads = DaemonExecutor(1, name="streamload-scatter")

    @property
    def files(self) -> dict[str, int]:
        """How long each file is, by its name."""
        return {name: file.file.size_bytes for name, file in self._files.items()}

    async def begin_anew(self) -> None:
        """Write down that nothing is done yet.

        Before anything is: a journal of an earlier conversion must not be there together with files of this one.
        """
        await self._put_journal(Journal(self._made, older=list(self._older)))

    async def reopen(self, journal: Journal) -> bool:
        """Have the files as the journal says; whether all of them are there."""
        self._group, self._noted = journal.group, frozenset(journal.files)
        ranks: dict[str, int] = {}
        if journal.group < len(self._conversion.groups):
            ranks = {name: rank for rank, name in self._names_of(journal.group)}
        for name, said in journal.files.items():
            sums: list[tuple[int, int]] = []
            if name in ranks:
                before = range(self._conversion.groups[journal.group].start, journal.tensor)
                lengths = _blocks(list(self._conversion.sizes(ranks[name], before)))
                sums = [(said.header_bytes, said.header_checksum), *zip(lengths, _values(said.sums), strict=False)]
            file = await self._destination.reopen(name, said.size_bytes, said.kept, sums)
            if file is None:
                return False
            self._files[name] = _RankFile(
                file, said.header_bytes, said.header_checksum, BlockSums((), _values(said.sums))
            )
            self._files[name].position = file.size_bytes
        for name, rank in ranks.items():
            if name in self._files:
                rest = range(journal.tensor, self._conversion.groups[journal.group].stop)
                self._open[rank] = again = self._files[name]
                sizes = list(self._conversion.sizes(rank, rest))
                again.sums = BlockSums(_blocks(sizes), again.sums.values)
                again.position -= sum(sizes)
        for name, again in self._files.items():
            again.blocks = len(again.sums.values)
            again.kept, again.kept_at = journal.files[name].kept, again.position
            if again.complete:
                await again.file.leave()
        return True

    async def begin(self, group: int) -> None:
        """Begin the files of a group, with their headers; nothing happens where they were."""
        self._group = group
        if self._open:
            return
        lengths: list[int] = []
        for rank, name in self._names_of(group):
            header = encode_header(self._conversion.entries(rank, group), metadata=METADATA)
            sizes = list(self._conversion.sizes(rank, self._conversion.groups[group]))
            lengths.append(len(header) + sum(sizes))
            self._destination.check_fits(lengths)
            file = await self._destination.create(name, lengths[-1])
            running = RunningChecksum("CRC64NVME")
            running.add(memoryview(header))
            sums = BlockSums(_blocks(sizes))
            self._open[rank] = self._files[name] = _RankFile(file, len(header), running.value, sums)
            await file.write(memoryview(header))
            if self._open[rank].complete:
                await file.finish()

    async def cut(self, span: Span, view: memoryview) -> Pieces:
        """Find each rank's bytes in a read, put them together and sum them up.

        Called once for each read, in order; ahead of `write` by some. What it returns may be views of the read.
        """
        call = ThreadCall(self._threads, lambda: self._cut(span, view))
        try:
            return await call.result()
        except asyncio.CancelledError:
            if not call.take_back():
                await call.left(_GRACE_S)
            raise

    def _cut(self, span: Span, view: memoryview) -> Pieces:
        found = {rank: _Views(view, span) for rank in self._open}
        for number in range(span.first, span.stop):
            for rank, part in enumerate(self._conversion.slices(number)):
                if part is not None:
                    found[rank].add(part)
        pieces: dict[int, memoryview] = {}
        for rank, each in found.items():
            views = each.views
            if views:
                pieces[rank] = views[0] if len(views) == 1 else memoryview(b"".join(views))
                self._open[rank].sums.add(pieces[rank])
        return pieces

    async def write(self, pieces: Pieces) -> None:
        """Write what a read has brought, each rank's part into its file; in the order of the reads."""
        await self._destination.write_all([(self._open[rank].file, data) for rank, data in pieces.items()])
        for rank, data in pieces.items():
            file = self._open[rank]
            file.position += data.nbytes
            if file.complete:
                # At once, rather than at the group's end: what it holds is given back.
                await file.file.finish()

    async def note(self, tensor: int, sums: dict[str, dict[str, list[list[int]]]], *, group: int) -> bool:
        """Write down how far the conversion is, if all of that would outlast this process.

        Args:
            tensor: The first tensor that was not read.
            sums: Of the source.
            group: The group that it belongs to.

        Returns:
            Whether it was written down.
        """
        for file in self._files.values():
            if not await file.keep():
                return False
        for rank, file in self._open.items():
            # Reads that were cut already, and are not written, are not to be told of.
            before = range(self._conversion.groups[self._group].start, tensor)
            file.blocks = sum(-(-size // BLOCK_BYTES) for size in self._conversion.sizes(rank, before))
        if group != self._group:
            for file in self._open.values():
                await file.file.leave()
            self._open = {}
        files = {name: file.described() for name, file in self._files.items()}
        await self._put_journal(Journal(self._made, group, tensor, files, sums, list(self._older)))
        return True

    async def create_beside(self, name: str, size_bytes: int) -> NewFile:
        """Begin a file that goes with the ranks' own; the caller writes and finishes it."""
        self._beside[name] = file = await self._destination.create(name, size_bytes)
        return file

    async def publish(self, *, manifests: bool) -> list[str]:
        """Put all files under their names, and remove what an earlier conversion has left; the manifests' names.

        Raises:
            SourceError: It cannot be done; or another conversion has been there, and nothing was touched.
        """
        of_ranks = [names.manifest for names in self._names]
        new = {name for name, file in self._files.items() if file.file.published}
        there = await self.look()
        older = [name for name in self._older if name in there and name not in new and name not in self._beside]
        for name in older:
            if (there[name].size_bytes, there[name].version) != self._older[name]:
                raise SourceError("somebody has written this file since the conversion began", object=name)
        for name in of_ranks:
            # It may tell of what is about to be replaced.
            await self._destination.remove(name)
        # Old files and new ones are never there together, and the part without which a rank has none comes last:
        # whoever looks in between, or after a kill, finds no checkpoint rather than a part of one.
        for name in older:
            if name not in of_ranks:
                await self._destination.remove(name)
        for beside in self._beside.values():
            await beside.publish()
        for file in reversed(self._files.values()):
            await file.file.publish()
        if not manifests:
            return []
        for rank, name in enumerate(of_ranks):
            # One after the other in memory, too: that of many tensors has megabytes.
            await self._put_manifest(name, encode_manifest(list(self._said_of(rank))))
        return of_ranks

    async def done(self, versions: Mapping[str, tuple[int, str]]) -> None:
        """Write down that everything is there."""
        await self._put_journal(Journal(self._made, done=dict(versions)))

    async def give_up(self, *, keep: bool) -> None:
        """End a conversion that has failed.

        Args:
            keep: Whether what the journal tells of stays there. Where not, the journal goes too, but for what it says
                of an earlier conversion's files.
        """
        if not keep:
            await self._tolerating(self._forget())
        for beside in self._beside.values():
            # One that is there has taken the place of an older one, and the next conversion replaces it.
            await self._tolerating(beside.leave() if keep and beside.published else beside.discard())
        for name, file in reversed(self._files.items()):
            if keep and name in self._noted:
                await self._tolerating(file.file.leave())
            else:
                await self._tolerating(file.file.discard())

    async def aclose(self) -> None:
        """End its thread."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        ended = asyncio.wrap_future(self._threads.ended)
        await asyncio.wait({ended}, timeout=_GRACE_S)
        if self._threads.join(0.0 if not self._threads.ended.done() else 1.0):
            ended.cancel()

    async def _tolerating(self, call: Awaitable[None]) -> None:
        try:
            await call
        except StreamloadError as error:
            # What the conversion failed of matters more.
            _log.warning("something is left of a conversion that failed: %s", error)

    async def _put_manifest(self, name: str, content: bytes) -> None:
        file = await self.create_beside(name, len(content))
        await file.write(memoryview(content))
        await file.finish()
        await file.publish()

    async def _forget(self) -> None:
        if self._older:
            await self.begin_anew()
        else:
            await self.look()
            await self._destination.remove(JOURNAL_NAME)

    async def look(self) -> Mapping[str, SourceObject]:
        """What is in the destination.

        Raises:
            SourceError: It cannot be said; or another conversion has been there: not every place can refuse it.
        """
        try:
            there, journal = await self._look()
            other = _told(journal) != self._journal
        except ObjectChangedError:  # between two requests; the checkpoint that is converted has not
            other = True
        if other:
            raise SourceError(
                "another conversion into the same place has begun or ended since this one did: this one is given up",
                object=JOURNAL_NAME,
            )
        return there

    async def _put_journal(self, journal: Journal) -> None:
        await self.look()
        content = journal.encode()
        file = await self._destination.create(JOURNAL_NAME, len(content))
        try:
            await file.write(memoryview(content))
            await file.finish()
            await file.publish()
        except BaseException:
            if file.published or file.doubtful:
                # It is true, and the one before is gone, perhaps: what either tells of has to stay.
                self._noted |= frozenset(journal.files)
                self._journal = _told(content)
                await file.leave()
            else:
                await file.discard()
            raise
        self._noted, self._journal = frozenset(journal.files), _told(content)

    def _names_of(self, group: int) -> Iterator[tuple[int, str]]:
        for rank, names in enumerate(self._names):
            part = self._conversion.part(rank, group)
            if part is not None:
                yield rank, names.name(part)

    def _said_of(self, rank: int) -> Iterator[ManifestFile]:
        """What a rank's manifest says."""
        for group in range(len(self._conversion.groups)):
            part = self._conversion.part(rank, group)
            if part is None:
                continue
            name = self._names[rank].name(part)
            file = self._files[name]
            at, number = file.header_bytes, 0
            said = []
            for tensor, nbytes in self._conversion.held(rank, group):
                end = at + nbytes
                blocks = -(-(end - at) // BLOCK_BYTES)
                values = file.sums.values[number : number + blocks]
                said.append(ManifestTensor(tensor, at, end, b"".join(value.to_bytes(8, "big") for value in values)))
                at, number = end, number + blocks
            yield ManifestFile(
                name, file.file.size_bytes, file.header_bytes, file.header_checksum, BLOCK_BYTES, tuple(said)
            )


def views_of(part: TensorInfo, view: memoryview, span: Span) -> Iterable[memoryview]:
    """A rank's bytes of a tensor in a read, piece by piece."""
    if len(part.stripes) != 1:
        return [view[at - span.start : at - span.start + nbytes] for at, _, nbytes in part.runs(span.start, span.end)]
    # By far the most frequent case of many pieces, and one that needs no look at each of them: whole rows, but for
    # those at the ends.
    stripe = part.stripes[0]
    nbytes, step = stripe.nbytes, stripe.file_step
    row = max(0, -(-(span.start - stripe.file_start) // step))
    stop = min(stripe.count, (span.end - nbytes - stripe.file_start) // step + 1)
    if row >= stop:
        return [view[at - span.start : at - span.start + size] for at, _, size in part.runs(span.start, span.end)]
    first, last = stripe.file_start + row * step, stripe.file_start + stop * step
    ends = [*part.runs(span.start, first), *part.runs(last - step + nbytes, span.end)]
    views = [view[at : at + nbytes] for at in range(first - span.start, last - span.start, step)]
    around = [(at, view[at - span.start : at - span.start + size]) for at, _, size in ends]
    return [*(each for at, each in around if at < first), *views, *(each for at, each in around if at >= first)]


def _told(journal: bytes | bytearray | None) -> bytes | None:
    """Tells a journal from any other one, in little memory: one of many tensors has some megabytes."""
    return None if journal is None else hashlib.sha256(memoryview(journal)[:MAX_MANIFEST_BYTES]).digest()


def _values(sums: str) -> Iterator[int]:
    """Checksums out of the text that the journal has of them."""
    raw = bytes.fromhex(sums)
    return (int.from_bytes(raw[at : at + 8], "big") for at in range(0, len(raw), 8))


def _blocks(sizes: Sequence[int]) -> Iterator[int]:
    """The lengths of some tensors' blocks."""
    for size in sizes:
        for start in range(0, size, BLOCK_BYTES):
            yield min(BLOCK_BYTES, size - start)
