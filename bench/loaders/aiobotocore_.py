"""aiobotocore: botocore over aiohttp, the usual way to S3 from asyncio."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import import_module
from typing import Any, ClassVar

from bench.loaders.base import Job
from bench.loaders.ranges import CONCURRENCY, Fetch, RangedLoader

__all__ = ["Aiobotocore"]

# More than aiohttp buffers, so this takes all that there is, and waits for no more.
_MAX_PIECE_BYTES = 1 << 20


class Aiobotocore(RangedLoader):
    """``get_object`` with a range; the body goes piece by piece to where it is wanted, without being joined."""

    name: ClassVar[str] = "aiobotocore"
    packages: ClassVar[tuple[tuple[str, str], ...]] = (("aiobotocore", "aiobotocore"),)

    def imports(self) -> None:
        super().imports()
        for module in ("aiobotocore.session", "aiobotocore.config", "aiobotocore.client"):
            import_module(module)

    @asynccontextmanager
    async def open(self, job: Job) -> AsyncIterator[Fetch]:
        config = import_module("aiobotocore.config").AioConfig(
            max_pool_connections=CONCURRENCY,
            s3={"addressing_style": "path" if job.endpoint is not None else "auto"},
            # Asked for the checksum of a range, S3 has none.
            response_checksum_validation="when_required",
        )
        session: Any = import_module("aiobotocore.session").get_session()
        async with session.create_client("s3", endpoint_url=job.endpoint, config=config) as client:

            async def fetch(key: str, start: int, end: int) -> AsyncIterator[bytes | memoryview]:
                answer = await client.get_object(Bucket=job.bucket, Key=key, Range=f"bytes={start}-{end - 1}")
                async with answer["Body"] as body:
                    while piece := await body.read(_MAX_PIECE_BYTES):
                        yield piece

            yield fetch
