"""The second turn of a conversation: the same text by every route, less computed, and predicted so."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from cloud_server.keys import issue
from edge_agent.agent import Agent
from edge_agent.answer import Answer
from edge_agent.job import Job, Quality, Route, Wish
from edge_agent.left import MOST, Left
from edge_agent.link import Link
from edge_agent.runs.split import Front
from protocol.errors import LinkLost
from protocol.frames import Admitted, Digests, Hidden, Load
from protocol.transport.base import Address, Connection
from split_model.prefix import LIFE_S
from split_model.sampling import Sampling
from support.cloud import Cloud, cloud
from support.edge import agent, always, begin, checkpoints, text_of
from support.phone import expected, prompt_of, runner

pytestmark = pytest.mark.anyio
LAYERS = 5
FIRST, MORE = prompt_of(150), prompt_of(20, 1)
GREEDY, SAMPLED = Sampling(), Sampling(temperature=0.9, top_p=0.95, seed=7)
WISHES: dict[str, dict[str, object]] = {
    "cloud": {"route": Route.CLOUD},
    "split": {"route": Route.SPLIT, "split": 2},
    "last": {"route": Route.SPLIT, "split": LAYERS},
    "local": {"route": Route.LOCAL, "quality": Quality.BEST},
    "tiny": {"tiny": True},
    "speculative": {"route": Route.SPECULATIVE, "split": 0, "draft": 4},
    "speculative split": {"route": Route.SPECULATIVE, "split": 2, "draft": 4},
}


def job(prompt: tuple[int, ...], sampling: Sampling = GREEDY, **wish: object) -> Job:
    return Job(os.urandom(16), prompt, 16, sampling, (), Wish(**wish))  # type: ignore[arg-type]


def ids(prompt: tuple[int, ...], sampling: Sampling, tiny: bool = False) -> tuple[int, ...]:
    return expected(checkpoints()[0 if tiny else 1], prompt, sampling, 16)


async def asked(made: Agent, prompt: tuple[int, ...], sampling: Sampling = GREEDY, **wish: object) -> Answer:
    """An answer with the right text."""
    answer = await begin(made, job(prompt, sampling, **wish))
    text = runner(checkpoints()[1]).tokenizer.decode(ids(prompt, sampling, "tiny" in wish))
    assert await text_of(answer) == text
    await made.means.tiny.compute.call(lambda: None)
    return answer


@pytest.fixture
async def server(key_folder: Path) -> AsyncIterator[Cloud]:
    async with cloud(checkpoints()[1], keys=key_folder) as made:
        yield made
        await made.settled()
        assert made.service.prefixes.free_slots == made.service.config.slots


@pytest.fixture
async def made(server: Cloud, key_folder: Path, tmp_path: Path) -> AsyncIterator[Agent]:
    token = issue(key_folder, "mine", 3600)
    async with agent(tmp_path, always(server.connection), edge_layers=LAYERS, token=token) as made:
        yield made
        await made.means.tiny.compute.call(lambda: None)
        assert made.means.tiny.prefixes.free_slots == made.means.full.prefixes.free_slots == 4


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("route", WISHES)
async def test_the_text_is_the_same_and_what_was_computed_is_not_again(
    made: Agent, route: str, sampling: Sampling
) -> None:
    wish = WISHES[route]
    first = await asked(made, FIRST, sampling, **wish)
    longer = (*FIRST, *ids(FIRST, sampling, route == "tiny"), *MORE)
    second = await asked(made, longer, sampling, **wish)
    assert first.outcome is not None
    assert second.outcome is not None
    held = second.outcome.held_cloud if route in ("cloud", "speculative") else second.outcome.held_edge
    assert held == len(FIRST) + 15  # the answer's last token was not computed
    assert held not in (first.outcome.held_cloud, first.outcome.held_edge)
    fresh = longer[::-1]
    plans = [(await made.decide(job(prompt, sampling, **wish))).plan.score for prompt in (longer, fresh)]
    assert plans[0].first_token_s < plans[1].first_token_s
    site = "cloud" if route in ("cloud", "speculative") else "edge"
    text = made.metrics.text().decode()
    assert f'tandem_edge_prefix_hits_total{{site="{site}"}} {held:.1f}' in text
    assert f'tandem_edge_prefix_queries_total{{site="{site}"}} {len(FIRST) + len(longer):.1f}' in text


async def test_conversations_that_go_from_route_to_route(made: Agent) -> None:
    log = FIRST
    for wish in (*WISHES.values(), *reversed(WISHES.values())):
        await asked(made, log, SAMPLED, **wish)
        log = (*log, *ids(log, SAMPLED, "tiny" in wish)[:-1], *MORE[:3])


async def test_more_conversations_than_slots(made: Agent) -> None:
    for wish in (WISHES["local"], WISHES["split"]):
        for turn in range(2):
            for one in range(5):
                log = prompt_of(40, one)
                await asked(made, log if not turn else (*log, *ids(log, GREEDY), 9), **wish)


async def test_another_split_has_no_use_for_these_hidden_states(made: Agent) -> None:
    await asked(made, FIRST, **WISHES["split"])
    other = await asked(made, (*FIRST, 9), route=Route.SPLIT, split=3)
    assert other.outcome is not None
    assert other.outcome.held_edge == 0
    assert (other.now.front, other.now.held_front) == (2, len(FIRST))


async def frames(made: Agent, log: tuple[int, ...]) -> list[Hidden]:
    seat = await made.means.full.seat(2, ids=log, front=True)
    try:
        front = Front(seat, made.means.full.compute, len(FIRST), 8)
        return [frame async for frame in front.frames(log, 0)]
    finally:
        seat.close()


async def test_hidden_states_are_sent_again_as_they_were(made: Agent) -> None:
    longer = (*FIRST, *MORE)
    fresh = await frames(made, longer)
    again = await frames(made, longer)
    assert made.means.full.held(longer, 2, front=True) == len(longer) - 1
    assert again == fresh


async def test_an_answer_that_is_left_early_leaves_what_it_computed(made: Agent) -> None:
    for route in ("local", "split", "cloud"):
        answer = await begin(made, job(FIRST, SAMPLED, **WISHES[route]))
        await anext(answer)
        await answer.aclose()
    await made.means.full.compute.call(lambda: None)
    for route in ("local", "split", "cloud"):
        second = await asked(made, FIRST, SAMPLED, **WISHES[route])
        assert second.outcome is not None
        assert (second.outcome.held_edge or second.outcome.held_cloud) == len(FIRST) - 1


async def test_a_replica_that_keeps_nothing_is_not_believed_to(tmp_path: Path) -> None:
    async with cloud(checkpoints()[1]) as server, agent(tmp_path, always(server.connection)) as made:
        await asked(made, FIRST, **WISHES["cloud"])
        log = FIRST
        for believed in (True, False, False):
            log = (*log, *ids(log, GREEDY), *MORE)
            answer = await asked(made, log, **WISHES["cloud"])
            assert (answer.now.held_cloud > 0) == believed
            assert answer.outcome is not None
            assert answer.outcome.held_cloud == 0


IDS = tuple(range(30))


def admitted(held: int, numerics: bytes = b"n" * 16) -> Admitted:
    return Admitted(Digests(b"w" * 16, b"t" * 16, numerics), True, held, 0, False)


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_what_was_left_is_believed_for_as_long_as_replicas_keep_it() -> None:
    clock = Clock()
    left = Left(clock)
    left.add(IDS)
    assert (left.held((*IDS, 99)), left.held(IDS), left.held((99, *IDS))) == (30, 29, 0)
    assert left.held((*IDS, 99), sparse=True) == 0
    clock.now = LIFE_S
    assert left.held((*IDS, 99)) == 0


def test_a_longer_log_takes_the_place_of_its_beginning_and_few_are_kept() -> None:
    left = Left()
    for seed in range(2 * MOST):
        left.add((seed, *IDS))
        left.add((seed, *IDS, 7))
    assert sum(left.held((seed, *IDS, 7, 8)) > 0 for seed in range(2 * MOST)) == MOST


def test_a_replica_is_believed_when_it_says_so() -> None:
    left = Left()
    left.told(IDS, False, admitted(12))  # the operator's own prefix
    assert left.held((*IDS[:20], 99, 98)) == 12
    left.add(IDS)
    left.told((*IDS, 1), False, admitted(12))
    assert left.held((*IDS, 1)) == 12
    left.told((*IDS, 1), False, admitted(0))
    assert left.held((*IDS, 1)) == 0


@pytest.mark.parametrize("how", ["digests", "steps"])
def test_a_replica_that_was_started_anew_has_forgotten_all(how: str) -> None:
    link = Link(Address("a", 1), refuse)
    told = Load(1, 0, 7, 0.0, 1e9, 1e9, 1e6, 0, False, 0.0)
    link.heard(told)
    link.left.told(IDS, False, admitted(0))
    link.left.add(IDS)
    link.heard(told)
    assert link.left.held((*IDS, 1)) == len(IDS)
    if how == "digests":
        link.left.told((1, 2), False, admitted(0, b"o" * 16))
    else:
        link.heard(replace(told, steps=6))
    assert link.left.held((*IDS, 1)) == 0


async def refuse(address: Address) -> Connection:
    raise LinkLost("not in this test")


async def test_who_finds_a_kept_slot_leaves_one_to_those_that_came_before(tmp_path: Path) -> None:
    async with agent(tmp_path, slots=1) as made:
        phone, gate = made.means.tiny, threading.Event()
        await asked(made, FIRST, tiny=True)
        phone.compute.post(gate.wait)
        earlier = await phone.seat(phone.config.layers, ids=MORE)
        drawing = asyncio.create_task(earlier.draw(MORE, GREEDY))
        await asyncio.sleep(0)
        earlier.close()
        asking = asyncio.create_task(phone.seat(phone.config.layers, ids=FIRST))
        await asyncio.sleep(0)
        gate.set()
        assert (await drawing,) == ids(MORE, GREEDY, tiny=True)[:1]
        (await asking).close()
