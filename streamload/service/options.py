"""What a sidecar can be told beyond how to stage."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from streamload.errors import OptionError
from streamload.options import from_environment
from streamload.sources.sidecar_protocol import MAX_SOCKET_PATH_BYTES
from streamload.stage import StageArguments

__all__ = ["ServeArguments", "ServeOptions", "parse_mode"]

_MAX_PORT = 65535


def parse_mode(text: str) -> int:
    """A file's mode, in octal digits.

    Raises:
        ValueError: It is none.
    """
    try:
        return int(text, 8)
    except ValueError:
        raise ValueError(f"{text!r} is no mode in octal digits, such as 660") from None


@dataclass(frozen=True, kw_only=True, slots=True)
class ServeOptions:
    """Who may ask, and where.

    Attributes:
        socket: The Unix socket's path; None: ``streamload.sock`` in the folder that is staged into. What is staged has
            to lie in the socket's folder.
        socket_mode: The socket's mode: who may write to it may ask. What is staged is as open as the process's umask
            says.
        socket_group: The group that it belongs to, by name or number; None: the process's.
        host: The address that the port is on; None: all of the machine's.
        port: Where state and metrics are shown, over TCP; 0: a free one; None: nowhere.
        drain_s: How long reads that are under way may take to land when the process is to end.
    """

    socket: str | None = None
    socket_mode: int = 0o666
    socket_group: str | None = None
    host: str | None = None
    port: int | None = None
    drain_s: float = 10.0

    def __post_init__(self) -> None:
        if self.socket is not None and len(os.fsencode(os.path.abspath(self.socket))) > MAX_SOCKET_PATH_BYTES:
            raise OptionError(
                f"socket={self.socket!r} is longer than the {MAX_SOCKET_PATH_BYTES} bytes that a Unix socket's path has"
            )
        if not 0 <= self.socket_mode <= 0o777:
            raise OptionError(f"socket_mode={self.socket_mode:o} is no mode")
        if self.port is not None and not 0 <= self.port <= _MAX_PORT:
            raise OptionError(f"port={self.port} is not from 0 to {_MAX_PORT}")
        if not 0 <= self.drain_s < float("inf"):
            raise OptionError(f"drain_s={self.drain_s!r} is not a number of seconds")

    @classmethod
    def resolve(cls, given: dict[str, Any]) -> ServeOptions:
        """Put together what the caller gave, what ``STREAMLOAD_SERVE_…`` variables say, and the defaults.

        Raises:
            OptionError: A value without meaning.
        """
        return cls(**{**from_environment(_FROM_ENVIRONMENT, prefix="SERVE_"), **given})


class ServeArguments(StageArguments, total=False):
    """`ServeOptions` and what staging takes, as keyword arguments."""

    socket: str | None
    socket_mode: int
    socket_group: str | None
    host: str | None
    port: int | None
    drain_s: float


_FROM_ENVIRONMENT: dict[str, Callable[[str], Any]] = {
    "socket": str,
    "socket_mode": parse_mode,
    "socket_group": str.strip,
    "host": str.strip,
    "port": int,
    "drain_s": float,
}
