"""safetensors: the file is mapped, and each tensor copied, which is what brings it into memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from bench.loaders.base import Job, Loader, Outcome, Took, now

if TYPE_CHECKING:
    import torch


class Safetensors(Loader):
    """`safetensors.safe_open`, file by file."""

    name = "safetensors"
    packages: ClassVar[tuple[tuple[str, str], ...]] = (("torch", "torch"), ("safetensors", "safetensors"))

    def reason_not(self, job: Job) -> str | None:
        """It maps files."""
        if job.remote:
            return "reads local files only"
        if job.destination == "stage":
            return "does not stage"
        return self.missing()

    def imports(self) -> None:
        """Torch's part of it."""
        import_module("safetensors.torch")

    def drain(self, job: Job, took: Took) -> Outcome:
        """A mapped tensor holds nothing yet: the copy produces it."""
        nbytes = 0
        for name, tensor in _tensors(job):
            owned = tensor.clone() if job.device == "cpu" else tensor
            nbytes += owned.nbytes
            took(name, owned)
        _finish(job)
        return Outcome(nbytes, now())

    def params(self, job: Job, params: Mapping[str, torch.Tensor]) -> Outcome:
        """The copy into the parameter reads the mapped file."""
        nbytes = 0
        for name, tensor in _tensors(job):
            params[name].copy_(tensor)
            nbytes += tensor.nbytes
        _finish(job)
        return Outcome(nbytes, now())


def _tensors(job: Job) -> Iterator[tuple[str, torch.Tensor]]:
    safe_open: Any = import_module("safetensors").safe_open
    for path in job.files:
        with safe_open(path, framework="pt", device=job.device) as opened:
            # In the order of their bytes; the names alone come sorted, and would be read to and fro.
            for name in opened.offset_keys():
                yield name, opened.get_tensor(name)


def _finish(job: Job) -> None:
    if job.device != "cpu":
        import_module("torch").cuda.synchronize()
