"""Starts the whole cloud side, and ends it in order."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

from cloud_server import keys
from cloud_server.app import make_app
from cloud_server.config import ServerConfig
from cloud_server.service import Service
from cloud_server.session import Session
from protocol.http_server import bound, serving_http
from protocol.transport.base import Address, ServerChannel
from protocol.transport.grpc import serve_grpc
from protocol.transport.quic import serve_quic
from split_model.compute import Compute, release_heap
from split_model.model import Model
from split_model.tokenizer import ChatTokenizer


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
        http_socket = stack.enter_context(bound(config.host, config.http_port))
        compute = Compute(config.threads)
        stack.push_async_callback(compute.aclose)
        model = await compute.call(Model.load, config.model)
        tokenizer = await asyncio.to_thread(ChatTokenizer.load, config.model)
        verifier = keys.Verifier(config.keys) if config.keys else None
        service = Service(config, model, tokenizer, compute, verifier)
        await service.worker.warm_up(min(96, service.context // 2))
        release_heap()
        address = Address(config.host, config.port)
        if config.keys:
            address = await _listen_wire(stack, service, config)
        if service.address is None and config.host not in ("0.0.0.0", "::"):
            service.address = address
        tls = keys.tls(config.keys) if config.keys else None
        http = await stack.enter_async_context(serving_http(make_app(service), config.host, http_socket, 2, tls))
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
