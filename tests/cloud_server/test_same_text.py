"""Every route gives the ids of the whole model in one process: any split, alone or batched, any chunking."""

from __future__ import annotations

import asyncio
import random

import pytest

from split_model.sampling import Sampling
from support.checkpoints import checkpoint
from support.cloud import cloud
from support.phone import Phone, expected, prompt_of

pytestmark = pytest.mark.anyio
LAYERS = 5
GREEDY, SAMPLED = Sampling(), Sampling(temperature=0.9, top_p=0.95, top_k=50, seed=11)


@pytest.fixture(scope="module")
def phone() -> Phone:
    return Phone(checkpoint())


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("step_tokens", [8, 24, 128])
@pytest.mark.parametrize("split", range(LAYERS + 1))
async def test_a_session_alone(phone: Phone, split: int, step_tokens: int, sampling: Sampling) -> None:
    prompt = prompt_of(77)
    async with cloud(checkpoint(), step_tokens=step_tokens) as server:
        heard = await phone.ask(server.connection, prompt, split=split, sampling=sampling, max_tokens=12)
    assert heard.ids == expected(checkpoint(), prompt, sampling, 12)
    assert heard.admitted.exact


@pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])
@pytest.mark.parametrize("step_tokens", [24, 128])
@pytest.mark.parametrize("split", range(LAYERS + 1))
async def test_a_session_among_fifteen_others(phone: Phone, split: int, step_tokens: int, sampling: Sampling) -> None:
    prompt = prompt_of(77)
    draw = random.Random(split)
    others = [
        (
            prompt_of(draw.randrange(3, 150), seed),
            draw.randrange(LAYERS + 1),
            Sampling(draw.choice([0.0, 1.0]), seed=seed),
        )
        for seed in range(1, 16)
    ]
    async with cloud(checkpoint(), step_tokens=step_tokens, slots=16) as server:
        asked = [
            phone.ask(server.connection, p, split=s, sampling=how, max_tokens=10) for p, s, how in others
        ]  # fmt: skip
        mine = phone.ask(server.connection, prompt, split=split, sampling=sampling, max_tokens=12)
        heard, *rest = await asyncio.gather(mine, *asked)
    assert heard.ids == expected(checkpoint(), prompt, sampling, 12)
    for one, (p, _, how) in zip(rest, others, strict=True):
        assert one.ids == expected(checkpoint(), p, how, 10)


@pytest.mark.parametrize("split", [0, 2, LAYERS])
async def test_a_session_resumed_from_its_token_log(phone: Phone, split: int) -> None:
    prompt, whole = prompt_of(40), expected(checkpoint(), prompt_of(40), SAMPLED, 14)
    async with cloud(checkpoint()) as server:
        heard = await phone.ask(
            server.connection, prompt, split=split, sampling=SAMPLED, max_tokens=14, delivered=whole[:6], attempt=2
        )
    assert heard.ids == whole[6:]
    assert heard.done.answer_tokens == len(whole)
