"""QUIC: one bidirectional stream per session, frames behind a 4-byte big-endian length."""

from __future__ import annotations

import asyncio
import socket
import time

from aioquic.tls import SessionTicket
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509 import load_pem_x509_certificates

from protocol.errors import LinkLost
from protocol.limits import SILENCE_END
from protocol.transport.base import Address, Trust
from protocol.transport.quic_client import ClientLink, QuicClientChannel, connected
from protocol.transport.quic_connection import MendedConnection, configuration
from protocol.transport.quic_server import serve_quic
from protocol.transport.tickets import Kept, TicketStore

__all__ = ["QuicClientChannel", "connect_quic", "serve_quic"]


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
        used = tickets.take(address, trust) if tickets else None
        config.session_ticket = used.ticket if used else None

        def keep(ticket: SessionTicket) -> None:
            """Comes after the handshake, which has checked the certificate unless it was resumed."""
            assert tickets is not None
            checked = used.checked if used and quic.tls.session_resumed else time.time()
            tickets.add(address, trust, Kept(ticket, checked))

        quic = MendedConnection(configuration=config, session_ticket_handler=keep if tickets else None)
    except BaseException:
        sock.close()
        raise
    link, where = ClientLink(quic, address, trust, tickets), sock.getpeername()
    await link.plug(sock)
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
    for family, _, _, _, where in found:
        try:
            return connected(family, where)
        except OSError as error:
            problem = error
    raise LinkLost(f"{address} cannot be reached: {problem}")
