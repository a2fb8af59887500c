"""An ordinary checkpoint, converted into one whose files are one rank's each."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Unpack, cast

from streamload.checkpoint import (
    MAX_MANIFEST_BYTES,
    RankFiles,
    is_manifest,
    select,
)
from streamload.errors import (
    CheckpointError,
    ChecksumError,
    NotFoundError,
    ObjectChangedError,
    OptionError,
)
from streamload.loan import Loan
from streamload.options import Options
from streamload.pipeline.discover import Discovered, ask_checksums, discover, read_config
from streamload.pipeline.fetch import Fetcher
from streamload.pipeline.source_sums import SourceSums
from streamload.plan import Conversion, Placements, Span
from streamload.planning import effective_reads
from streamload.report import Recorder
from streamload.save import Destination
from streamload.save.conversion import ConversionWriter, Pieces
from streamload.save.journal import JOURNAL_NAME, Journal, Made
from streamload.saving import destination_for
from streamload.sources import SourceObject, open_source
from streamload.uris import scheme_of, scrub_uri
from streamload.whole import WholeRead

__all__ = ["ShardedCheckpoint", "shard"]

_MAX_FILE_BYTES = 5 << 30
"""As `save_sharded`."""

# How much is read between two entries of the journal: what a killed conversion has to do again, at most. Each of them
# waits for the disk.
_NOTED_BYTES = 1 << 30

# What is read, cut and written in one go: small enough that the processor's cache has it all the while, large enough
# that waking the threads for it costs little (of 1 to 8 MiB, 2 and 4 took the least time).
_READ_BYTES = 4 << 20

# What an option that cannot be given here is called instead.
_NOT_HERE = {"rank": "tp", "world_size": "tp", "pp_size": "pp"}

# Weights in other formats: they are what is converted, or the same once more.
_WEIGHTS = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx", ".npz"),
    *(".index.json", ".ot", ".tflite"),
)


@dataclass(frozen=True, slots=True)
class ShardedCheckpoint:
    """What a conversion has made.

    Attributes:
        uri: The checkpoint that was converted.
        destination: Where its ranks' files are.
        ranks: How many ranks there are.
        files: The ranks' files.
        manifests: Their manifests.
        copied: The other files.
        tensors: How many tensors the checkpoint has.
        nbytes: Their bytes in the source.
        written_bytes: The ranks' files' bytes.
        resumed_bytes: How many bytes of the source had been read before by a conversion that was interrupted; all of
            them where there was nothing left to do.
        seconds: How long it took.
        verified: Bytes of the source whose content was checked now, by what checked it.
        unverified: Bytes whose content nothing vouches for, by the reason.
    """

    uri: str
    destination: str
    ranks: int
    files: tuple[str, ...]
    manifests: tuple[str, ...]
    copied: tuple[str, ...]
    tensors: int
    nbytes: int
    written_bytes: int
    resumed_bytes: int
    seconds: float
    verified: dict[str, int] = field(default_factory=dict)
    unverified: dict[str, int] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)


def shard(
    src: str | os.PathLike[str],
    dest: str | os.PathLike[str],
    *,
    tp: int,
    pp: int = 1,
    max_file_bytes: int | None = _MAX_FILE_BYTES,
    **options: Unpack[Options],
) -> ShardedCheckpoint:
    """Convert an ordinary checkpoint into one whose files are one rank's each, as vLLM's ``sharded_state`` names them.

    What each rank gets is what `streamload.load` with that rank gives: slices by the model's config, or by
    ``placements``. The source is read once, verified as a load is, and written as it comes; tensors without elements
    are left out. Beside the files lie their manifests, and copies of what is no weight: config, tokenizer.

    Nothing is under its name before everything is complete. A conversion that was interrupted, or killed, goes on where
    it was when it is called again with the same arguments; one that is done is left as it is. Where the source has
    changed since, it begins anew. Needs no torch.

    Args:
        src: As for `streamload.open`.
        dest: A directory, which is made where it is missing, or ``s3://bucket/prefix``.
        tp: How many ranks share each layer.
        pp: How many pipeline stages there are; the ranks of one stage follow one another.
        max_file_bytes: How many bytes of tensors a file may hold; a larger one has a file of its own. None: no limit.
        **options: The fields of `LoadOptions`: ``memory_bytes``, ``placements``, ``expert_parallel``, ``uneven``,
            ``pattern``, ``include``, ``exclude``, ``verify``; those that say where tensors go have no effect.

    Raises:
        OptionError: Bad options, ``verify="sha256"`` among them; too little memory for the objects of an object store;
            a tensor cannot be shared out; or the destination is, or lies in, the source.
        CheckpointError: There is no valid checkpoint, or something else in the destination.
        ChecksumError: The source is not what its manifest or its store says; nothing of it is in the destination.
        SourceError: It cannot be read, or not be written; or another conversion has written there meanwhile.
    """
    _check_count("tp", tp)
    _check_count("pp", pp)
    if max_file_bytes is not None:
        _check_count("max_file_bytes", max_file_bytes)
    for name in options:
        if name in _NOT_HERE:
            raise OptionError(f"there is no option {name!r} here: give {_NOT_HERE[name]}")
    source, destination = os.fspath(src), os.fspath(dest)
    given = cast("Options", {**options, "rank": 0, "world_size": tp * pp, "pp_size": pp})
    task = WholeRead(source, given)
    if task.options.verify == "sha256":
        raise OptionError(
            "verify='sha256' is not possible here: it sums up a file from its first byte to its last, and tensors are "
            "read in another order; 'auto' and 'require' go by a manifest or the store's other checksums"
        )
    _check_apart(source, destination)
    assert task.options.memory_bytes is not None
    # Half of it for reads, half for what is written.
    writer = destination_for(destination, task.options.memory_bytes // 2, files=tp * pp)
    needed = 2 * (tp * pp + 1) * writer.held_bytes
    if needed > task.options.memory_bytes:
        raise OptionError(
            f"memory_bytes={task.options.memory_bytes} is too little to write {tp * pp} objects at the same time, each "
            f"of which needs a part of {writer.held_bytes} bytes: it takes {needed}"
        )
    return task.run(_Sharding(task, destination, writer, tp, pp, max_file_bytes).run)


class _Sharding:
    """One conversion."""

    def __init__(
        self, task: WholeRead, uri: str, destination: Destination, tp: int, pp: int, max_file_bytes: int | None
    ) -> None:
        self._task = task
        self._options = task.options
        self._fetcher: Fetcher = task.fetcher
        self._recorder: Recorder = task.recorder
        self._uri = uri
        self._destination = destination
        self._max_file_bytes = max_file_bytes
        pattern = task.options.pattern
        self._names = [RankFiles(rank, tp * pp, pp, pattern) for rank in range(tp * pp)]
        self._ranks = (tp, pp, self._names[0].effective_pattern)
        assert task.options.memory_bytes is not None
        read_bytes, _, most = effective_reads(task.source, task.options)
        memory = task.options.memory_bytes // 2
        self._read_bytes = min(read_bytes, memory, task.options.read_bytes or _READ_BYTES)
        self._reads = max(1, min(most, memory // self._read_bytes))

    async def run(self) -> ShardedCheckpoint:
        """All of it."""
        options = self._options
        verify = options.verify != "off"
        listed = {object.key: object for object in await self._fetcher.ask(self._task.source.list)}
        found = await discover(
            self._fetcher, self._recorder, self._task.concurrency, keep_headers=verify, checksums=False
        )
        conversion = await self._plan(found)
        for rank, of_rank in enumerate(self._names):
            for group in range(len(conversion.groups)):
                of_rank.name(conversion.part(rank, group) or 0)  # a pattern without parts cannot name a second file
        for numbers in conversion.groups:
            # But for the headers: better now than in the middle.
            self._destination.check_fits([sum(conversion.sizes(rank, numbers)) for rank in range(len(self._names))])
        sums = await self._watch(found, conversion)
        copied = [object for key, object in listed.items() if _is_copied(key)]
        source = {object.key: object for object in (*found.objects.values(), *copied)}
        source |= {key: object for key, object in listed.items() if is_manifest(key)}
        made = Made(
            self._ranks,
            f"{conversion.digest} {sums.digest}",
            {key: _version_of(object) for key, object in sorted(source.items())},
        )
        self._recorder.planned(len(conversion.catalog.files), conversion.tensors, conversion.nbytes)
        async with self._destination, open_source(self._uri) as self._place:
            await self._destination.claim(f"{JOURNAL_NAME}.lock")
            there, content = await self._look()
            journal = None if content is None else self._parse(content)
            self._check_foreign(there, journal)
            if journal is not None and journal.made == made and journal.done and _is_done(journal, there):
                return self._result(conversion, journal.done, conversion.nbytes, [object.key for object in copied])
            writer, begun = await self._resume(
                conversion, made, there, (content, journal), {object.key for object in copied}
            )
            try:
                if begun is None:
                    await writer.begin_anew()
                    begun = Journal(made)
                resumed = conversion.nbytes_before(begun.tensor)
                if begun.files:
                    sums.restore(begun.sums)
                self._recorder.arrived_bytes = resumed
                await self._convert(conversion, writer, sums, found.objects, begun)
                sums.check_complete()
                for object in copied:
                    await self._copy(writer, object)
                manifests = await writer.publish(manifests=True)
                made_files = [*writer.files, *manifests, *(object.key for object in copied)]
                now = await writer.look()
                versions = {key: _version_of(now[key]) for key in made_files}
                await writer.done(versions)
            except BaseException as error:
                # A bad source must not be gone on with. Anything else may be better the next time.
                bad = _holds(error, (ChecksumError, ObjectChangedError))
                await writer.give_up(keep=not bad)
                raise
            finally:
                await writer.aclose()
        return self._result(conversion, versions, resumed, [object.key for object in copied])

    async def _plan(self, found: Discovered) -> Conversion:
        options = self._options
        placements = options.placements
        if not isinstance(placements, Placements):
            placements = Placements.from_config(await read_config(self._fetcher, self._recorder))
        names = [tensor.name for file in found.catalog.files for tensor in file.tensors]
        slicers = [placements.slicer(names, ranks, uneven=options.uneven) for ranks in options.ranks_of_all()]
        catalog = select(found.catalog, options.include, options.exclude)
        return Conversion(catalog, slicers, max_file_bytes=self._max_file_bytes)

    async def _watch(self, found: Discovered, conversion: Conversion) -> SourceSums:
        """What the source's files have to sum up to."""
        verify = self._options.verify
        sums = SourceSums(self._recorder, off=verify == "off", required=verify == "require")
        checksums = (
            {}
            if verify == "off"
            else await ask_checksums(self._fetcher, found.objects.values(), self._task.concurrency)
        )
        for number, file in enumerate(conversion.catalog.files):
            header = found.headers.pop(file.key, b"")
            sums.watch(
                file, conversion.covered(number), header, checksums.get(file.key, ""), found.manifests.get(file.key)
            )
        return sums

    async def _look(self) -> tuple[dict[str, SourceObject], bytearray | None]:
        """What is in the destination, and in its journal."""
        fetcher = Fetcher(self._place, self._recorder)
        try:
            there = {object.key: object for object in await fetcher.ask(self._place.list)}
        except NotFoundError:
            return {}, None
        object = there.get(JOURNAL_NAME)
        if object is None:
            return there, None
        content = bytearray(min(object.size_bytes, MAX_MANIFEST_BYTES))
        await fetcher.read(object, 0, len(content), Loan([memoryview(content)]))
        return there, content

    def _parse(self, content: bytearray) -> Journal:
        try:
            return Journal.parse(content)
        except CheckpointError as error:
            raise error.locate(uri=scrub_uri(self._uri)) from error.__cause__

    def _check_foreign(self, there: Mapping[str, SourceObject], journal: Journal | None) -> None:
        """Refuse a destination in which something else lies."""
        where = scrub_uri(self._uri)
        begun = journal is not None and (journal.files or journal.done or journal.older)
        if journal is not None and begun and journal.made.ranks != self._ranks:
            tp, pp, pattern = journal.made.ranks
            raise CheckpointError(
                f"there is a conversion for tp={tp} and pp={pp} ({pattern}), and what is asked for is "
                f"tp={self._ranks[0]} and pp={self._ranks[1]} ({self._ranks[2]}): remove it, or choose another place",
                uri=where,
                object=JOURNAL_NAME,
            )
        ours = set() if journal is None else {*journal.files, *journal.done, *journal.older}
        foreign = sorted(key for key in there if _is_weights(key) and key not in ours)
        if foreign:
            raise CheckpointError(
                f"there are files of another checkpoint ({len(foreign)}): remove them, or choose another place",
                uri=where,
                object=foreign[0],
            )

    async def _resume(
        self,
        conversion: Conversion,
        made: Made,
        there: Mapping[str, SourceObject],
        found: tuple[bytearray | None, Journal | None],
        copied: Collection[str],
    ) -> tuple[ConversionWriter, Journal | None]:
        """What writes, and how far it is; None where it begins anew."""
        content, journal = found

        def writer_over(older: Iterable[str]) -> ConversionWriter:
            versions = {name: _version_of(there[name]) for name in older if name in there}
            return ConversionWriter(
                self._destination, conversion, self._names, made, look=self._look, journal=content, older=versions
            )

        copies = {*copied, *(key for key in (journal.made.source if journal else ()) if _is_copied(key))}
        mine = partial(_is_mine, names=self._names, copies=copies)
        if journal is not None and journal.made == made and not journal.done:
            writer = writer_over(journal.older)
            await self._destination.prepare(mine, {name: file.kept for name, file in journal.files.items()})
            try:
                if await writer.reopen(journal):
                    return writer, journal
            except BaseException:
                await writer.give_up(keep=True)
                await writer.aclose()
                raise
            # What there is of them is cleared up below, or replaced at the end.
            await writer.give_up(keep=True)
            await writer.aclose()
        await self._destination.prepare(mine)
        return writer_over(_older(journal, there, copied)), None

    async def _convert(
        self,
        conversion: Conversion,
        writer: ConversionWriter,
        sums: SourceSums,
        objects: Mapping[str, SourceObject],
        begun: Journal,
    ) -> None:
        keys = [file.key for file in conversion.catalog.files]
        noted = 0

        async def fetch(span: Span, memory: memoryview) -> Loan:
            key = keys[span.file]
            loan = Loan([memory[: span.end - span.start]])
            loan.checksum = sums.running(key, span.start)
            self._recorder.start("read")
            try:
                await self._fetcher.read(objects[key], span.start, span.end, loan, "worker")
            finally:
                self._recorder.stop("read")
            self._recorder.fetched_bytes += loan.nbytes
            return loan

        async def write(span: Span, loan: Loan, pieces: Pieces) -> None:
            nonlocal noted
            # Before anything of it is written; in order, as what is noted has to be.
            sums.add(keys[span.file], span.start, loan)
            await writer.write(pieces)
            self._recorder.arrived_bytes += loan.nbytes
            self._recorder.tensors = span.stop if span.whole else span.first
            noted += loan.nbytes
            if span.whole and noted >= _NOTED_BYTES and await writer.note(span.stop, sums.state(), group=group):
                noted = 0

        for group in range(begun.group, len(conversion.groups)):
            numbers = conversion.groups[group]
            await writer.begin(group)
            rest = range(max(begun.tensor, numbers.start), numbers.stop)
            spans = conversion.spans(rest, self._read_bytes)
            await _in_order(spans, self._reads, self._read_bytes, fetch, writer.cut, write)
            await writer.note(numbers.stop, sums.state(), group=group + 1)
            noted = 0

    async def _copy(self, writer: ConversionWriter, object: SourceObject) -> None:
        """Copy a file that is no weight; it gets its name together with the weights."""
        file = await writer.create_beside(object.key, object.size_bytes)
        memory = memoryview(bytearray(min(self._read_bytes, object.size_bytes)))
        for start in range(0, object.size_bytes, self._read_bytes):
            end = min(start + self._read_bytes, object.size_bytes)
            await self._fetcher.read(object, start, end, Loan([memory[: end - start]]))
            await file.write(memory[: end - start])
        await file.finish()
        await file.leave()  # there may be many of them

    def _result(
        self, conversion: Conversion, there: Mapping[str, tuple[int, str]], resumed: int, copied: list[str]
    ) -> ShardedCheckpoint:
        self._recorder.finish("done")
        report = self._recorder.report()
        files = tuple(name for name in there if _is_weights(name))
        return ShardedCheckpoint(
            uri=self._recorder.uri,
            destination=scrub_uri(self._uri),
            ranks=len(self._names),
            files=files,
            manifests=tuple(names.manifest for names in self._names),
            copied=tuple(copied),
            tensors=conversion.tensors,
            nbytes=conversion.nbytes,
            written_bytes=sum(there[name][0] for name in files),
            resumed_bytes=resumed,
            seconds=report.seconds,
            verified=report.verified,
            unverified=report.unverified,
        )


