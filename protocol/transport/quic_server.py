"""The cloud's side of QUIC: a listener, its connections, and one task per session."""

from __future__ import annotations

import asyncio
import socket
from collections import Counter
from functools import partial

from aioquic._buffer import Buffer
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.asyncio.server import QuicServer
from aioquic.quic.configuration import SMALLEST_MAX_DATAGRAM_SIZE, QuicConfiguration
from aioquic.quic.connection import NetworkAddress
from aioquic.quic.packet import QuicHeader, QuicPacketType, pull_quic_header

from protocol.errors import LinkLost
from protocol.limits import RECEIVE_BYTES, SILENCE_END
from protocol.prefixes import prefix
from protocol.transport.base import Address, Handler, ServerTls, end_sessions, run_session
from protocol.transport.quic_connection import MendedConnection, configuration
from protocol.transport.quic_door import Bounds, Door, Verdict, refusal
from protocol.transport.quic_sessions import QuicServerChannel, ServerLink
from protocol.transport.tickets import ServerTickets

HANDSHAKE_S = SILENCE_END  # seconds that a handshake may take
LEAST_CID = 8  # bytes of the id that a client chooses for its first packet (RFC 9000, 7.2)


class Dispatcher(QuicServer):
    """Hands datagrams to their connections, and lets new ones in. Retry and version negotiation are aioquic's own."""

    def __init__(self, config: QuicConfiguration, handler: Handler, tickets: ServerTickets, bounds: Bounds):
        super().__init__(configuration=config, retry=True)
        self._handler, self._tickets, self._bounds, self._door = handler, tickets, bounds, Door(bounds)
        self._places: Counter[str] = Counter()  # of settled connections
        self.half_open: dict[ServerLink, asyncio.TimerHandle] = {}  # oldest first, with the end of their time
        self.links: set[ServerLink] = set()  # all that carry or may carry sessions
        self.closing: set[ServerLink] = set()
        self.tasks: set[asyncio.Task[None]] = set()
        self.closed = asyncio.Event()

    # datagrams

    def datagram_received(self, data: bytes | str, addr: NetworkAddress) -> None:
        assert isinstance(data, bytes)
        try:
            header = pull_quic_header(Buffer(data=data), host_cid_length=self._configuration.connection_id_length)
        except ValueError:
            return
        if link := self._protocols.get(header.destination_cid):
            link.datagram_received(data, addr)
        elif len(data) < SMALLEST_MAX_DATAGRAM_SIZE:
            return  # begins nothing, and an answer could be larger
        elif header.packet_type is QuicPacketType.INITIAL and header.version in self._configuration.supported_versions:
            if len(header.destination_cid) >= LEAST_CID:
                self._knock(header, data, addr)
        else:
            super().datagram_received(data, addr)

    def _knock(self, header: QuicHeader, data: bytes, addr: NetworkAddress) -> None:
        original = header.destination_cid
        if header.token:
            try:
                original = self._retry.validate_token(
                    address=addr, destination_cid=header.destination_cid, token=header.token, now=self._loop.time()
                )
            except ValueError:
                super().datagram_received(data, addr)  # answers INVALID_TOKEN
                return
        place, proven = prefix(addr[0]), bool(header.token)
        match self._door.judge(place, proven, len(self.half_open)):
            case Verdict.PROVE:
                super().datagram_received(data, addr)  # answers with a Retry
            case Verdict.REFUSE:
                self._refuse(header, addr, f"too many handshakes from {place}")
            case Verdict.TAKE if full := self._full(place):
                self._refuse(header, addr, full)
            case Verdict.TAKE:
                self._accept(header, data, addr, original, proven)

    def _refuse(self, header: QuicHeader, addr: NetworkAddress, why: str) -> None:
        assert self._transport is not None
        self._transport.sendto(refusal(header, why), addr)

    def _full(self, place: str) -> str:
        """Why there is no room for one more connection from this prefix, after making some where none is in use."""
        most, here = self._bounds.connections, max(1, self._bounds.connections // 2)
        if self._places[place] >= here and not self._make_room(place):
            return f"too many connections from {place}, limit {here}"
        if len(self.links) >= most and not self._make_room():
            return f"too many connections, limit {most}"
        return ""

    def _make_room(self, place: str = "") -> bool:
        """Ends the connection that had no session for longest, if there is one without."""
        idle = [
            link for link in self.links if link.handshaken and not link.streams and place in ("", link.place)
        ]  # fmt: skip
        if idle:
            min(idle, key=lambda link: link.used_at).shut("the server needs the room")
        return bool(idle)

    def _accept(
        self, header: QuicHeader, data: bytes, addr: NetworkAddress, original: bytes, proven: bool
    ) -> None:  # fmt: skip
        assert self._transport is not None
        if len(self.half_open) >= self._bounds.half_open:
            self.drop(next((link for link in self.half_open if not link.proven), next(iter(self.half_open))))
        quic = MendedConnection(
            configuration=self._configuration,
            original_destination_connection_id=original,
            retry_source_connection_id=header.destination_cid if proven else None,
            tickets=self._tickets,
        )
        link = ServerLink(quic, self, addr, proven)
        link.connection_made(self._transport)
        link._connection_id_issued_handler = partial(self._connection_id_issued, protocol=link)
        link._connection_id_retired_handler = partial(self._connection_id_retired, protocol=link)
        link._connection_terminated_handler = partial(self._connection_terminated, link)
        for cid in (header.destination_cid, quic.host_cid):
            self._connection_id_issued(cid, link)
        self.links.add(link)
        self.half_open[link] = self._loop.call_later(HANDSHAKE_S, self.drop, link)
        link.datagram_received(data, addr)
        if not quic.begun:
            self.drop(link)

    # what connections tell

    def begin(self, channel: QuicServerChannel) -> None:
        task = self._loop.create_task(run_session(self._handler, channel))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def settled(self, link: ServerLink) -> None:
        self.half_open.pop(link).cancel()
        self._places[link.place] += 1

    def left(self, link: ServerLink) -> None:
        if timer := self.half_open.pop(link, None):
            timer.cancel()
        elif link in self.links:
            self._places.subtract([link.place])
            if not self._places[link.place]:
                del self._places[link.place]
        self.links.discard(link)
        if link.cids:
            self.closing.add(link)

    def drop(self, link: ServerLink) -> None:
        """Forgets a half-open connection without a word, which its address might not have asked for."""
        link.lose(LinkLost("the handshake was not completed"))
        link.disarm()
        self._connection_terminated(link)

    def _connection_id_issued(self, cid: bytes, protocol: QuicConnectionProtocol) -> None:
        assert isinstance(protocol, ServerLink)
        super()._connection_id_issued(cid, protocol)
        protocol.cids.add(cid)

    def _connection_id_retired(self, cid: bytes, protocol: QuicConnectionProtocol) -> None:
        assert isinstance(protocol, ServerLink)
        super()._connection_id_retired(cid, protocol)
        protocol.cids.discard(cid)

    def _connection_terminated(self, protocol: QuicConnectionProtocol) -> None:
        """aioquic's own looks through the ids of all connections."""
        assert isinstance(protocol, ServerLink)
        for cid in protocol.cids:
            del self._protocols[cid]
        protocol.cids.clear()
        self.closing.discard(protocol)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()

    def shut(self) -> None:
        for link in list(self.links):
            link.shut("the server is shutting down")

    def release(self) -> None:
        """Gives back timers and the socket."""
        for link in self.closing:
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
    bounds: Bounds = Bounds(),  # noqa: B008  (frozen)
    idle_timeout: float = SILENCE_END,
) -> QuicListener:
    """Listens on UDP; port 0 takes any. Raises OSError."""
    config = configuration(is_client=False, idle_timeout=idle_timeout)
    config.load_cert_chain(tls.certificate, tls.key)
    store = ServerTickets() if tickets is None else tickets
    transport, dispatcher = await asyncio.get_running_loop().create_datagram_endpoint(
        lambda: Dispatcher(config, handler, store, bounds), local_addr=(host, port)
    )
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
    return QuicListener(dispatcher, Address(host, transport.get_extra_info("sockname")[1]))
