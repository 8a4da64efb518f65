"""Reaching a replica, and what is remembered of it."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from pathlib import Path as Folder

import pytest

from edge_agent.conditions import Network, Rates
from edge_agent.dial import race, reach
from edge_agent.link import FIRST_BACKOFF_S, PRIORS, REFUSED_S, Link, Path
from edge_agent.networks import BLOCKED_S
from edge_agent.replicas import Links
from edge_agent.state import State
from protocol.errors import FaultCode, LinkLost, SessionFault, UnverifiedServer
from protocol.frames import Load
from protocol.transport.base import Address, Connection, ServerChannel
from protocol.transport.memory import MemoryConnection
from support.clock import Clock
from support.edge import always

pytestmark = pytest.mark.anyio
HERE = Address("here", 1)


async def nothing(channel: ServerChannel) -> None:
    await channel.handshake()


class Named(MemoryConnection):
    """A memory connection that says which transport it stands for, and whose handshake can be held up."""

    def __init__(self, transport: str = "quic", shaken: bool = True, ticket_age_s: float | None = None):
        super().__init__(nothing)
        self.transport = transport
        self.ticket_age_s = ticket_age_s
        self.shaken = asyncio.Event()
        if shaken:
            self.shaken.set()

    async def handshake(self) -> None:
        await self.shaken.wait()


def dial(connection: Connection | None = None, error: Exception | None = None) -> Callable[[], Awaitable[Connection]]:
    """Finds the connection, fails, or never ends."""

    async def run() -> Connection:
        if error:
            raise error
        if connection is None:
            await asyncio.Event().wait()
        assert connection is not None
        return connection

    return run


async def turn() -> None:
    """Lets the others go on."""
    await asyncio.sleep(0)


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await turn()


async def never() -> Connection:
    raise AssertionError("was dialled")


async def test_the_first_dial_wins_alone_when_it_is_quick() -> None:
    first = Named()
    assert await race(dial(first), never, patience_s=60) is first


async def test_the_second_dial_starts_at_once_when_the_first_fails() -> None:
    second = Named()
    async with asyncio.timeout(10):
        assert await race(dial(error=LinkLost("no")), dial(second), patience_s=60) is second


async def test_the_second_dial_starts_when_patience_ends() -> None:
    second = Named()
    assert await race(dial(), dial(second), patience_s=0) is second


async def test_a_dial_that_comes_second_is_closed() -> None:
    first, second = Named(), Named("grpc")
    slow = asyncio.Event()

    async def late() -> Connection:
        await slow.wait()
        return first

    async def sets() -> Connection:
        slow.set()
        return second

    winner = await race(late, sets, patience_s=0)
    (loser,) = {first, second} - {winner}
    assert not winner.closed
    assert loser.closed or loser is first  # cancelled before it was there, or closed


async def test_a_race_that_is_cancelled_while_the_loser_leaves_closes_its_winner() -> None:
    winner, leaving = Named(), asyncio.Event()

    async def reluctant() -> Connection:
        try:
            await asyncio.Event().wait()
        finally:
            leaving.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()
        raise LinkLost("left")

    racing = asyncio.create_task(race(reluctant, dial(winner), patience_s=0))
    await leaving.wait()
    racing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await racing
    assert winner.closed


async def test_a_server_that_cannot_be_verified_ends_the_race() -> None:
    with pytest.raises(UnverifiedServer, match="forged"):
        await race(dial(error=UnverifiedServer("forged")), never, patience_s=60)


@pytest.mark.parametrize("second", [None, dial(error=LinkLost("second"))])
async def test_a_lost_race_says_what_the_first_met(second: Callable[[], Awaitable[Connection]] | None) -> None:
    with pytest.raises(LinkLost, match="first"):
        await race(dial(error=LinkLost("first")), second, patience_s=60)


async def test_a_dial_that_is_cancelled_closes_its_connection() -> None:
    half = Named(shaken=False)
    task = asyncio.create_task(reach(always(half), HERE))
    await turn()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    assert half.closed


async def test_a_link_is_dialled_once_for_all_who_wait() -> None:
    dialled = 0

    async def quic(address: Address) -> Connection:
        nonlocal dialled
        dialled += 1
        await turn()
        return Named()

    link = Link(HERE, quic)
    assert link.cloud().cold
    found = await asyncio.gather(*(link.connect() for _ in range(5)))
    assert len(set(found)) == dialled == 1
    assert not link.cloud().cold
    await found[0].aclose()
    assert await link.connect() is not found[0]
    await link.aclose()
    assert dialled == 2


async def test_a_connection_with_a_ticket_takes_a_session_before_its_handshake() -> None:
    early = Named(shaken=False, ticket_age_s=1.0)
    link = Link(HERE, always(early))
    assert await link.connect() is early
    assert await link.connect() is early
    assert not link.dialler.warm
    link.dialler.spoke()
    early.shaken.set()
    await until(lambda: link.dialler.warm)
    await link.aclose()


async def test_early_data_that_gets_no_answer_makes_room_for_the_other_transport() -> None:
    early, other = Named(shaken=False, ticket_age_s=1.0), Named("grpc")
    link = Link(HERE, always(early), always(other))
    assert await link.connect() is early
    link.dialler.spoke()
    await until(lambda: early.closed)
    assert await link.connect() is other
    await link.aclose()


async def test_a_network_without_udp_is_remembered_and_forgotten() -> None:
    clock, quic, other = Clock(), Named(), Named("grpc")
    link = Link(HERE, dial_once(LinkLost("no UDP"), quic), always(other), clock=clock)
    assert await link.connect() is other
    assert link.cloud().handshake_trips == 0
    other.closed = True
    assert link.cloud().handshake_trips == 3
    again = Named("grpc")
    link.dialler._grpc = always(again)
    assert await link.connect() is again
    again.closed = True
    link.path.resumable_until = time.time() + 60  # a ticket is of no use where no datagram passes
    assert link.cloud().handshake_trips == 3
    clock.now += BLOCKED_S + 1
    assert link.cloud().handshake_trips == 0
    link.path.resumable_until = 0.0
    assert link.cloud().handshake_trips == 1
    assert await link.connect() is quic
    await link.aclose()


def dial_once(error: LinkLost, connection: Connection) -> Callable[[Address], Awaitable[Connection]]:
    """Fails the first time."""
    errors = [error]

    async def connect(address: Address) -> Connection:
        if errors:
            raise errors.pop()
        return connection

    return connect


async def test_a_replica_that_is_not_there_is_tried_later_and_later() -> None:
    clock = Clock()
    link = Link(HERE, dial_once(LinkLost("gone"), Named()), clock=clock)
    with pytest.raises(LinkLost, match="gone"):
        await link.connect()
    assert link.unreachable == "gone"
    assert link.cloud().unreachable == "no replica is reachable: gone"
    waits = [link.retry_at - clock.now]
    for _ in range(9):
        clock.now = link.retry_at
        link.lost("gone")
        waits.append(link.retry_at - clock.now)
    assert waits[:3] == [FIRST_BACKOFF_S, 2 * FIRST_BACKOFF_S, 4 * FIRST_BACKOFF_S]
    assert waits[-1] == waits[-2] == 30
    await link.connect()
    assert link.unreachable is None
    await link.aclose()


async def test_whoever_waits_hears_when_a_dial_is_given_up() -> None:
    link = Link(HERE, always(Named(shaken=False)))
    waiting = asyncio.create_task(link.connect())
    await turn()
    await link.aclose()
    with pytest.raises(LinkLost, match="given up"):
        await waiting


async def test_refusals_stand_for_a_while() -> None:
    clock = Clock()
    link = Link(HERE, always(Named()), clock=clock)
    link.refuse(SessionFault(FaultCode.UNAUTHENTICATED, "the token has expired"))
    assert link.refused() == "here:1 refused: unauthenticated: the token has expired"
    clock.now += REFUSED_S + 1
    assert link.refused() is None
    link.refuse(SessionFault(FaultCode.BUSY, "full", 2.5))
    assert link.refused() is None
    assert link.wait_s == pytest.approx(2.5)
    clock.now += 3
    assert link.wait_s == 0


async def test_a_server_that_is_not_verified_is_refused_in_words() -> None:
    async def quic(address: Address) -> Connection:
        raise UnverifiedServer("the certificate is not under this CA")

    link = Link(HERE, quic, always(Named("grpc")))
    with pytest.raises(UnverifiedServer):
        await link.connect()
    assert link.refused() == "here:1: the certificate is not under this CA"


def load(**changes: float) -> Load:
    values = {"running": 1, "waiting": 2, "steps": 3, "wait_s": 0.5, "prefill_rate": 4e9, "decode_rate": 2e9,
              "delivery_rate": 1e6, "credit": 0, "draining": False}  # fmt: skip
    return Load(**{**values, **changes})  # type: ignore[arg-type]


async def test_what_a_replica_says_of_itself_replaces_the_prior_and_ages() -> None:
    clock = Clock()
    link = Link(HERE, always(Named()), clock=clock)
    link.kind = Network.WIFI
    assert (link.rtt_s, link.cloud().up, link.cloud().down) == PRIORS[Network.WIFI]
    link.heard(load())
    cloud = link.cloud()
    assert (cloud.rates, cloud.down, cloud.wait_s, cloud.load_age_s) == (Rates(4e9, 2e9), 1e6, 0.5, 0)
    link.heard(load(prefill_rate=0, decode_rate=4e9, delivery_rate=0))
    assert link.cloud().rates == Rates(4e9, pytest.approx(2.6e9))
    clock.now += 60
    assert (link.cloud().wait_s, link.cloud().load_age_s) == (0, 60)


async def test_the_better_replica_comes_first(tmp_path: Folder) -> None:
    near, far, lost, refused, busy = (Link(Address(name, 1), always(Named())) for name in "nflrb")
    near.path.rtt_s, far.path.rtt_s = 0.01, 0.2
    lost.lost("gone")
    refused.refuse(SessionFault(FaultCode.WRONG_MODEL, "no"))
    busy.refuse(SessionFault(FaultCode.DRAINING, "shutting down", 30))
    links = Links([refused, lost, busy, far, near], State(tmp_path))
    near.path.rtt_s, far.path.rtt_s = 0.01, 0.2
    assert links.ranked() == [near, far, busy, lost, refused]
    near.heard(load(wait_s=1.0))
    assert links.ranked()[0] is far


async def test_a_path_is_known_at_the_next_start(tmp_path: Folder) -> None:
    state = State(tmp_path)
    first = Links([Link(HERE, always(Named()))], state)
    first.start()
    await first.links[0].connect()
    first.links[0].heard(load())
    first.links[0].path.rtt_s = 0.123
    await first.aclose()
    (again,) = Links([Link(HERE, always(Named()))], state).links
    assert (again.path.rtt_s, again.path.down, again.cloud().rates) == (0.0, 1e6, Rates(4e9, 2e9))
    assert again.resumable
    assert again.path.resumable_until > time.time()


@pytest.mark.parametrize("text", ["", "[]", '{"here:1": 3}', '{"here:1": {"rtt_s": "x", "up": null, "else": 1}}'])
async def test_what_is_remembered_badly_is_forgotten(tmp_path: Folder, text: str) -> None:
    (tmp_path / "links.json").write_text(text)
    (link,) = Links([Link(HERE, always(Named()))], State(tmp_path)).links
    assert link.path == Path()