async def _in_order(
    spans: Iterator[Span],
    reads: int,
    read_bytes: int,
    fetch: Callable[[Span, memoryview], Coroutine[Any, Any, Loan]],
    cut: Callable[[Span, memoryview], Awaitable[Pieces]],
    write: Callable[[Span, Loan, Pieces], Awaitable[None]],
) -> None:
    """Make reads, several at once, and have them cut and written one after the other, in order.

    Args:
        spans: What to read.
        reads: How many are under way or not written yet, each with memory of its own.
        read_bytes: The longest one.
        fetch: Reads into memory.
        cut: Says what is to be written of it; the next one is cut while it is written.
        write: Writes it; the memory is used again afterwards.
    """
    free: list[memoryview] = []
    slots = asyncio.Semaphore(reads)
    asked: asyncio.Queue[tuple[Span, memoryview, asyncio.Task[Loan]] | None] = asyncio.Queue()
    # What is cut may be a copy, and so has memory of its own: of one read that waits, and one on each side of it.
    ready: asyncio.Queue[tuple[Span, memoryview, Loan, Pieces] | None] = asyncio.Queue(1)

    async def ask(group: asyncio.TaskGroup) -> None:
        for span in spans:
            await slots.acquire()
            # Made when they are needed: a small checkpoint needs few.
            memory = free.pop() if free else memoryview(bytearray(read_bytes))
            asked.put_nowait((span, memory, group.create_task(fetch(span, memory))))
        asked.put_nowait(None)

    async def cut_all() -> None:
        while (item := await asked.get()) is not None:
            span, memory, task = item
            loan = await task
            await ready.put((span, memory, loan, await cut(span, loan.views[0])))
        await ready.put(None)

    async with asyncio.TaskGroup() as group:
        group.create_task(ask(group))
        group.create_task(cut_all())
        while (item := await ready.get()) is not None:
            span, memory, loan, pieces = item
            await write(span, loan, pieces)
            free.append(memory)
            slots.release()


