"""A path that falls silent while drafts are under way: the answer goes on from the token log, wherever it can."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

import edge_agent.runs.session
from edge_agent.job import Job
from protocol.errors import FaultCode, LinkLost, SessionFault
from split_model.sampling import Sampling
from support.cloud import Cloud, cloud
from support.edge import always
from support.eventually import eventually
from support.fading import Fading
from support.phone import runner
from support.speculation import GREEDY, LAYERS, PROMPT, SAMPLED, blurred, carrying, drafter, drafting_phone, speculate

pytestmark = pytest.mark.anyio
ROUTES = pytest.mark.parametrize(("split", "how"), [(0, GREEDY), (0, SAMPLED), (1, GREEDY), (LAYERS, SAMPLED)])
AFTER = pytest.mark.parametrize("frames", [0, 1, 4])


def truth(how: Sampling) -> list[int]:
    return list(runner(blurred()[1]).tokens(PROMPT, max_tokens=24, sampling=how))


@pytest.fixture(autouse=True)
def soon(monkeypatch: pytest.MonkeyPatch) -> None:
    """Suspicion comes early, despair late."""
    for how in (GREEDY, SAMPLED):
        truth(how)
    monkeypatch.setattr(edge_agent.runs.session, "SUSPICION_S", 0.3)
    monkeypatch.setattr(edge_agent.runs.session, "SUSPICION_TRIPS", 0)
    monkeypatch.setattr(edge_agent.runs.session, "LOST_S", 30.0)


@pytest.fixture
async def real() -> AsyncIterator[Cloud]:
    async with cloud(blurred()[1]) as made:
        yield made


@pytest.fixture
async def second() -> AsyncIterator[Cloud]:
    async with cloud(blurred()[1]) as made:
        yield made


async def at_rest(*clouds: Cloud) -> None:
    for one in clouds:
        await eventually(lambda one=one: one.service.rooms.taken == 0)
        assert await one.settled() == (0, 0)


@AFTER
@ROUTES
async def test_the_next_replica_goes_on(
    tmp_path: Path, real: Cloud, second: Cloud, split: int, how: Sampling, frames: int
) -> None:
    gone, other = Fading(real.handle, frames), Fading(second.handle, None)
    async with drafting_phone(tmp_path, always(gone), always(other)) as made:
        said, carried = await speculate(made, 4, split, how)
        assert said == truth(how)
        assert (carried.replica, carried.attempts >= 2) == ("replica:2", True)
        assert carried.rounds > 0
        gone.again.set()
    await at_rest(second)


@AFTER
@ROUTES
async def test_a_path_that_bears_again_carries_its_drafts_on(
    tmp_path: Path, real: Cloud, split: int, how: Sampling, frames: int
) -> None:
    fading = Fading(real.handle, frames)

    async def revive() -> None:
        await eventually(lambda: fading.moves)
        fading.left = None
        fading.silent.clear()
        fading.again.set()

    async with drafting_phone(tmp_path, always(fading)) as made:
        helper = asyncio.create_task(revive())
        said, _ = await speculate(made, 4, split, how)
        await helper
        assert said == truth(how)
    await at_rest(real)


@ROUTES
async def test_a_replica_that_drains_hands_its_answer_to_the_next(
    tmp_path: Path, real: Cloud, second: Cloud, split: int, how: Sampling
) -> None:
    drains = Fading(real.handle, 2)
    drains.fault = SessionFault(FaultCode.DRAINING, "shutting down", 60.0)
    async with drafting_phone(tmp_path, always(drains), always(Fading(second.handle, None))) as made:
        said, carried = await speculate(made, 4, split, how)
        assert said == truth(how)
        assert carried.attempts == 2
    await at_rest(real, second)


@pytest.mark.parametrize("split", [0, 2])
async def test_a_recovery_that_is_cancelled_leaves_nothing(
    tmp_path: Path, real: Cloud, second: Cloud, split: int
) -> None:
    ways = [Fading(one.handle, frames) for one, frames in ((real, 2), (second, 0))]
    async with drafting_phone(tmp_path, *(always(way) for way in ways)) as made:
        asking = asyncio.create_task(speculate(made, 4, split))
        await eventually(lambda: ways[1].sessions)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await made.means.full.compute.call(lambda: None)
        assert made.means.full.free._value == made.means.tiny.free._value == 4
        for way in ways:
            way.again.set()
    await at_rest(real, second)


async def test_where_nothing_answers_the_cloud_is_lost_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real: Cloud
) -> None:
    monkeypatch.setattr(edge_agent.runs.session, "LOST_S", 0.3)
    fading = Fading(real.handle, 3)
    async with drafting_phone(tmp_path, always(fading)) as made:
        with pytest.raises(LinkLost, match="no replica answers"):
            await speculate(made, 4)
        await made.means.full.compute.call(lambda: None)
        assert made.means.tiny.free._value == 4
        fading.again.set()
    await at_rest(real)


@pytest.mark.parametrize(("first", "then"), [(0, 0), (0, 2), (2, 0), (2, LAYERS)])
@pytest.mark.parametrize("drafts_after", [True, False])
async def test_a_run_hands_on_to_another_of_any_split(
    tmp_path: Path, real: Cloud, first: int, then: int, drafts_after: bool
) -> None:
    """As a move in mid-answer does: the older session stays until the next has said something."""
    job, log = Job(bytes(16), PROMPT, 24, SAMPLED), list(PROMPT)
    async with drafting_phone(tmp_path, always(real.connection)) as made:
        rest = drafter(made, SAMPLED, 4, then) if drafts_after else None
        async with carrying(made, job, then, rest) as second, contextlib.aclosing(second.tokens(log)) as later:
            drafts = drafter(made, SAMPLED, 4, first)
            async with carrying(made, job, first, drafts) as run, contextlib.aclosing(run.tokens(log)) as tokens:
                for _ in range(7):
                    await anext(tokens)
                run.hand_on, second.carried = True, run.carried
            async for _ in later:
                await run.part()
        assert log[len(PROMPT) :] == truth(SAMPLED)
        assert made.means.links.links[0].unreachable is None
    await at_rest(real)
