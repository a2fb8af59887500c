"""Which keys a source will look for."""

from __future__ import annotations

from streamload.errors import NotFoundError

__all__ = ["check_key"]


def check_key(key: str, *, uri: str) -> None:
    """Refuse a key that does not lie under the root: keys come out of index files, which anybody can write.

    Raises:
        NotFoundError: A part of the key is empty, ``.`` or ``..``, or there is a null byte in it.
    """
    if "\0" in key or any(part in {"", ".", ".."} for part in key.split("/")):
        raise NotFoundError("this is no name of an object under the URI", uri=uri, object=key)
