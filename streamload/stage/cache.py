"""Versions side by side under one folder: where each lies, and which have to go.

::

    CACHE/NAME/DIGEST/    one version: its files, its READY, its locks
    CACHE/.streamload-cache.lock

A version is in use while a process holds one of its locks, and for a while after it was staged or found there.
"""

from __future__ import annotations

import logging
import os
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from streamload.errors import SourceError
from streamload.stage.locks import FileLock
from streamload.stage.names import LOCK_NAME, USE_NAME, version_name
from streamload.units import format_bytes, format_seconds

__all__ = ["CACHE_LOCK_NAME", "CachedVersion", "cached_versions", "evict", "is_version", "link_to", "version_folder"]

CACHE_LOCK_NAME = ".streamload-cache.lock"
"""Held by who removes versions."""

_GOING_SUFFIX = ".streamload-removed"

_logger = logging.getLogger("streamload.stage")


@dataclass(frozen=True, slots=True)
class CachedVersion:
    """A version in a cache.

    Attributes:
        path: Its folder.
        nbytes: The room that it takes.
        used_s: When it was used last, in seconds since 1970.
    """

    path: str
    nbytes: int
    used_s: float


def version_folder(cache: str, uri: str, digest: str) -> str:
    """Where a version lies."""
    return os.path.join(cache, version_name(uri), digest)


def is_version(folder: str) -> bool:
    """Whether a folder is a version in a cache."""
    return os.path.lexists(os.path.join(folder, USE_NAME))


def cached_versions(cache: str) -> list[CachedVersion]:
    """All versions, the least recently used first; only what has a lock of ours is one.

    Raises:
        OSError: The cache cannot be listed.
    """
    found: list[CachedVersion] = []
    for name in sorted(os.listdir(cache)):
        parent = os.path.join(cache, name)
        if os.path.islink(parent) or not os.path.isdir(parent):
            continue
        for digest in sorted(os.listdir(parent)):
            if digest.endswith(_GOING_SUFFIX):
                continue
            path = os.path.join(parent, digest)
            try:
                used_s = os.lstat(os.path.join(path, USE_NAME)).st_mtime
            except OSError:
                continue
            found.append(CachedVersion(path, sum(_sizes(path)), used_s))
    return sorted(found, key=lambda version: version.used_s)


def evict(
    cache: str, *, keep_bytes: int, keep_s: float, needed_bytes: int, now_s: float, spare: Callable[[str], bool]
) -> list[CachedVersion]:
    """Remove versions, the least recently used first, until what is left and what is needed stay within a limit.

    A version goes all at once, by renaming its folder while its lock is held; who waits for that lock finds it gone.
    What is in use stays, even beyond the limit, and so does what cannot be removed; a log line says so. Called with the
    cache's lock held.

    Args:
        cache: The cache.
        keep_bytes: The limit.
        keep_s: What was used less than so many seconds ago is in use.
        needed_bytes: What will be staged.
        now_s: The time, in seconds since 1970.
        spare: Which folders stay in any case.

    Returns:
        What was removed.

    Raises:
        OSError: The cache cannot be listed.
    """
    _clear_up(cache)
    versions = cached_versions(cache)
    total = sum(version.nbytes for version in versions)
    removed: list[CachedVersion] = []
    for version in versions:
        if total + needed_bytes <= keep_bytes:
            break
        if spare(version.path) or now_s - version.used_s < keep_s:
            continue
        try:
            if not _take_away(version.path, used_before_s=now_s - keep_s):
                continue
        except OSError as error:
            _logger.warning("%s cannot be removed, and stays: %s", version.path, error.strerror)
            continue
        _remove(version.path + _GOING_SUFFIX)
        total -= version.nbytes
        removed.append(version)
        _logger.info(
            "%s: removed, %s, last used %s ago",
            version.path,
            format_bytes(version.nbytes),
            format_seconds(now_s - version.used_s),
        )
    if total + needed_bytes > keep_bytes:
        _logger.warning(
            "%s: %s stay, more than keep_bytes: they are in use, or cannot be removed",
            cache,
            format_bytes(total + needed_bytes),
        )
    return removed


def _take_away(path: str, *, used_before_s: float) -> bool:
    """Rename a version's folder, so that nobody finds it any more; whether that was done, and not in use.

    Raises:
        OSError: It cannot be renamed.
    """
    use, work = (FileLock(os.path.join(path, name)) for name in (USE_NAME, LOCK_NAME))
    try:
        # Since the versions were listed, somebody may have found it and gone: his lock has, and what he noted has not.
        if not use.take() or not work.take() or use.touched_s > used_before_s:
            return False
        os.rename(path, path + _GOING_SUFFIX)
        return True
    finally:
        use.release()
        work.release()


def link_to(link: str, target: str) -> None:
    """Make a link to a version's folder, in place of another link that is there.

    Args:
        link: The link's own path.
        target: The folder.

    Raises:
        SourceError: Something that is no link is in its place.
        OSError: It cannot be made.
    """
    if os.path.lexists(link) and not os.path.islink(link):
        raise SourceError(
            f"{link} is no link: with a cache, the folder to stage into becomes a link to a version in the cache; name "
            "a path where nothing is yet"
        )
    parent = os.path.dirname(link) or "."
    os.makedirs(parent, exist_ok=True)
    # A name of its own: several may do this at once, and process ids repeat between containers.
    unfinished = os.path.join(parent, f".{os.path.basename(link)}.{secrets.token_hex(8)}.streamload-staging")
    os.symlink(target, unfinished)
    os.rename(unfinished, link)


def _clear_up(cache: str) -> None:
    """Remove what a killed process has left of versions that it was removing."""
    for name in os.listdir(cache):
        parent = os.path.join(cache, name)
        if os.path.islink(parent) or not os.path.isdir(parent):
            continue
        for digest in os.listdir(parent):
            if digest.endswith(_GOING_SUFFIX):
                _remove(os.path.join(parent, digest))


def _remove(folder: str) -> None:
    """Remove what nobody finds any more; what cannot be removed is tried again by the next one who looks."""
    # Imported here: with its compressors it takes longer than all else that a second run does.
    from shutil import rmtree

    try:
        rmtree(folder)
    except OSError as error:
        # A network mount keeps a file that somebody has open.
        _logger.warning("%s cannot be removed yet: %s", folder, error.strerror)


def _sizes(folder: str) -> Iterator[int]:
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                yield os.lstat(os.path.join(parent, name)).st_blocks * 512
            except FileNotFoundError:
                continue
