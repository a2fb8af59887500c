"""s3torchconnector: Amazon's connector for PyTorch, on the client of Mountpoint for S3."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module
from queue import Empty, SimpleQueue
from typing import TYPE_CHECKING, Any, ClassVar

from bench.loaders.base import Job, Loader, Outcome, Took, header_entries, header_size, now, tensors_in
from bench.loaders.ranges import HEAD_BYTES, Unit, bytes_of, units_of

if TYPE_CHECKING:
    import torch

__all__ = ["S3torchconnector"]

# Its client cuts a range into parts of 8 MiB and requests those side by side; what waits for another reader is the copy
# into the consumer's memory. With the largest tensors of 64 MiB, this many stay within a memory limit of 256 MiB.
READERS = 3


class S3torchconnector(Loader):
    """The range-based reader, on a few threads: ``readinto`` for each 8 MiB and more of tensors.

    The sequential reader, its default, keeps all that it has read.
    """

    name: ClassVar[str] = "s3torchconnector"
    packages: ClassVar[tuple[tuple[str, str], ...]] = (("s3torchconnector", "s3torchconnector"),)

    def reason_not(self, job: Job) -> str | None:
        if not job.remote:
            return "reads from object stores only"
        if job.destination == "stage":
            return "stages no files"
        return self.missing()

    def imports(self) -> None:
        for module in ("torch", "numpy", "s3torchconnector"):
            import_module(module)

    def drain(self, job: Job, took: Took) -> Outcome:
        def use(name: str, tensor: torch.Tensor) -> None:
            took(name, tensor if job.device == "cpu" else tensor.to(job.device))

        return _load(job, use, None)

    def params(self, job: Job, params: Mapping[str, torch.Tensor]) -> Outcome:
        def use(name: str, tensor: torch.Tensor) -> None:
            params[name].copy_(tensor)

        return _load(job, use, params if job.device == "cpu" else None)


def _load(job: Job, use: Callable[[str, torch.Tensor], None], params: Mapping[str, torch.Tensor] | None) -> Outcome:
    """Read on threads, and use what was read on this one.

    Args:
        job: What to read.
        use: Given each tensor that is not in ``params``.
        params: To read into directly, where a unit is one tensor.
    """
    objects = _objects(job)
    todo: SimpleQueue[Unit] = SimpleQueue()
    with ThreadPoolExecutor(READERS) as pool:
        for units in pool.map(_units, (objects[number] for number in range(len(job.files))), job.sizes):
            for unit in units:
                todo.put(unit)
    # A thread goes on only when what it read was used: that bounds what is in memory.
    done: SimpleQueue[tuple[Unit, memoryview | None] | BaseException | None] = SimpleQueue()
    go_on = threading.Semaphore(READERS)
    stopped = threading.Event()

    def read() -> None:
        # A reader has a position, so no two threads can share one.
        reader: Any = None
        try:
            while go_on.acquire() and not stopped.is_set():
                unit = todo.get_nowait()
                if reader is None or reader.key != unit.key:
                    reader = objects[job.files.index(unit.key)]
                done.put((unit, _read_unit(reader, unit, params)))
        except Empty:
            # Nothing was read for this turn: it is another thread's.
            go_on.release()
            done.put(None)
        except BaseException as error:
            done.put(error)

    threads = [threading.Thread(target=read, daemon=True) for _ in range(READERS)]
    for thread in threads:
        thread.start()
    nbytes, last, running = 0, 0.0, READERS
    try:
        while running:
            found = done.get()
            if isinstance(found, BaseException):
                raise found
            if found is None:
                running -= 1
                continue
            unit, content = found
            if content is not None:
                for name, tensor in tensors_in(content, unit.entries, unit.start):
                    use(name, tensor)
            nbytes += unit.nbytes
            last = now()
            del found, content
            go_on.release()
    finally:
        stopped.set()
        for _ in threads:
            go_on.release()
    return Outcome(nbytes, last)


def _objects(job: Job) -> Any:
    """The job's files, each opened anew when it is indexed."""
    connector: Any = import_module("s3torchconnector")
    return connector.S3MapDataset.from_objects(
        [f"s3://{job.bucket}/{key}" for key in job.files],
        region=os.environ.get("AWS_REGION", "us-east-1"),
        endpoint=job.endpoint,
        s3client_config=connector.S3ClientConfig(force_path_style=job.endpoint is not None),
        # Its own buffer is for small reads; there are none here.
        reader_constructor=connector.S3ReaderConstructor.range_based(buffer_size=0),
    )


def _units(reader: Any, size: int) -> list[Unit]:
    head = bytearray(min(HEAD_BYTES, size))
    _read_into(reader, 0, memoryview(head))
    if len(head) < (end := header_size(memoryview(head))):
        head = bytearray(end)
        _read_into(reader, 0, memoryview(head))
    return units_of(reader.key, header_entries(memoryview(head)))


def _read_unit(reader: Any, unit: Unit, params: Mapping[str, torch.Tensor] | None) -> memoryview | None:
    """The unit's bytes; None where they were read into the parameter itself."""
    import torch

    if params is not None and len(unit.entries) == 1 and params[unit.entries[0].name].is_contiguous():
        _read_into(reader, unit.start, bytes_of(params[unit.entries[0].name]))
        return None
    content = bytes_of(torch.empty(unit.nbytes, dtype=torch.uint8))
    _read_into(reader, unit.start, content)
    return content


def _read_into(reader: Any, start: int, into: memoryview) -> None:
    at = 0
    while at < len(into):
        reader.seek(start + at)
        nbytes = reader.readinto(into[at:])
        if not nbytes:
            raise RuntimeError(f"{reader.key}: {at} bytes came of {len(into)}")
        at += nbytes
