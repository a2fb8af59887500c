"""What the engine asks over the Unix socket: what there is, where a range can be read, and the verdict on each file."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

from aiohttp import web

from streamload.errors import NotFoundError, ObjectChangedError, OptionError, SourceError, StreamloadError
from streamload.service.bodies import read_body
from streamload.service.sidecar import Sidecar
from streamload.sources.sidecar_protocol import (
    ASK_AGAIN_S,
    CANCEL,
    OBJECTS,
    PROGRESS,
    RANGE,
    START,
    STATUS,
    VERDICT,
    error_to_json,
)
from streamload.stage import Stager

__all__ = ["MAX_BODY_BYTES", "asking_app"]

_logger = logging.getLogger("streamload.service")

MAX_BODY_BYTES = 64 << 10
"""The longest path that Linux knows has 4096 bytes, each of which takes six in JSON at most."""

# Often enough for a person to see it move.
_PROGRESS_S = 0.5

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A range of one version of a file, or the whole of it.

    Attributes:
        key: The file.
        version: Which version of it.
        start: The first byte.
        end: One past the last; None where no range was named.
        stamp: What the one who asks has known the file by so far; None where he has read nothing of it.
    """

    key: str
    version: str
    start: int
    end: int | None
    stamp: str | None

    @classmethod
    def parse(cls, body: bytes) -> _Asked:
        """Understand a request.

        Raises:
            OptionError: It makes no sense.
        """
        try:
            said = json.loads(body)
        except (ValueError, RecursionError):
            raise OptionError("the body is not JSON") from None
        if not isinstance(said, dict) or said.keys() - {"key", "version", "start", "end", "stamp"}:
            raise OptionError("the body is no object with key, version, start, end and stamp")
        key, version, stamp = said.get("key"), said.get("version"), said.get("stamp")
        start, end = said.get("start", 0), said.get("end")
        if not isinstance(key, str) or not isinstance(version, str) or not isinstance(stamp, str | None):
            raise OptionError("key and version have to be strings, and stamp one or null")
        # A bool is an int as well.
        if type(start) is not int or type(end) not in (int, type(None)):
            raise OptionError("start and end have to be whole numbers", object=key)
        return cls(key, version, start, end, stamp)


