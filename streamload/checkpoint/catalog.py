"""The catalog: which files make a checkpoint, whether they fit together, and which of their tensors are wanted."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Sequence
from dataclasses import replace

from streamload.checkpoint.index import SHARD_SUFFIX, Index
from streamload.checkpoint.tensors import Catalog, ShardFile
from streamload.checkpoint.text import brief, natural_key
from streamload.errors import CheckpointError, IndexFileError, OptionError

__all__ = ["build_catalog", "name_filter", "select", "shard_keys"]


def shard_keys(listed_keys: Sequence[str], index: Index | None, *, all_listed: bool = True) -> tuple[str, ...]:
    """Say which shard files make the checkpoint, in the order in which they are read.

    Args:
        listed_keys: What lies in the checkpoint's folder, deeper folders left out.
        index: What the chosen index file says, if there is one. Only the files that it names count then: a folder can
            hold the same weights twice.
        all_listed: Whether that is all that lies there; where not, the index is believed.

    Returns:
        Their keys in natural order; never empty. A file that the index names in a deeper folder is among them unseen.

    Raises:
        IndexFileError: The index names a file that is not there.
        CheckpointError: There is no shard file.
    """
    if index is not None:
        if all_listed:
            _check_listed(index, set(listed_keys))
        return index.shards
    shards = sorted((key for key in listed_keys if key.endswith(SHARD_SUFFIX)), key=natural_key)
    if not shards:
        there_is = f"only {brief(sorted(listed_keys))}" if listed_keys else "nothing at all"
        raise CheckpointError(f"no file ends in {SHARD_SUFFIX}; there is {there_is}")
    return tuple(shards)


def _check_listed(index: Index, listed_keys: set[str]) -> None:
    missing = [shard for shard in index.shards if "/" not in shard and shard not in listed_keys]
    if not missing:
        return
    name = next(name for name, shard in index.weight_map.items() if shard == missing[0])
    others = f", nor are {len(missing) - 1} more of the files that it names" if len(missing) > 1 else ""
    raise IndexFileError(
        f"the index names {brief(missing[0])} for tensor {brief(name)}, but that file is not there{others}",
        object=index.key,
    )


def build_catalog(files: Sequence[ShardFile], index: Index | None) -> Catalog:
    """Put the shard files together and check that they fit the index.

    A tensor that lies in one of the files but not in the index belongs to the checkpoint nevertheless: an index left
    stale by a tool that added tensors must not make them disappear.

    Args:
        files: The files that `shard_keys` named, in the order in which they are to be read.
        index: The index that named them, if one did.

    Raises:
        IndexFileError: A tensor does not lie in the file that the index names for it.
        CheckpointError: A tensor lies in two files.
    """
    owners: dict[str, str] = {}
    for file in files:
        for tensor in file.tensors:
            owner = owners.get(tensor.name)
            if owner is not None:
                raise CheckpointError(
                    f"tensor {brief(tensor.name)} lies in two files, {brief(owner)} and {brief(file.key)}",
                    object=file.key,
                )
            owners[tensor.name] = file.key
    if index is not None:
        _check_index(index, owners)
    return Catalog(tuple(files))


def _check_index(index: Index, owners: dict[str, str]) -> None:
    misplaced = [name for name, shard in index.weight_map.items() if owners.get(name) != shard]
    if not misplaced:
        return
    name = misplaced[0]
    found = f"it lies in {brief(owners[name])}" if name in owners else "it is in no file"
    others = f"; the same goes for {len(misplaced) - 1} more of its tensors" if len(misplaced) > 1 else ""
    raise IndexFileError(
        f"the index names {brief(index.weight_map[name])} for tensor {brief(name)}, but {found}{others}",
        object=index.key,
    )


def select(catalog: Catalog, include: Sequence[str], exclude: Sequence[str], *, partial: bool = False) -> Catalog:
    """Choose tensors by their names.

    Globs are those of `fnmatch` (``*``, ``?``, ``[seq]``, ``[!seq]``) over the whole name, case-sensitive; ``*`` also
    matches dots.

    Args:
        catalog: All there are.
        include: A tensor is chosen if any of these matches it; without any, every tensor is.
        exclude: A tensor that any of these matches is left out, chosen or not. Globs that match nothing do no harm.
        partial: Whether the catalog is a part of the checkpoint, in which there need not be what `include` names.

    Returns:
        The chosen tensors. Files keep their sizes; those out of which nothing was chosen are left out.

    Raises:
        OptionError: A glob of `include` matches no tensor at all.
    """
    if not include and not exclude:
        return catalog
    for glob in () if partial else include:
        matches = re.compile(fnmatch.translate(glob)).match
        if not any(matches(tensor.name) for file in catalog.files for tensor in file.tensors):
            raise OptionError(f"no tensor's name matches {brief(glob)}, which was to be included")
    wanted = name_filter(include, exclude)
    files = []
    for file in catalog.files:
        chosen = tuple(tensor for tensor in file.tensors if wanted(tensor.name))
        if chosen:
            files.append(replace(file, tensors=chosen))
    return Catalog(tuple(files))


def name_filter(include: Sequence[str], exclude: Sequence[str]) -> Callable[[str], bool]:
    """What `select` chooses by: whether a name is among those that are included, and not among those left out."""
    included, excluded = _any_of(include or ["*"]).match, _any_of(exclude).match
    return lambda name: included(name) is not None and excluded(name) is None


def _any_of(globs: Sequence[str]) -> re.Pattern[str]:
    # `(?!)` matches nothing: no glob at all must not become the empty pattern, which matches everything.
    return re.compile("|".join(map(fnmatch.translate, globs)) or "(?!)")
