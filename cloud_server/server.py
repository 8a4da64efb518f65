"""Starts the whole cloud side, and ends it in order."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import uvicorn

from cloud_server import keys
from cloud_server.app import make_app
from cloud_server.config import ServerConfig
from cloud_server.service import Service
from cloud_server.session import Session
from protocol.transport.base import Address, ServerChannel
from protocol.transport.grpc import serve_grpc
from protocol.transport.quic import serve_quic
from split_model.compute import Compute
from split_model.model import Model
from split_model.tokenizer import ChatTokenizer

log = logging.getLogger(__name__)


class QuietUvicorn(uvicorn.Server):
    """uvicorn without its own signal handlers: the program decides when it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@dataclass(frozen=True, slots=True)
class CloudServer:
    """A running server; QUIC and gRPC share `address`, HTTP has its own."""

    service: Service
    address: Address
    http: Address

    async def drain(self, deadline_s: float) -> int:
        """Refuses new sessions, waits for the running ones up to the deadline, and says how many are left."""
        rooms = self.service.rooms
        rooms.draining = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(deadline_s):
                await rooms.vacant.wait()
        return rooms.taken


@asynccontextmanager
async def running(config: ServerConfig) -> AsyncIterator[CloudServer]:
    """Loads the model, listens on all three ports, and on leaving stops and cancels whatever is left.

    Raises ModelError, BadKeys, or OSError for a port that cannot be had.
    """
    async with AsyncExitStack() as stack:
        http_socket = stack.enter_context(_listen(config.host, config.http_port))
        compute = Compute(config.threads)
        stack.push_async_callback(compute.aclose)
        model = await compute.call(Model.load, config.model)
        tokenizer = await asyncio.to_thread(ChatTokenizer.load, config.model)
        verifier = keys.Verifier(config.keys) if config.keys else None
        service = Service(config, model, tokenizer, compute, verifier)
        await service.worker.warm_up(min(96, service.context // 2))
        address = Address(config.host, config.port)
        if config.keys:
            address = await _listen_wire(stack, service, config)
        if service.address is None and config.host not in ("0.0.0.0", "::"):
            service.address = address
        http = await _serve_http(stack, service, config, http_socket)
        service.ready = True
        yield CloudServer(service, address, http)


async def _listen_wire(stack: AsyncExitStack, service: Service, config: ServerConfig) -> Address:
    """gRPC first, since a TCP port that the system chooses is then tried as a UDP port too."""
    assert config.keys is not None

    async def handle(channel: ServerChannel) -> None:
        await Session(service, channel).serve()

    certificate = keys.tls(config.keys)
    grpc = await serve_grpc(config.host, config.port, certificate, handle)
    stack.push_async_callback(grpc.aclose)
    quic = await serve_quic(config.host, grpc.address.port, certificate, handle)
    stack.push_async_callback(quic.aclose)
    return quic.address


def _listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise OSError(error.errno, f"cannot listen on {host}:{port}: {error.strerror}") from None
    return listener


async def _serve_http(
    stack: AsyncExitStack, service: Service, config: ServerConfig, listener: socket.socket
) -> Address:
    files = keys.tls(config.keys) if config.keys else None
    settings = uvicorn.Config(
        make_app(service),
        log_config=None,
        lifespan="off",
        timeout_keep_alive=30,
        timeout_graceful_shutdown=2,
        ssl_certfile=files.certificate if files else None,
        ssl_keyfile=files.key if files else None,
    )
    server = QuietUvicorn(settings)
    task = asyncio.create_task(server.serve(sockets=[listener]))

    async def stop() -> None:
        server.should_exit = True
        await task

    stack.push_async_callback(stop)
    while not server.started:
        if task.done():
            task.result()
            raise OSError("the HTTP server ended at once")
        await asyncio.sleep(0.01)
    return Address(config.host, listener.getsockname()[1])
