"""Saves what a rank has, so that it can be loaded per rank again."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from streamload.checkpoint import RankFiles
from streamload.errors import OptionError, StreamloadError
from streamload.options import resolve
from streamload.pipeline.engine import run_in_thread
from streamload.pipeline.policy import RetryPolicy
from streamload.save import Destination, open_destination
from streamload.shared_memory import covering
from streamload.sinks.dtypes import require_torch
from streamload.uris import scrub_uri

if TYPE_CHECKING:
    import torch

__all__ = ["SavedShards", "destination_for", "memory_limit", "save_sharded"]

_MAX_FILE_BYTES = 5 << 30
"""What vLLM's own example takes."""


@dataclass(frozen=True, slots=True)
class SavedShards:
    """What one rank has saved.

    Attributes:
        uri: Where.
        files: The shard files' names, in order of their parts.
        manifest: The manifest's name; None where none was asked for.
        tensors: How many tensors there are in them; what shares memory with another one is not.
        nbytes: The files' bytes, headers included.
    """

    uri: str
    files: tuple[str, ...]
    manifest: str | None
    tensors: int
    nbytes: int


def save_sharded(
    model: torch.nn.Module | Mapping[str, torch.Tensor],
    uri: str | os.PathLike[str],
    *,
    rank: int = 0,
    world_size: int = 1,
    pp_size: int = 1,
    pattern: str | None = None,
    max_file_bytes: int | None = _MAX_FILE_BYTES,
    manifest: bool = True,
    memory_bytes: int | None = None,
) -> SavedShards:
    """Save the tensors that this rank has, as vLLM's ``sharded_state`` reads them.

    Each rank calls it with its own model; ranks do not wait for each other. The files of this rank appear when all of
    them are complete, and its manifest last; until then nothing is under their names, and a save that fails or is
    interrupted leaves nothing there. Files that an earlier save of the same rank left are replaced or removed.

    Of tensors that share memory, the one that covers the others is saved. Tensors may lie on any device and need not be
    contiguous; what has to be copied is copied in pieces. Tensors must not change meanwhile.

    Args:
        model: A module, whose ``state_dict()`` counts, or tensors by name.
        uri: A directory, which is made where it is missing, or ``s3://bucket/prefix``.
        rank: This rank.
        world_size: How many ranks there are.
        pp_size: How many pipeline stages these ranks make up; those of one stage follow one another.
        pattern: A file name over the fields ``tp_rank`` or ``rank``, ``pp_rank`` and ``part``, as vLLM's
            ``sharded_state`` takes it: both of the first two count within a stage. None: vLLM's own,
            ``model-rank-{rank}-part-{part}.safetensors``, or with several stages
            ``model-pp-{pp_rank}-tp-{tp_rank}-part-{part}.safetensors``.
        max_file_bytes: How many bytes of tensors a file may hold; a larger tensor has a file of its own. None: no
            limit.
        manifest: Whether to write the checksums of all blocks beside the files, which loads verify against.
        memory_bytes: The limit on copies and parts that are on their way. None: as for a load.

    Raises:
        OptionError: The numbers or the pattern make no sense, or something is not a tensor.
        UnsupportedDtypeError: A tensor's dtype is not one of the format's.
        SourceError: It could not be written.
        MissingDependencyError: torch is not installed.
    """
    require_torch()
    from streamload.save.sharded import write_sharded
    from streamload.save.tensors import local_tensor

    if max_file_bytes is not None and (type(max_file_bytes) is not int or max_file_bytes < 1):
        raise OptionError(f"max_file_bytes={max_file_bytes!r} is not a whole number of at least 1")
    names = RankFiles(rank, world_size, pp_size, pattern)
    name = os.fspath(uri)
    limit = memory_limit(memory_bytes)
    # Half of it for copies of tensors, half for parts of objects: neither waits for the other.
    destination = destination_for(name, limit // 2)
    tensors = {str(key): local_tensor(str(key), value) for key, value in _state_of(model).items()}
    kept = covering(tensors)
    _wait_for_devices(kept)

    async def save() -> SavedShards:
        async with destination:
            written = await write_sharded(
                destination, names, kept, max_file_bytes=max_file_bytes, manifest=manifest, memory_bytes=limit // 2
            )
        return SavedShards(
            uri=destination.uri,
            files=tuple(file.key for file in written.files),
            manifest=written.manifest,
            tensors=len(kept),
            nbytes=sum(file.size_bytes for file in written.files),
        )

    try:
        return run_in_thread(save)
    except StreamloadError as error:
        raise error.locate(uri=scrub_uri(name)) from error.__cause__


def memory_limit(memory_bytes: int | None) -> int:
    """The effective limit: what was given, what the environment says, or the default.

    Raises:
        OptionError: It makes no sense.
    """
    options, _ = resolve({} if memory_bytes is None else {"memory_bytes": memory_bytes})
    assert options.memory_bytes is not None
    return options.memory_bytes


def destination_for(uri: str, memory_bytes: int, *, files: int = 1) -> Destination:
    """What writes to a URI, with requests made again as a load makes them again.

    Args:
        uri: The folder.
        memory_bytes: The limit on what is held until it is written.
        files: How many files one task writes at the same time.

    Raises:
        OptionError: Nothing writes there.
    """
    return open_destination(uri, memory_bytes=memory_bytes, ask=_ask, files=files)


async def _ask(call: Callable[[], Awaitable[Any]], key: str) -> Any:
    policy = RetryPolicy()
    attempts = 0
    while True:
        attempts += 1
        try:
            return await call()
        except StreamloadError as error:
            wait_s = policy.backoff_s(attempts, error, random.random())
            if wait_s is None:
                raise error.locate(attempts=attempts) from None
        await asyncio.sleep(wait_s)


def _state_of(model: torch.nn.Module | Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    if isinstance(model, Mapping):
        return model
    state_dict = getattr(model, "state_dict", None)
    if not callable(state_dict):
        raise OptionError(f"what is to be saved is neither a module nor a mapping but {type(model).__name__}")
    return cast("Mapping[str, torch.Tensor]", state_dict())


def _wait_for_devices(tensors: Mapping[str, torch.Tensor]) -> None:
    """The save's threads copy on streams of their own: what the caller's streams still write must be there first."""
    import torch

    for device in {tensor.device for tensor in tensors.values() if tensor.device.type == "cuda"}:
        torch.cuda.synchronize(device)
