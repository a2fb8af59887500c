"""What is shown over TCP, to the kubelet and to Prometheus: state, and nothing that changes any."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from aiohttp import web

from streamload.service.bodies import read_body
from streamload.service.sidecar import Sidecar

__all__ = ["HEALTH", "METRICS", "READY", "STARTUP", "showing_app"]

STARTUP = "/startupz"
HEALTH = "/healthz"
READY = "/readyz"
METRICS = "/metrics"

_Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def showing_app(sidecar: Sidecar) -> web.Application:
    """What answers on the TCP port, which is opened after the socket."""

    async def startup(_: web.Request) -> web.Response:
        # Not when all is staged: a startup probe holds the engine's container back until then.
        return web.Response(text="the socket answers\n")

    async def health(_: web.Request) -> web.Response:
        # A failure is no reason to be killed: another attempt follows, as it would in another process.
        return web.Response(text=f"{sidecar.state}\n")

    async def ready(_: web.Request) -> web.Response:
        status = sidecar.status()
        text = f"{sidecar.state}: {status['landed_bytes']} of {status['total_bytes']} bytes are there\n"
        if sidecar.error is not None:
            text += f"{sidecar.error}\n"
        return web.Response(text=text, status=200 if sidecar.state == "staged" else 503)

    async def metrics(_: web.Request) -> web.Response:
        # Imported here: nothing waits for it before somebody asks.
        from streamload.service.metrics import CONTENT_TYPE, exposition

        return web.Response(body=exposition(sidecar.status()), headers={"Content-Type": CONTENT_TYPE})

    @web.middleware
    async def without_bodies(request: web.Request, handler: _Handler) -> web.StreamResponse:
        await read_body(request)
        return await handler(request)

    app = web.Application(middlewares=[without_bodies], client_max_size=1)
    app.add_routes(
        [web.get(STARTUP, startup), web.get(HEALTH, health), web.get(READY, ready), web.get(METRICS, metrics)]
    )
    return app
