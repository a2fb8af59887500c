"""What Run:ai's engine is told: our options, and how it hears of them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

__all__ = ["Backend", "RunaiSettings", "Setup", "file_strategy_is_set", "variables_set"]

Backend = str
"""Which of its readers the engine needs: ``file``, ``s3``, ``gs`` or ``az``."""

# It gives up on a request that is silent for a second, which has ended many a load; S3 answers within a second nearly
# always, and so long is what our own S3 source waits.
_REQUEST_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True)
class RunaiSettings:
    """The engine's own settings, as far as a load can choose them.

    Attributes:
        chunk_bytes: How large its requests are, in bytes: at least 5 MiB for objects, 2 MiB for files. None: its own
            choice, 8 MiB for objects.
        request_timeout_s: How long a request to S3 may be silent before the engine makes it again, in seconds.
        virtual_addressing: Whether the bucket is named in the host's name. None: as our own S3 client does it.
    """

    chunk_bytes: int | None = None
    request_timeout_s: float | None = None
    virtual_addressing: bool | None = None


@dataclass(frozen=True, slots=True)
class Setup:
    """What one start of the engine is given; reads that differ in it cannot share a start.

    Attributes:
        backend: Which reader.
        variables: Environment variables that it must find.
        credentials: Its own names for credentials, region and endpoint, with their values.
    """

    backend: Backend
    variables: tuple[tuple[str, str], ...] = ()
    credentials: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @classmethod
    def of(
        cls,
        backend: Backend,
        settings: RunaiSettings,
        *,
        concurrency: int | None = None,
        virtual: bool | None = None,
        credentials: tuple[tuple[str, str], ...] = (),
    ) -> Setup:
        """Put our options into the engine's words.

        Args:
            backend: Which reader.
            settings: The load's.
            concurrency: How many workers it should have; None: its own choice, 16 for files and 8 for objects.
            virtual: How our own S3 client addresses the bucket.
            credentials: What it is to sign with, where we found it.
        """
        said: dict[str, str] = {}
        if concurrency is not None:
            # The general one too: versions that have no other read it.
            names = ("FS_QUEUE_DEPTH", "CONCURRENCY") if backend == "file" else ("OBJ_CONCURRENCY", "CONCURRENCY")
            said |= {f"RUNAI_STREAMER_{name}": str(concurrency) for name in names}
        if settings.chunk_bytes is not None:
            said["RUNAI_STREAMER_CHUNK_BYTESIZE"] = str(settings.chunk_bytes)
            if backend == "file":
                said["RUNAI_STREAMER_FS_CHUNK_BYTESIZE"] = str(settings.chunk_bytes)
        if backend == "s3":
            timeout_s = settings.request_timeout_s or _REQUEST_TIMEOUT_S
            said["RUNAI_STREAMER_S3_REQUEST_TIMEOUT_MS"] = str(round(timeout_s * 1000))
            # A second attempt while the first is still under way could write into memory that is in use again. We try
            # again ourselves, when the engine has answered.
            said["RUNAI_STREAMER_S3_TIMEOUT"] = "0"
            if settings.virtual_addressing is not None:
                virtual = settings.virtual_addressing
            if virtual is not None:
                said["RUNAI_STREAMER_S3_USE_VIRTUAL_ADDRESSING"] = str(int(virtual))
        return cls(backend, tuple(said.items()), credentials)


def file_strategy_is_set() -> bool:
    """Whether somebody has said how the engine is to read files: past the page cache or not, by which calls."""
    return "RUNAI_STREAMER_FS_STRATEGY" in os.environ


@contextmanager
def variables_set(variables: tuple[tuple[str, str], ...]) -> Iterator[None]:
    """Have these environment variables set, and afterwards as they were.

    The engine takes its settings from nowhere else. Some it reads when it starts, others when one of its threads first
    needs them, so they stay until it has ended. What somebody else sets meanwhile is left alone.
    """
    before = {name: os.environ.get(name) for name, _ in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in variables:
            if os.environ.get(name) == value:
                restored = before[name]
                if restored is None:
                    del os.environ[name]
                else:
                    os.environ[name] = restored
