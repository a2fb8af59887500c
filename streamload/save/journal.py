"""What a conversion notes beside its files, so that another process can go on with it, or see that it is done."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from typing import Any

from streamload.errors import CheckpointError

__all__ = ["JOURNAL_NAME", "Journal", "KeptFile", "Made"]

JOURNAL_NAME = ".streamload-shard.json"
"""What it is called: nothing that reads checkpoints looks at it."""

_FORMAT, _VERSION = "streamload-shard", 1


@dataclass(frozen=True, slots=True)
class Made:
    """What a conversion makes out of what.

    Attributes:
        ranks: How many ranks share each layer, how many pipeline stages there are, and the pattern of the files' names:
            where these differ, files of the two cannot lie in one folder.
        digest: Tells its slices and files, and what the source has to sum up to, from those of any other one.
        source: Size and version of each file that is read, by its key.
    """

    ranks: tuple[int, int, str]
    digest: str
    source: dict[str, tuple[int, str]]


@dataclass(frozen=True, slots=True)
class KeptFile:
    """A file that is finished, or begun.

    Attributes:
        size_bytes: How long it will be.
        header_bytes: Where its tensors begin.
        header_checksum: Of what comes before.
        sums: The checksums of its tensors' blocks so far, eight bytes each, as hexadecimal text.
        kept: What its destination needs to go on with it.
    """

    size_bytes: int
    header_bytes: int
    header_checksum: int
    sums: str
    kept: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Journal:
    """How far a conversion is.

    Attributes:
        made: What is made of what.
        group: The group of tensors that is being read.
        tensor: The first tensor that was not read.
        files: What there is of the files, by name.
        sums: What sums up the source: per file and stretch, what has been read of it.
        older: Files of an earlier conversion that are still there.
        done: Size and version of each file in the destination, once everything is there.
    """

    made: Made
    group: int = 0
    tensor: int = 0
    files: dict[str, KeptFile] = field(default_factory=dict)
    sums: dict[str, dict[str, list[list[int]]]] = field(default_factory=dict)
    older: list[str] = field(default_factory=list)
    done: dict[str, tuple[int, str]] = field(default_factory=dict)

    def encode(self) -> bytes:
        """As it is written."""
        return json.dumps({"format": _FORMAT, "version": _VERSION, **asdict(self)}, indent=1).encode()

    @classmethod
    def parse(cls, raw: bytes | bytearray) -> Journal:
        """Read what `encode` has written.

        Raises:
            CheckpointError: It is something else.
        """
        try:
            said = json.loads(raw)
            if (said.pop("format"), said.pop("version")) != (_FORMAT, _VERSION):
                raise ValueError("it is of another version")
            made = said.pop("made")
            tp, pp, pattern = made["ranks"]
            return cls(
                made=Made((int(tp), int(pp), str(pattern)), str(made["digest"]), _versions(made["source"])),
                files={name: KeptFile(**kept) for name, kept in said.pop("files").items()},
                done=_versions(said.pop("done")),
                **said,
            )
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise CheckpointError(
                f"this is no journal of a conversion ({error}): remove it, and the files that it was for",
                object=JOURNAL_NAME,
            ) from error


def _versions(said: dict[str, Any]) -> dict[str, tuple[int, str]]:
    return {str(key): (int(size), str(version)) for key, (size, version) in said.items()}
