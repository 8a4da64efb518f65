"""The cloud's side of QUIC: a listener, its connections, and one task per session."""

from __future__ import annotations

import asyncio
import socket
from functools import partial

from aioquic._buffer import Buffer
from aioquic.asyncio.server import QuicServer
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE, QuicConfiguration
from aioquic.quic.connection import TRANSPORT_CLOSE_FRAME_CAPACITY, NetworkAddress
from aioquic.quic.crypto import CryptoPair
from aioquic.quic.packet import QuicErrorCode, QuicFrameType, QuicHeader, QuicPacketType, pull_quic_header
from aioquic.quic.packet_builder import QuicPacketBuilder

from protocol.frames import ClientFrame, ServerFrame, decode_client, encode
from protocol.limits import RECEIVE_BYTES, SILENCE_END
from protocol.transport.base import Address, Handler, ServerTls, end_sessions, run_session
from protocol.transport.quic_connection import MendedConnection, configuration
from protocol.transport.quic_link import Link, Stream
from protocol.transport.tickets import ServerTickets


class QuicServerChannel(Stream):
    """The cloud's end of one stream."""

    transport = "quic"

    def __init__(self, link: Link, stream_id: int, peer: str):
        super().__init__(link, stream_id)
        self.peer = peer
        self.early = False
        self.ticket_age_s = link.quic.ticket_age_s

    async def handshake(self) -> None:
        await self._link.handshake()

    def silent_s(self) -> float:
        return asyncio.get_running_loop().time() - self._link.heard_at

    def delivery_rate(self) -> float:
        return self._link.quic.control.delivery_rate or 0.0

    async def send(self, frame: ServerFrame) -> None:
        await self.put(encode(frame))

    async def receive(self) -> ClientFrame:
        first = not self._taken
        data = await self.take()
        if first:
            self.early = self._link.handshaken is None
        return decode_client(data)

    async def aclose(self) -> None:
        self.close(abort=False)


class ServerLink(Link):
    """The cloud's end of one connection; its sessions' tasks belong to the listener."""

    def __init__(self, quic: MendedConnection, peer: str, handler: Handler, tasks: set[asyncio.Task[None]]):
        super().__init__(quic)
        self._peer, self._handler, self._tasks = peer, handler, tasks

    def stream(self, stream_id: int) -> Stream | None:
        if stream_id in self.streams:
            return self.streams[stream_id]
        channel = QuicServerChannel(self, stream_id, self._peer)
        task = self._loop.create_task(run_session(self._handler, channel))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return channel


class Dispatcher(QuicServer):
    """Hands datagrams to their connections. Version negotiation and Retry are aioquic's own."""

    def __init__(
        self, config: QuicConfiguration, handler: Handler, tickets: ServerTickets, retry: bool, max_connections: int
    ):
        super().__init__(configuration=config, retry=retry)
        self._handler, self._tickets, self._max_connections = handler, tickets, max_connections
        self.links: set[ServerLink] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.closed = asyncio.Event()

    def datagram_received(self, data: bytes | str, addr: NetworkAddress) -> None:
        assert isinstance(data, bytes)
        try:
            header = pull_quic_header(Buffer(data=data), host_cid_length=self._configuration.connection_id_length)
        except ValueError:
            return
        if link := self._protocols.get(header.destination_cid):
            link.datagram_received(data, addr)
        elif self._begins(header, data):
            self._accept(header, data, addr)
        else:
            super().datagram_received(data, addr)

    def _begins(self, header: QuicHeader, data: bytes) -> bool:
        return (
            header.packet_type == QuicPacketType.INITIAL
            and header.version in self._configuration.supported_versions
            and len(data) >= SMALLEST_MAX_DATAGRAM_SIZE
            and (self._retry is None or bool(header.token))
        )

    def _accept(self, header: QuicHeader, data: bytes, addr: NetworkAddress) -> None:
        assert self._transport is not None
        if len(self.links) >= self._max_connections:
            self._transport.sendto(_refusal(header), addr)
            return
        original, retried = header.destination_cid, None
        if self._retry is not None:
            try:
                original = self._retry.validate_token(
                    address=addr, destination_cid=header.destination_cid, token=header.token, now=self._loop.time()
                )
            except ValueError:
                super().datagram_received(data, addr)  # answers INVALID_TOKEN
                return
            retried = header.destination_cid
        quic = MendedConnection(
            configuration=self._configuration,
            original_destination_connection_id=original,
            retry_source_connection_id=retried,
            tickets=self._tickets,
        )
        link = ServerLink(quic, str(Address(addr[0].removeprefix("::ffff:"), addr[1])), self._handler, self.tasks)
        link.connection_made(self._transport)
        link._connection_id_issued_handler = partial(self._connection_id_issued, protocol=link)
        link._connection_id_retired_handler = partial(self._connection_id_retired, protocol=link)
        link._connection_terminated_handler = partial(self._forget, link)
        self._protocols[header.destination_cid] = self._protocols[quic.host_cid] = link
        self.links.add(link)
        link.datagram_received(data, addr)

    def _forget(self, link: ServerLink) -> None:
        self.links.discard(link)
        self._connection_terminated(link)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()

    def shut(self) -> None:
        for link in self.links:
            link.shut("the server is shutting down")

    def release(self) -> None:
        """Gives back timers and the socket."""
        for link in self.links:
            link.disarm()
        assert self._transport is not None
        self._transport.close()


class QuicListener:
    """A UDP socket and all that came through it."""

    def __init__(self, dispatcher: Dispatcher, address: Address):
        self._dispatcher = dispatcher
        self.address = address

    async def aclose(self) -> None:
        server = self._dispatcher
        server.shut()
        try:
            await end_sessions(server.tasks)
        finally:
            server.release()
        await server.closed.wait()


async def serve_quic(
    host: str,
    port: int,
    tls: ServerTls,
    handler: Handler,
    *,
    tickets: ServerTickets | None = None,
    retry: bool = False,
    idle_timeout: float = SILENCE_END,
    max_connections: int = 1024,
) -> QuicListener:
    """Listens on UDP; port 0 takes any. `retry` makes clients prove their address. Raises OSError."""
    config = configuration(is_client=False, idle_timeout=idle_timeout)
    config.load_cert_chain(tls.certificate, tls.key)
    store = ServerTickets() if tickets is None else tickets
    transport, dispatcher = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: Dispatcher(config, handler, store, retry, max_connections), local_addr=(host, port)
    )
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
    return QuicListener(dispatcher, Address(host, transport.get_extra_info("sockname")[1]))


def _refusal(header: QuicHeader) -> bytes:
    """An Initial that closes the connection before it begins (RFC 9000, 10.2.3)."""
    assert header.version is not None
    crypto = CryptoPair()
    crypto.setup_initial(cid=header.destination_cid, is_client=False, version=header.version)
    builder = QuicPacketBuilder(
        host_cid=header.destination_cid,
        peer_cid=header.source_cid,
        is_client=False,
        max_datagram_size=SMALLEST_MAX_DATAGRAM_SIZE,
        version=header.version,
    )
    builder.start_packet(QuicPacketType.INITIAL, crypto)
    reason = b"too many connections"
    buffer = builder.start_frame(QuicFrameType.TRANSPORT_CLOSE, capacity=TRANSPORT_CLOSE_FRAME_CAPACITY + len(reason))
    buffer.push_uint_var(QuicErrorCode.CONNECTION_REFUSED)
    buffer.push_uint_var(QuicFrameType.PADDING)
    buffer.push_uint_var(len(reason))
    buffer.push_bytes(reason)
    datagrams, _ = builder.flush()
    return datagrams[0]
