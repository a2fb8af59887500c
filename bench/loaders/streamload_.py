"""streamload itself, as a user calls it: nothing tuned but the memory limit."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

from bench.loaders.base import MIB, Job, Loader, Outcome, Took, now

if TYPE_CHECKING:
    import torch


_S3_CLIENT = (
    *("aiobotocore.session", "aiobotocore.client", "aiobotocore.httpsession", "aiobotocore.endpoint"),
    *("aiobotocore.retries.adaptive", "aiobotocore.discovery", "aiobotocore.waiter", "aiobotocore.paginate"),
    *("botocore.client", "aiohttp", "awscrt.checksums"),
)


class Streamload(Loader):
    """`streamload.stream`, `load_into` and `stage_checkpoint`, with verification as it is by default."""

    name = "streamload"
    packages: ClassVar[tuple[tuple[str, str], ...]] = (("torch", "torch"), ("streamload", "streamload"))
    source: ClassVar[str | None] = None

    def imports(self) -> None:
        """What a load imports by and by, too."""
        for name in ("uvloop", "streamload"):
            import_module(name)

    def imports_for(self, job: Job) -> None:
        """A source or sink is imported when a load first uses it; that is no part of what is measured.

        Staging needs no torch, and imports none.
        """
        if job.destination == "stage":
            import_module("streamload.staging")
        else:
            for name in ("torch", "streamload.loader", "streamload.filling", "streamload.sinks.host"):
                import_module(name)
        if job.remote:
            # streamload imports its S3 client on the load's own thread, when a bucket is first opened.
            for name in ("streamload.sources.s3", "streamload.sources.s3_client", *_S3_CLIENT):
                import_module(name)
        else:
            import_module("streamload.sources.local")
        if job.device != "cpu":
            import_module("streamload.sinks.cuda")

    def drain(self, job: Job, took: Took) -> Outcome:
        """Every tensor is produced and dropped."""
        import streamload

        nbytes = 0
        last = 0.0
        with streamload.stream(job.uri, device=job.device, memory_bytes=job.memory_bytes, source=self.source) as stream:
            for name, tensor in stream:
                nbytes += tensor.nbytes
                took(name, tensor)
                last = now()
        return _outcome(job, nbytes, last, stream.report)

    def params(self, job: Job, params: Mapping[str, torch.Tensor]) -> Outcome:
        """`streamload.load_into`, as a user calls it."""
        import streamload

        report = streamload.load_into(params, job.uri, memory_bytes=job.memory_bytes, source=self.source)
        if job.device != "cpu":
            import_module("torch").cuda.synchronize()
        return _outcome(job, report.nbytes, now(), report)

    def stage(self, job: Job) -> Outcome:
        """`streamload.stage_checkpoint`: every file is fsynced, and the marker written last."""
        import streamload

        assert job.target is not None
        staged = streamload.stage_checkpoint(job.uri, job.target, memory_bytes=job.memory_bytes)
        if not job.remote:
            return Outcome(staged.nbytes, now(), notes={"phases": staged.phases})
        return Outcome(staged.nbytes, now(), sum(staged.verified.values()), staged.nbytes, {"phases": staged.phases})

    def command(self, job: Job) -> list[str]:
        """``streamload load``, by the interpreter that runs this."""
        limit = f"{job.memory_bytes // MIB}MiB"
        source = [] if self.source is None else ["--source", self.source]
        command = [sys.executable, "-m", "streamload", "load", job.uri, "--memory-bytes", limit, "--quiet", "--json"]
        return command + source


class StreamloadRunai(Streamload):
    """The same, with Run:ai's engine for the reads."""

    name = "streamload-runai"
    packages: ClassVar[tuple[tuple[str, str], ...]] = (
        *Streamload.packages,
        ("runai_model_streamer", "runai-model-streamer[s3]"),
        ("runai_model_streamer_s3", "runai-model-streamer[s3]"),
    )
    source: ClassVar[str | None] = "runai"

    def imports_for(self, job: Job) -> None:
        super().imports_for(job)
        for name in ("streamload.sources.runai", "runai_model_streamer.libstreamer.libstreamer"):
            import_module(name)


def _outcome(job: Job, nbytes: int, last: float, report: Any) -> Outcome:
    notes = {
        "bottleneck": report.bottleneck,
        "requests": report.requests,
        "retries": report.retries,
        "peak_staged_bytes": report.peak_staged_bytes,
        "unverified": report.unverified,
    }
    if not job.remote:
        # A file system keeps nothing to compare content with.
        return Outcome(nbytes, last, notes=notes)
    return Outcome(nbytes, last, sum(report.verified.values()), report.total_bytes, notes)
