"""A path that falls silent in mid-answer: every way is tried at once, and not a token is lost, repeated or changed."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import edge_agent.runs.attempts
import edge_agent.runs.session
from edge_agent.agent import Agent, running
from edge_agent.config import AgentConfig
from edge_agent.dial import Connect
from edge_agent.job import Job
from edge_agent.link import Link
from edge_agent.runs.cloud import Carried, CloudRun
from edge_agent.runs.split import Front
from protocol.errors import FaultCode, LinkLost, SessionFault
from protocol.transport.base import Address, Connection
from protocol.transport.memory import MemoryConnection
from split_model.sampling import Sampling
from support.cloud import Cloud, cloud
from support.edge import always, checkpoints
from support.eventually import eventually
from support.fading import Fading

pytestmark = pytest.mark.anyio
ANSWER = 12
PROMPT = tuple(range(3, 12))
GREEDY, SAMPLED = Sampling(), Sampling(temperature=1.0, seed=7)


@asynccontextmanager
async def phone(state: Path, *replicas: tuple[Connect, Connect | None]) -> AsyncIterator[Agent]:
    """An agent whose replicas are each dialled over QUIC, and over gRPC where there is a way."""
    config = AgentConfig(*checkpoints(), state=state, threads=1)
    links = [Link(Address("replica", 1 + index), quic, grpc) for index, (quic, grpc) in enumerate(replicas)]
    for index, link in enumerate(links):
        link.path.rtt_s = 0.001 * index  # the order of preference
    async with running(config, links) as made:
        for index, link in enumerate(made.means.links.links):
            link.path.rtt_s = 0.001 * index
        yield made


async def ids(made: Agent, split: int, sampling: Sampling, bits: int = 16) -> tuple[list[int], Carried]:
    """The answer by that split, token id by token id, and what happened on its way."""
    means = made.means
    wanted = Job(os.urandom(16), PROMPT, ANSWER, sampling)
    seat = await means.full.seat(split) if split else None
    try:
        front = Front(seat, means.full.compute, len(PROMPT), bits) if seat else None
        run = CloudRun(wanted, split, means.links, means.me, (), means.full.config.context, front)
        return [token async for token in run.tokens(list(PROMPT))], run.carried
    finally:
        if seat is not None:
            seat.close()


@pytest.fixture
def soon(truth: dict[Sampling, list[int]], monkeypatch: pytest.MonkeyPatch) -> None:
    """Suspicion comes early, despair late."""
    monkeypatch.setattr(edge_agent.runs.session, "SUSPICION_S", 0.3)
    monkeypatch.setattr(edge_agent.runs.session, "SUSPICION_TRIPS", 0)
    monkeypatch.setattr(edge_agent.runs.session, "LOST_S", 30.0)


@pytest.fixture
async def real() -> AsyncIterator[Cloud]:
    async with cloud(checkpoints()[1]) as made:
        yield made


@pytest.fixture
async def second() -> AsyncIterator[Cloud]:
    async with cloud(checkpoints()[1]) as made:
        yield made


@pytest.fixture
async def truth(real: Cloud, tmp_path: Path) -> dict[Sampling, list[int]]:
    """What an undisturbed cloud says."""
    async with phone(tmp_path / "quiet", (always(MemoryConnection(real.handle)), None)) as made:
        return {how: (await ids(made, 0, how))[0] for how in (GREEDY, SAMPLED)}


async def at_rest(*clouds: Cloud) -> bool:
    """No rows and no rooms are held."""
    return all([await one.settled() == (0, 0) and one.service.rooms.taken == 0 for one in clouds])


async def nowhere(address: Address) -> Connection:
    raise LinkLost("nobody there")


ROUTES = pytest.mark.parametrize(("split", "how"), [(0, GREEDY), (0, SAMPLED), (1, GREEDY), (2, SAMPLED)])
AFTER = pytest.mark.parametrize("tokens", [0, 1, 5])


@AFTER
@ROUTES
async def test_the_next_replica_goes_on(
    soon: None, tmp_path: Path, real: Cloud, second: Cloud, truth: dict[Sampling, list[int]], split: int,
    how: Sampling, tokens: int,
) -> None:  # fmt: skip
    gone, other = Fading(real.handle, tokens), Fading(second.handle, None)
    async with phone(tmp_path, (always(gone), None), (always(other), None)) as made:
        said, carried = await ids(made, split, how)
        assert said == truth[how]
        assert (carried.replica, carried.attempts >= 2) == ("replica:2", True)
        first = made.means.links.links[0]
        assert first.unreachable
        assert gone.moves == 1
        gone.again.set()
    assert await at_rest(second)


@AFTER
@ROUTES
async def test_a_path_that_bears_again_carries_its_session_on(
    soon: None, tmp_path: Path, real: Cloud, truth: dict[Sampling, list[int]], split: int, how: Sampling, tokens: int
) -> None:
    fading = Fading(real.handle, tokens)

    async def revive() -> None:
        await eventually(lambda: fading.moves)
        fading.left = None
        fading.silent.clear()
        fading.again.set()

    async with phone(tmp_path, (always(fading), nowhere)) as made:
        helper = asyncio.create_task(revive())
        said, carried = await ids(made, split, how)
        await helper
        assert said == truth[how]
        assert made.means.links.links[0].unreachable is None
        assert carried.attempts == fading.sessions
    assert await at_rest(real)


@AFTER
@ROUTES
async def test_grpc_goes_on_where_udp_has_gone_silent(
    soon: None, tmp_path: Path, real: Cloud, truth: dict[Sampling, list[int]], split: int, how: Sampling, tokens: int
) -> None:
    quic, grpc = Fading(real.handle, tokens, "quic"), Fading(real.handle, None, "grpc")
    async with phone(tmp_path, (always(quic), always(grpc))) as made:
        said, carried = await ids(made, split, how)
        assert said == truth[how]
        assert (carried.transport, carried.replica, carried.attempts) == ("grpc", "replica:1", 2)
        dialler = made.means.links.links[0].dialler
        assert dialler.connection is grpc
        await eventually(lambda: dialler.udp_blocked)
        assert quic.closed
        quic.again.set()
    assert await at_rest(real)


async def test_a_path_that_speaks_again_is_not_without_udp(soon: None, tmp_path: Path, real: Cloud) -> None:
    quic, grpc = Fading(real.handle, 3, "quic"), Fading(real.handle, None, "grpc")
    async with phone(tmp_path, (always(quic), always(grpc))) as made:
        _, carried = await ids(made, 0, GREEDY)
        assert carried.transport == "grpc"
        quic.silent_s = lambda: 0.0  # type: ignore[method-assign]
        dialler = made.means.links.links[0].dialler
        await eventually(lambda: dialler.connection is quic)
        assert not dialler.udp_blocked
        quic.again.set()


async def test_where_nothing_answers_the_cloud_is_lost_in_time(
    soon: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real: Cloud, second: Cloud
) -> None:
    monkeypatch.setattr(edge_agent.runs.session, "LOST_S", 0.3)
    ways = [Fading(one.handle, tokens) for one, tokens in ((real, 3), (second, 0))]
    async with phone(tmp_path, *((always(way), nowhere) for way in ways)) as made:
        with pytest.raises(LinkLost, match="no replica answers"):
            await ids(made, 2, GREEDY)
        for way in ways:
            way.again.set()
    for one in (real, second):
        await eventually(lambda one=one: one.service.rooms.taken == 0)


async def test_a_recovery_that_is_cancelled_leaves_nothing(
    soon: None, tmp_path: Path, real: Cloud, second: Cloud
) -> None:
    ways = [Fading(one.handle, tokens) for one, tokens in ((real, 3), (second, 0))]
    async with phone(tmp_path, *((always(way), nowhere) for way in ways)) as made:
        asking = asyncio.create_task(ids(made, 1, GREEDY))
        await eventually(lambda: ways[1].sessions)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        assert made.means.full.free._value > 0
        for way in ways:
            way.again.set()
    for one in (real, second):
        await eventually(lambda one=one: one.service.rooms.taken == 0)


async def test_a_replica_is_blamed_for_its_own_refusal_only(
    soon: None, tmp_path: Path, real: Cloud, second: Cloud, truth: dict[Sampling, list[int]]
) -> None:
    """The answer recovers from one replica to the other, which then drains, while the first is back."""
    first, other = Fading(real.handle, 2), Fading(second.handle, 3)
    other.fault = SessionFault(FaultCode.DRAINING, "shutting down", 60.0)
    said: list[int] = []
    async with phone(tmp_path, (always(first), None), (always(other), None)) as made:
        means = made.means
        run = CloudRun(Job(os.urandom(16), PROMPT, ANSWER, GREEDY), 0, means.links, means.me, (), 64)
        async for token in run.tokens(list(PROMPT)):
            said.append(token)
            if run.carried.replica == "replica:2" and first.left is not None:
                first.left, again = None, Fading(real.handle, None)
                means.links.links[0].dialler._quic = always(again)  # it has been started again
                means.links.links[0].found()
        assert run.carried.replica == "replica:1"
        first.again.set()
    assert said == truth[GREEDY]
