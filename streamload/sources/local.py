"""Files and folders of this machine, mounts included."""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import stat
import threading
from collections.abc import Awaitable, Sequence
from contextlib import suppress
from typing import ClassVar, TypeVar
from urllib.parse import unquote

import aiofiles.os

from streamload.errors import NotFoundError, OptionError, SourceError
from streamload.loan import Loan
from streamload.sources.base import Source, SourceObject
from streamload.sources.keys import check_key
from streamload.sources.operations import Operations
from streamload.sources.os_errors import translate_os_error
from streamload.sources.positional import SKIPPED_GAP_BYTES, OpenFile, ReadAhead, ReadJob, passes_over, version_of
from streamload.sources.threads import DaemonExecutor, ThreadCall

__all__ = ["LocalSource", "path_of"]

T = TypeVar("T")

_log = logging.getLogger("streamload.sources")

# Descriptors kept open: more than any published checkpoint has shard files, and a quarter of the usual limit of 1024.
_MAX_OPEN_FILES = 256

# Cached files are copied as fast as two cores can, and more threads than cores are in each other's way; where there are
# cores, four keep a disk's queue filled.
_THREADS = min(4, max(2, len(os.sched_getaffinity(0))))

# Whether a file is in the page cache is told by so many bytes of it.
_SAMPLES = 16

# How long the last thread may take from having nothing left to do to being gone: microseconds, if it is scheduled.
_THREAD_EXIT_S = 1.0


