"""Files of a repository, put into the Hub's cache while they are read.

The layout is huggingface_hub's, which engines look into::

    models--org--model/
        blobs/<etag>                   each content once
        snapshots/<commit>/<path>      links to blobs
        refs/<revision>                the commit that it was

A blob is written under a name that nobody looks for and renamed when it is whole, compared with what the Hub says its
content is, and on disk. Links and the revision come last, when nothing is missing.
"""

from __future__ import annotations

import hashlib
import os
import threading
import uuid
from bisect import insort
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from functools import partial

from streamload.errors import ChecksumError, ClosedError, SourceError
from streamload.sources.hub_repository import HubFile, Snapshot, is_file_name

__all__ = ["CacheWriter"]

# Of a blob that is read back to be summed up: a call's cost does not show any more, and stopping is soon seen.
_PIECE_BYTES = 1 << 20

# The most views that one call takes.
_MOST_VIEWS = min(os.sysconf("SC_IOV_MAX"), 1024)


class CacheWriter:
    """Writes what was read of a snapshot's files; every method blocks, and may be called on several threads.

    Args:
        snapshot: The repository at one commit.
        weights: The paths of all files of weights that may belong to what is read.
    """

    def __init__(self, snapshot: Snapshot, weights: Collection[str]) -> None:
        self._weights = frozenset(weights)
        self._snapshot = snapshot
        self._lock = threading.Lock()
        self._partial: dict[str, _Blob] = {}
        self._whole: dict[str, HubFile] = {}
        self._stopped = False

    def use(self, file: HubFile) -> None:
        """Note that a file is part of what is read; one that is cached already is whole. Does not block."""
        # Without the lock, which is held while the disk is waited for: this is called on an event loop.
        if file.cached is not None:
            self._whole[file.path] = file

    def write(self, file: HubFile, start: int, views: Sequence[memoryview]) -> bool:
        """Write bytes of a file. Returns whether it has all of them now: then `finish` it.

        That is told once, and only when nobody else writes into the file any more: what is asked for twice may arrive
        twice, and nothing may change after it was compared.

        Raises:
            SourceError: The cache cannot be written.
        """
        try:
            with self._lock:
                if self._stopped or file.path in self._whole:
                    return False
                blob = self._partial.get(file.path)
                if blob is None:
                    blob = self._partial[file.path] = _Blob(self._folder("blobs"), file)
                if blob.handed_out:
                    return False
                blob.writers += 1
            end = start
            try:
                end = _write(blob.descriptor, start, views)
            finally:
                with self._lock:
                    blob.writers -= 1
                    blob.add(start, end)
                    # Nobody else can come to this point before another write has begun, and none begins any more.
                    last = blob.whole and not blob.writers
                    blob.handed_out = last
            return last
        except OSError as error:
            raise _cannot(error, self._snapshot.folder) from error

    def finish(self, file: HubFile) -> None:
        """Compare a file that has all its bytes with what the Hub says, and give it its name.

        Raises:
            ChecksumError: It is something else.
            SourceError: The cache cannot be written.
            ClosedError: It was stopped meanwhile.
        """
        with self._lock:
            blob = self._partial.get(file.path)
            if blob is None or self._stopped:
                raise ClosedError("the source was closed")
            blob.finishing = True
        try:
            self._check(blob)
            os.fdatasync(blob.descriptor)
            with self._lock:
                if self._stopped:
                    raise ClosedError("the source was closed")
                os.replace(blob.path, os.path.join(self._folder("blobs"), file.etag))
                self._whole[file.path] = file
        except SourceError:
            raise
        except OSError as error:
            raise _cannot(error, self._snapshot.folder) from error
        finally:
            with self._lock:
                self._partial.pop(file.path, None)
            blob.discard()

    def close(self) -> None:
        """Leave nothing behind that is not whole; where nothing is missing, make it a snapshot. May be called twice.

        Raises:
            SourceError: The cache cannot be written.
        """
        with self._lock:
            self._stopped = True
            complete = not self._partial and self._nothing_missing()
            for blob in self._partial.values():
                # `finish` sees that it was stopped, and discards it. Under a thread that hangs in the kernel nothing is
                # closed: its descriptor would become another file's.
                if not blob.finishing:
                    blob.discard(keep_open=blob.writers > 0)
            self._partial.clear()
        if complete:
            try:
                self._publish()
            except OSError as error:
                raise _cannot(error, self._snapshot.folder) from error

    def stop(self) -> None:
        """Have `finish` end soon."""
        self._stopped = True

    def _nothing_missing(self) -> bool:
        """Whether whoever finds these files finds a checkpoint, and not a part of one that looks like a smaller one.

        With an index file that is plain to see; without one, every file counts.
        """
        indexed = any(path.endswith(".safetensors.index.json") for path in self._whole)
        return bool(self._whole) and (indexed or self._weights <= self._whole.keys())

    def _publish(self) -> None:
        snapshot = self._snapshot
        for file in list(self._whole.values()):
            link = os.path.join(self._folder("snapshots", snapshot.commit), *file.path.split("/"))
            os.makedirs(os.path.dirname(link), exist_ok=True)
            if not os.path.exists(link):
                blob = os.path.join(snapshot.folder, "blobs", file.etag)
                _replace(link, partial(os.symlink, os.path.relpath(blob, os.path.dirname(link))))
        revision = snapshot.asked.revision or "main"
        if revision != snapshot.commit and is_file_name(revision):
            ref = os.path.join(self._folder("refs"), *revision.split("/"))
            os.makedirs(os.path.dirname(ref), exist_ok=True)
            _replace(ref, partial(_write_text, snapshot.commit))

    def _folder(self, *names: str) -> str:
        folder = os.path.join(self._snapshot.folder, *names)
        os.makedirs(folder, exist_ok=True)
        return folder

    def _check(self, blob: _Blob) -> None:
        file = blob.file
        if file.sha256 is not None:
            digest = hashlib.sha256()
        else:
            # What git calls an object's name: not to vouch for it, but to find what was received wrongly.
            digest = hashlib.sha1(b"blob %d\0" % file.size_bytes, usedforsecurity=False)
        at = 0
        while piece := os.pread(blob.descriptor, _PIECE_BYTES, at):
            if self._stopped:
                raise ClosedError("the source was closed")
            digest.update(piece)
            at += len(piece)
        if digest.hexdigest() != file.etag:
            raise ChecksumError(f"what was read sums up to {digest.hexdigest()}, but the Hub says {file.etag}")


