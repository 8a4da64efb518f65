"""How both programs serve HTTP: a port that is bound before anything slow begins, and uvicorn on it."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator

import uvicorn
from fastapi import FastAPI

from protocol.transport.base import Address, ServerTls


class QuietUvicorn(uvicorn.Server):
    """uvicorn without its own signal handlers: the program decides when it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bound(host: str, port: int) -> socket.socket:
    """A TCP socket on the port, 0 for any. Raises OSError that names the place."""
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


@contextlib.asynccontextmanager
async def serving_http(
    app: FastAPI, host: str, listener: socket.socket, grace_s: int, tls: ServerTls | None = None
) -> AsyncIterator[Address]:
    """Serves on a bound socket; on leaving, requests under way have `grace_s` seconds to end."""
    settings = uvicorn.Config(
        app,
        log_config=None,
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
