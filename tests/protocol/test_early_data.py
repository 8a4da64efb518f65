"""0-RTT over real sockets: the server's application has the request before the handshake is complete."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from protocol.errors import LinkLost
from protocol.frames import Frame, Tokens
from protocol.transport.base import Address, ServerChannel, ServerTls, Trust
from protocol.transport.quic import connect_quic, serve_quic
from protocol.transport.quic_door import Bounds
from protocol.transport.quic_server import QuicListener
from protocol.transport.tickets import Kept
from support.certificates import Authority
from support.relay import UdpRelay
from support.sample_frames import OPEN, opening, opening_of
from support.tickets import WatchedStore, visit

pytestmark = [pytest.mark.anyio, pytest.mark.usefixtures("tidy")]


class Server:
    """A QUIC server that notes what its sessions saw first, and answers each first frame."""

    def __init__(self) -> None:
        self.first: asyncio.Queue[tuple[ServerChannel, Frame]] = asyncio.Queue()

    @classmethod
    async def start(cls, tls: ServerTls, port: int = 0, *, retry: bool = False) -> Server:
        server = cls()
        bounds = Bounds(retry_above=0) if retry else Bounds()
        server.listener = await serve_quic("127.0.0.1", port, tls, server.handle, bounds=bounds)
        server.address = server.listener.address
        return server

    async def handle(self, channel: ServerChannel) -> None:
        self.first.put_nowait((channel, await channel.receive()))
        await channel.send(Tokens(1, (1,)))
        await channel.receive()

    async def aclose(self) -> None:
        await self.listener.aclose()

    listener: QuicListener
    address: Address


@pytest.fixture
async def server(tls: ServerTls) -> AsyncIterator[Server]:
    server = await Server.start(tls)
    yield server
    await server.aclose()


@pytest.fixture
def store(folder: Path) -> WatchedStore:
    return WatchedStore(folder)


async def test_the_application_has_the_request_before_the_handshake_is_complete(
    server: Server, trust: Trust, store: WatchedStore
) -> None:
    async with await UdpRelay.start(server.address) as relay:
        await visit(relay.address, trust, store)
        relay.down.hold()  # the phone hears nothing, so it cannot have finished the handshake
        connection = await connect_quic(relay.address, trust, store)
        assert connection.ticket_age_s is not None
        assert 0 <= connection.ticket_age_s < 60
        channel = await connection.open()
        opened = opening(log=(1,) * 9000, log_length=9000, prompt_length=9000, ticket_age_s=connection.ticket_age_s)
        await channel.send(opened)
        seen, frame = await server.first.get()
        assert frame.log == opened.log  # type: ignore[union-attr]
        assert seen.early
        assert seen.ticket_age_s is not None
        assert abs(seen.ticket_age_s - frame.ticket_age_s) < 5  # type: ignore[union-attr, operator]
        waiting = asyncio.create_task(seen.handshake())
        await asyncio.wait({waiting}, timeout=0.3)
        assert not waiting.done()
        assert connection.handshaken is None
        relay.down.release()
        await waiting
        assert await channel.receive() == Tokens(1, (1,))
        facts = connection.facts()
        assert facts.resumed
        assert facts.early_accepted
        assert connection.ticket_age_s is None
        await connection.aclose()


async def test_the_answer_to_early_data_comes_within_one_round_trip(
    server: Server, trust: Trust, store: WatchedStore
) -> None:
    """Counted in flights: one of the phone's has left when the answer is there."""
    async with await UdpRelay.start(server.address) as relay:
        await visit(relay.address, trust, store)
        before = len(relay.up.sizes)
        connection = await connect_quic(relay.address, trust, store)
        channel = await connection.open()
        await channel.send(OPEN)
        await relay.up.until(before + 1)
        relay.up.hold()  # nothing but the first flight reaches the server
        assert await channel.receive() == Tokens(1, (1,))
        relay.up.release()
        await connection.aclose()