def _holds(error: BaseException, kinds: tuple[type[BaseException], ...]) -> bool:
    if isinstance(error, BaseExceptionGroup):
        return any(_holds(each, kinds) for each in error.exceptions)
    return isinstance(error, kinds)


def _is_weights(key: str) -> bool:
    return key.endswith((".safetensors", ".safetensors.index.json"))


def _is_copied(key: str) -> bool:
    """Whether a file of the source is copied: what is no weight, nor tells of any, nor is hidden."""
    return not key.endswith(_WEIGHTS) and not key.startswith(".") and not is_manifest(key)


def _is_mine(name: str, names: list[RankFiles], copies: Collection[str]) -> bool:
    return name == JOURNAL_NAME or name in copies or any(name == each.manifest or each.is_mine(name) for each in names)


def _older(journal: Journal | None, there: Mapping[str, SourceObject], copied: Collection[str]) -> list[str]:
    """What an earlier conversion has left, in the order in which it goes: nothing is a checkpoint without weights."""
    if journal is None:
        return []
    names = there.keys() & {*journal.older, *journal.files, *journal.done}
    # A copy that somebody has changed is not the conversion's any more; and those that come again are replaced.
    changed = {name for name in names & journal.done.keys() if _version_of(there[name]) != journal.done[name]}
    ours = (name for name in names if _is_weights(name) or is_manifest(name) or name not in {*changed, *copied})
    return sorted(ours, key=lambda name: (not _is_weights(name), name))


