"""tensorizer, on a file in its own format that is made from the checkpoint beforehand.

The file lies beside the checkpoint's and outside the clock. Its tensors are loaded lazily, in the file's order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bench.loaders.base import Job, Loader, Outcome, Took, now

if TYPE_CHECKING:
    import torch


class Tensorizer(Loader):
    """`tensorizer.TensorDeserializer`, with as many readers as it chooses."""

    name = "tensorizer"
    packages: ClassVar[tuple[tuple[str, str], ...]] = (("torch", "torch"), ("tensorizer", "tensorizer"))

    def reason_not(self, job: Job) -> str | None:
        """It reads S3 through one curl process and a presigned URL, which the origin of bench/ does not answer."""
        if job.remote:
            return "reads S3 by presigned URLs and in its own format only: not set up here"
        if job.scenario == "small-tensors":
            return "its format has room for 256 KiB of metadata only"
        if job.destination == "stage":
            return "does not stage"
        return self.missing()

    def imports(self) -> None:
        """All of it."""
        import_module("tensorizer")

    def prepare(self, job: Job) -> None:
        """Write the checkpoint once more, in tensorizer's format."""
        target = _converted(job)
        if target.exists():
            return
        serializer_of: Any = import_module("tensorizer").TensorSerializer
        kinds: Any = import_module("tensorizer.serialization").TensorType
        safe_open: Any = import_module("safetensors").safe_open
        target.parent.mkdir(exist_ok=True)
        partial = target.with_suffix(".partial")
        serializer = serializer_of(str(partial))
        number = 0
        for path in job.files:
            with safe_open(path, framework="pt") as opened:
                for name in opened.offset_keys():
                    # Parameters, as of one module: its format knows nothing else.
                    serializer.write_tensor(number, name, kinds.PARAM, opened.get_tensor(name))
                    number += 1
        serializer.close()
        os.replace(partial, target)

    def drain(self, job: Job, took: Took) -> Outcome:
        """Each tensor is loaded when it is asked for."""
        return _iterate(job, took)

    def params(self, job: Job, params: Mapping[str, torch.Tensor]) -> Outcome:
        """Each tensor is copied into its parameter."""

        def fill(name: str, tensor: Any) -> None:
            params[name].copy_(tensor)

        return _iterate(job, fill)


def _converted(job: Job) -> Path:
    return Path(job.uri).parent / "tensorizer" / "model.tensors"


def _iterate(job: Job, use: Callable[[str, Any], None]) -> Outcome:
    deserializer_of: Any = import_module("tensorizer").TensorDeserializer
    nbytes = 0
    with deserializer_of(str(_converted(job)), device=job.device, lazy_load=True) as tensors:
        # Not read_tensors(), which reads one after the other: this is what fills a module.
        for name, tensor in tensors.items():
            use(name, tensor)
            nbytes += tensor.nbytes
        if job.device != "cpu":
            import_module("torch").cuda.synchronize()
        return Outcome(nbytes, now())
