"""The limit: the plainest code that moves the same bytes. Everyone's speed is given as a ratio to it.

Two threads of blocking reads into one reused ring of 256 MiB, for local files and (in `bench.loaders.sockets`) for an
object store. It makes no tensors, and it is the same for both destinations. On a GPU it is page-locked copies of as
many bytes, again and again from one buffer; from an object store it is those copies and the sockets at once, as if
nothing had to connect them.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

from bench.loaders.base import MIB, Job, Loader, Outcome, Took, now

RING_BYTES = 256 * MIB
# What streamload and the others read at a time, too; the ring holds a whole number of them.
READ_BYTES = 8 * MIB
THREADS = 2
# Copies smaller than this do not fill the bus.
COPY_BYTES = 64 * MIB


class Limit(Loader):
    """Moves the bytes, and nothing else."""

    name = "limit"
    makes_tensors = False

    def reason_not(self, job: Job) -> str | None:
        """One limit for both kinds of memory: the drain's."""
        if job.destination == "params":
            return "the limit is the drain's"
        return None

    def imports(self) -> None:
        """What the S3 limit needs."""
        import_module("botocore.session")

    def drain(self, job: Job, took: Took) -> Outcome:
        """Read everything into the ring, or copy as much to the GPU."""
        move = self._fetch if job.remote else self._read
        if job.device == "cpu":
            return move(job)
        if not job.remote:
            return copy_page_locked(job)
        return _both(lambda: move(job), lambda: copy_page_locked(job))

    def stage(self, job: Job) -> Outcome:
        """Read or receive into the ring and write from there, on the same two threads."""
        assert job.target is not None
        folder = Path(job.target)
        targets = {name: os.open(folder / Path(name).name, os.O_WRONLY | os.O_CREAT, 0o644) for name in job.files}
        try:
            move = _received if job.remote else through_ring
            move(job, lambda name, piece, start: _write(targets[name], piece, start))
            return Outcome(nbytes=job.size_bytes, last=now())
        finally:
            for file in targets.values():
                os.close(file)

    @staticmethod
    def _read(job: Job) -> Outcome:
        through_ring(job, None)
        return Outcome(nbytes=job.size_bytes, last=now())

    @staticmethod
    def _fetch(job: Job) -> Outcome:
        from bench.loaders.sockets import drain_sockets

        return drain_sockets(job)


def _received(job: Job, then: Callable[[str, memoryview, int], None]) -> None:
    from bench.loaders.sockets import drain_sockets

    drain_sockets(job, then)


def through_ring(job: Job, then: Callable[[str, memoryview, int], None] | None) -> None:
    """Read all files of a folder, 8 MiB at a time, round and round in one ring.

    Args:
        job: Of a folder.
        then: Given the file's name, the bytes and their place in the file, on the thread that read them.

    Raises:
        OSError: A read failed, or a file is shorter than it was.
    """
    ring = memoryview(mmap.mmap(-1, RING_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    files = {name: os.open(name, os.O_RDONLY) for name in job.files}

    def ranges() -> Iterator[tuple[str, int, int]]:
        for name, size in zip(job.files, job.sizes, strict=True):
            for start in range(0, size, READ_BYTES):
                yield name, start, min(READ_BYTES, size - start)

    todo = enumerate(ranges())
    lock = threading.Lock()
    errors: list[BaseException] = []

    def work() -> None:
        try:
            while not errors:
                with lock:
                    number, (name, start, nbytes) = next(todo, (0, ("", 0, 0)))
                if not nbytes:
                    return
                at = number * READ_BYTES % RING_BYTES
                piece = ring[at : at + nbytes]
                _read_whole(files[name], piece, start)
                if then is not None:
                    then(name, piece, start)
        except BaseException as error:
            errors.append(error)

    try:
        threads = [threading.Thread(target=work) for _ in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        for file in files.values():
            os.close(file)
    if errors:
        raise errors[0]


def copy_page_locked(job: Job) -> Outcome:
    """Copy as many bytes as the job has from one page-locked buffer to one on the device."""
    import torch

    host = torch.empty(COPY_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(COPY_BYTES, dtype=torch.uint8, device=job.device)
    for _ in range(-(-job.size_bytes // COPY_BYTES)):
        device.copy_(host, non_blocking=True)
    torch.cuda.synchronize()
    return Outcome(nbytes=job.size_bytes, last=now())


def _both(first: Callable[[], Outcome], second: Callable[[], Outcome]) -> Outcome:
    """Run both at once; the slower one decides."""
    outcomes: list[Outcome] = []
    thread = threading.Thread(target=lambda: outcomes.append(second()))
    thread.start()
    outcomes.append(first())
    thread.join()
    if len(outcomes) < 2:
        raise RuntimeError("the copies to the device failed")
    return max(outcomes, key=lambda outcome: outcome.last)


def _read_whole(file: int, into: memoryview, start: int) -> None:
    done = 0
    while done < len(into):
        got = os.preadv(file, [into[done:]], start + done)
        if not got:
            raise OSError("the file ended early")
        done += got


def _write(file: int, piece: memoryview, start: int) -> None:
    done = 0
    while done < len(piece):
        done += os.pwritev(file, [piece[done:]], start + done)
