"""What the tiny model does while nothing is under way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import edge_agent.idle
from edge_agent.conditions import Meter
from edge_agent.idle import PIECE, WAITING, Idle, Written
from edge_agent.job import Job, Route, Wish
from edge_agent.learned import Agreement, Learned
from edge_agent.runs.local import PhoneModel
from edge_agent.state import State
from split_model.compute import Compute
from split_model.model import Model
from split_model.sampling import Sampling
from support.cloud import cloud
from support.edge import agent, always, begin, checkpoints, pair, text_of
from support.eventually import eventually
from support.phone import expected

pytestmark = pytest.mark.anyio
PROMPT = tuple(range(10, 60))
GREEDY, SAMPLED = Sampling(), Sampling(temperature=0.9, seed=7)


class Bench:
    """An idle tiny model, and switches for what it asks about."""

    def __init__(self, tiny: PhoneModel, learned: Learned):
        self.tiny, self.learned = tiny, learned
        self.busy, self.able, self.asked = False, True, 0
        self.busy_from: int | None = None  # the question from which on the phone is busy
        self.idle = Idle(tiny, learned, self._busy, lambda: self.able)

    def _busy(self) -> bool:
        self.asked += 1
        return self.busy or (self.busy_from is not None and self.asked >= self.busy_from)

    async def free(self) -> int:
        """Slots, once the compute thread has done all it was asked."""
        await self.tiny.compute.call(lambda: None)
        return self.tiny.prefixes.free_slots


@pytest.fixture
async def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Bench]:
    monkeypatch.setattr(edge_agent.idle, "QUIET_S", 0.0)
    state, compute = State(tmp_path), Compute(1)
    try:
        model = await compute.call(Model.load, checkpoints()[0])
        tiny = PhoneModel(compute, model, 2, Meter(state))
        yield Bench(tiny, Learned(Agreement(), pair(), state, "pair"))
    finally:
        await compute.aclose()


def answered(folder: Path, sampling: Sampling = GREEDY, tokens: int = 20) -> Written:
    """By one model or the other."""
    ids = (*PROMPT, *expected(folder, PROMPT, sampling, tokens))
    return Written(ids, len(PROMPT), sampling)


@pytest.mark.parametrize("sampling", [Sampling(), SAMPLED], ids=["greedy", "sampled"])
async def test_its_own_tokens_all_agree_and_those_of_another_model_do_not(bench: Bench, sampling: Sampling) -> None:
    tiny, full = checkpoints()
    shares, kind = bench.learned.agreement, sampling.temperature > 0
    async with bench.idle.running():
        bench.idle.offer(answered(tiny, sampling))
        await eventually(lambda: bench.idle.scored == 1)
        more = shares.mean(kind)
        assert more > Agreement().mean()
        bench.idle.offer(answered(full, sampling))
        await eventually(lambda: bench.idle.scored == 2)
    assert shares.mean(kind) < more
    assert shares.mean(not kind) == Agreement().mean()
    assert await bench.free() == 2


async def test_it_gives_way_at_the_next_piece_and_begins_anew_when_there_is_quiet(bench: Bench) -> None:
    written = answered(checkpoints()[0], tokens=PIECE + 20)
    assert len(written.ids) > 3 * PIECE
    async with bench.idle.running():
        bench.busy_from = 4  # quiet at first (two questions); then after one piece
        bench.idle.offer(written)
        bench.idle.wake()
        await eventually(lambda: bench.asked >= 4)
        assert await bench.free() == 2
        assert bench.idle.scored == 0
        bench.busy_from = None
        bench.idle.wake()
        await eventually(lambda: bench.idle.scored == 1)
        assert await bench.free() == 2


async def test_nothing_is_looked_at_without_power_to_spare(bench: Bench) -> None:
    bench.able = False
    assert not bench.idle.offer(answered(checkpoints()[0]))
    bench.able = True
    assert bench.idle.offer(answered(checkpoints()[0]))
    bench.able = False
    async with bench.idle.running():
        bench.idle.wake()
        for _ in range(50):
            await asyncio.sleep(0)
        assert bench.idle.scored == 0
        bench.able = True
        bench.idle.wake()
        await eventually(lambda: bench.idle.scored == 1)


async def test_what_waits_is_bounded_and_what_does_not_fit_is_passed_over(bench: Bench) -> None:
    for _ in range(WAITING + 5):
        assert bench.idle.offer(answered(checkpoints()[0], tokens=2))
    context = bench.tiny.config.context
    assert not bench.idle.offer(Written(tuple([5] * context), 10, Sampling()))
    assert not bench.idle.offer(Written(PROMPT, len(PROMPT), Sampling()))  # no answer at all
    async with bench.idle.running():
        bench.idle.wake()
        await eventually(lambda: bench.idle.scored == WAITING)


async def test_it_ends_in_the_middle_and_leaves_nothing_behind(bench: Bench) -> None:
    before = asyncio.all_tasks()
    async with bench.idle.running():
        bench.idle.offer(answered(checkpoints()[0], tokens=60))
        bench.idle.wake()
        await eventually(lambda: bench.asked >= 3)
    assert asyncio.all_tasks() == before
    assert await bench.free() == 2
    assert not bench.tiny.free.locked()


async def test_an_agent_learns_from_what_the_cloud_answered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_agent.idle, "QUIET_S", 0.0)
    async with cloud(checkpoints()[1]) as server, agent(tmp_path, always(server.connection)) as made:
        before = made.learned.agreement.mean()
        answer = await begin(made, Job(bytes(16), PROMPT, 16, Sampling(), (), Wish(route=Route.CLOUD)))
        await text_of(answer)
        await eventually(lambda: made.idle.scored == 1)
        after = made.learned.agreement.mean()
        assert after < before  # two random models hardly agree
        tiny = await begin(made, Job(bytes(15) + b"1", PROMPT, 4, Sampling(), (), Wish(tiny=True)))
        await text_of(tiny)
    async with agent(tmp_path) as again:
        assert again.learned.agreement.mean() == pytest.approx(after)
        assert made.idle.scored == 1