class _Blob:
    """A file that is being written.

    Attributes:
        writers: How many threads write into it.
        handed_out: Whether somebody was told that it is whole, and nothing may change any more.
        finishing: Whether `CacheWriter.finish` has it.
    """

    def __init__(self, folder: str, file: HubFile) -> None:
        self.file = file
        self.path = os.path.join(folder, f"{file.etag}.{uuid.uuid4().hex[:8]}.incomplete")
        self.descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        self.writers = 0
        self.handed_out = False
        self.finishing = False
        self._spans: list[tuple[int, int]] = []

    def add(self, start: int, end: int) -> None:
        """Note that these bytes are there."""
        insort(self._spans, (start, end))
        merged: list[tuple[int, int]] = []
        for span in self._spans:
            if merged and span[0] <= merged[-1][1]:
                merged[-1] = (merged[-1][0], max(merged[-1][1], span[1]))
            else:
                merged.append(span)
        self._spans = merged

    @property
    def whole(self) -> bool:
        """Whether all bytes are there."""
        return self._spans == [(0, self.file.size_bytes)]

    def discard(self, *, keep_open: bool = False) -> None:
        """Remove it, unless it got its name."""
        if not keep_open:
            with suppress(OSError):
                os.close(self.descriptor)
        with suppress(OSError):
            os.unlink(self.path)


def _write(descriptor: int, start: int, views: Sequence[memoryview]) -> int:
    """Write views one after the other; where they end."""
    left = list(views)
    while left:
        written = os.pwritev(descriptor, left[:_MOST_VIEWS], start)
        start += written
        while left and written >= left[0].nbytes:
            written -= left.pop(0).nbytes
        if written:
            left[0] = left[0][written:]
    return start


def _write_text(text: str, path: str) -> None:
    with open(path, "x", encoding="ascii") as file:
        file.write(text)


def _replace(path: str, make: Callable[[str], None]) -> None:
    """Make something under another name, and rename it: others see what was there or what is there, nothing else."""
    beside = f"{path}.{uuid.uuid4().hex[:8]}.incomplete"
    try:
        make(beside)
        os.replace(beside, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(beside)
        raise


def _cannot(error: OSError, folder: str) -> SourceError:
    return SourceError(f"the cache {folder} cannot be written: {error.strerror or error}")
