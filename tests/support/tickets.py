"""Session tickets for tests: a store that tells when one has come, and a visit that brings one."""

from __future__ import annotations

import asyncio
from pathlib import Path

from protocol.transport.base import Address, Trust
from protocol.transport.quic import connect_quic
from protocol.transport.tickets import Kept, TicketStore


class WatchedStore(TicketStore):
    """Tells when a ticket has come."""

    def __init__(self, folder: Path):
        super().__init__(folder)
        self.added = asyncio.Event()

    def add(self, address: Address, trust: Trust, kept: Kept) -> None:
        super().add(address, trust, kept)
        self.added.set()


async def visit(address: Address, trust: Trust, store: WatchedStore) -> None:
    """A connection without a session, which brings a ticket."""
    store.added.clear()
    connection = await connect_quic(address, trust, store)
    await connection.handshake()
    await store.added.wait()
    await connection.aclose()
