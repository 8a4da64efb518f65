"""gRPC over TLS, for networks without UDP: the same frames as messages of one bidirectional call per session."""

from __future__ import annotations

import asyncio
import socket
import time
from contextlib import suppress
from typing import Any

import grpc
import grpc.aio

from protocol.errors import LinkLost, UnverifiedServer
from protocol.frames import ClientFrame, ServerFrame, decode_server, encode
from protocol.transport.base import Address, ClientChannel, LinkFacts, Trust, Way
from protocol.transport.grpc_server import CALLS, METHOD, OPTIONS, PREFIX, SERVICE, SIGN, serve_grpc
from protocol.transport.memory import Pipe

__all__ = ["connect_grpc", "serve_grpc"]

SIGN_AFTER = 1.0  # seconds without another message after which a phone gives a sign of life
CLIENT_OPTIONS = [
    *OPTIONS,
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # no backoff inherited from an earlier connection
]


class GrpcClientChannel:
    """The phone's end of one call. Two tasks move its frames, because cancelling a read of gRPC's ends the call."""

    def __init__(self, connection: GrpcConnection, call: Any):
        self._connection, self._call = connection, call
        self._up, self._down = Pipe(), Pipe()
        self.bytes_up = self.bytes_down = 0
        self._tasks = [asyncio.create_task(self._write()), asyncio.create_task(self._read())]

    async def _write(self) -> None:
        with suppress(LinkLost, grpc.RpcError, grpc.aio.BaseError, asyncio.InvalidStateError):  # _read tells why
            while True:
                await self._call.write(await self._next())

    async def _next(self) -> bytes:
        try:
            async with asyncio.timeout(SIGN_AFTER):
                return await self._up.get()
        except TimeoutError:
            return SIGN

    async def _read(self) -> None:
        error = LinkLost("the peer ended the session")
        try:
            async for data in self._call:
                self._connection.heard_at = time.monotonic()
                await self._down.put(data)
        except grpc.aio.AioRpcError as failure:
            error = self._connection.failed(failure)
        except LinkLost as closed:
            error = closed
        finally:
            self._up.close(drop=True, error=error)
            self._down.close(error=error)

    async def send(self, frame: ClientFrame) -> None:
        data = encode(frame)
        await self._up.put(data)
        self.bytes_up += PREFIX + len(data)
        self._connection.bytes_sent += PREFIX + len(data)

    async def receive(self) -> ServerFrame:
        data = await self._down.get()
        self.bytes_down += PREFIX + len(data)
        self._connection.bytes_received += PREFIX + len(data)
        return decode_server(data)

    async def aclose(self) -> None:
        self._up.close(drop=True)
        self._down.close(drop=True)
        self._call.cancel()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._connection.ended(self)


class GrpcConnection:
    """The phone's path to one replica over TCP."""

    transport = "grpc"
    ticket_age_s: float | None = None

    def __init__(self, address: Address, channel: Any):
        self.address = address
        self._channel = channel
        self._generate = channel.stream_stream(f"/{SERVICE}/{METHOD}")
        self._channels: set[GrpcClientChannel] = set()
        self._changed = asyncio.Event()
        self.closed = False
        self.bytes_sent = self.bytes_received = 0
        self.heard_at = time.monotonic()
        self._way = asyncio.create_task(_way(address))

    def facts(self) -> LinkFacts:
        return LinkFacts(bytes_sent=self.bytes_sent, bytes_received=self.bytes_received)

    def failed(self, error: grpc.aio.AioRpcError) -> LinkLost:
        """A failed call, in our words."""
        details = error.details() or error.code().name
        if error.code() is grpc.StatusCode.UNAVAILABLE:
            self.closed = True
        unverified = "certificate" in details.lower() or "Hostname Verification Check" in details
        return UnverifiedServer(details) if unverified else LinkLost(details)

    async def open(self) -> ClientChannel:
        while not self.closed and len(self._channels) >= CALLS:
            self._changed.clear()
            await self._changed.wait()
        if self.closed:
            raise LinkLost("the connection is closed")
        channel = GrpcClientChannel(self, self._generate())
        self._channels.add(channel)
        return channel

    def ended(self, channel: GrpcClientChannel) -> None:
        self._channels.discard(channel)
        self._changed.set()

    async def handshake(self) -> None:
        state = self._channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.READY:
            if self.closed or state is grpc.ChannelConnectivity.SHUTDOWN:
                raise LinkLost("the connection is closed")
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                raise await self._why()
            await self._channel.wait_for_state_change(state)
            state = self._channel.get_state(try_to_connect=True)
        self.heard_at = time.monotonic()

    def silent_s(self) -> float:
        return time.monotonic() - self.heard_at

    def displaced(self) -> bool:
        way = self._way.result() if self._way.done() and not self._way.cancelled() else None
        return way is not None and way.gone()

    async def move(self) -> bool:
        return False

    async def _why(self) -> LinkLost:
        """The channel's state has no words, a failing call does."""
        try:
            await self._channel.unary_unary(f"/{SERVICE}/Probe")(b"")
        except grpc.aio.AioRpcError as error:
            return self.failed(error)
        return LinkLost("the connection failed")

    async def aclose(self) -> None:
        self.closed = True
        self._changed.set()
        for channel in list(self._channels):
            await channel.aclose()
        self._way.cancel()
        await asyncio.gather(self._way, self._channel.close(), return_exceptions=True)


async def _way(address: Address) -> Way | None:
    """gRPC does not tell which of its addresses it uses: that of the kernel's choice, at the start."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(address.host, address.port, type=socket.SOCK_DGRAM)
    except OSError:
        return None
    return Way.now(found[0][0], found[0][4])


async def connect_grpc(address: Address, trust: Trust) -> GrpcConnection:
    """A connection that may still be under way: `handshake()` waits for it, `open()` and `send` work at once."""
    options: list[tuple[str, Any]] = list(CLIENT_OPTIONS)
    if trust.server_name:
        options.append(("grpc.ssl_target_name_override", trust.server_name))
    credentials = grpc.ssl_channel_credentials(root_certificates=trust.ca)
    return GrpcConnection(address, grpc.aio.secure_channel(str(address), credentials, options=options))
