"""How both programs serve HTTP: a port that is bound before anything slow begins, and uvicorn on it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from protocol.openai import ApiError
from protocol.transport.base import Address, ServerTls


class QuietUvicorn(uvicorn.Server):
    """uvicorn without its own signal handlers: the program decides when it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Doorway:
    """Where an app will be: until `app` is set only `/health` is well, and everything else is told to wait."""

    def __init__(self) -> None:
        self.app: ASGIApp = _loading

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app(scope, receive, send)


async def _loading(scope: Scope, receive: Receive, send: Send) -> None:
    response = ApiError(503, "the model is being loaded", code="loading", retry_after_s=1).response()
    if scope["path"] in ("/health", "/ready"):
        well = scope["path"] == "/health"
        response = JSONResponse({"status": "ok" if well else "loading"}, 200 if well else 503)
    await response(scope, receive, send)


def bound(host: str, port: int) -> socket.socket:
    """A TCP socket on the port, 0 for any. Raises OSError that names the place."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen()  # or another program could still take it
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


@contextlib.asynccontextmanager
async def serving_http(
    app: ASGIApp, host: str, listener: socket.socket, grace_s: int, tls: ServerTls | None = None
) -> AsyncIterator[Address]:
    """Serves on a bound socket; on leaving, requests under way have `grace_s` seconds to end."""
    settings = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,  # it would have what the request log leaves out: queries, and nothing of what was asked for
        lifespan="off",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=grace_s,
        ssl_certfile=tls.certificate if tls else None,
        ssl_keyfile=tls.key if tls else None,
    )
    server = QuietUvicorn(settings)
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        while not server.started:
            if task.done():
                task.result()
                raise OSError("the HTTP server ended at once")
            await asyncio.sleep(0.01)
        yield Address(host, listener.getsockname()[1])
    finally:
        server.should_exit = True
        await task
