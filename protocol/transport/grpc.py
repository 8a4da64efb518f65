"""gRPC over TLS, for networks without UDP: the same frames as messages of one bidirectional call per session."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import suppress
from typing import Any
from urllib.parse import unquote

os.environ.setdefault("GRPC_VERBOSITY", "NONE")  # read at import; its core writes to stderr what is raised here anyway

import grpc
import grpc.aio

from protocol.errors import LinkLost, UnverifiedServer
from protocol.frames import ClientFrame, ServerFrame, decode_server, encode
from protocol.limits import MAX_FRAME
from protocol.transport.base import (
    Address,
    ClientChannel,
    Handler,
    LinkFacts,
    ServerTls,
    Trust,
    end_sessions,
    run_session,
)
from protocol.transport.memory import Pipe, PipeServerChannel

SERVICE, METHOD = "tandem.v1.Split", "Generate"
PREFIX = 5  # bytes that gRPC puts before a message
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_FRAME),
    ("grpc.max_send_message_length", MAX_FRAME),
    ("grpc.keepalive_time_ms", 10_000),  # a silent peer is found in 15 s
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
]
CLIENT_OPTIONS = [
    *OPTIONS,
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.use_local_subchannel_pool", 1),  # no backoff inherited from an earlier connection
]
SERVER_OPTIONS = [*OPTIONS, ("grpc.so_reuseport", 0), ("grpc.max_concurrent_streams", 128)]


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
                await self._call.write(await self._up.get())

    async def _read(self) -> None:
        error = LinkLost("the peer ended the session")
        try:
            async for data in self._call:
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
        self._connection.channels.discard(self)


class GrpcConnection:
    """The phone's path to one replica over TCP."""

    transport = "grpc"
    ticket_age_s: float | None = None

    def __init__(self, address: Address, channel: Any):
        self.address = address
        self._channel = channel
        self._generate = channel.stream_stream(f"/{SERVICE}/{METHOD}")
        self.channels: set[GrpcClientChannel] = set()
        self.closed = False
        self.bytes_sent = self.bytes_received = 0

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
        if self.closed:
            raise LinkLost("the connection is closed")
        channel = GrpcClientChannel(self, self._generate())
        self.channels.add(channel)
        return channel

    async def handshake(self) -> None:
        state = self._channel.get_state(try_to_connect=True)
        while state is not grpc.ChannelConnectivity.READY:
            if self.closed or state is grpc.ChannelConnectivity.SHUTDOWN:
                raise LinkLost("the connection is closed")
            if state is grpc.ChannelConnectivity.TRANSIENT_FAILURE:
                raise await self._why()
            await self._channel.wait_for_state_change(state)
            state = self._channel.get_state(try_to_connect=True)

    async def _why(self) -> LinkLost:
        """The channel's state has no words, a failing call does."""
        try:
            await self._channel.unary_unary(f"/{SERVICE}/Probe")(b"")
        except grpc.aio.AioRpcError as error:
            return self.failed(error)
        return LinkLost("the connection failed")

    async def aclose(self) -> None:
        self.closed = True
        for channel in list(self.channels):
            await channel.aclose()
        await self._channel.close()


async def connect_grpc(address: Address, trust: Trust) -> GrpcConnection:
    """A connection that may still be under way: `handshake()` waits for it, `open()` and `send` work at once."""
    options: list[tuple[str, Any]] = list(CLIENT_OPTIONS)
    if trust.server_name:
        options.append(("grpc.ssl_target_name_override", trust.server_name))
    credentials = grpc.ssl_channel_credentials(root_certificates=trust.ca)
    return GrpcConnection(address, grpc.aio.secure_channel(str(address), credentials, options=options))


class GrpcServerChannel(PipeServerChannel):
    """The cloud's end of one call."""

    def __init__(self, peer: str):
        super().__init__("grpc", peer, Pipe(), Pipe())

    async def read(self, requests: AsyncIterator[bytes]) -> None:
        """Moves frames from the call until the phone ends it."""
        try:
            async for data in requests:
                await self._up.put(data)
        except (LinkLost, grpc.aio.BaseError):
            return
        finally:
            self._up.close()

    async def write(self, context: Any) -> None:
        """Moves frames to the call until the session has ended and all is sent."""
        try:
            while True:
                await context.write(await self._down.get())
        except (LinkLost, grpc.aio.BaseError):
            return
        finally:
            self._down.close(drop=True)


class GrpcListener:
    """A TCP port, and one task per session."""

    def __init__(self, server: grpc.aio.Server, handler: Handler, host: str):
        self._server, self._handler = server, handler
        self._tasks: set[asyncio.Task[None]] = set()
        self.address = Address(host, 0)

    async def start(self, credentials: grpc.ServerCredentials, port: int) -> None:
        method = grpc.stream_stream_rpc_method_handler(self._serve)
        self._server.add_generic_rpc_handlers([grpc.method_handlers_generic_handler(SERVICE, {METHOD: method})])
        try:
            bound = self._server.add_secure_port(str(Address(self.address.host, port)), credentials)
        except RuntimeError as error:
            raise OSError(f"cannot listen on {self.address.host}:{port}: {error}") from None
        self.address = Address(self.address.host, bound)
        await self._server.start()

    async def _serve(self, requests: AsyncIterator[bytes], context: Any) -> None:
        """One call. It ends when the session has; the session may outlive it, to find its channel closed."""
        channel = GrpcServerChannel(unquote(context.peer().split(":", 1)[1]))
        session = asyncio.create_task(run_session(self._handler, channel))
        self._tasks.add(session)
        session.add_done_callback(self._tasks.discard)
        reader = asyncio.create_task(channel.read(requests))
        try:
            await channel.write(context)
        finally:
            await channel.aclose()
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)

    async def aclose(self) -> None:
        await self._server.stop(None)
        await end_sessions(self._tasks)


async def serve_grpc(
    host: str, port: int, tls: ServerTls, handler: Handler, *, max_sessions: int = 1024
) -> GrpcListener:
    """Listens on TCP; port 0 takes any. Raises OSError."""
    credentials = grpc.ssl_server_credentials([(tls.key.read_bytes(), tls.certificate.read_bytes())])
    server = grpc.aio.server(options=SERVER_OPTIONS, maximum_concurrent_rpcs=max_sessions)
    listener = GrpcListener(server, handler, host)
    await listener.start(credentials, port)
    return listener
