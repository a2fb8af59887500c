"""What is in a folder already: ours and whole, or in the way."""

from __future__ import annotations

import os
from collections.abc import Callable

from streamload.errors import SourceError
from streamload.stage.listing import Listing
from streamload.stage.names import READY_NAME
from streamload.stage.ready import ReadyFile, is_as_staged, read_ready

__all__ = ["look"]


def look(
    folder: str,
    listing: Listing,
    known: dict[str, ReadyFile],
    *,
    counts: Callable[[ReadyFile], bool],
    replace: bool,
) -> dict[str, ReadyFile]:
    """Look which files are there, whole; what is in the way of the others is refused, or will be replaced.

    Args:
        folder: Where to look.
        listing: What is wanted.
        known: What the marker or the journal says of files under their names.
        counts: Whether a file that is as it was staged need not be read again.
        replace: Whether what is in the way will be replaced.

    Returns:
        What is there, of the wanted version.

    Raises:
        SourceError: Something is in the way.
    """
    there: dict[str, ReadyFile] = {}
    for key, file in listing.files.items():
        path = os.path.join(folder, key)
        said = known.get(key)
        if said is not None and is_as_staged(folder, said):
            if said.identity == file.identity and counts(said):
                there[key] = said
        elif os.path.isdir(path) and not os.path.islink(path):
            raise SourceError("a folder is in the way of this file", object=key)
        elif os.path.lexists(path) and not replace:
            why = "is not what was staged here" if said is not None else "was not staged here"
            raise SourceError(
                f"the file in its place {why}; remove it, or say on_conflict='replace' (--on-conflict replace)",
                object=key,
            )
    marker = os.path.join(folder, READY_NAME)
    if os.path.lexists(marker) and read_ready(folder) is None and not replace:
        raise SourceError(
            "the marker there is not one of ours; remove it, or say on_conflict='replace' (--on-conflict replace)",
            object=READY_NAME,
        )
    return there
