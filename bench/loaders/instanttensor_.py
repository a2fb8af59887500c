"""InstantTensor: safetensors files onto a CUDA device, one reader for all files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from bench.loaders.base import Job, Loader, Outcome, Took, now

if TYPE_CHECKING:
    import torch


class Instanttensor(Loader):
    """`instanttensor.safe_open` over all files, buffered reads where they are warm, and tensors it does not copy."""

    name = "instanttensor"
    packages: ClassVar[tuple[tuple[str, str], ...]] = (("torch", "torch"), ("instanttensor", "instanttensor"))

    def reason_not(self, job: Job) -> str | None:
        """It loads onto GPUs."""
        if job.remote:
            return "reads local files only"
        if job.device == "cpu":
            return "loads onto CUDA devices only"
        return self.missing()

    def environ(self, job: Job) -> dict[str, str]:
        """Reading past the page cache is its default, and right for cold files."""
        return {} if job.scenario == "local-cold" else {"INSTANTTENSOR_BACKEND": "BUFFERED"}

    def imports(self) -> None:
        """Its extension module comes with it."""
        import_module("instanttensor")

    def drain(self, job: Job, took: Took) -> Outcome:
        """Each tensor is a view of its staging buffer."""
        return _iterate(job, took)

    def params(self, job: Job, params: Mapping[str, torch.Tensor]) -> Outcome:
        """Each view is copied into its parameter."""

        def fill(name: str, tensor: Any) -> None:
            params[name].copy_(tensor)

        return _iterate(job, fill)


def _iterate(job: Job, use: Callable[[str, Any], None]) -> Outcome:
    instanttensor: Any = import_module("instanttensor")
    nbytes = 0
    with instanttensor.safe_open(list(job.files), framework="pt", device=f"{job.device}:0", copy=False) as opened:
        for name, tensor in opened.tensors():
            use(name, tensor)
            nbytes += tensor.nbytes
        import_module("torch").cuda.synchronize()
        return Outcome(nbytes, now())
