"""Where a sidecar is asked: a Unix socket for the engine, a TCP port for who only looks."""

from __future__ import annotations

import asyncio
import grp
import logging
import os
import socket
import stat
from contextlib import suppress
from types import TracebackType
from typing import Self

from aiohttp import web

from streamload.errors import OptionError, SourceError
from streamload.service.asking import asking_app
from streamload.service.options import ServeOptions
from streamload.service.showing import showing_app
from streamload.service.sidecar import Sidecar
from streamload.sources.os_errors import translate_os_error
from streamload.stage.locks import FileLock

__all__ = ["Listeners"]

_logger = logging.getLogger("streamload.service")

_BACKLOG = 1024
# On the port, to which everybody may connect; the kubelet and Prometheus have one each.
_MOST_LOOKING = 32
# In the end every wait is answered at once; this is for who does not take the answer.
_CLOSE_S = 1.0


class Listeners:
    """The socket and the port, open for as long as the block runs.

    Of several processes, one has a socket: who holds the lock on the file beside it, which ends with its holder. So a
    socket that a killed process has left is replaced, and a living one's is not.

    Args:
        sidecar: Who is asked.
        path: The socket's absolute path.
        options: Who may ask.

    Attributes:
        port: Where the port is; None before it is open, or where there is none.

    Raises:
        OptionError: On entering: another process serves there; there is no such group.
        SourceError: On entering: the socket or the port cannot be opened.
    """

    def __init__(self, sidecar: Sidecar, path: str, options: ServeOptions) -> None:
        self._path = path
        self._options = options
        folder, name = os.path.split(path)
        self._lock = FileLock(os.path.join(folder, f".{name}.lock"))
        self._asking = self._runner(asking_app(sidecar))
        self._showing = self._runner(showing_app(sidecar))
        self._servers: list[asyncio.Server] = []
        self.port: int | None = None
        self._bound = False

    async def __aenter__(self) -> Self:
        try:
            await self._listen()
        except BaseException as error:
            await self._close()
            if isinstance(error, OSError) and not isinstance(error, SourceError):
                raise translate_os_error(error, uri=self._path) from error
            raise
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._close()

    def _runner(self, app: web.Application) -> web.AppRunner:
        # Who has gone away waits for nothing any more.
        return web.AppRunner(
            app,
            access_log=None,
            handler_cancellation=True,
            shutdown_timeout=_CLOSE_S,
            # How long it listens on to a body that it has refused, so that the answer is heard.
            lingering_time=_CLOSE_S,
            logger=_logger,
        )

    async def _listen(self) -> None:
        os.makedirs(os.path.dirname(self._path), exist_ok=True)
        if not self._lock.take():
            raise OptionError(f"another process serves on {self._path}")
        listener = self._bind()
        try:
            await self._asking.setup()
            server = self._asking.server
            assert server is not None
            loop = asyncio.get_running_loop()
            self._servers.append(await loop.create_unix_server(server, sock=listener, backlog=_BACKLOG))
        except BaseException:
            listener.close()
            raise
        _logger.info("serving on %s", self._path, extra={"fields": {"socket": self._path}})
        options = self._options
        if options.port is not None:
            await self._showing.setup()
            # An empty list of addresses is all of them.
            shown = await loop.create_server(self._look, options.host or None, options.port, backlog=_MOST_LOOKING)
            self._servers.append(shown)
            self.port = shown.sockets[0].getsockname()[1]
            _logger.info("state and metrics on port %d", self.port, extra={"fields": {"port": self.port}})

    def _look(self) -> asyncio.BaseProtocol:
        """A connection to the port: one more, in place of the oldest where there are too many."""
        server = self._showing.server
        assert server is not None
        for oldest in server.connections[: max(0, len(server.connections) - _MOST_LOOKING)]:
            oldest.force_close()
        return server()

    def _bind(self) -> socket.socket:
        """A socket that listens, with its owner and mode, and has its name last.

        Whoever found it earlier would be refused, and not come back.
        """
        options = self._options
        group = -1 if options.socket_group is None else _group_of(options.socket_group)
        if os.path.lexists(self._path) and not _is_socket(self._path):
            raise OptionError(f"{self._path} is no socket, and in the way of one")
        folder, name = os.path.split(self._path)
        # Not longer than its name, which may be as long as a socket's can be. What is there was left by a process that
        # was killed in between: we have the lock.
        private = os.path.join(folder, os.fsdecode(b"~" + os.fsencode(name)[:-1]))
        if os.path.lexists(private) and _is_socket(private):
            os.unlink(private)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        try:
            listener.bind(private)
            try:
                if group >= 0:
                    os.chown(private, -1, group)
                os.chmod(private, options.socket_mode)
                listener.listen(_BACKLOG)
                os.rename(private, self._path)
            except BaseException:
                os.unlink(private)
                raise
            self._bound = True
        except BaseException:
            listener.close()
            raise
        return listener

    async def _close(self) -> None:
        # Gone before anything else: who asks from now on waits for the next process.
        if self._bound:
            with suppress(OSError):
                os.unlink(self._path)
        for server in self._servers:
            server.close()
        await self._asking.cleanup()
        await self._showing.cleanup()
        self._lock.release()


def _is_socket(path: str) -> bool:
    return stat.S_ISSOCK(os.lstat(path).st_mode)


def _group_of(name: str) -> int:
    """A group's number.

    Raises:
        OptionError: There is none of this name.
    """
    if name.isdecimal():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        raise OptionError(f"socket_group={name!r}: there is no such group") from None
