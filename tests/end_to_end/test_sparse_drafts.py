"""Drafts in a sparse answer: each position that is verified chooses its own pages, as it would have alone."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import pytest

from edge_agent.agent import Agent
from edge_agent.decisions import Outcome
from edge_agent.job import Job, Route, Wish
from split_model.model import Model
from split_model.sampling import Sampling
from split_model.sparse import Budget
from support.cloud import cloud
from support.edge import always
from support.eventually import eventually
from support.phone import prompt_of
from support.speculation import BLUR, blurred, drafting_phone

pytestmark = pytest.mark.anyio
SMALL = Budget(page=16, first=0, best=1, recent=2, whole=1, least=64)
TOKENS = 48
DRAFTING = {
    "by the phone": Wish(Route.SPECULATIVE, draft=4, sparse=True),
    "over a split": Wish(Route.SPECULATIVE, split=2, draft=6, sparse=True),
    "in the cloud": Wish(Route.CLOUD, draft=6, sparse=True),
    "a page of them": Wish(Route.SPECULATIVE, draft=16, sparse=True),
}


@pytest.fixture
async def phone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Agent]:
    """Of models that read few keys early on, and a cloud that drafts whether that pays or not."""
    monkeypatch.setitem(Model.load.__kwdefaults__, "budget", SMALL)
    monkeypatch.setattr("split_model.drafting.GAIN", 0.0)
    tiny, full = blurred(BLUR)
    async with cloud(full, tiny=tiny) as server, drafting_phone(tmp_path, always(server.connection)) as made:
        await server.service.worker.warm_up(40)
        await said(made, prompt_of(80), Wish(Route.CLOUD, draft=0), Sampling())  # so that it knows what the server has
        yield made


async def said(made: Agent, prompt: Sequence[int], wish: Wish, how: Sampling) -> tuple[list[int], Outcome]:
    """The answer's ids, and its end."""
    asked = Job(os.urandom(16), tuple(prompt), TOKENS, how, (), wish)
    (answer,) = made.answer(await made.decide(asked), [asked])
    async for _ in answer:
        pass
    assert answer.outcome is not None
    return answer._log[len(prompt) :], answer.outcome


@pytest.mark.parametrize("how", [Sampling(), Sampling(0.9, 0.95, 50, 11)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("length", [50, 80])  # rounds before the position from which pages are chosen, or none
async def test_drafts_change_no_id_of_a_sparse_answer(phone: Agent, how: Sampling, length: int) -> None:
    prompt = prompt_of(length)
    right, alone = await said(phone, prompt, Wish(Route.CLOUD, draft=0, sparse=True), how)
    dense, _ = await said(phone, prompt, Wish(Route.CLOUD, draft=0), how)
    assert right != dense
    assert (alone.drafted, alone.exact) == (0, False)
    for name, wish in DRAFTING.items():
        ids, outcome = await said(phone, prompt, wish, how)
        assert ids == right, name
        assert (outcome.route, outcome.exact) == (wish.route, False), name
        assert outcome.drafted > outcome.accepted > 0, name
    await eventually(lambda: {one.free._value for one in (phone.means.tiny, phone.means.full)} == {phone.config.slots})
