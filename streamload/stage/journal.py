"""What has landed so far, written down so that a killed process can be gone on from.

One line of JSON for each piece, appended after the piece itself. The journal is not trusted: a piece counts when its
bytes on the volume sum up to what the line says, so it needs no order among writes, and survives a power cut as well
as a SIGKILL. A line that is torn is none. Only that a file is whole is trusted, since that line is made durable after
the file and before the file gets its name.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

from streamload.stage.names import JOURNAL_NAME
from streamload.stage.ready import ReadyFile, file_of

__all__ = ["Journal", "Landed", "Noted", "read_journal"]


@dataclass(frozen=True, slots=True)
class Landed:
    """A piece of a file.

    Attributes:
        algorithm: How it was summed up.
        start: Its first byte.
        nbytes: How many there are.
        value: What they sum up to.
    """

    algorithm: str
    start: int
    nbytes: int
    value: int

    @property
    def end(self) -> int:
        """One past its last byte."""
        return self.start + self.nbytes


@dataclass(slots=True)
class Noted:
    """What a journal says.

    Attributes:
        landed: Pieces, by the identity of their file; they may overlap.
        whole: Files that are whole, by their key.
        stamps: What readers knew a file by, by its identity; see `Journal.stamp`.
    """

    landed: dict[str, list[Landed]] = field(default_factory=dict)
    whole: dict[str, ReadyFile] = field(default_factory=dict)
    stamps: dict[str, list[str]] = field(default_factory=dict)


def read_journal(folder: str) -> Noted:
    """Read what a folder's journal says; nothing where there is none.

    Raises:
        OSError: It cannot be read.
    """
    noted = Noted()
    try:
        with open(os.path.join(folder, JOURNAL_NAME), "rb") as file:
            lines = file.read().split(b"\n")
    except FileNotFoundError:
        return noted
    for line in lines[:-1]:  # what is behind the last line's end is torn
        try:
            _take(noted, json.loads(line))
        except (ValueError, KeyError, TypeError):
            continue
    return noted


def _take(noted: Noted, said: dict[str, Any]) -> None:
    if "whole" in said:
        file = file_of(said["whole"])
        noted.whole[file.key] = file
        return
    pieces = noted.landed.setdefault(said["of"], [])
    if "stamp" in said:
        noted.stamps.setdefault(said["of"], []).append(str(said["stamp"]))
        return
    if "forget" in said:
        noted.stamps.pop(said["of"], None)
        start, end = said["forget"]
        pieces[:] = [piece for piece in pieces if piece.end <= start or end <= piece.start]
        return
    piece = Landed(said["by"], said["at"], said["n"], int(said["sum"], 16))
    if piece.start >= 0 and piece.nbytes > 0:
        pieces.append(piece)


class Journal:
    """A folder's journal, open for more lines; its methods may be called on any thread.

    Args:
        folder: The folder.

    Raises:
        OSError: It cannot be opened.
    """

    def __init__(self, folder: str) -> None:
        self._path = os.path.join(folder, JOURNAL_NAME)
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW
        self._fd = os.open(self._path, flags, 0o666)
        size = os.fstat(self._fd).st_size
        # What comes next must not become a part of a torn line.
        self._lock = threading.Lock()
        self._torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"

    def landed(self, identity: str, piece: Landed) -> None:
        """A piece is in its place."""
        self._append(
            {"of": identity, "by": piece.algorithm, "at": piece.start, "n": piece.nbytes, "sum": f"{piece.value:x}"}
        )

    def stamp(self, identity: str, stamp: str) -> None:
        """Readers know a file by this from now on.

        Who has read of a file that is still known by the stamp that he was told has read nothing that was replaced
        since, whatever was killed and begun again meanwhile.
        """
        self._append({"of": identity, "stamp": stamp})

    def forget(self, identity: str, start: int, end: int) -> None:
        """A range turned out to be wrong: pieces that touch it do not count, nor do any stamps."""
        self._append({"of": identity, "forget": [start, end]})

    def whole(self, file: ReadyFile) -> None:
        """A file is whole and durable, and about to get its name. Returns when that is durable too."""
        self.vouch([file])

    def vouch(self, files: Iterable[ReadyFile]) -> None:
        """Files are whole under their names, which no marker may say from now on. Returns when that is durable."""
        for file in files:
            self._append({"whole": asdict(file)})
        os.fsync(self._fd)

    def close(self) -> None:
        """Keep it for the next one."""
        os.close(self._fd)

    def _append(self, said: dict[str, Any]) -> None:
        line = json.dumps(said, separators=(",", ":")).encode() + b"\n"
        with self._lock:
            # One call, and O_APPEND: another process's lines do not mix with ours.
            written = os.write(self._fd, b"\n" * self._torn + line) - self._torn
            self._torn = written != len(line)
        if self._torn:
            raise OSError(errno.ENOSPC, "the journal could not be written whole")