class LocalSource(Source):
    """A folder of files, or one file.

    Reads are `os.preadv` calls into the lent views, made by daemon threads. A file is opened by the first read, and
    every read ends by comparing the open file's modification time, size and inode with those first seen; a file that is
    replaced by renaming another one over it can be read to its end once it is open, since its content stays.

    A cancelled read ends once its thread has left the views, which takes as long as one call of at most 8 MiB; where
    that is longer than `grace_s`, the loan is quarantined and the thread left to itself.

    Args:
        uri: A path, or a ``file://`` URI with ``%`` escapes.
        concurrency: How many threads read; by default half as many as the class's `concurrency`.
        grace_s: How long a cancelled read, and `aclose`, wait for a thread that hangs, in seconds.

    Raises:
        OptionError: The URI names another machine.
    """

    scheme: ClassVar[str] = "file"
    # Asking takes about 100 µs (two thread switches and their bookkeeping), in which a disk of 1 GB/s brings 100 KB;
    # rounded down, because what is read through also takes room in the page cache.
    request_cost_bytes: ClassVar[int] = 64 << 10
    # One more call to the kernel takes about a microsecond, Python's part in it included, in which a thread reads 4 to
    # 8 KB into place. The lower bound, because what is not read spares the memory that all ranks of a node share; and
    # a page, because within one the disk brings the gap along.
    skipped_gap_bytes: ClassVar[int | None] = SKIPPED_GAP_BYTES
    # Long enough that these 100 µs are below a tenth of a read's time, even out of the page cache.
    read_bytes: ClassVar[int] = 8 << 20
    # Two reads for each thread: while one is under way the next waits in line, so that no thread ever waits for the
    # event loop to find it something to do.
    concurrency: ClassVar[int] = 2 * _THREADS

    # The kernel copies out of the page cache, where a byte's address within its cache line is its offset's: a copy
    # between lines cut in different places takes a quarter longer (measured, with `rep movsb` on an AMD EPYC).
    congruence_bytes: ClassVar[int] = 64

    def __init__(self, uri: str, *, concurrency: int | None = None, grace_s: float = 5.0) -> None:
        super().__init__(uri)
        self._path = path_of(uri)
        self._grace_s = grace_s
        self._threads = DaemonExecutor(_THREADS if concurrency is None else concurrency)
        self._operations = Operations()
        self._ahead = ReadAhead()
        self._turn = threading.Lock()  # on reader threads only; see ReadJob
        self._files: dict[tuple[str, str], OpenFile] = {}
        self._root: str | None = None
        self._hanging = 0

    async def list(self) -> list[SourceObject]:
        async with self._operations.running():
            status = await self._ask(_stat(self._path, executor=self._threads))
            root = self._root_of(status)
            if root != self._path:
                return [_object(os.path.basename(self._path), status)]
            objects = await self._ask(_scan(root, executor=self._threads))
        if not objects:
            raise NotFoundError("there are no files in this folder", uri=self.uri)
        return objects

    async def stat(self, key: str) -> SourceObject:
        check_key(key, uri=self.uri)
        async with self._operations.running():
            path = os.path.join(await self._find_root(), key)
            status = await self._ask(_stat(path, executor=self._threads), key)
        if not stat.S_ISREG(status.st_mode):
            raise NotFoundError("this is not a regular file", uri=self.uri, object=key)
        return _object(key, status)

    async def read(self, object: SourceObject, start: int, end: int, loan: Loan) -> None:
        if start == end:
            return
        if not 0 <= start < end <= object.size_bytes:
            raise SourceError(
                f"the file has {object.size_bytes} bytes", uri=self.uri, object=object.key, start=start, end=end
            )
        async with self._operations.running():
            root = self._root if self._root is not None else await self._find_root()
            file = self._open(root, object)
            rows = loan.rows if loan.rows is not None and passes_over(loan.rows) else None
            gaps = None if rows is not None else loan.gaps
            self._ahead.ask(file, start, end - start, gaps=rows is not None or gaps is not None)
            job = ReadJob(
                file,
                loan.views if rows is None else (),
                start,
                gaps=gaps,
                rows=rows,
                turn=self._turn,
                # Summed up on the thread that reads, while the processor has the bytes at hand.
                checksum=loan.checksum,
                ahead=self._ahead,
            )
            try:
                error = await self._run(job, loan)
            finally:
                self.requests += job.calls
        if isinstance(error, SourceError):
            raise error.locate(uri=self.uri, object=object.key, start=start, end=end)
        if error is not None:
            raise translate_os_error(
                error, uri=self.uri, object=object.key, start=start, end=end, valid_bytes=job.filled
            ) from error

    async def path_of(self, key: str) -> str:
        """An object's path, for those who read the file themselves."""
        async with self._operations.running():
            return os.path.join(await self._find_root(), key)

    async def find_cached(self, objects: Sequence[SourceObject]) -> frozenset[str]:
        """The keys of those files that are in the page cache, or nearly so, by a few bytes of each."""
        async with self._operations.running():
            root = await self._find_root()
            paths = {object.key: (os.path.join(root, object.key), object.size_bytes) for object in objects}
            return await _find_cached(paths, executor=self._threads)

    async def aclose(self) -> None:
        try:
            await self._operations.close()
        finally:
            for file in self._files.values():
                file.close()
            self._files.clear()
            self._threads.shutdown(wait=False, cancel_futures=True)
        # A read that hangs has had its grace.
        ended = asyncio.wrap_future(self._threads.ended)
        await asyncio.wait({ended}, timeout=0 if self._hanging else self._grace_s)
        if self._threads.ended.done():
            self._threads.join(_THREAD_EXIT_S)
        else:
            _log.warning("%s: a call to the kernel does not return; its thread is left behind", self.uri)
            ended.cancel()

    def _root_of(self, status: os.stat_result) -> str:
        """The folder that keys are relative to: the path itself, or the folder of the file that it names."""
        if stat.S_ISDIR(status.st_mode):
            self._root = self._path
        elif stat.S_ISREG(status.st_mode):
            self._root = os.path.dirname(self._path)
        else:
            raise SourceError("this is neither a folder nor a regular file", uri=self.uri)
        return self._root

    async def _find_root(self) -> str:
        if self._root is not None:
            return self._root
        return self._root_of(await self._ask(_stat(self._path, executor=self._threads)))

    async def _ask(self, answer: Awaitable[T], key: str | None = None) -> T:
        """Wait for a call's answer; the system's error becomes ours."""
        try:
            return await answer
        except SourceError as error:
            raise error.locate(uri=self.uri, object=key) from None
        except OSError as error:
            if key is None and error.filename not in {None, self._path}:
                key = os.path.basename(os.fsdecode(error.filename))
            raise translate_os_error(error, uri=self.uri, object=key) from error
        except ValueError as error:  # a path with a null byte
            raise NotFoundError(str(error), uri=self.uri, object=key) from error

    def _open(self, root: str, object: SourceObject) -> OpenFile:
        """The file that reads of this version of the object share; nothing is opened yet."""
        key = (object.key, object.version)
        file = self._files.pop(key, None)
        if file is None:
            check_key(object.key, uri=self.uri)
            file = OpenFile(os.path.join(root, object.key), object.version)
            if len(self._files) >= _MAX_OPEN_FILES:
                self._files.pop(next(iter(self._files))).close()
        self._files[key] = file  # the last used comes last
        return file

    async def _run(self, job: ReadJob, loan: Loan) -> OSError | None:
        """Run a job on a thread. Returns or raises only once the thread has left the loan, or quarantines it."""
        call = ThreadCall(self._threads, job.run)
        try:
            return await call.result()
        except asyncio.CancelledError:
            job.stop = True
            if not call.take_back() and not await call.left(self._grace_s):
                self._hanging += 1
                loan.quarantine()
            raise


