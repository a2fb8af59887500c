"""How is a checkpoint written, so that it is there whole or not at all? Onto disks and into S3."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from importlib import import_module
from typing import Any

from streamload.errors import OptionError
from streamload.save.base import Ask, Destination, NewFile
from streamload.uris import scheme_of

__all__ = ["Ask", "Destination", "NewFile", "open_destination"]

# Module and class; the modules are imported when a URI asks for them.
_BUILT_IN = {
    "file": ("streamload.save.local", "LocalDestination"),
    "s3": ("streamload.save.s3", "S3Destination"),
}


async def _ask_once(call: Callable[[], Awaitable[Any]], key: str) -> Any:
    return await call()


def open_destination(uri: str, *, memory_bytes: int, ask: Ask = _ask_once, files: int = 1) -> Destination:
    """Make what writes into the folder that a URI names. Nothing is opened, requested or created yet.

    Args:
        uri: A path, a ``file://`` URI, or ``s3://bucket/prefix``.
        memory_bytes: The limit on what is held in memory until it is written.
        ask: Makes a request again where that is worth it; by default, nothing is tried twice.
        files: How many files one task writes at the same time.

    Raises:
        OptionError: Nothing writes to such a URI, or it makes no sense.
    """
    scheme = scheme_of(uri)
    if scheme not in _BUILT_IN:
        raise OptionError(f"nothing can be written to {scheme}://; known are: {', '.join(sorted(_BUILT_IN))}", uri=uri)
    module, name = _BUILT_IN[scheme]
    destination = getattr(import_module(module), name)(uri, memory_bytes=memory_bytes, ask=ask, files=files)
    assert isinstance(destination, Destination)
    return destination
