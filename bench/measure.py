"""One run of one loader, in a process that does nothing else. Started by `bench.rounds`; reads a request from stdin.

The answer is one line of JSON on stdout. Whatever a loader prints goes to stderr.
"""

from __future__ import annotations

import filecmp
import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.loaders import loader_named
from bench.loaders.base import Job, Loader, Outcome

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be run.

    Attributes:
        loader: Its name.
        job: The work.
        folder: The data set's, where the tensors that must come out are written down.
        action: ``run``, ``check`` (the tensors are compared; the times mean nothing), ``prepare``.
        began: `time.perf_counter` when the process was started, where all of it counts; None where the clock starts
            with the loader's call.
    """

    loader: str
    job: Job
    folder: str
    action: str = "run"
    began: float | None = None

    def to_json(self) -> str:
        """For another process."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Request:
        """What `to_json` made."""
        value = json.loads(text)
        job = value.pop("job")
        return cls(job=Job(**job | {"files": tuple(job["files"]), "sizes": tuple(job["sizes"])}), **value)


@dataclass(frozen=True, slots=True)
class Measured:
    """What came of it.

    Attributes:
        seconds: From the call (or from the start of the process) to the last tensor.
        cpu_s: Processor time of this process, user and system, over the same work.
        peak_rss_bytes: The most resident memory while it ran, what was imported before included.
        above_imports_bytes: The same above what was resident before.
        wrong: What is wrong with the tensors; None where nothing is, or nothing was compared.
        outcome: The loader's own account.
    """

    seconds: float
    cpu_s: float
    peak_rss_bytes: int
    above_imports_bytes: int
    wrong: str | None
    outcome: dict[str, Any] = field(default_factory=dict)


def main() -> None:
    """Read the request, run it, print the answer."""
    answer = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    request = Request.from_json(sys.stdin.read())
    loader = loader_named(request.loader)
    if request.action == "prepare":
        loader.prepare(request.job)
        print("{}", file=answer)
    else:
        print(json.dumps(asdict(measure(loader, request))), file=answer, flush=True)


def measure(loader: Loader, request: Request) -> Measured:
    """Run the loader once, with everything around it that is not to be measured."""
    job = request.job
    whole = request.began is not None
    loader.imports()
    loader.imports_for(job)
    if job.device != "cpu":
        _wake(job.device)
    checker = Checker(Path(request.folder)) if request.action == "check" and loader.makes_tensors else None
    params = None
    if job.destination == "params":
        params = resident_params(job, Path(request.folder))
    before_bytes = 0 if whole else peak_bytes(reset=True)
    used_s = 0.0 if whole else _cpu_s()
    count = Counter()
    took = count if checker is None else checker.took
    began = time.perf_counter() if request.began is None else request.began
    outcome: Outcome
    if job.destination == "stage":
        outcome = loader.stage(job)
    elif params is None:
        outcome = loader.drain(job, took)
    else:
        outcome = loader.params(job, params)
    seconds = outcome.last - began
    cpu_s = _cpu_s() - used_s
    peak = peak_bytes()
    if checker is not None and params is not None:
        for name, tensor in params.items():
            checker.took(name, tensor)
    wrong = None
    if job.destination == "stage":
        wrong = staged_wrong(job) if request.action == "check" else None
    elif checker is not None:
        wrong = checker.wrong()
    elif loader.makes_tensors and job.destination == "drain" and count.nbytes != outcome.nbytes:
        wrong = f"says {outcome.nbytes} bytes, and handed out {count.nbytes}"
    if wrong is None and not loader.makes_tensors and outcome.nbytes != job.size_bytes:
        wrong = f"moved {outcome.nbytes} of {job.size_bytes} bytes"
    return Measured(seconds, cpu_s, peak, peak - before_bytes, wrong, asdict(outcome))


class Counter:
    """Counts what a loader hands out; as little as can be done with a tensor."""

    def __init__(self) -> None:
        self.nbytes = 0

    def __call__(self, name: str, tensor: torch.Tensor | memoryview) -> None:
        """Count it."""
        self.nbytes += tensor.nbytes


class Checker:
    """Compares what a loader hands out with what was written down when the checkpoint was made."""

    def __init__(self, folder: Path) -> None:
        from bench.datasets import expected

        self._missing = expected(folder)
        self._seen: set[str] = set()
        self._wrong: list[str] = []

    def took(self, name: str, tensor: torch.Tensor | memoryview) -> None:
        """Compare one."""
        from bench.datasets import checksum

        if name in self._seen:
            self._wrong.append(f"{name} came twice")
            return
        expected = self._missing.pop(name, None)
        if expected is None:
            self._wrong.append(f"there is no {name}")
            return
        self._seen.add(name)
        if isinstance(tensor, memoryview):
            content: Any = tensor
        else:
            dtype, shape = torch_name(tensor), tuple(tensor.shape)
            if (dtype, shape) != (expected.dtype, expected.shape):
                self._wrong.append(f"{name} is {dtype} {shape} and not {expected.dtype} {expected.shape}")
                return
            content = bytes_of(tensor)
        if checksum(content) != expected.checksum:
            self._wrong.append(f"{name} has other bytes")

    def wrong(self) -> str | None:
        """What is wrong with all of them; None where nothing is."""
        found = self._wrong + [f"{name} is missing" for name in self._missing]
        return f"{len(found)} of {len(self._seen) + len(self._missing)} tensors, e.g. {found[0]}" if found else None


def staged_wrong(job: Job) -> str | None:
    """What is wrong with the files in the folder that they were staged into; None where nothing is."""
    assert job.target is not None
    for source in job.files:
        staged = Path(job.target) / Path(source).name
        if not staged.is_file() or not filecmp.cmp(source, staged, shallow=False):
            return f"{staged.name} is missing, or has other bytes"
    return None


def torch_name(tensor: torch.Tensor) -> str:
    """A tensor's dtype as the format names it."""
    import torch

    names = {torch.bfloat16: "BF16", torch.float32: "F32", torch.uint8: "U8"}
    return names.get(tensor.dtype, str(tensor.dtype))


def bytes_of(tensor: torch.Tensor) -> Any:
    """A tensor's bytes as a buffer."""
    import torch

    return tensor.detach().contiguous().cpu().view(-1).view(torch.uint8).numpy()


def resident_params(job: Job, folder: Path) -> Mapping[str, torch.Tensor]:
    """The parameters, every page of them touched, as those of an engine that has been set up."""
    import torch

    from bench.datasets import expected
    from bench.loaders.base import torch_dtype

    return {
        name: torch.zeros(value.shape, dtype=torch_dtype(value.dtype), device=job.device).fill_(1)
        for name, value in expected(folder).items()
    }


def peak_bytes(*, reset: bool = False) -> int:
    """The process's peak of resident memory, VmHWM; the peak so far is forgotten first where asked."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("the kernel shows no VmHWM")


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _wake(device: str) -> None:
    """The device's set-up takes a second, and is nobody's."""
    import torch

    torch.empty(1, device=device)
    torch.cuda.synchronize()


if __name__ == "__main__":
    main()
