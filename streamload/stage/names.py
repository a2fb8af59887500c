"""Which of a source's files are staged, and what staging calls its own. No I/O."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from streamload.sources.base import SourceObject

__all__ = [
    "JOURNAL_NAME",
    "LOCK_NAME",
    "READY_NAME",
    "USE_NAME",
    "USUAL_NAMES",
    "choose",
    "identity",
    "is_unfinished",
    "is_weights",
    "unfinished_name",
    "version_digest",
    "version_name",
]

READY_NAME = "READY"
"""Written last: what is there is whole."""

LOCK_NAME = ".streamload-stage.lock"
"""Locked by who stages."""

USE_NAME = ".streamload-stage.used"
"""In a cache: locked, shared, by who uses a version; its time of change says when it was used last."""

JOURNAL_NAME = ".streamload-stage.journal"
"""What has landed and was summed up, until all is there."""

USUAL_NAMES = (
    *("config.json", "generation_config.json", "configuration.json", "params.json", "modules.json"),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "tokenizer.model"),
    *("vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model", "tekken.json"),
    *("chat_template.jinja", "chat_template.json", "preprocessor_config.json", "processor_config.json"),
    *("video_preprocessor_config.json", "quantize_config.json", "quant_config.json", "hf_quant_config.json"),
)
"""What lies beside weights, for a source that cannot list it: what transformers and vLLM look for by name."""

_PREFIX, _SUFFIX = ".", ".streamload-staging"

_WEIGHTS = ".safetensors"
# The same weights once more: beside safetensors files, nobody who reads those needs them.
_OTHER_FORMATS = ("*.bin", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.ot", "*.pt", "*.pth")

_DIGEST_LETTERS = 16


def choose(
    keys: Iterable[str], *, include: Sequence[str], exclude: Sequence[str], shards: Sequence[str] | None
) -> list[str]:
    """Say which files are staged: all that a program which loads the checkpoint could want.

    Hidden files and staging's own are left out; so are, where there are safetensors files, those of other formats, and
    safetensors files that the index does not name. Globs that include are taken at their word instead.

    Args:
        keys: All there are.
        include: Globs; only what matches one of them is staged. None given: what was said above.
        exclude: Globs; what matches one of them is not.
        shards: The files that the index names; None where there is none.
    """
    found = sorted(dict.fromkeys([*keys, *(shards or ())]))
    found = [
        key for key in found if key != READY_NAME and not key.startswith(".streamload-") and not is_unfinished(key)
    ]
    if include:
        found = [key for key in found if _matches(key, include)]
    else:
        weights = any(key.endswith(_WEIGHTS) for key in found)
        named = None if shards is None else set(shards)
        found = [
            key
            for key in found
            if not key.startswith(".")
            and not (weights and _matches(key, _OTHER_FORMATS))
            and not (named is not None and key.endswith(_WEIGHTS) and key not in named)
        ]
    return [key for key in found if not _matches(key, exclude)]


def unfinished_name(key: str) -> str:
    """What a file is called until it is whole: nothing that a loader looks at."""
    folder, slash, name = key.rpartition("/")
    return f"{folder}{slash}{_PREFIX}{name}{_SUFFIX}"


def is_unfinished(key: str) -> bool:
    """Whether a file is called as unfinished ones are."""
    name = key.rpartition("/")[2]
    return name.startswith(_PREFIX) and name.endswith(_SUFFIX)


def is_weights(key: str) -> bool:
    """Whether a file holds weights, in any format; the others are small, and describe them."""
    return key.endswith(_WEIGHTS) or _matches(key, _OTHER_FORMATS)


def identity(uri: str, object: SourceObject) -> str:
    """What tells one version of one file from all others; a file's own version says nothing on another disk."""
    return _digest(uri, object.key, str(object.size_bytes), object.version)


def version_digest(identities: Iterable[str]) -> str:
    """What tells one version of a checkpoint, and a choice of its files, from all others."""
    return _digest(*sorted(identities))


def version_name(uri: str) -> str:
    """A folder's name for all versions of what a URI names: its last part, and what tells it from others."""
    last = uri.partition("?")[0].rstrip("/").rpartition("/")[2]
    return f"{re.sub(r'[^A-Za-z0-9._-]+', '-', last).strip('.-') or 'checkpoint'}-{_digest(uri)[:8]}"


def _digest(*parts: str) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode("utf-8", "surrogateescape") + b"\0")
    return digest.hexdigest()[:_DIGEST_LETTERS]


def _matches(key: str, globs: Iterable[str]) -> bool:
    return any(fnmatchcase(key, glob) for glob in globs)
