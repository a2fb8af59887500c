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
from importlib import import_module
from typing import TYPE_CHECKING, Any

from streamload._version import __version__
from streamload.checkpoint import Catalog, ShardFile, Stripe, TensorInfo
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
from streamload.trace import Trace

if TYPE_CHECKING:
    from streamload.diagnosis import Diagnosis, Finding, doctor
    from streamload.filling import load_into
    from streamload.inspection import Inspection, RankPlan, inspect
    from streamload.loader import AsyncStream, Stream, load, open, stream
    from streamload.manifesting import WrittenManifest, write_manifest
    from streamload.saving import SavedShards, save_sharded
    from streamload.service import ServeArguments
    from streamload.serving import serve_checkpoint
    from streamload.sharding import ShardedCheckpoint, shard
    from streamload.slicing import LoadWeights, SlicedLoad, load_sliced
    from streamload.stage import StageArguments, Staged
    from streamload.staging import stage_checkpoint
    from streamload.verification import BadBlock, FileVerification, Verification, verify

# What is imported when it is first asked for: no program does all of this, and an init container loads nothing.
_LATER = {
    "diagnosis": ("Diagnosis", "Finding", "doctor"),
    "filling": ("load_into",),
    "inspection": ("Inspection", "RankPlan", "inspect"),
    "loader": ("AsyncStream", "Stream", "load", "open", "stream"),
    "manifesting": ("WrittenManifest", "write_manifest"),
    "saving": ("SavedShards", "save_sharded"),
    "service": ("ServeArguments",),
    "serving": ("serve_checkpoint",),
    "sharding": ("ShardedCheckpoint", "shard"),
    "slicing": ("LoadWeights", "SlicedLoad", "load_sliced"),
    "stage": ("StageArguments", "Staged"),
    "staging": ("stage_checkpoint",),
    "verification": ("BadBlock", "FileVerification", "Verification", "verify"),
}
_MODULE_OF = {name: module for module, names in _LATER.items() for name in names}

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


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