def _list_folder(path: str) -> list[SourceObject]:
    """The regular files in a folder, links followed, in order of their names."""
    objects: list[SourceObject] = []
    for name in sorted(os.listdir(path)):
        file = os.path.join(path, name)
        try:
            status = os.stat(file)
        except OSError as error:
            # Gone since it was listed, or a broken link. To leave out a shard file or an index would turn a checkpoint
            # into a smaller one; what else lies in the folder is none of our business.
            if not name.endswith((".safetensors", ".safetensors.index.json")):
                continue
            if isinstance(error, FileNotFoundError) and not os.path.islink(file):
                continue
            raise NotFoundError(f"this is a link to a file that is not there ({error.strerror})", object=name) from None
        if stat.S_ISREG(status.st_mode):
            objects.append(_object(name, status))
        elif name.endswith(".safetensors.index.json") or (
            name.endswith(".safetensors") and not stat.S_ISDIR(status.st_mode)
        ):
            # A folder may be called as it likes; what looks like a file and is none is somebody's mistake.
            raise SourceError("this is not a regular file", object=name)
    return objects


def _in_page_cache(files: dict[str, tuple[str, int]]) -> frozenset[str]:
    return frozenset(key for key, (path, nbytes) in files.items() if _is_in_page_cache(path, nbytes))


def _is_in_page_cache(path: str, nbytes: int) -> bool:
    found = 0
    with suppress(OSError):  # what a byte is asked for that is not there; what else is wrong, a read will tell
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            for part in range(_SAMPLES):
                found += os.preadv(fd, (bytearray(1),), nbytes * (2 * part + 1) // (2 * _SAMPLES), os.RWF_NOWAIT)
        finally:
            os.close(fd)
    return found == _SAMPLES


_stat = aiofiles.os.stat
_scan = aiofiles.os.wrap(_list_folder)
_find_cached = aiofiles.os.wrap(_in_page_cache)


def _object(key: str, status: os.stat_result) -> SourceObject:
    return SourceObject(key, status.st_size, version_of(status))


def path_of(uri: str) -> str:
    """The path that a URI, or a plain path, means."""
    scheme, separator, rest = uri.partition("://")
    if not separator or scheme.lower() != "file":
        path = uri
    else:
        host, slash, path = rest.partition("/")
        if host not in {"", "localhost"}:
            raise OptionError("a file:// URI cannot name another machine: write file:///path", uri=uri)
        path = unquote(slash + path, errors="surrogateescape")
    if not path:
        raise OptionError(f"a path is missing ({os.strerror(errno.ENOENT)})", uri=uri)
    # A trailing slash says nothing that the file's own kind does not.
    return path.rstrip("/") or "/"
