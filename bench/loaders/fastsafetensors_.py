"""fastsafetensors: whole batches of a file into one buffer by threads of its own, tensors as views of it.

Tuned: batches of half the memory limit, since one is read while one is handed out; tensors are borrowed, not cloned, as
all our destinations are done with them at once; files that are in the page cache are read through it. It reads past the
page cache where it can unless told otherwise, which is right for cold files and much slower for warm ones.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from bench.loaders.base import MIB, Job, Loader, Outcome, Took, now

if TYPE_CHECKING:
    import torch

# The checkpoints' largest tensor; a batch holds at least one.
_LEAST_BATCH_BYTES = 64 * MIB


class Fastsafetensors(Loader):
    """`fastsafetensors.ParallelLoader` in one process."""

    name = "fastsafetensors"
    packages: ClassVar[tuple[tuple[str, str], ...]] = (
        ("torch", "torch"),
        ("fastsafetensors", "fastsafetensors"),
    )

    def reason_not(self, job: Job) -> str | None:
        """It reads files."""
        if job.remote:
            return "reads local files only"
        if job.destination == "stage":
            return "does not stage"
        return self.missing()

    def environ(self, job: Job) -> dict[str, str]:
        """Through the page cache where the files are in it."""
        return {} if job.scenario == "local-cold" else {"FASTSAFETENSORS_ODIRECT": "0"}

    def imports(self) -> None:
        """Its extension module comes with it."""
        import_module("fastsafetensors")

    def drain(self, job: Job, took: Took) -> Outcome:
        """Each tensor is a view of the batch's buffer."""
        return _iterate(job, took)

    def params(self, job: Job, params: Mapping[str, torch.Tensor]) -> Outcome:
        """Each view is copied into its parameter."""

        def fill(name: str, tensor: Any) -> None:
            params[name].copy_(tensor)

        return _iterate(job, fill)


def _iterate(job: Job, use: Callable[[str, Any], None]) -> Outcome:
    fastsafetensors: Any = import_module("fastsafetensors")
    loader = fastsafetensors.ParallelLoader(
        None,
        list(job.files),
        device=job.device if job.device == "cpu" else f"{job.device}:0",
        # GPUDirect Storage needs a driver of its own; bounce buffers work everywhere.
        nogds=True,
        use_tqdm_on_load=False,
        max_batch_bytes=max(job.memory_bytes // 2, _LEAST_BATCH_BYTES),
        accumulate_resident=False,
        borrowed_tensors=True,
    )
    nbytes = 0
    try:
        for name, tensor in loader.iterate_weights():
            use(name, tensor)
            nbytes += tensor.nbytes
        if job.device != "cpu":
            import_module("torch").cuda.synchronize()
        return Outcome(nbytes, now())
    finally:
        loader.close()
