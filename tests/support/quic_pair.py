"""Two QUIC connections without sockets or a clock: datagrams move when a test says so."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from aioquic._buffer import Buffer
from aioquic.quic.events import QuicEvent, StreamDataReceived
from aioquic.quic.packet import QuicHeader, QuicPacketType, encode_quic_retry, pull_quic_header
from aioquic.quic.retry import QuicRetryTokenHandler
from aioquic.tls import SessionTicket

from protocol.transport.base import ServerTls, Trust
from protocol.transport.quic_bbr import NAME
from protocol.transport.quic_connection import MendedConnection, configuration
from protocol.transport.tickets import ServerTickets

CLIENT, SERVER = ("192.0.2.1", 1000), ("192.0.2.2", 4433)


def phone(
    trust: Trust,
    ticket: SessionTicket | None = None,
    kept: list[SessionTicket] | None = None,
    control: str = NAME,
) -> MendedConnection:
    """A phone's end that has not sent anything yet; the tickets it gets are appended to `kept`."""
    config = configuration(is_client=True, idle_timeout=15.0)
    config.server_name, config.cadata, config.session_ticket = "localhost", trust.ca, ticket
    config.congestion_control_algorithm = control
    return MendedConnection(configuration=config, session_ticket_handler=None if kept is None else kept.append)


def drained(connection: MendedConnection) -> Iterator[QuicEvent]:
    """The events that nobody has seen yet."""
    while (event := connection.next_event()) is not None:
        yield event


@dataclass
class Pair:
    """A phone, a server, and `half_rtt` seconds between them."""

    client: MendedConnection
    tls: ServerTls
    tickets: ServerTickets = field(default_factory=ServerTickets)
    half_rtt: float = 0.05
    retry: QuicRetryTokenHandler | None = None
    now: float = 100.0
    server: MendedConnection | None = None
    heard: list[QuicEvent] = field(default_factory=list)  # by the server
    answered: list[QuicEvent] = field(default_factory=list)  # and by the phone
    _waiting: list[bytes] = field(default_factory=list)  # what the server sends without a connection

    def start(self) -> None:
        self.client.connect(SERVER, now=self.now)

    def up(self) -> int:
        """One flight of the phone's arrives; tells its datagrams."""
        datagrams = self.client.datagrams_to_send(now=self.now)
        self.now += self.half_rtt
        for data, _ in datagrams:
            self.arrive(data)
        return len(datagrams)

    def down(self) -> int:
        """One flight of the server's arrives; tells its datagrams."""
        datagrams, self._waiting = self._waiting, []
        if self.server:
            datagrams += [data for data, _ in self.server.datagrams_to_send(now=self.now)]
        self.now += self.half_rtt
        for data in datagrams:
            self.client.receive_datagram(data, SERVER, now=self.now)
        self.answered += drained(self.client)
        return len(datagrams)

    def settle(self) -> None:
        """Round trips until nobody has anything to say."""
        while self.up() + self.down():
            pass

    def requested(self, stream_id: int = 0) -> bytes:
        """What the server's application has of a stream."""
        return b"".join(e.data for e in self.heard if isinstance(e, StreamDataReceived) and e.stream_id == stream_id)

    def arrive(self, data: bytes) -> None:
        """A datagram of the phone's comes to the server."""
        header = pull_quic_header(Buffer(data=data), host_cid_length=8)
        if self.server is None and header.packet_type is QuicPacketType.INITIAL:
            if self.retry and not header.token:
                self._waiting = [self._retry(self.retry, header)]
            else:
                self.server = self._accept(header)
        if self.server:
            self.server.receive_datagram(data, CLIENT, now=self.now)
            self.heard += drained(self.server)

    def _accept(self, header: QuicHeader) -> MendedConnection:
        config = configuration(is_client=False, idle_timeout=15.0)
        config.load_cert_chain(self.tls.certificate, self.tls.key)
        original, retried = header.destination_cid, None
        if self.retry:
            retried = header.destination_cid
            original = self.retry.validate_token(
                address=CLIENT, destination_cid=retried, token=header.token, now=self.now
            )
        return MendedConnection(
            configuration=config,
            original_destination_connection_id=original,
            retry_source_connection_id=retried,
            tickets=self.tickets,
        )

    def _retry(self, tokens: QuicRetryTokenHandler, header: QuicHeader) -> bytes:
        new_cid = b"retried!"
        token = tokens.create_token(
            address=CLIENT,
            original_destination_connection_id=header.destination_cid,
            retry_source_connection_id=new_cid,
            now=self.now,
        )
        assert header.version is not None
        return encode_quic_retry(
            version=header.version,
            source_cid=new_cid,
            destination_cid=header.source_cid,
            original_destination_cid=header.destination_cid,
            retry_token=token,
        )


def ticket_of(trust: Trust, tls: ServerTls, tickets: ServerTickets) -> SessionTicket:
    """A ticket that `tickets` knows."""
    kept: list[SessionTicket] = []
    pair = Pair(phone(trust, kept=kept), tls, tickets)
    pair.start()
    pair.settle()
    return kept[0]
