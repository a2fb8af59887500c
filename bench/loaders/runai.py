"""Run:ai Model Streamer: the nearest peer, from folders and object stores."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from bench.loaders.base import Job, Loader, Outcome, Took, now

if TYPE_CHECKING:
    import torch

__all__ = ["Runai", "RunaiDefault"]


class RunaiDefault(Loader):
    """As it comes. Only what it needs to reach the endpoint at all is set, and tensors are yielded to be kept."""

    name: ClassVar[str] = "runai-default"
    packages: ClassVar[tuple[tuple[str, str], ...]] = (
        ("runai_model_streamer", "runai-model-streamer[s3]"),
        ("runai_model_streamer_s3", "runai-model-streamer[s3]"),
    )
    owned: ClassVar[bool] = True

    def reason_not(self, job: Job) -> str | None:
        if job.destination == "stage" and not job.remote:
            return "stages from object stores only"
        return self.missing()

    def environ(self, job: Job) -> dict[str, str]:
        if not job.remote:
            return {}
        # Without the second, it asks a metadata service for credentials first, and waits for seconds.
        endpoint = {"RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING": "0", "AWS_EC2_METADATA_DISABLED": "true"}
        return endpoint if job.endpoint is not None else {}

    def imports(self) -> None:
        for module in ("torch", "runai_model_streamer"):
            import_module(module)
        # It imports these by itself for the first object of a store; imports are not what is measured.
        for module in ("credentials.credentials", "files.files"):
            import_module(f"runai_model_streamer_s3.{module}")

    def drain(self, job: Job, took: Took) -> Outcome:
        nbytes, last = 0, 0.0
        with self._stream(job) as tensors:
            for name, tensor in tensors:
                took(name, tensor)
                nbytes += tensor.nbytes
                last = now()
        return Outcome(nbytes, last)

    def params(self, job: Job, params: Mapping[str, torch.Tensor]) -> Outcome:
        nbytes, last = 0, 0.0
        with self._stream(job) as tensors:
            for name, tensor in tensors:
                params[name].copy_(tensor)
                nbytes += tensor.nbytes
                last = now()
        return Outcome(nbytes, last)

    def stage(self, job: Job) -> Outcome:
        if job.target is None:
            raise ValueError("there is no folder to stage into")
        import_module("runai_model_streamer").pull_files(job.uri, job.target)
        return Outcome(job.size_bytes, now())

    @contextmanager
    def _stream(self, job: Job) -> Iterator[Iterator[tuple[str, torch.Tensor]]]:
        streamer: Any = import_module("runai_model_streamer").SafetensorsStreamer
        paths = [f"s3://{job.bucket}/{key}" for key in job.files] if job.remote else list(job.files)
        if job.endpoint is not None and os.environ.get("AWS_ENDPOINT_URL") != job.endpoint:
            raise RuntimeError("this loader finds the endpoint in AWS_ENDPOINT_URL only, and that names another one")
        with streamer() as stream:
            stream.stream_files(paths, device=job.device, owned=self.owned)
            yield stream.get_tensors()


class Runai(RunaiDefault):
    """Tuned for this work: its memory limit as for all, eight readers, and views of its buffer instead of copies.

    Its default limit of 40 GB is two to three times slower where memory is fresh. Neither destination keeps a tensor
    after the next one has come, so it need not copy them.
    """

    name: ClassVar[str] = "runai"
    owned: ClassVar[bool] = False

    def environ(self, job: Job) -> dict[str, str]:
        tuned = {"RUNAI_STREAMER_MEMORY_LIMIT": str(job.memory_bytes), "RUNAI_STREAMER_CONCURRENCY": "8"}
        return super().environ(job) | tuned
