"""Strangers at the QUIC port: proof above a rate, few half-open connections, and never more out than three times in."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from aioquic.quic.packet import QuicPacketType
from aioquic.quic.retry import QuicRetryTokenHandler

from protocol.errors import LinkLost
from protocol.frames import Draft, Tokens
from protocol.prefixes import prefix
from protocol.transport.base import Address, Connection, Trust
from protocol.transport.quic import connect_quic
from protocol.transport.quic_door import PLACES, Bounds, Buckets, Door, Verdict
from protocol.transport.quic_server import QuicListener
from protocol.transport.tickets import TicketStore
from support.certificates import Authority
from support.clock import Clock
from support.quic_raw import LEAST, Hello, Peer, crypto, initial
from support.tickets import WatchedStore
from support.wires import Serve, turn

pytestmark = pytest.mark.anyio

UNLIMITED = Bounds(retry_above=1e6, per_prefix=1e6)


@pytest.fixture(scope="module")
def hello(trust: Trust) -> Hello:
    return Hello.of(trust)


@pytest.fixture
async def peers() -> AsyncIterator[Callable[..., Peer]]:
    made: list[Peer] = []

    def make(address: Address, at: str = "127.0.0.1") -> Peer:
        made.append(Peer(address, at))
        return made[-1]

    yield make
    for peer in made:
        peer.close()


async def ask(connection: Connection) -> None:
    """One session."""
    channel = await connection.open()
    await channel.send(Draft(1, (1,)))
    assert await channel.receive() == Tokens(1, (1,))
    await channel.aclose()


async def answered(address: Address, trust: Trust, tickets: TicketStore | None = None) -> bool:
    """An honest phone asks and is answered; tells whether early data was taken."""
    connection = await connect_quic(address, trust, tickets)
    try:
        await ask(connection)
        await connection.handshake()
        return connection.facts().early_accepted
    finally:
        await connection.aclose()


async def flood(peer: Peer, datagrams: Iterator[bytes]) -> None:
    """The server has read each before the next leaves."""
    for data in datagrams:
        with suppress(BlockingIOError):
            peer.send(data)
        await turn()


def empty(listener: QuicListener) -> bool:
    """Nothing is kept of any connection."""
    server = listener._dispatcher
    return not (server.links or server.half_open or server.closing or server._protocols or server._places)


@pytest.mark.parametrize(
    ("host", "place"),
    [
        ("192.0.2.77", "192.0.2.0/24"),
        ("::ffff:192.0.2.77", "192.0.2.0/24"),
        ("2001:db8:1:2ff::1", "2001:db8:1:200::/56"),
        ("fe80::1%eth0", "fe80::/56"),
    ],
)
def test_a_prefix_is_what_one_subscriber_holds(host: str, place: str) -> None:
    assert prefix(host) == place


def test_a_bucket_fills_with_time_and_a_full_table_forgets_the_oldest() -> None:
    clock = Clock(100.0)
    buckets = Buckets(2.0, 3.0, 2, clock)
    assert [buckets.take("a") for _ in range(4)] == [True, True, True, False]
    clock.now += 0.5
    assert [buckets.take("a") for _ in range(2)] == [True, False]
    clock.now += 100
    assert [buckets.take("a") for _ in range(4)] == [True, True, True, False]
    for key in "bcdefg":
        assert buckets.take(key)
    assert len(buckets) == 2
    assert not Buckets(0.0, 3.0, 2, clock).take("a")


def test_forged_addresses_spend_nothing_of_those_who_prove_theirs() -> None:
    clock = Clock(100.0)
    door = Door(Bounds(retry_above=5, per_prefix=1), clock)
    first = [door.judge("a", proven=False, half_open=0) for _ in range(20)]
    assert first.count(Verdict.TAKE) == 5
    assert set(first) == {Verdict.TAKE, Verdict.PROVE}
    shown = [door.judge("a", proven=True, half_open=0) for _ in range(12)]
    assert shown == [Verdict.TAKE] * 10 + [Verdict.REFUSE] * 2
    assert door.judge("b", proven=True, half_open=0) is Verdict.TAKE
    clock.now += 1
    assert door.judge("a", proven=True, half_open=0) is Verdict.TAKE
    assert door.judge("c", proven=False, half_open=256) is Verdict.PROVE
    for number in range(2 * PLACES):
        door.judge(str(number), proven=True, half_open=0)
    assert len(door._proven) == PLACES


def garbage(hello: Hello) -> list[bytes]:
    unknown = bytearray(hello.packet())
    unknown[1:5] = b"\x0a\x0a\x0a\x0a"
    short_id = initial(crypto(hello.message), to=b"short", source=hello.cid)
    return [
        b"", b"\x00", bytes(LEAST), b"\xff" * 1400, b"\x40" * 30, b"\xc0" + bytes(1300), os.urandom(1400), short_id,
        bytes(unknown[:60]), b"\xc0\x0a\x0a\x0a\x0a\x00\x00", bytes(unknown), hello.packet()[: LEAST - 1],
        initial(crypto(hello.message), to=os.urandom(8), keys=b"other id"), hello.packet(token=b"made up"),
        hello.packet(token=os.urandom(200)), initial(b"\x01", to=os.urandom(8)), initial(b"\x1f", to=os.urandom(8)),
        initial(crypto(os.urandom(400)), to=os.urandom(8)), initial(crypto(bytes(400)), to=os.urandom(8)),
    ]  # fmt: skip


@pytest.mark.parametrize("bounds", [UNLIMITED, Bounds(retry_above=0)], ids=["calm", "retry"])
async def test_whatever_comes_never_more_than_three_times_as_much_goes(
    serve: Serve, trust: Trust, hello: Hello, peers: Callable[..., Peer], bounds: Bounds
) -> None:
    listener = await serve(bounds=bounds)
    for data in garbage(hello):
        peer = peers(listener.address)
        await flood(peer, iter([data]))
        await answered(listener.address, trust)
        assert peer.received <= 3 * peer.sent, data
    assert len(listener._dispatcher.half_open) <= 1  # which waits for the rest of a long message


async def test_small_datagrams_begin_nothing_and_get_no_answer(
    serve: Serve, trust: Trust, hello: Hello, peers: Callable[..., Peer]
) -> None:
    listener = await serve()
    peer = peers(listener.address)
    await flood(peer, (data[: LEAST - 1] for data in garbage(hello)))
    await answered(listener.address, trust)
    assert peer.received == 0


async def test_a_long_certificate_is_held_back_until_the_address_is_shown(
    serve: Serve, authority: Authority, hello: Hello, tmp_path: Path, peers: Callable[..., Peer]
) -> None:
    names = [f"host-{number}.example.org" for number in range(400)]
    listener = await serve(used=authority.issue(tmp_path, "127.0.0.1", *names))
    peer = peers(listener.address)
    await flood(peer, iter([hello.packet()]))
    assert 2 * peer.sent < peer.received <= 3 * peer.sent
    await listener.aclose()  # a farewell would be too much
    assert peer.received <= 3 * peer.sent


async def test_a_refusal_is_smaller_than_what_it_refuses(
    serve: Serve, trust: Trust, hello: Hello, peers: Callable[..., Peer]
) -> None:
    listener = await serve(bounds=Bounds(connections=1))
    first = await connect_quic(listener.address, trust)
    channel = await first.open()
    await channel.send(Draft(1, (1,)))
    await channel.receive()
    peer = peers(listener.address)
    await flood(peer, (hello.packet() for _ in range(5)))
    assert len(peer.answers) == 5
    assert peer.received < peer.sent / 5
    await first.aclose()


async def test_below_the_rate_nobody_is_asked_for_proof_and_above_it_everybody(
    serve: Serve, trust: Trust, hello: Hello, peers: Callable[..., Peer]
) -> None:
    listener = await serve(bounds=Bounds(retry_above=3))
    peer = peers(listener.address)
    await flood(peer, (hello.packet() for _ in range(3)))
    assert peer.kinds() == {QuicPacketType.INITIAL}
    assert len(listener._dispatcher.half_open) == 3
    stranger = peers(listener.address, "127.0.9.1")
    await flood(stranger, (hello.packet() for _ in range(20)))
    assert QuicPacketType.RETRY in stranger.kinds()
    assert len(listener._dispatcher.half_open) <= 3 + 3
    assert stranger.received < stranger.sent / 5


async def test_two_thousand_half_open_connections_keep_nobody_out(
    serve: Serve, trust: Trust, hello: Hello, folder: Path, peers: Callable[..., Peer]
) -> None:
    listener = await serve()
    tickets = WatchedStore(folder)
    warm = await connect_quic(listener.address, trust, tickets)  # brings a ticket
    await ask(warm)
    await tickets.added.wait()
    attackers = [peers(listener.address, f"127.1.{number}.1") for number in range(20)]
    for attacker in attackers:
        await flood(attacker, (hello.packet() for _ in range(100)))
    assert len(listener._dispatcher.half_open) <= Bounds().half_open
    assert sum(attacker.received for attacker in attackers) < sum(attacker.sent for attacker in attackers)
    assert not await answered(listener.address, trust)
    assert await answered(listener.address, trust, tickets)
    await ask(warm)
    await warm.aclose()


async def test_half_open_ones_that_showed_their_address_make_way_too(
    serve: Serve, trust: Trust, hello: Hello, peers: Callable[..., Peer]
) -> None:
    """Twenty places answer the Retry and then say nothing more."""
    listener = await serve(bounds=Bounds(retry_above=0, half_open=16))
    for number in range(20):
        attacker = peers(listener.address, f"127.2.{number}.1")
        await flood(attacker, iter([hello.packet()]))
        (retry,) = attacker.answers
        await flood(attacker, iter([after(retry, hello)]))
        assert QuicPacketType.INITIAL in attacker.kinds()
    half_open = listener._dispatcher.half_open
    assert len(half_open) == 16
    assert all(link.proven for link in half_open)
    await answered(listener.address, trust)
    assert len(half_open) == 15  # the phone's place was another's


def after(retry: bytes, hello: Hello) -> bytes:
    """The first packet again, as a Retry asks for it."""
    size = retry[5]
    at = 6 + size
    source = retry[at + 1 : at + 1 + retry[at]]
    return hello.packet(token=retry[at + 1 + retry[at] : -16], to=source)


async def test_more_handshakes_than_a_prefix_may_do_are_refused_in_words(serve: Serve, trust: Trust) -> None:
    listener = await serve(bounds=Bounds(retry_above=0, per_prefix=0.1))
    await answered(listener.address, trust)
    connection = await connect_quic(listener.address, trust)
    with pytest.raises(LinkLost, match=r"too many handshakes from 127\.0\.0\.0/24"):
        await connection.handshake()
    await connection.aclose()


async def test_a_token_serves_only_who_got_it(serve: Serve, hello: Hello, peers: Callable[..., Peer]) -> None:
    listener = await serve(bounds=Bounds(retry_above=0))
    honest, thief = peers(listener.address), peers(listener.address, "127.0.7.1")
    await flood(honest, iter([hello.packet()]))
    stolen = after(honest.answers[0], hello)
    await flood(thief, iter([stolen, hello.packet(token=QuicRetryTokenHandler()._aead.encrypt(bytes(12), b"x", None))]))
    assert not listener._dispatcher.half_open
    assert thief.received < thief.sent / 5


async def test_a_first_packet_that_cannot_be_read_leaves_nothing(
    serve: Serve, trust: Trust, hello: Hello, peers: Callable[..., Peer]
) -> None:
    listener = await serve(bounds=UNLIMITED)
    peer = peers(listener.address)
    await flood(peer, (initial(crypto(hello.message), to=os.urandom(8), keys=b"other id") for _ in range(50)))
    await answered(listener.address, trust)
    assert not listener._dispatcher.half_open
    assert peer.received == 0


async def test_a_handshake_that_is_not_completed_is_forgotten(
    serve: Serve, hello: Hello, peers: Callable[..., Peer], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.transport.quic_server.HANDSHAKE_S", 0.05)
    listener = await serve()
    await flood(peers(listener.address), iter([hello.packet()]))
    (link,) = listener._dispatcher.half_open
    with pytest.raises(LinkLost, match="not completed"):
        await link.handshake()
    assert empty(listener)


async def test_two_hundred_connections_at_once_are_all_served(serve: Serve, trust: Trust) -> None:
    listener = await serve()
    await asyncio.gather(*(answered(listener.address, trust) for _ in range(200)))


async def test_when_all_places_are_taken_one_without_a_session_makes_way(serve: Serve, trust: Trust) -> None:
    listener = await serve(bounds=Bounds(connections=4))  # two from one prefix
    idle, busy, third = [await connect_quic(listener.address, trust) for _ in range(3)]
    await idle.handshake()
    held = await busy.open()
    await held.send(Draft(1, (1,)))
    await held.receive()
    await third.handshake()
    with pytest.raises(LinkLost, match="needs the room"):
        await idle.until(lambda: False)
    taken = await third.open()
    await taken.send(Draft(1, (1,)))
    await taken.receive()
    fourth = await connect_quic(listener.address, trust)
    with pytest.raises(LinkLost, match=r"too many connections from 127\.0\.0\.0/24, limit 2"):
        await fourth.handshake()
    for connection in (idle, busy, third, fourth):
        await connection.aclose()
    while not empty(listener):
        await turn()
    await answered(listener.address, trust)


async def test_ids_are_forgotten_with_their_connection(serve: Serve, trust: Trust) -> None:
    listener = await serve(idle_timeout=0.1)
    for _ in range(5):
        await answered(listener.address, trust)
    while not empty(listener):
        await turn()
