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
from streamload.checkpoint import Catalog, ShardFile, Stripe, TensorInfo
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
    ManifestError,
    MemoryLimitError,
    MismatchError,
    MissingDependencyError,
    NotFoundError,
    ObjectChangedError,
    OptionError,
    PeerError,
    SourceError,
    StreamloadError,
    TransientError,
    TruncatedReadError,
    UnsupportedDtypeError,
)
from streamload.events import Event, Progress
from streamload.filling import load_into
from streamload.inspection import Inspection, RankPlan, inspect
from streamload.loader import AsyncStream, Stream, load, open, stream
from streamload.manifesting import WrittenManifest, write_manifest
from streamload.options import LoadOptions, Options
from streamload.plan import (
    Absent,
    Batch,
    Experts,
    PackedShard,
    Piece,
    Placement,
    Placements,
    Plan,
    Ranks,
    Read,
    Replicate,
    Shard,
)
from streamload.report import Report
from streamload.saving import SavedShards, save_sharded
from streamload.service import ServeArguments
from streamload.serving import serve_checkpoint
from streamload.sharding import ShardedCheckpoint, shard
from streamload.slicing import LoadWeights, SlicedLoad, load_sliced
from streamload.stage import StageArguments, Staged
from streamload.staging import stage_checkpoint
from streamload.trace import Trace
from streamload.verification import BadBlock, FileVerification, Verification, verify

# Without it, Python prints warnings to stderr where nobody has configured logging.
logging.getLogger("streamload").addHandler(logging.NullHandler())

__all__ = [
    "Absent",
    "AccessError",
    "AsyncStream",
    "BadBlock",
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
    "Experts",
    "FileVerification",
    "Finding",
    "HeaderError",
    "IndexFileError",
    "Inspection",
    "LoadOptions",
    "LoadWeights",
    "ManifestError",
    "MemoryLimitError",
    "MismatchError",
    "MissingDependencyError",
    "NotFoundError",
    "ObjectChangedError",
    "OptionError",
    "Options",
    "PackedShard",
    "PeerError",
    "Piece",
    "Placement",
    "Placements",
    "Plan",
    "Progress",
    "RankPlan",
    "Ranks",
    "Read",
    "Replicate",
    "Report",
    "SavedShards",
    "ServeArguments",
    "Shard",
    "ShardFile",
    "ShardedCheckpoint",
    "SlicedLoad",
    "SourceError",
    "StageArguments",
    "Staged",
    "Stream",
    "StreamloadError",
    "Stripe",
    "TensorInfo",
    "Trace",
    "TransientError",
    "TruncatedReadError",
    "UnsupportedDtypeError",
    "Verification",
    "WrittenManifest",
    "__version__",
    "doctor",
    "inspect",
    "load",
    "load_into",
    "load_sliced",
    "open",
    "save_sharded",
    "serve_checkpoint",
    "shard",
    "stage_checkpoint",
    "stream",
    "verify",
    "write_manifest",
]
