"""obstore: Rust's ``object_store``; a range comes as one piece of memory that Rust owns."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

from bench.loaders.base import Job
from bench.loaders.ranges import Fetch, RangedLoader

__all__ = ["Obstore"]


class Obstore(RangedLoader):
    """``get_range_async`` and a copy to where the bytes are wanted."""

    name: ClassVar[str] = "obstore"
    packages: ClassVar[tuple[tuple[str, str], ...]] = (("obstore", "obstore"),)
    whole_answers: ClassVar[bool] = True

    def imports(self) -> None:
        super().imports()
        import_module("obstore.store")

    @asynccontextmanager
    async def open(self, job: Job) -> AsyncIterator[Fetch]:
        obstore: Any = import_module("obstore")
        store = _store(job)

        async def fetch(key: str, start: int, end: int) -> AsyncIterator[bytes | memoryview]:
            yield memoryview(await obstore.get_range_async(store, key, start=start, end=end))

        yield fetch


def _store(job: Job) -> Any:
    client: dict[str, Any] = {}
    options: dict[str, Any] = {}
    if job.endpoint is not None:
        client["allow_http"] = job.endpoint.startswith("http:")
        options |= {"endpoint": job.endpoint, "virtual_hosted_style_request": False}
    # It reads the other variables of AWS's tools by itself.
    if (bundle := os.environ.get("AWS_CA_BUNDLE")) is not None:
        client["root_certificate"] = Path(bundle).read_bytes()
    return import_module("obstore.store").S3Store(job.bucket, client_options=client, **options)