def _version_of(object: SourceObject) -> tuple[int, str]:
    return object.size_bytes, object.version


def _is_done(journal: Journal, there: Mapping[str, SourceObject]) -> bool:
    return all(name in there and _version_of(there[name]) == version for name, version in journal.done.items())


def _check_count(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise OptionError(f"{name}={value!r} is not a whole number of at least 1")


def _check_apart(source: str, destination: str) -> None:
    """Refuse a destination that is the source, or lies in it."""
    before, after = _folder(source), _folder(destination)
    if before is not None and after is not None and f"{after}/".startswith(f"{before}/"):
        same = "is" if before == after else "lies in"
        raise OptionError(f"the destination {scrub_uri(destination)} {same} the source: choose another place")


def _folder(uri: str) -> str | None:
    """What names a folder on a disk, or a prefix in a bucket, in one way only; None for anything else."""
    scheme = scheme_of(uri)
    # Only here: what the sources import takes longer than the rest of the package.
    if scheme == "file":
        from streamload.sources.local import path_of

        path = os.path.realpath(path_of(uri))
        return os.path.dirname(path) if os.path.isfile(path) else path
    if scheme == "s3":
        from streamload.sources.s3 import place_of

        place = place_of(uri)
        return f"s3://{place.bucket}/{place.prefix}".rstrip("/")
    return None
