"""The cloud's end of one QUIC connection, and of its streams."""

from __future__ import annotations

import asyncio
from typing import Protocol

from aioquic.quic.connection import NetworkAddress
from aioquic.quic.events import HandshakeCompleted, QuicEvent
from aioquic.quic.packet import QuicErrorCode

from protocol.errors import LinkLost
from protocol.frames import ClientFrame, ServerFrame, decode_client, encode
from protocol.limits import STALLED
from protocol.prefixes import prefix
from protocol.transport.base import Address
from protocol.transport.quic_connection import MendedConnection
from protocol.transport.quic_link import HEADER, Link, Stream


class QuicServerChannel(Stream):
    """The cloud's end of one stream."""

    transport = "quic"

    def __init__(self, link: Link, stream_id: int, peer: str):
        super().__init__(link, stream_id)
        self.peer = peer
        self.early = False
        self.bytes_up = self.bytes_down = 0
        self.ticket_age_s = link.quic.ticket_age_s

    async def handshake(self) -> None:
        await self._link.handshake()

    def silent_s(self) -> float:
        return asyncio.get_running_loop().time() - self._link.quic.heard_at

    def delivery_rate(self) -> float:
        return self._link.quic.control.delivery_rate or 0.0

    def rtt_s(self) -> float | None:
        return self._link.quic.control.rtt_s

    async def send(self, frame: ServerFrame) -> None:
        data = encode(frame)
        await self.put(data)
        self.bytes_down += HEADER + len(data)

    async def receive(self) -> ClientFrame:
        first = not self._taken
        data = await self.take()
        self.bytes_up += HEADER + len(data)
        if first:
            self.early = self._link.handshaken is None
        return decode_client(data)

    async def aclose(self) -> None:
        self.close(abort=False)
        asyncio.get_running_loop().call_later(STALLED, self._give_up)

    def _give_up(self) -> None:
        """What a peer has not taken by now is not kept for it."""
        if not self._link.lost and self._link.quic.unsent(self._id):
            self._link.quic.reset_stream(self._id, QuicErrorCode.NO_ERROR)
            self._link.flush_soon()


class ServerLink(Link):
    """The cloud's end of one connection; its sessions' tasks belong to the listener."""

    def __init__(self, quic: MendedConnection, house: House, addr: NetworkAddress, proven: bool):
        super().__init__(quic)
        self.place, self.proven = prefix(addr[0]), proven
        self.cids: set[bytes] = set()
        self.used_at = self._loop.time()  # when its newest session began
        self._house, self._peer = house, str(Address(addr[0].removeprefix("::ffff:"), addr[1]))

    def stream(self, stream_id: int) -> Stream | None:
        if stream_id in self.streams:
            return self.streams[stream_id]
        channel = QuicServerChannel(self, stream_id, self._peer)
        self.used_at = self._loop.time()
        self._house.begin(channel)
        return channel

    def quic_event_received(self, event: QuicEvent) -> None:
        super().quic_event_received(event)
        if isinstance(event, HandshakeCompleted):
            self._house.settled(self)

    def lose(self, error: LinkLost) -> None:
        super().lose(error)
        self._house.left(self)


class House(Protocol):
    """What a connection tells the listener that it belongs to."""

    def begin(self, channel: QuicServerChannel) -> None:
        """A session's first bytes have come."""

    def settled(self, link: ServerLink) -> None:
        """The handshake is complete."""

    def left(self, link: ServerLink) -> None:
        """The connection carries nothing more."""
