"""The phone's end of one QUIC connection, and of its streams; it may go on from another socket."""

from __future__ import annotations

import asyncio
import errno
import socket
from datetime import UTC, datetime
from typing import Any

from aioquic.quic.events import HandshakeCompleted, QuicEvent
from aioquic.quic.packet import QuicErrorCode
from aioquic.tls import AlertDescription

from protocol.errors import LinkLost, UnverifiedServer
from protocol.frames import ClientFrame, ServerFrame, decode_server, encode
from protocol.limits import PING_AFTER, RECEIVE_BYTES
from protocol.transport.base import Address, ClientChannel, LinkFacts, Trust, Way
from protocol.transport.quic_connection import MendedConnection
from protocol.transport.quic_link import HEADER, Link, Stream
from protocol.transport.tickets import TicketStore

NO_WAY = frozenset(  # errors of sending that another socket may not meet
    (
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
        errno.EADDRNOTAVAIL,
        errno.ENETDOWN,
        errno.ENODEV,
        errno.EINVAL,
        errno.EPERM,
    )
)
FIRST_RETRY_S, MOST_RETRY_S = 0.05, 1.0  # between moves for errors of sending

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


def connected(family: int, there: Any) -> socket.socket:
    """A UDP socket that the kernel has bound, and tells errors of. Raises OSError."""
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, RECEIVE_BYTES)
        sock.connect(there)
    except OSError:
        sock.close()
        raise
    return sock


class Port(asyncio.DatagramProtocol):
    """One UDP socket of a connection; a move puts another in its place."""

    def __init__(self, link: ClientLink, sock: socket.socket):
        self._link, self.way, self.closed = link, Way.of(sock), asyncio.Event()

    def datagram_received(self, data: bytes, addr: object) -> None:
        self._link.datagram_received(data, addr)

    def error_received(self, exc: Exception) -> None:
        self._link.failed(self, exc)

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set()


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
    hurries = True

    def __init__(self, quic: MendedConnection, address: Address, trust: Trust, tickets: TicketStore | None):
        super().__init__(quic)
        self.address = address
        self._trust, self._tickets = trust, tickets
        self._ticket = quic.configuration.session_ticket
        self._pinged_at = 0.0
        self._pinger: asyncio.TimerHandle | None = None
        self._port: Port | None = None
        self._move: asyncio.Task[bool] | None = None
        self._retry_s, self._retry_at = 0.0, 0.0

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

    def silent_s(self) -> float:
        return self._loop.time() - self._quic.heard_at

    async def aclose(self) -> None:
        self.shut("the phone closed the connection")
        if self._move is not None:
            await asyncio.wait({self._move})
        if self._port is not None:
            await self._port.closed.wait()

    def lose(self, error: LinkLost) -> None:
        super().lose(error)
        self.disarm()
        if self._transport is not None:
            self._transport.close()

    def disarm(self) -> None:
        super().disarm()
        if self._pinger is not None:
            self._pinger.cancel()

    # sockets

    async def plug(self, sock: socket.socket) -> None:
        """Goes on from this connected socket, which it then owns, and closes the one before."""
        try:
            transport, port = await self._loop.create_datagram_endpoint(lambda: Port(self, sock), sock=sock)
        except BaseException:
            sock.close()
            raise
        before, self._transport, self._port = self._transport, transport, port
        if before is not None:
            before.close()
        if self.lost:
            transport.close()

    def displaced(self) -> bool:
        return self._port is not None and self._port.way.gone()

    async def move(self) -> bool:
        if self.lost or not self.handshaken:
            return False
        return await asyncio.shield(self._moving())

    def _moving(self) -> asyncio.Task[bool]:
        if self._move is None or self._move.done():
            self._move = self._loop.create_task(self._go_on())
        return self._move

    async def _go_on(self) -> bool:
        assert self._port is not None
        before = self._port.way
        try:
            sock = connected(before.family, before.there)
        except OSError:
            return False
        await self.plug(sock)
        if not self.lost:
            self._quic.go_on(self._loop.time(), elsewhere=self._port.way != before)
            self.transmit()
        return not self.lost

    def failed(self, port: Port, exc: Exception) -> None:
        """The socket is connected, so a host without a server answers; where there is no way, another is looked for."""
        if self.lost or port is not self._port:
            return
        if isinstance(exc, ConnectionRefusedError):
            self.lose(LinkLost(f"nobody listens on {self.address}"))
        elif isinstance(exc, OSError) and exc.errno in NO_WAY and self.handshaken:
            self._try_elsewhere()

    def _try_elsewhere(self) -> None:
        """Moves; less often the longer it does not help."""
        now = self._loop.time()
        if now >= self._retry_at:
            helped = self.silent_s() < PING_AFTER
            self._retry_s = FIRST_RETRY_S if helped else min(2 * self._retry_s or FIRST_RETRY_S, MOST_RETRY_S)
            self._retry_at = now + self._retry_s
            self._moving()

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
                self._quic.ask()
                self.flush_soon()
            self._pinged_at, due = now, now + PING_AFTER
        self._pinger = self._loop.call_at(due, self._ping)
