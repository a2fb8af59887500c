"""Put files into a bucket."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from streamload.testing.s3server import S3Server

__all__ = ["upload"]


def upload(server: S3Server, files: Iterable[Path], *, bucket: str, prefix: str) -> None:
    """Make `bucket` on `server` and put `files` there, each as ``prefix/NAME``."""
    with server.client() as client:
        client.create_bucket(Bucket=bucket)
        for file in files:
            with file.open("rb") as body:
                client.put_object(Bucket=bucket, Key=f"{prefix}/{file.name}", Body=body)
