"""A checkpoint staged for an engine that reads it meanwhile: what a sidecar does."""

from __future__ import annotations

import dataclasses
import os
import time
from typing import Any, Unpack

from streamload.errors import OptionError, StreamloadError
from streamload.pipeline.engine import run_in_thread
from streamload.service import ServeArguments, ServeOptions, Sidecar
from streamload.stage import Stager
from streamload.staging import folder_path, process_began_s, split_options
from streamload.uris import scrub_uri

__all__ = ["serve_checkpoint"]

_OF_SERVING = frozenset(field.name for field in dataclasses.fields(ServeOptions))
_SOCKET_NAME = "streamload.sock"


def serve_checkpoint(
    uri: str | os.PathLike[str], folder: str | os.PathLike[str] | None = None, **options: Unpack[ServeArguments]
) -> None:
    """Stage a checkpoint as `stage_checkpoint` does, and let others read what has landed meanwhile.

    They load ``sidecar://`` and the socket's path. Never returns: what interrupts it (an exception out of a signal's
    handler) ends it, once reads that are under way have landed. Staging that fails is begun again, after a pause or
    when somebody asks. Docs: docs/serve.md.

    Args:
        uri: As for `stage_checkpoint`.
        folder: As for `stage_checkpoint`.
        **options: The fields of `ServeOptions`, and what `stage_checkpoint` takes.

    Raises:
        OptionError: Bad options; what is staged would not lie in the socket's folder; another process serves there.
        SourceError: The socket or the port cannot be opened.
    """
    began_s = process_began_s()
    given: dict[str, Any] = dict(options)
    serving = ServeOptions.resolve({name: given.pop(name) for name in list(given) if name in _OF_SERVING})
    staging, reading = split_options(given)
    path = None if folder is None else folder_path(os.fspath(folder))
    root = staging.cache or path
    if root is None:
        raise OptionError("there is neither a folder to stage into nor a cache")
    if serving.socket is None and staging.cache is not None:
        raise OptionError("say where the socket is: with a cache, the folder becomes a link")
    socket = os.path.abspath(serving.socket or os.path.join(root, _SOCKET_NAME))

    def make() -> Stager:
        return Stager(os.fspath(uri), path, staging, reading)

    sidecar = Sidecar(
        make,
        os.path.dirname(socket),
        reading,
        drain_s=serving.drain_s,
        began_s=time.monotonic() if began_s is None else began_s,
    )
    # Now rather than when somebody asks; the folder itself need not be there yet.
    sidecar.relative(os.path.join(os.path.abspath(root), "file"))

    # Imported here: with aiohttp's server it takes longer than all of `import streamload`.
    from streamload.service.listening import Listeners

    async def body() -> None:
        async with Listeners(sidecar, socket, serving):
            await sidecar.run()

    try:
        run_in_thread(body)
    except StreamloadError as error:
        raise error.locate(uri=scrub_uri(os.fspath(uri))) from error.__cause__
