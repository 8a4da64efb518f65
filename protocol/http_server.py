"""How both programs serve HTTP: a listener that is bound before anything slow begins, and uvicorn."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
import stat
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import uvicorn
from fastapi.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from protocol.api_errors import ApiError
from protocol.http_connections import Connections
from protocol.http_gate import Bounded
from protocol.limits import HttpLimits
from protocol.transport.base import Address, ServerTls

LIMITS = HttpLimits()
BACKLOG = 128


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
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections inherit it; asyncio's are without
        listener.bind((host, port))
        listener.listen(BACKLOG)  # or another program could still take it
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


@contextlib.contextmanager
def bound_unix(path: Path) -> Iterator[socket.socket]:
    """A Unix socket for this user alone, removed at the end; one that nobody listens on is replaced.

    Raises OSError that names the path.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        _remove_stale(path)
        mask = os.umask(0o177)
        try:
            listener.bind(str(path))
        finally:
            os.umask(mask)
        listener.listen(BACKLOG)
        mine = path.stat().st_ino
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {path}: {error.strerror or error}") from None
    try:
        with listener:
            yield listener
    finally:
        with contextlib.suppress(FileNotFoundError):
            if path.stat().st_ino == mine:  # and not that of whoever replaced it
                path.unlink()


def _remove_stale(path: Path) -> None:
    """Raises OSError where something else is, or where somebody listens."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(path.lstat().st_mode):
            raise FileExistsError(errno.EEXIST, "there is a file, and it is not a socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as trial:
            try:
                trial.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()
                return
        raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))


@contextlib.asynccontextmanager
async def serving_http(
    app: ASGIApp,
    host: str,
    listener: socket.socket,
    grace_s: int,
    tls: ServerTls | None = None,
    limits: HttpLimits = LIMITS,
) -> AsyncIterator[Address]:
    """Serves on a bound socket; on leaving, requests under way have `grace_s` seconds to end."""
    settings = uvicorn.Config(
        Bounded(app, limits),
        ws="none",
        log_config=None,
        log_level="error",  # below, it has a line for everything that is no HTTP
        access_log=False,  # it would have what the request log leaves out: queries, and nothing of what was asked for
        lifespan="off",
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=limits.idle_s,
        timeout_graceful_shutdown=grace_s,
        ssl_certfile=tls.certificate if tls else None,
        ssl_keyfile=tls.key if tls else None,
    )
    settings.load()
    server = QuietUvicorn(settings)
    connections = Connections(server, listener, limits)
    serving = asyncio.create_task(server.serve(sockets=[]))
    accepting = asyncio.create_task(connections.accept())
    try:
        yield Address(host, 0 if listener.family == socket.AF_UNIX else listener.getsockname()[1])
    finally:
        accepting.cancel()
        await asyncio.gather(accepting, return_exceptions=True)
        listener.close()
        server.should_exit = True
        await serving
        await connections.aclose()
        await asyncio.gather(*server.server_state.tasks, return_exceptions=True)
