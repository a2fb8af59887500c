"""All ranks' files of a conversion, written as the source is read."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from streamload.checkpoint import (
    BLOCK_BYTES,
    ManifestFile,
    ManifestTensor,
    RankFiles,
    TensorInfo,
    encode_header,
    encode_manifest,
)
from streamload.checksums import BlockSums, RunningChecksum
from streamload.errors import StreamloadError
from streamload.plan import Conversion, Span
from streamload.save.base import Destination, NewFile
from streamload.save.journal import JOURNAL_NAME, Journal, KeptFile, Made
from streamload.save.sharded import METADATA
from streamload.sources.threads import DaemonExecutor, ThreadCall

__all__ = ["ConversionWriter", "Pieces", "put", "views_of"]

Pieces: TypeAlias = Mapping[int, memoryview]
"""What a read has brought, by rank: the next bytes of that rank's file."""

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


class ConversionWriter:
    """Writes the files of a conversion, and a journal beside them.

    Files are complete under temporary names, or as uploads that are not completed yet, until `publish`. What the
    journal tells of stays there when the process ends, however it ends. One task at a time; use `aclose` at the end.

    Args:
        destination: Where to, claimed already.
        conversion: What goes where.
        names: What each rank's files are called.
        made: For the journal.
        older: Files of an earlier conversion that are there, and will be replaced or removed.
    """

    def __init__(
        self,
        destination: Destination,
        conversion: Conversion,
        names: Sequence[RankFiles],
        made: Made,
        older: Sequence[str] = (),
    ) -> None:
        self._destination = destination
        self._conversion = conversion
        self._names = names
        self._made = made
        self._older = list(older)
        self._group = 0
        self._files: dict[str, _RankFile] = {}  # all of them, those that were finished before included
        self._open: dict[int, _RankFile] = {}  # those of the group that is being read, by rank
        self._noted: frozenset[str] = frozenset()
        self._threads = DaemonExecutor(1, name="streamload-scatter")

    @property
    def files(self) -> dict[str, int]:
        """How long each file is, by its name."""
        return {name: file.file.size_bytes for name, file in self._files.items()}

    async def reopen(self, journal: Journal) -> bool:
        """Have the files as the journal says; whether all of them are there."""
        self._group, self._noted = journal.group, frozenset(journal.files)
        for name, said in journal.files.items():
            file = await self._destination.reopen(name, said.size_bytes, said.kept)
            if file is None:
                return False
            self._files[name] = _RankFile(
                file, said.header_bytes, said.header_checksum, BlockSums((), _values(said.sums))
            )
            self._files[name].position = file.size_bytes
        if journal.group < len(self._conversion.groups):
            rest = range(journal.tensor, self._conversion.groups[journal.group].stop)
            for rank, name in self._names_of(journal.group):
                if name in self._files:
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
        for rank, name in self._names_of(group):
            header = encode_header(self._conversion.entries(rank, group), metadata=METADATA)
            sizes = list(self._conversion.sizes(rank, self._conversion.groups[group]))
            file = await self._destination.create(name, len(header) + sum(sizes))
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
        found: dict[int, list[memoryview]] = {rank: [] for rank in self._open}
        for number in range(span.first, span.stop):
            for rank, part in enumerate(self._conversion.slices(number)):
                if part is not None:
                    found[rank] += views_of(part, view, span)
        pieces: dict[int, memoryview] = {}
        for rank, views in found.items():
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
        await self._put_journal(Journal(self._made, group, tensor, files, sums, self._older))
        self._noted = frozenset(files)
        return True

    async def publish(self, *, manifests: bool) -> list[str]:
        """Put all files under their names, and remove what an earlier conversion has left; the manifests' names."""
        of_ranks = [names.manifest for names in self._names]
        for name in of_ranks:
            # It may tell of what is about to be replaced.
            await self._destination.remove(name)
        # Old files and new ones are never there together, and the part without which a rank has none comes last:
        # whoever looks in between, or after a kill, finds no checkpoint rather than a part of one.
        new = {name for name, file in self._files.items() if file.file.published}
        for name in self._older:
            if name not in new and name not in of_ranks:
                await self._destination.remove(name)
        for file in reversed(self._files.values()):
            await file.file.publish()
        if not manifests:
            return []
        for rank, name in enumerate(of_ranks):
            await put(self._destination, name, encode_manifest(list(self._said_of(rank))))
        return of_ranks

    async def done(self, versions: Mapping[str, tuple[int, str]]) -> None:
        """Write down that everything is there."""
        await self._put_journal(Journal(self._made, done=dict(versions)))

    async def give_up(self, *, keep: bool) -> None:
        """End a conversion that has failed.

        Args:
            keep: Whether what the journal tells of stays there. Where not, the journal goes too.
        """
        if not keep:
            await self._tolerating(self._destination.remove(JOURNAL_NAME))
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

    async def _put_journal(self, journal: Journal) -> None:
        await put(self._destination, JOURNAL_NAME, journal.encode())

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


async def put(destination: Destination, name: str, content: bytes) -> None:
    """Write a small file, there whole or not at all.

    Raises:
        SourceError: It cannot be written.
    """
    file = await destination.create(name, len(content))
    try:
        await file.write(memoryview(content))
        await file.finish()
        await file.publish()
    except BaseException:
        await file.discard()
        raise


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


def _values(sums: str) -> Iterator[int]:
    """Checksums out of the text that the journal has of them."""
    raw = bytes.fromhex(sums)
    return (int.from_bytes(raw[at : at + 8], "big") for at in range(0, len(raw), 8))


def _blocks(sizes: Sequence[int]) -> Iterator[int]:
    """The lengths of some tensors' blocks."""
    for size in sizes:
        for start in range(0, size, BLOCK_BYTES):
            yield min(BLOCK_BYTES, size - start)
