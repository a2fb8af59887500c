"""The marker that is written last: which files are there, of which versions, and what they sum up to."""

from __future__ import annotations

import json
import os
import stat
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from streamload.errors import StreamloadError
from streamload.sources.keys import check_key
from streamload.stage.names import READY_NAME, unfinished_name
from streamload.stage.volume import sync_folder

__all__ = ["Ready", "ReadyFile", "file_of", "is_as_staged", "read_ready", "remove_ready", "write_ready"]

_FORMAT, _VERSION = "streamload-stage", 1
# Some 300 bytes for each file; what is longer is none of ours.
_MAX_BYTES = 16 << 20


@dataclass(frozen=True, slots=True)
class ReadyFile:
    """A file that is there, whole.

    Attributes:
        key: Its name.
        identity: Which version of which file it is a copy of, see `names.identity`.
        size_bytes: Its length.
        mtime_ns: When it was changed last, on the volume; a file with another time was changed since.
        checksum: What it sums up to, with the algorithm's name; None where it was not summed up.
        verified: What it was compared with; None where there was nothing.
        stamps: What readers knew it by while it was being brought, see `journal.Journal.stamp`.
    """

    key: str
    identity: str
    size_bytes: int
    mtime_ns: int
    checksum: str | None = None
    verified: str | None = None
    stamps: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Ready:
    """What the marker says.

    Attributes:
        uri: Where the files came from, without credentials.
        digest: Of this version and this choice of files.
        include: The globs that chose.
        exclude: The globs that left out.
        files: What is there.
        index: Identity of the index file that named the shards; None where there is none.
        shards: The files that it named.
    """

    uri: str
    digest: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    files: tuple[ReadyFile, ...]
    index: str | None = None
    shards: tuple[str, ...] = ()


def read_ready(folder: str) -> Ready | None:
    """What a folder's marker says; None where there is none, or one that is not ours.

    Raises:
        OSError: It cannot be read.
    """
    try:
        # Not waiting for who writes, should it be a pipe.
        fd = os.open(os.path.join(folder, READY_NAME), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (FileNotFoundError, NotADirectoryError):
        return None
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            return None
        with open(fd, "rb", closefd=False) as file:
            raw = file.read(_MAX_BYTES + 1)
    finally:
        os.close(fd)
    try:
        said = json.loads(raw)
        if (said["format"], said["version"]) != (_FORMAT, _VERSION):
            return None
        files = tuple(file_of(each) for each in said["files"])
        return Ready(
            uri=said["uri"],
            digest=said["digest"],
            include=tuple(said["include"]),
            exclude=tuple(said["exclude"]),
            files=files,
            index=said["index"],
            shards=tuple(said["shards"]),
        )
    except (ValueError, KeyError, TypeError, AttributeError):
        return None


def file_of(said: dict[str, Any]) -> ReadyFile:
    """A file, out of JSON.

    Whoever may write to the volume may have written it, and what it names may be removed: only what lies in the folder.

    Raises:
        TypeError: It is none.
    """
    file = ReadyFile(**{**said, "stamps": tuple(said.get("stamps", ()))})
    if not (isinstance(file.key, str) and type(file.size_bytes) is int and type(file.mtime_ns) is int):
        raise TypeError("not a file's name, size and time of change")
    try:
        check_key(file.key, uri="")
    except StreamloadError as error:
        raise TypeError(str(error)) from error
    return file


def write_ready(folder: str, ready: Ready) -> None:
    """Write the marker, so that it is there whole or not at all, and stays.

    Raises:
        OSError: It cannot be written.
    """
    content = json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(ready)}, indent=1) + "\n"
    unfinished = Path(folder, unfinished_name(READY_NAME))
    with suppress(FileNotFoundError):
        unfinished.unlink()
    with open(unfinished, "x", encoding="utf-8") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    # The files' names before the marker's.
    sync_folder(folder)
    os.rename(unfinished, os.path.join(folder, READY_NAME))
    sync_folder(folder)


def remove_ready(folder: str) -> None:
    """Remove the marker: what is there is not whole any more.

    Raises:
        OSError: It cannot be removed.
    """
    try:
        os.unlink(os.path.join(folder, READY_NAME))
    except FileNotFoundError:
        return
    sync_folder(folder)


def is_as_staged(folder: str, file: ReadyFile) -> bool:
    """Whether a file has the length and the time of change that it had when it was staged."""
    try:
        status = os.lstat(os.path.join(folder, file.key))
    except OSError:
        return False
    return (status.st_size, status.st_mtime_ns) == (file.size_bytes, file.mtime_ns)
