"""The cloud's side of gRPC: a listener, with bounds as far as gRPC offers them, and one task per session."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import unquote

import grpc
import grpc.aio

from protocol.errors import LinkLost
from protocol.frames import ClientFrame, decode_client
from protocol.limits import CONNECTION_BYTES, MAX_FRAME, SILENCE_END, STALLED
from protocol.transport.base import Address, Handler, ServerTls, end_sessions, run_session
from protocol.transport.memory import Pipe, PipeServerChannel

SERVICE, METHOD = "tandem.v1.Split", "Generate"
PREFIX = 5  # bytes that gRPC puts before a message
SIGN = b""  # a message that is no frame: a sign of life
CALLS = 32  # that a phone has open on one connection
HANDSHAKE_S = SILENCE_END
IDLE_S = 60.0  # a connection without a call is closed after
AGE_S = 600.0  # and any other after twice as long, which is the end of calls that nobody reads
OPTIONS = [
    ("grpc.max_receive_message_length", MAX_FRAME),
    ("grpc.max_send_message_length", MAX_FRAME),
    ("grpc.keepalive_time_ms", 10_000),  # a silent peer is found in 15 s
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 5_000),
]


class Budget:
    """Bytes that the calls of one connection may hold between them."""

    def __init__(self) -> None:
        self.calls = 0
        self._free = CONNECTION_BYTES
        self._room = asyncio.Event()

    async def take(self, size: int) -> None:
        """Waits until so much is free."""
        while self._free < size:
            self._room.clear()
            await self._room.wait()
        self._free -= size

    def give(self, size: int) -> None:
        self._free += size
        self._room.set()


class GrpcServerChannel(PipeServerChannel):
    """The cloud's end of one call."""

    def __init__(self, peer: str, budget: Budget):
        super().__init__("grpc", peer, Pipe(), Pipe())
        self._budget, self._held = budget, 0
        self._heard_at: float | None = None  # known of phones that give signs of life

    def silent_s(self) -> float:
        return 0.0 if self._heard_at is None else asyncio.get_running_loop().time() - self._heard_at

    async def receive(self) -> ClientFrame:
        data = await self._up.get()
        self._give(len(data))
        self.bytes_up += len(data)
        return decode_client(data)

    def _give(self, size: int) -> None:
        self._held -= size
        self._budget.give(size)

    def release(self) -> None:
        """Gives back what it holds of its connection's budget; to be called last."""
        self._give(self._held)

    async def read(self, requests: AsyncIterator[bytes]) -> None:
        """Moves frames from the call until the phone ends it."""
        try:
            async for data in requests:
                if self._heard_at is not None or data == SIGN:
                    self._heard_at = asyncio.get_running_loop().time()
                if data != SIGN:
                    await self._budget.take(len(data))
                    self._held += len(data)
                    await self._up.put(data)
        except (LinkLost, grpc.aio.BaseError):
            return
        finally:
            self._up.close()

    async def write(self, context: Any) -> None:
        """Moves frames to the call until the session has ended and all is sent, or the phone takes nothing more."""
        try:
            while True:
                data = await self._down.get()
                async with asyncio.timeout(STALLED):
                    await context.write(data)
        except (LinkLost, grpc.aio.BaseError):
            return
        except TimeoutError:
            self._down.close(error=LinkLost(f"the peer took nothing for {STALLED:g} s"))
        finally:
            self._down.close(drop=True)


class GrpcListener:
    """A TCP port, and one task per session."""

    def __init__(self, server: grpc.aio.Server, handler: Handler, host: str):
        self._server, self._handler = server, handler
        self._tasks: set[asyncio.Task[None]] = set()
        self._calls: set[asyncio.Task[Any]] = set()
        self._budgets: dict[str, Budget] = {}  # by the peer's address and port, which is one connection
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
        peer = unquote(context.peer().split(":", 1)[1])
        channel = GrpcServerChannel(peer, self._enter(peer))
        session = asyncio.create_task(run_session(self._handler, channel))
        self._tasks.add(session)
        session.add_done_callback(self._tasks.discard)
        reader = asyncio.create_task(channel.read(requests))
        try:
            await channel.write(context)
        finally:
            reader.cancel()
            try:
                await channel.aclose()
                await asyncio.gather(reader, return_exceptions=True)
            finally:  # gRPC cancels a call that is ending a second time
                channel.release()
                self._leave(peer)

    def _enter(self, peer: str) -> Budget:
        call = asyncio.current_task()
        assert call is not None
        self._calls.add(call)
        call.add_done_callback(self._calls.discard)
        budget = self._budgets.setdefault(peer, Budget())
        budget.calls += 1
        return budget

    def _leave(self, peer: str) -> None:
        self._budgets[peer].calls -= 1
        if not self._budgets[peer].calls:
            del self._budgets[peer]

    async def aclose(self) -> None:
        await self._server.stop(None)
        await end_sessions(self._tasks)
        await end_sessions(self._calls)  # which gRPC cancels, and does not wait for


async def serve_grpc(
    host: str, port: int, tls: ServerTls, handler: Handler, *, max_sessions: int = 4096, connections: int = 512
) -> GrpcListener:
    """Listens on TCP; port 0 takes any. A handshake under way counts among the `connections`. Raises OSError."""
    credentials = grpc.ssl_server_credentials([(tls.key.read_bytes(), tls.certificate.read_bytes())])
    options = [
        *OPTIONS,
        ("grpc.so_reuseport", 0),
        ("grpc.max_allowed_incoming_connections", connections),
        ("grpc.max_concurrent_streams", 2 * CALLS),  # those that a phone has cancelled may still count here
        ("grpc.server_handshake_timeout_ms", int(HANDSHAKE_S * 1000)),
        ("grpc.max_connection_idle_ms", int(IDLE_S * 1000)),
        ("grpc.max_connection_age_ms", int(AGE_S * 1000)),
        ("grpc.max_connection_age_grace_ms", int(AGE_S * 1000)),
        ("grpc.http2.max_ping_strikes", 2),  # pings more often than OPTIONS allow end a connection
    ]
    server = grpc.aio.server(options=options, maximum_concurrent_rpcs=max_sessions)
    listener = GrpcListener(server, handler, host)
    await listener.start(credentials, port)
    return listener
