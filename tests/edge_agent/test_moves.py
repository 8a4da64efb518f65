"""Answers that change their plan in the middle: the text stays, nothing is lost or repeated, nothing is left behind."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from edge_agent.agent import Agent
from edge_agent.conditions import Conditions, Rates
from edge_agent.decisions import Leg
from edge_agent.dial import Connect
from edge_agent.job import Job, Quality, Route, Wish
from edge_agent.replan import Move, Progress, Room
from protocol.errors import FaultCode, LinkLost, SessionFault
from protocol.transport.base import Address, Connection
from protocol.transport.grpc import connect_grpc, serve_grpc
from protocol.transport.quic import connect_quic, serve_quic
from split_model.sampling import Sampling
from support.certificates import Authority
from support.cloud import Cloud, cloud
from support.edge import agent, always, begin, checkpoints, text_of
from support.phone import expected, runner

pytestmark = pytest.mark.anyio
PROMPT = tuple(range(10, 60))
LAYERS, FULL = 5, "big-1"
EVERY = 4  # tokens between two moves
GREEDY, SAMPLED = Sampling(), Sampling(temperature=0.9, top_p=0.95, seed=7)
CLOUD, LOCAL = Leg(Route.CLOUD, 0, 0, FULL), Leg(Route.LOCAL, 0, 0, FULL)
SPLITS = [Leg(Route.SPLIT, split, 0, FULL) for split in (2, LAYERS)]
DRAFTS = [Leg(Route.SPECULATIVE, split, 4, FULL) for split in (0, 2)]
PLANS = [CLOUD, LOCAL, *SPLITS, *DRAFTS]


class Script:
    """Moves an answer from leg to leg, every few tokens, whatever the conditions."""

    def __init__(self, legs: Sequence[Leg], job: Job, now: Conditions, every: int = EVERY):
        self._legs, self._every = list(legs), every
        self._next = len(job.prompt) + every
        self.losses = self.wanted = 0  # of the cloud, before the first move

    def due(self, at: Progress) -> bool:
        return bool(self._legs) and at.length >= self._next and self.losses >= self.wanted

    def better(self, running: Leg, at: Progress, look: object, room: Room) -> Move | None:
        self._next = at.length + self._every
        return Move(self._legs.pop(0), "where the test says")

    def lost(self, at: Progress) -> None:
        self.losses += 1


def every_pair(legs: Sequence[Leg]) -> list[Leg]:
    """A way over all legs that goes from each to each other once, back to the first."""
    way: list[Leg] = []
    for index, one in enumerate(legs):
        way += [step for other in legs[index + 1 :] for step in (one, other)]
    return [*way, legs[0]]


def job(max_tokens: int = 60, sampling: Sampling = GREEDY, **wish: object) -> Job:
    return Job(os.urandom(16), PROMPT, max_tokens, sampling, (), Wish(quality=Quality.BEST, **wish))  # type: ignore[arg-type]


def reference(max_tokens: int = 60, sampling: Sampling = GREEDY) -> str:
    folder = checkpoints()[1]
    return runner(folder).tokenizer.decode(expected(folder, PROMPT, sampling, max_tokens))


def scripted(made: Agent, *legs: Leg, every: int = EVERY) -> None:
    made.watch = partial(Script, legs, every=every)


@pytest.fixture
async def server() -> AsyncIterator[Cloud]:
    async with cloud(checkpoints()[1]) as made:
        yield made


@asynccontextmanager
async def wired(kind: str, server: Cloud, folder: Path) -> AsyncIterator[Connect]:
    """A way to dial the server over a transport."""
    if kind == "memory":
        yield always(server.connection)
        return
    authority = Authority.create()
    tls, trust = authority.issue(folder, "127.0.0.1"), authority.trust
    serve = serve_quic if kind == "quic" else serve_grpc
    listener = await serve("127.0.0.1", 0, tls, server.handle)

    async def dial(_: Address) -> Connection:
        return await (connect_quic if kind == "quic" else connect_grpc)(listener.address, trust)

    try:
        yield dial
    finally:
        await listener.aclose()


async def settled(made: Agent) -> tuple[int, int]:
    """Free slots of both models, once the compute thread has done all it was asked."""
    await made.means.tiny.compute.call(lambda: None)
    return made.means.tiny.prefixes.free_slots, made.means.full.prefixes.free_slots


async def nothing_left(made: Agent, server: Cloud) -> None:
    assert await settled(made) == (4, 4)
    async with asyncio.timeout(30):
        while await server.settled() != (0, 0):
            pass


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "seeded"])
@pytest.mark.parametrize("kind", ["quic", "grpc"])
async def test_the_text_is_the_same_through_moves_between_every_two_plans(
    server: Cloud, tmp_path: Path, kind: str, sampling: Sampling
) -> None:
    first, *legs = every_pair(PLANS)
    count = EVERY * (len(legs) + 1)
    async with wired(kind, server, tmp_path / "tls") as dial, agent(tmp_path, dial, edge_layers=LAYERS) as made:
        scripted(made, *legs)
        made.means.links.links[0].path.rtt_s = 0.0
        answer = await begin(made, job(count, sampling, route=first.route))
        assert await text_of(answer) == reference(count, sampling)
        outcome = answer.outcome
        assert outcome is not None
        assert (outcome.moves, outcome.tokens, outcome.exact, outcome.transport) == (len(legs), count, True, kind)
        assert [(leg.route, leg.split) for leg in outcome.legs] == [(leg.route, leg.split) for leg in (first, *legs)]
        assert all(leg.tokens == EVERY for leg in outcome.legs)
        assert outcome.attempts == sum(leg.route is not Route.LOCAL for leg in (first, *legs))
        assert f"at token {EVERY} moved to where the test says" in outcome.reason
        await nothing_left(made, server)


async def test_a_session_of_token_ids_hands_its_place_on_with_what_it_holds(server: Cloud, tmp_path: Path) -> None:
    """Whoever waits for a slot does not come between; the old session is still open when the new one begins."""
    async with agent(tmp_path, always(server.connection), edge_layers=LAYERS) as made:
        scripted(made, SPLITS[0], CLOUD)
        answer = await begin(made, job(route=Route.CLOUD))
        async with aclosing(answer):
            text = "".join([(await anext(answer)).text for _ in range(EVERY)])
            (before,) = server.connection._sessions
            text += (await anext(answer)).text
            assert before.done() or before.cancelling() or before not in server.connection._sessions
            assert text + await text_of(answer) == reference()
        assert answer.outcome is not None
        assert (answer.outcome.attempts, answer.outcome.moves) == (3, 2)
        await nothing_left(made, server)


async def test_a_full_server_keeps_the_place_of_an_answer_that_moves(tmp_path: Path) -> None:
    async with (
        cloud(checkpoints()[1], slots=1, waiting=0) as server,
        agent(tmp_path, always(server.connection), edge_layers=LAYERS) as made,
    ):
        scripted(made, *SPLITS, CLOUD)
        answer = await begin(made, job(route=Route.CLOUD))
        assert await text_of(answer) == reference()
        assert answer.outcome is not None
        assert [leg.route for leg in answer.outcome.legs] == [Route.CLOUD, Route.SPLIT, Route.SPLIT, Route.CLOUD]
        assert answer.outcome.attempts == 4
        await nothing_left(made, server)


@pytest.mark.parametrize("legs", [(CLOUD, SPLITS[0]), (SPLITS[0], CLOUD), (LOCAL, CLOUD), (CLOUD, LOCAL)], ids=str)
@pytest.mark.parametrize("pieces", [EVERY, EVERY + 1])
@pytest.mark.parametrize("how", ["close", "cancel", "abort"])
async def test_an_answer_that_is_ended_around_a_move_leaves_nothing_behind(
    server: Cloud, tmp_path: Path, legs: tuple[Leg, Leg], pieces: int, how: str
) -> None:
    async with agent(tmp_path, always(server.connection), edge_layers=LAYERS) as made:
        scripted(made, legs[1])
        answer = await begin(made, job(900, route=legs[0].route))
        async with aclosing(answer):
            for _ in range(pieces):
                await anext(answer)
            if how == "close":
                await answer.aclose()
            else:
                moving = asyncio.create_task(anext(answer))  # type: ignore[arg-type]
                await asyncio.sleep(0)  # it is on its way to the next leg
                if how == "cancel":
                    moving.cancel()
                else:
                    answer.abort(SessionFault(FaultCode.DRAINING, "leaving", 1.0))
                with suppress(asyncio.CancelledError, SessionFault):
                    await moving
        assert made.under_way == []
        assert answer.outcome is not None
        assert answer.outcome.finish.startswith(("cancelled", "failed"))
        await nothing_left(made, server)


async def test_a_cloud_that_goes_during_a_move_leaves_the_phone_to_finish(
    server: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.runs.session.LOST_S", 0.2)
    async with agent(tmp_path, always(server.connection), edge_layers=LAYERS) as made:
        scripted(made, SPLITS[0])
        answer = await begin(made, job(route=Route.CLOUD))
        text = "".join([(await anext(answer)).text for _ in range(EVERY)])
        await server.connection.aclose()
        assert text + await text_of(answer) == reference()
        assert answer.outcome is not None
        assert [leg.route for leg in answer.outcome.legs] == [Route.CLOUD, Route.LOCAL]
        assert answer.outcome.exact
        assert await settled(made) == (4, 4)


async def test_a_lost_cloud_is_used_again_by_the_same_answer_when_it_is_back(
    server: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edge_agent.runs.session.LOST_S", 0.2)
    paths = [server.connection]

    async def dial(_: Address) -> Connection:
        if paths[0].closed:
            raise LinkLost("nobody listens")
        return paths[0]

    async with agent(tmp_path, dial, edge_layers=LAYERS) as made:
        back = Script([CLOUD], job(), made.conditions())
        back.wanted = 1
        made.watch = lambda job, now: back
        answer = await begin(made, job(route=Route.CLOUD))
        text = "".join([(await anext(answer)).text for _ in range(3)])
        await server.connection.aclose()
        while answer.legs.running.route is Route.CLOUD:
            text += (await anext(answer)).text
        paths[0] = type(server.connection)(server.handle)
        try:
            assert text + await text_of(answer) == reference()
        finally:
            await paths[0].aclose()
        outcome = answer.outcome
        assert outcome is not None
        assert [leg.route for leg in outcome.legs] == [Route.CLOUD, Route.LOCAL, Route.CLOUD]
        assert (outcome.moves, outcome.exact, outcome.degraded, back.losses) == (1, True, False, 1)
        await nothing_left(made, server)


async def test_conditions_that_change_move_an_answer(
    server: Cloud, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No script: the agent's own lookout, with conditions given by the test."""
    monkeypatch.setattr("edge_agent.replan.EVERY_S", 0.0)
    async with agent(tmp_path, always(server.connection), edge_layers=LAYERS) as made:
        made.means.links.links[0].path.rtt_s = 0.0
        near = made.conditions()
        assert near.cloud is not None
        near = replace(near, phone=replace(near.phone, full=Rates(1e8, 1e8)), answer_tokens=200.0,
                       cloud=replace(near.cloud, rates=Rates(1e12, 1e12)))  # fmt: skip
        slow = replace(near, cloud=replace(near.cloud, rates=Rates(1e6, 1e6)))
        monkeypatch.setattr(made, "conditions", lambda aside=None: near)
        monkeypatch.setattr(made, "surroundings", lambda legs: slow if legs.running.tokens > 20 else near)
        answer = await begin(made, job(200, SAMPLED))
        assert answer.plan.route is Route.CLOUD
        assert await text_of(answer) == reference(200, SAMPLED)
        outcome = answer.outcome
        assert outcome is not None
        assert [leg.route for leg in outcome.legs] == [Route.CLOUD, Route.LOCAL]
        assert 20 < outcome.legs[0].tokens < 60
        assert "moved to local (the cloud at 0.00 of its rate)" in outcome.reason
        await nothing_left(made, server)


async def test_the_last_token_moves_nowhere(server: Cloud, tmp_path: Path) -> None:
    async with agent(tmp_path, always(server.connection), edge_layers=LAYERS) as made:
        scripted(made, LOCAL, every=8)
        answer = await begin(made, job(8, route=Route.CLOUD))
        assert await text_of(answer) == reference(8)
        assert answer.outcome is not None
        assert (answer.outcome.moves, answer.outcome.finish) == (0, "length")