class _Asking:
    """The handlers.

    Args:
        sidecar: What they ask.
    """

    def __init__(self, sidecar: Sidecar) -> None:
        self._sidecar = sidecar

    async def status(self, _: web.Request) -> web.Response:
        return web.json_response(self._sidecar.status())

    async def start(self, _: web.Request) -> web.Response:
        await self._sidecar.start()
        return web.json_response(self._sidecar.status())

    async def cancel(self, _: web.Request) -> web.Response:
        await self._sidecar.cancel()
        return web.json_response(self._sidecar.status())

    async def progress(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream", "Cache-Control": "no-cache"})
        await response.prepare(request)
        while True:
            status = self._sidecar.status()
            await response.write(f"event: {status['state']}\ndata: {json.dumps(status)}\n\n".encode())
            if status["state"] != "staging":
                return response
            await self._sidecar.changed(_PROGRESS_S)

    async def objects(self, _: web.Request) -> web.Response:
        return await self._in_time(self._objects)

    async def range(self, request: web.Request) -> web.Response:
        asked = _Asked.parse(await request.read())
        return await self._in_time(lambda: self._range(asked))

    async def verdict(self, request: web.Request) -> web.Response:
        asked = _Asked.parse(await request.read())
        return await self._in_time(lambda: self._verdict(asked))

    async def _in_time(self, answer: Callable[[], Awaitable[dict[str, Any]]]) -> web.Response:
        self._sidecar.waiting += 1
        try:
            async with asyncio.timeout(ASK_AGAIN_S):
                return web.json_response(await answer())
        except StreamloadError:  # one of which is a TimeoutError
            raise
        except TimeoutError:
            return web.json_response({}, status=202)
        finally:
            self._sidecar.waiting -= 1

    async def _objects(self) -> dict[str, Any]:
        stager = self._sidecar.stager()
        objects = await stager.objects()
        return {
            "uri": stager.uri,
            "objects": [
                {
                    "key": key,
                    "size_bytes": object.size_bytes,
                    "version": stager.identity(key),
                    # What is whole need not be asked for range by range.
                    **(self._place(stager, key, 0, object.size_bytes) if stager.is_whole(key) else {}),
                }
                for key, object in objects.items()
            ],
        }

    async def _range(self, asked: _Asked) -> dict[str, Any]:
        stager = self._sidecar.stager()
        size_bytes = await self._find(stager, asked)
        end = size_bytes if asked.end is None else asked.end
        if not 0 <= asked.start < end <= size_bytes:
            raise _RangeError(
                f"the file has {size_bytes} bytes", uri=stager.uri, object=asked.key, start=asked.start, end=end
            )
        if not stager.landed(asked.key, asked.start, end):
            stager.want(asked.key, asked.start, end)
            await stager.wait(asked.key, asked.start, end)
        self._check_stamp(stager, asked)
        self._sidecar.answered += 1
        return self._place(stager, asked.key, asked.start, end)

    async def _verdict(self, asked: _Asked) -> dict[str, Any]:
        stager = self._sidecar.stager()
        size_bytes = await self._find(stager, asked)
        await stager.whole(asked.key)
        self._check_stamp(stager, asked)
        return self._place(stager, asked.key, 0, size_bytes)

    async def _find(self, stager: Stager, asked: _Asked) -> int:
        """The size of a file that is staged, at the version that was asked for; no other path is ever looked at."""
        object = (await stager.objects()).get(asked.key)
        if object is None:
            raise NotFoundError("no such file is staged", uri=stager.uri, object=asked.key)
        if stager.identity(asked.key) != asked.version:
            raise ObjectChangedError(
                "another version is staged now than the one that was read before", uri=stager.uri, object=asked.key
            )
        return object.size_bytes

    def _check_stamp(self, stager: Stager, asked: _Asked) -> None:
        if asked.stamp is not None and not stager.knows(asked.key, asked.stamp):
            raise ObjectChangedError(
                "some of what was read before turned out to be wrong, and was replaced since: load it again",
                uri=stager.uri,
                object=asked.key,
            )

    def _place(self, stager: Stager, key: str, start: int, end: int) -> dict[str, Any]:
        place = stager.place(key, start, end)
        return {
            "path": self._sidecar.relative(place.path),
            "stamp": place.stamp,
            "landed": place.landed,
            "mtime_ns": place.mtime_ns,
            "verified": place.verified,
        }


class _RangeError(SourceError):
    """Not a range of the file."""


_STATUSES: dict[type[StreamloadError], int] = {
    OptionError: 400,
    NotFoundError: 404,
    ObjectChangedError: 409,
    _RangeError: 416,
}


def asking_app(sidecar: Sidecar) -> web.Application:
    """What answers on the Unix socket."""

    @web.middleware
    async def answer_errors(request: web.Request, handler: _Handler) -> web.StreamResponse:
        try:
            await read_body(request)
            return await handler(request)
        except web.HTTPException as error:
            return _failed(StreamloadError(f"{error.reason}: {request.method} {request.path}"), error.status)
        except StreamloadError as error:
            if sidecar.state == "stopping":
                return web.json_response({}, status=503)
            return _failed(sidecar.ended() if sidecar.was_cancelled else error, _STATUSES.get(type(error), 502))

    asking = _Asking(sidecar)
    app = web.Application(middlewares=[answer_errors], client_max_size=MAX_BODY_BYTES)
    app.add_routes(
        [
            web.get(STATUS, asking.status),
            web.get(PROGRESS, asking.progress),
            web.get(OBJECTS, asking.objects),
            web.post(RANGE, asking.range),
            web.post(VERDICT, asking.verdict),
            web.post(START, asking.start),
            web.post(CANCEL, asking.cancel),
        ]
    )
    return app


def _failed(error: StreamloadError, status: int) -> web.Response:
    return web.json_response({"error": error_to_json(error)}, status=status)
