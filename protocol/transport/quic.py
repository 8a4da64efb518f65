"""QUIC: one bidirectional stream per session, frames behind a 4-byte big-endian length."""

from __future__ import annotations

import asyncio
import socket
import time
from datetime import UTC, datetime

from aioquic.quic.events import HandshakeCompleted, QuicEvent
from aioquic.quic.packet import QuicErrorCode
from aioquic.tls import AlertDescription, SessionTicket
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificates

from protocol.errors import LinkLost, UnverifiedServer
from protocol.frames import ClientFrame, ServerFrame, decode_server, encode
from protocol.limits import PING_AFTER, RECEIVE_BYTES, SILENCE_END
from protocol.transport.base import Address, ClientChannel, LinkFacts, Trust
from protocol.transport.quic_connection import MendedConnection, configuration
from protocol.transport.quic_link import HEADER, Link, Stream
from protocol.transport.quic_server import serve_quic
from protocol.transport.tickets import Kept, TicketStore

__all__ = ["connect_quic", "serve_quic"]

UNVERIFIED = frozenset(
    QuicErrorCode.CRYPTO_ERROR + alert
    for alert in (
        AlertDescription.bad_certificate,
        AlertDescription.unsupported_certificate,
        AlertDescription.certificate_expired,
        AlertDescription.certificate_unknown,
        AlertDescription.unknown_ca,
        AlertDescription.decrypt_error,
    )
)


class QuicClientChannel(Stream):
    """The phone's end of one stream."""

    def __init__(self, link: Link, stream_id: int):
        super().__init__(link, stream_id)
        self.bytes_up = self.bytes_down = 0

    async def send(self, frame: ClientFrame) -> None:
        data = encode(frame)
        await self.put(data)
        self.bytes_up += HEADER + len(data)

    async def receive(self) -> ServerFrame:
        data = await self.take()
        self.bytes_down += HEADER + len(data)
        return decode_server(data)

    async def aclose(self) -> None:
        self.close(abort=True)


class ClientLink(Link):
    """The phone's end of a connection. With a ticket, nothing leaves before the first frame, which then goes along."""

    transport = "quic"

    def __init__(self, quic: MendedConnection, address: Address, trust: Trust, tickets: TicketStore | None):
        super().__init__(quic)
        self.address = address
        self._trust, self._tickets = trust, tickets
        self._ticket = quic.configuration.session_ticket
        self._pinged_at = 0.0
        self._pinger: asyncio.TimerHandle | None = None
        self._socket_closed = asyncio.Event()

    @property
    def closed(self) -> bool:
        return self.lost is not None

    @property
    def ticket_age_s(self) -> float | None:
        if not self._ticket or self.handshaken:
            return None
        return (datetime.now(UTC) - self._ticket.not_valid_before).total_seconds()

    def facts(self) -> LinkFacts:
        control, done = self._quic.control, self.handshaken
        return LinkFacts(
            rtt_s=control.rtt_s,
            min_rtt_s=control.min_rtt_s,
            delivery_rate=control.delivery_rate,
            bytes_sent=self._quic.bytes_sent,
            bytes_received=self._quic.bytes_received,
            resumed=bool(done and done.session_resumed),
            early_accepted=bool(done and done.early_data_accepted),
        )

    async def open(self) -> ClientChannel:
        await self.until(lambda: self._quic.can_open)
        stream_id = self._quic.get_next_available_stream_id()
        self._quic.send_stream_data(stream_id, b"")  # reserves it
        if self._pinger is None:
            self._pinger = self._loop.call_later(PING_AFTER, self._ping)
        return QuicClientChannel(self, stream_id)

    async def handshake(self) -> None:
        self.flush_soon()
        await super().handshake()

    async def aclose(self) -> None:
        self.shut("the phone closed the connection")
        await self._socket_closed.wait()

    def lose(self, error: LinkLost) -> None:
        super().lose(error)
        self.disarm()
        if self._transport is not None:
            self._transport.close()

    def disarm(self) -> None:
        super().disarm()
        if self._pinger is not None:
            self._pinger.cancel()

    def connection_lost(self, exc: Exception | None) -> None:
        self._socket_closed.set()

    def error_received(self, exc: Exception) -> None:
        """The socket is connected, so a host without a server answers; other errors may pass."""
        if isinstance(exc, ConnectionRefusedError) and not self.lost:
            self.lose(LinkLost(f"nobody listens on {self.address}"))

    def why(self) -> LinkLost:
        error = super().why()
        assert self._quic.ending is not None
        return UnverifiedServer(str(error)) if self._quic.ending.error_code in UNVERIFIED else error

    def quic_event_received(self, event: QuicEvent) -> None:
        super().quic_event_received(event)
        refused = isinstance(event, HandshakeCompleted) and self._ticket and not event.session_resumed
        if refused and self._tickets:
            self._tickets.drop(self.address, self._trust)

    def _ping(self) -> None:
        """While a session is open, a silent path is asked for a sign of life every PING_AFTER."""
        self._pinger = None
        if self.lost or not self.streams:
            return
        now = self._loop.time()
        due = max(self._quic.heard_at, self._pinged_at) + PING_AFTER
        if due <= now:
            if self.handshaken:
                self._quic.send_ping(0)
                self.flush_soon()
            self._pinged_at, due = now, now + PING_AFTER
        self._pinger = self._loop.call_at(due, self._ping)


async def connect_quic(
    address: Address, trust: Trust, tickets: TicketStore | None = None, *, idle_timeout: float = SILENCE_END
) -> ClientLink:
    """A connection that may still be under way: `handshake()` waits for it, `open()` and `send` work at once.

    With a ticket, the handshake starts with the first `send`, so that the frame can go out as early data, or with
    `handshake()`. Raises LinkLost when there is no such host, ValueError when the CA is not PEM.
    """
    config = configuration(is_client=True, idle_timeout=idle_timeout)
    config.server_name = trust.server_name or address.host
    config.cadata = _plain_pem(trust.ca)
    sock = await _connected_socket(address)
    try:
        where = sock.getpeername()
        used = tickets.take(address, trust) if tickets else None
        config.session_ticket = used.ticket if used else None

        def keep(ticket: SessionTicket) -> None:
            """Comes after the handshake, which has checked the certificate unless it was resumed."""
            assert tickets is not None
            checked = used.checked if used and quic.tls.session_resumed else time.time()
            tickets.add(address, trust, Kept(ticket, checked))

        quic = MendedConnection(configuration=config, session_ticket_handler=keep if tickets else None)
        _, link = await asyncio.get_running_loop().create_datagram_endpoint(
            lambda: ClientLink(quic, address, trust, tickets), sock=sock
        )
    except BaseException:
        sock.close()
        raise
    link.connect(where, transmit=config.session_ticket is None)
    return link


def _plain_pem(ca: bytes) -> bytes:
    """The certificates alone: aioquic stumbles, deep in the handshake, over anything between or behind them."""
    return b"".join(one.public_bytes(Encoding.PEM) for one in load_pem_x509_certificates(ca))


async def _connected_socket(address: Address) -> socket.socket:
    loop = asyncio.get_running_loop()
    problem: OSError | None = None
    try:
        found = await loop.getaddrinfo(address.host, address.port, type=socket.SOCK_DGRAM)
    except OSError as error:
        raise LinkLost(f"{address} is not known: {error}") from None
    for family, kind, proto, _, where in found:
        sock = socket.socket(family, kind, proto)
        try:
            sock.setblocking(False)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
            sock.connect(where)
            return sock
        except OSError as error:
            sock.close()
            problem = error
    raise LinkLost(f"{address} cannot be reached: {problem}")
