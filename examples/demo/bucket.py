"""Put files into a bucket, with whatever endpoint and credentials the environment names."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path

from aiobotocore.session import get_session

__all__ = ["upload"]


async def upload(files: Iterable[Path], *, bucket: str, prefix: str) -> None:
    """Make `bucket` and put `files` there, each as ``prefix/NAME``, one after the other."""
    async with get_session().create_client("s3") as client:
        await client.create_bucket(Bucket=bucket)
        for file in files:
            body = await asyncio.to_thread(file.read_bytes)
            await client.put_object(Bucket=bucket, Key=f"{prefix}/{file.name}", Body=body)
