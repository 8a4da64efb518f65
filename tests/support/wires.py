"""The three transports behind one face, both ends on loopback."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from protocol.errors import LinkLost
from protocol.frames import Draft, Open, Tokens
from protocol.transport.base import (
    Address,
    ClientChannel,
    Connection,
    Handler,
    Listener,
    ServerChannel,
    ServerTls,
    Trust,
)
from protocol.transport.grpc import connect_grpc, serve_grpc
from protocol.transport.memory import MemoryConnection
from protocol.transport.quic import connect_quic, serve_quic
from protocol.transport.quic_server import QuicListener
from support.sample_frames import tokens_of

KINDS = ("memory", "quic", "grpc")
Serve = Callable[..., Awaitable[QuicListener]]  # the fixture `serve`


@dataclass
class Wire:
    """A server and its phones; what it opened it closes."""

    kind: str
    tls: ServerTls
    trust: Trust
    listener: Listener | None = None
    connections: list[Connection] = field(default_factory=list)
    _handler: Handler | None = None

    async def serve(self, handler: Handler) -> None:
        self._handler = handler
        if self.kind == "quic":
            self.listener = await serve_quic("127.0.0.1", 0, self.tls, handler)
        elif self.kind == "grpc":
            self.listener = await serve_grpc("127.0.0.1", 0, self.tls, handler)

    async def connect(self) -> Connection:
        assert self._handler is not None
        connection: Connection
        if self.kind == "quic":
            connection = await connect_quic(self.address, self.trust)
        elif self.kind == "grpc":
            connection = await connect_grpc(self.address, self.trust)
        else:
            connection = MemoryConnection(self._handler)
        self.connections.append(connection)
        return connection

    @property
    def address(self) -> Address:
        assert self.listener is not None
        return self.listener.address

    async def open(self) -> ClientChannel:
        """A channel on a connection of its own."""
        return await (await self.connect()).open()

    async def stop_serving(self) -> None:
        """The server goes; in memory it is one with the connections."""
        if self.listener:
            await self.listener.aclose()
        else:
            for connection in self.connections:
                await connection.aclose()

    async def aclose(self) -> None:
        for connection in self.connections:
            await connection.aclose()
        if self.listener:
            await self.listener.aclose()


async def echo(channel: ServerChannel) -> None:
    """Answers every Draft with its own tokens."""
    while isinstance(frame := await channel.receive(), Draft | Open):
        if isinstance(frame, Draft):
            await channel.send(Tokens(frame.position, frame.tokens))


def endless(stalled: asyncio.Queue[str]) -> Handler:
    """Sends for as long as somebody takes it, then says why it stopped."""

    async def handler(channel: ServerChannel) -> None:
        try:
            while True:
                await channel.send(tokens_of(250_000))
        except LinkLost as lost:
            stalled.put_nowait(str(lost))
            raise

    return handler


async def turn() -> None:
    """Lets the other end read: it lives in this loop."""
    for _ in range(3):
        await asyncio.sleep(0)


async def send_raw(channel: Any, data: bytes) -> None:
    """Sends bytes as if they were a frame, from either end of any transport."""
    if hasattr(channel, "put"):
        await channel.put(data)
    else:
        await channel._up.put(data)
