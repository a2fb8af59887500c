"""What a loader must offer to be measured, and what it is told.

A loader is one way to bring a checkpoint's tensors into memory. Each runs in a process of its own: `Loader.imports`
before the clock starts, then `Loader.drain` or `Loader.params` once. A loader that cannot do a job says why in
`Loader.reason_not`, and the table shows that sentence; it never does half a job.

The modules of this package must be importable without the packages they measure: those are imported in `imports` and
in the methods that run.
"""

from __future__ import annotations

import importlib.util
import json
import struct
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, TypeAlias

if TYPE_CHECKING:
    import torch

MIB = 1 << 20

Destination: TypeAlias = Literal["drain", "params", "stage"]
Took: TypeAlias = "Callable[[str, torch.Tensor | memoryview], None]"


@dataclass(frozen=True, slots=True)
class Job:
    """One piece of work, the same for every loader.

    Credentials, region and the CA bundle are found in the process's environment (``AWS_…``), as by all AWS tools.

    Attributes:
        scenario: The scenario's name.
        destination: ``drain``: each tensor is produced, touched nowhere, dropped. ``params``: into tensors that are
            there already. ``stage``: into files of a folder.
        uri: A folder, ``s3://bucket`` or ``s3://bucket/prefix``, as a user would name it.
        files: What is to be read, in order: absolute paths of a folder's files, or whole keys (the prefix included).
        sizes: Their sizes in bytes, in the same order.
        memory_bytes: The memory limit, for loaders that have one.
        device: ``cpu`` or ``cuda``.
        endpoint: The S3 endpoint's URL; None for a folder, and for AWS itself.
        target: The folder to stage into; None for the other destinations.
    """

    scenario: str
    destination: Destination
    uri: str
    files: tuple[str, ...]
    sizes: tuple[int, ...]
    memory_bytes: int
    device: str
    endpoint: str | None = None
    target: str | None = None

    @property
    def remote(self) -> bool:
        """Whether the files lie in an object store."""
        return self.uri.startswith("s3://")

    @property
    def bucket(self) -> str:
        """The bucket's name.

        Raises:
            ValueError: The files lie in a folder.
        """
        if not self.remote:
            raise ValueError(f"{self.uri} has no bucket")
        return self.uri.removeprefix("s3://").partition("/")[0]

    @property
    def size_bytes(self) -> int:
        """What all files have together, headers included."""
        return sum(self.sizes)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a loader has to say about its run.

    Attributes:
        nbytes: Tensor bytes that it produced (for what produces no tensors: bytes that it moved).
        last: `time.perf_counter` at the last tensor; what is given back after it is not counted.
        verified_bytes: Bytes whose content it compared with a checksum; None where it has no such thing.
        read_bytes: Tensor bytes of which ``verified_bytes`` should be all; None where it has no such thing.
        notes: What a reader of the results should know; goes into the JSON.
    """

    nbytes: int
    last: float
    verified_bytes: int | None = None
    read_bytes: int | None = None
    notes: dict[str, Any] = field(default_factory=dict)


class Loader:
    """One way to load; a subclass names itself and overrides what it can do.

    Attributes:
        name: Its name in the results, part of their contract.
        packages: What must be importable, as ``(module, what to install)``.
        makes_tensors: Whether it hands out tensors by name. What only moves bytes is checked by their number.
    """

    name: ClassVar[str]
    packages: ClassVar[tuple[tuple[str, str], ...]] = ()
    makes_tensors: ClassVar[bool] = True

    def missing(self) -> str | None:
        """Why it cannot run here at all: the first package that is not installed."""
        for module, install in self.packages:
            try:
                found = importlib.util.find_spec(module)
            except ModuleNotFoundError:
                found = None
            if found is None:
                return f"{install} is not installed"
        return None

    def reason_not(self, job: Job) -> str | None:
        """Why it cannot do this job, in a few words for the table; None where it can. May look at the machine.

        Overriders begin with `missing`.
        """
        return self.missing()

    def environ(self, job: Job) -> dict[str, str]:
        """Variables that its process is started with, above the job's own: how the peer is tuned."""
        return {}

    def imports(self) -> None:
        """Import everything that the run uses. The clock does not run."""

    def imports_for(self, job: Job) -> None:
        """The same for what only this job uses."""

    def prepare(self, job: Job) -> None:
        """Make what the loader needs once for a data set, files in its own format for example. Not timed.

        Called once before the rounds, in a process of its own, with a job on the local files even where the rounds read
        an object store; it must be quick where all is there.
        """

    def drain(self, job: Job, took: Took) -> Outcome:
        """Produce each tensor, give it to ``took``, drop it.

        ``took`` counts in a timed run, and computes a checksum in the run that checks for correctness; it is done with
        the tensor when it returns.
        """
        raise NotImplementedError

    def params(self, job: Job, params: Mapping[str, torch.Tensor]) -> Outcome:
        """Fill the parameters in place; their memory is resident, and none may be replaced."""
        raise NotImplementedError

    def stage(self, job: Job) -> Outcome:
        """Write the checkpoint's files into ``job.target``."""
        raise NotImplementedError

    def command(self, job: Job) -> list[str] | None:
        """A command line of its own that does a drain, for ``cold-start``; None where it has none."""
        return None


class TensorEntry(NamedTuple):
    """One tensor of a file's header; ``start`` and ``end`` count from the file's first byte."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def header_entries(head: bytes | memoryview) -> list[TensorEntry]:
    """The tensors of a safetensors file, in the order of their bytes, for loaders that bring only bytes.

    Args:
        head: The file's first bytes: the whole header at least (see `header_size`).
    """
    end = header_size(head)
    described = json.loads(bytes(head[8:end]))
    described.pop("__metadata__", None)
    entries = [
        TensorEntry(name, value["dtype"], tuple(value["shape"]), end + begin, end + stop)
        for name, value in described.items()
        for begin, stop in (value["data_offsets"],)
    ]
    return sorted(entries, key=lambda entry: entry.start)


def header_size(head: bytes | memoryview) -> int:
    """Where the tensors' bytes begin, told by the file's first eight bytes."""
    (size,) = struct.unpack_from("<Q", head)
    return 8 + int(size)


def torch_dtype(dtype: str) -> torch.dtype:
    """Torch's name for a dtype of the format."""
    import torch

    names = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "U8": torch.uint8, "I8": torch.int8}
    return names[dtype]


def tensors_in(content: memoryview, entries: list[TensorEntry], at: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    """Views of the tensors in a file's bytes; ``content`` begins at byte ``at`` of the file, and is writable."""
    import torch

    for entry in entries:
        dtype = torch_dtype(entry.dtype)
        if entry.end == entry.start:
            yield entry.name, torch.empty(entry.shape, dtype=dtype)
            continue
        flat = torch.frombuffer(content[entry.start - at : entry.end - at], dtype=torch.uint8)
        yield entry.name, flat.view(dtype).view(entry.shape)


def now() -> float:
    """The clock of all measurements; the same in every process of a machine."""
    return time.perf_counter()