async def test_nothing_leaves_before_the_first_frame_with_a_ticket(
    server: Server, trust: Trust, store: WatchedStore
) -> None:
    async with await UdpRelay.start(server.address) as relay:
        await visit(relay.address, trust, store)
        before = len(relay.up.sizes)
        unused = await connect_quic(relay.address, trust, store)
        await unused.open()
        await unused.aclose()
        assert len(relay.up.sizes) == before
        connection = await connect_quic(relay.address, trust, store)
        await connection.handshake()
        assert len(relay.up.sizes) > before
        await connection.aclose()


async def test_a_restarted_server_refuses_the_ticket_and_has_the_request_once(
    tls: ServerTls, trust: Trust, store: WatchedStore
) -> None:
    first = await Server.start(tls)
    for _ in range(2):
        await visit(first.address, trust, store)
    await first.aclose()
    second = await Server.start(tls, first.address.port)
    connection = await connect_quic(first.address, trust, store)
    channel = await connection.open()
    await channel.send(opening_of(5000))
    assert await channel.receive() == Tokens(1, (1,))
    seen, frame = await second.first.get()
    assert frame == opening_of(5000)
    assert second.first.empty()
    assert not seen.early
    assert seen.ticket_age_s is None
    facts = connection.facts()
    assert (facts.resumed, facts.early_accepted) == (False, False)
    assert connection.quic.control.ssthresh is None
    await connection.aclose()
    await second.aclose()


async def test_one_refusal_drops_the_tickets_of_that_replica_only(
    tls: ServerTls, trust: Trust, store: WatchedStore
) -> None:
    first, other = await Server.start(tls), await Server.start(tls)
    await visit(other.address, trust, store)
    for _ in range(2):
        await visit(first.address, trust, store)
    await first.aclose()
    second = await Server.start(tls, first.address.port)
    connection = await connect_quic(first.address, trust, store)
    await connection.handshake()
    await connection.aclose()
    await second.aclose()
    await other.aclose()
    kept = [store.take(other.address, trust), store.take(other.address, trust)]
    assert kept[0] is not None
    assert kept[1] is None


async def test_early_data_survives_a_retry(tls: ServerTls, trust: Trust, store: WatchedStore) -> None:
    server = await Server.start(tls, retry=True)
    await visit(server.address, trust, store)
    connection = await connect_quic(server.address, trust, store)
    channel = await connection.open()
    await channel.send(opening_of(5000))
    seen, frame = await server.first.get()
    assert frame == opening_of(5000)
    assert seen.early
    assert await channel.receive() == Tokens(1, (1,))
    await connection.handshake()
    assert connection.facts().early_accepted
    await connection.aclose()
    await server.aclose()


async def test_a_ticket_does_not_make_up_for_another_ca(server: Server, trust: Trust, store: WatchedStore) -> None:
    """A resumed handshake checks no certificate, so tickets belong to the CA they were got under."""
    await visit(server.address, trust, store)
    connection = await connect_quic(server.address, Authority.create("another").trust, store)
    with pytest.raises(LinkLost):
        await connection.handshake()
    await connection.aclose()


async def test_a_chain_of_tickets_counts_from_the_certificate(
    server: Server, trust: Trust, store: WatchedStore
) -> None:
    await visit(server.address, trust, store)
    first = store.take(server.address, trust)
    assert first is not None
    store.add(server.address, trust, Kept(first.ticket, first.checked - 1000))
    await visit(server.address, trust, store)
    second = store.take(server.address, trust)
    assert second is not None
    assert second.ticket != first.ticket
    assert second.checked == first.checked - 1000


async def test_several_early_sessions_share_a_first_flight(server: Server, trust: Trust, store: WatchedStore) -> None:
    await visit(server.address, trust, store)
    connection = await connect_quic(server.address, trust, store)
    channels = [await connection.open() for _ in range(3)]
    for number, channel in enumerate(channels):
        await channel.send(opening(attempt=number))
    seen = [await server.first.get() for _ in channels]
    assert {frame.attempt for _, frame in seen} == {0, 1, 2}  # type: ignore[union-attr]
    assert all(channel.early for channel, _ in seen)
    await connection.aclose()
