"""Streams model weights from where they lie into the memory of the rank that needs them.

::

    import streamload

    for name, tensor in streamload.stream("s3://models/llama", device="cuda:0"):
        ...

Loggers: ``streamload.progress`` (INFO: a line every few seconds, with ``progress=True`` and no terminal),
``streamload.events`` (INFO: attempts that are made again; ERROR: a callback raised), ``streamload.options`` (WARNING: a
variable's name is misspelt), ``streamload.sources`` (WARNING: a thread was left behind in the kernel). The library
prints nothing, but for the bar of ``progress=True``.
"""

from __future__ import annotations

import logging

from streamload._version import __version__
from streamload.checkpoint import Catalog, ShardFile, TensorInfo
from streamload.diagnosis import Diagnosis, Finding, doctor
from streamload.errors import (
    AccessError,
    CheckpointError,
    ChecksumError,
    ClosedError,
    CredentialsError,
    DeadlineError,
    DeviceError,
    HeaderError,
    IndexFileError,
    MemoryLimitError,
    MissingDependencyError,
    NotFoundError,
    ObjectChangedError,
    OptionError,
    SourceError,
    StreamloadError,
    TransientError,
    TruncatedReadError,
    UnsupportedDtypeError,
)
from streamload.events import Event, Progress
from streamload.inspection import Inspection, inspect
from streamload.loader import AsyncStream, Stream, load, open, stream
from streamload.options import LoadOptions, Options
from streamload.plan import Batch, Piece, Plan, Read
from streamload.report import Report
from streamload.trace import Trace

# Without it, Python prints warnings to stderr where nobody has configured logging.
logging.getLogger("streamload").addHandler(logging.NullHandler())

__all__ = [
    "AccessError",
    "AsyncStream",
    "Batch",
    "Catalog",
    "CheckpointError",
    "ChecksumError",
    "ClosedError",
    "CredentialsError",
    "DeadlineError",
    "DeviceError",
    "Diagnosis",
    "Event",
    "Finding",
    "HeaderError",
    "IndexFileError",
    "Inspection",
    "LoadOptions",
    "MemoryLimitError",
    "MissingDependencyError",
    "NotFoundError",
    "ObjectChangedError",
    "OptionError",
    "Options",
    "Piece",
    "Plan",
    "Progress",
    "Read",
    "Report",
    "ShardFile",
    "SourceError",
    "Stream",
    "StreamloadError",
    "TensorInfo",
    "Trace",
    "TransientError",
    "TruncatedReadError",
    "UnsupportedDtypeError",
    "__version__",
    "doctor",
    "inspect",
    "load",
    "open",
    "stream",
]
