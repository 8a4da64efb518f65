"""Early data that somebody recorded: sent again it runs nothing; sent late, elsewhere or from afar it does no harm."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from dataclasses import dataclass
from pathlib import Path

import pytest

from protocol.errors import LinkLost
from protocol.frames import Tokens
from protocol.transport.base import Address, ServerTls, Trust
from protocol.transport.quic import connect_quic, serve_quic
from protocol.transport.quic_server import QuicListener
from support.certificates import Authority
from support.checkpoints import checkpoint
from support.cloud import Cloud, cloud
from support.phone import Phone
from support.quic_raw import Peer
from support.relay import UdpRelay
from support.tickets import WatchedStore, visit
from support.wires import turn

pytestmark = pytest.mark.anyio
PROMPT = tuple(range(10, 60))
NEVER = 400  # answer tokens


@dataclass(frozen=True, slots=True)
class Replica:
    """One cloud server behind a listener."""

    cloud: Cloud
    listener: QuicListener

    @property
    def steps(self) -> int:
        return self.cloud.service.worker.load.steps

    @property
    def waiting(self) -> float:
        """Early requests that were made to wait for their handshake."""
        return float(self.cloud.service.metrics._early.labels("tiny-llama", "waited")._value.get())

    async def idle(self) -> None:
        """Until nothing is left of any session or connection."""
        server = self.listener._dispatcher
        while server.tasks or server.links or server.closing or self.cloud.service.rooms.taken:
            await turn()
        while await self.cloud.settled() != (0, 0):
            pass


@pytest.fixture(scope="module")
def phone() -> Phone:
    return Phone(checkpoint())


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority.create()


@pytest.fixture(scope="module")
def tls(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> ServerTls:
    return authority.issue(tmp_path_factory.mktemp("tls"), "127.0.0.1")


@pytest.fixture
async def replica(tls: ServerTls) -> AsyncIterator[Replica]:
    async with cloud(checkpoint()) as served:
        listener = await serve_quic("127.0.0.1", 0, tls, served.handle)
        yield Replica(served, listener)
        await listener.aclose()


async def recorded(
    relay: UdpRelay, phone: Phone, trust: Trust, folder: Path, *, hold: bool, max_tokens: int = 4
) -> list[bytes]:
    """The datagrams of a phone that asks in early data and goes; with `hold` none of them arrives."""
    store = WatchedStore(folder)
    await visit(relay.address, trust, store)
    before = len(relay.heard)
    connection = await connect_quic(relay.address, trust, store)
    if hold:
        relay.up.hold()
        channel = await connection.open()
        await channel.send(phone.open_frame(PROMPT, max_tokens=max_tokens, ticket_age_s=connection.ticket_age_s))
        await relay.up.until(before + 1)
    else:
        heard = await phone.ask(connection, PROMPT, max_tokens=max_tokens, ticket_age_s=connection.ticket_age_s)
        assert heard.admitted.early
    flight = relay.heard[before:]
    await connection.aclose()
    return flight


async def send(address: Address, flight: Iterable[bytes], at: str = "127.0.3.1") -> Peer:
    """From an address that is not the phone's."""
    attacker = Peer(address, at)
    for data in flight:
        attacker.send(data)
        await turn()
    return attacker


async def test_a_flight_sent_again_runs_nothing(
    replica: Replica, phone: Phone, authority: Authority, tmp_path: Path
) -> None:
    """To the same server while the connection lives there still and when it is forgotten."""
    async with await UdpRelay.start(replica.listener.address) as relay:
        flight = await recorded(relay, phone, authority.trust, tmp_path, hold=False)
        steps = replica.steps
        for _ in range(2):
            attacker = await send(replica.listener.address, flight * 3)
            assert attacker.received <= 3 * attacker.sent
            attacker.close()
            assert not replica.listener._dispatcher.tasks
            for link in list(replica.listener._dispatcher.half_open):
                replica.listener._dispatcher.drop(link)
            await replica.idle()
        assert replica.steps == steps


async def test_a_flight_sent_to_another_replica_runs_nothing(
    replica: Replica, phone: Phone, authority: Authority, tls: ServerTls, tmp_path: Path
) -> None:
    """Its ticket is in the memory of one server only."""
    async with cloud(checkpoint()) as served:
        other = Replica(served, await serve_quic("127.0.0.1", 0, tls, served.handle))
        async with await UdpRelay.start(replica.listener.address) as relay:
            flight = await recorded(relay, phone, authority.trust, tmp_path, hold=True)
        attacker = await send(other.listener.address, flight)
        assert attacker.received <= 3 * attacker.sent
        assert not other.listener._dispatcher.tasks
        assert other.steps == 0
        attacker.close()
        await other.listener.aclose()


async def test_a_flight_held_back_and_sent_late_waits_for_a_handshake_that_never_comes(
    replica: Replica, phone: Phone, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("protocol.limits.EARLY_AGE_TOLERANCE", 0.0)  # as if ten seconds had passed
    async with await UdpRelay.start(replica.listener.address) as relay:
        flight = await recorded(relay, phone, authority.trust, tmp_path, hold=True)
    monkeypatch.setattr("protocol.transport.quic_server.HANDSHAKE_S", 1.0)
    attacker = await send(replica.listener.address, flight)
    while replica.waiting == 0:
        await turn()
    assert replica.cloud.service.rooms.taken == 0
    await replica.idle()
    assert replica.steps == 0
    attacker.close()


async def test_a_flight_from_a_forged_address_gets_little_and_ends_with_its_handshake(
    replica: Replica, phone: Phone, authority: Authority, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sent once and in time it runs, as its phone wanted: for a moment, and answered with three times its bytes."""
    async with await UdpRelay.start(replica.listener.address) as relay:
        flight = await recorded(relay, phone, authority.trust, tmp_path, hold=True, max_tokens=NEVER)
    monkeypatch.setattr("protocol.transport.quic_server.HANDSHAKE_S", 1.0)
    attacker = await send(replica.listener.address, flight[:1])
    (link,) = replica.listener._dispatcher.half_open
    while not replica.steps:
        await turn()
    await replica.idle()
    assert isinstance(link.lost, LinkLost)
    assert 0 < attacker.received <= 3 * attacker.sent
    attacker.close()


async def test_an_early_request_is_answered_once_however_often_its_flight_comes(
    replica: Replica, phone: Phone, authority: Authority, tmp_path: Path
) -> None:
    """The network itself may bring datagrams twice."""
    store = WatchedStore(tmp_path)
    async with await UdpRelay.start(replica.listener.address) as relay:
        await visit(relay.address, authority.trust, store)
        before = len(relay.heard)
        connection = await connect_quic(relay.address, authority.trust, store)
        channel = await connection.open()
        await channel.send(phone.open_frame(PROMPT, max_tokens=4, ticket_age_s=connection.ticket_age_s))
        while not isinstance(await channel.receive(), Tokens):
            pass
        twin = await send(replica.listener.address, relay.heard[before:] * 2)
        assert len(replica.listener._dispatcher.tasks) == 1
        await connection.aclose()
        twin.close()
