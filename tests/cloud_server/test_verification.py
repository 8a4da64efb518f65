"""Drafts from a phone: the same ids for every split, length, share of right ones and company, and what is counted."""

from __future__ import annotations

import asyncio
import random

import pytest

from protocol.frames import Reason
from split_model.sampling import Sampling
from support.checkpoints import checkpoint
from support.cloud import cloud
from support.drafting_phone import guessing, speculate
from support.phone import Phone, expected, prompt_of

pytestmark = pytest.mark.anyio
LAYERS = 5
GREEDY, SAMPLED = Sampling(), Sampling(temperature=0.9, top_p=0.95, top_k=50, seed=11)
HOWS = pytest.mark.parametrize("sampling", [GREEDY, SAMPLED], ids=["greedy", "sampled"])


@pytest.fixture(scope="module")
def phone() -> Phone:
    return Phone(checkpoint())


@HOWS
@pytest.mark.parametrize("share", [0.0, 0.7, 1.0])
@pytest.mark.parametrize("ahead", [0, 2])
@pytest.mark.parametrize("draft", [1, 4, 9])
@pytest.mark.parametrize("split", [0, 2, LAYERS])
async def test_any_drafts_at_any_split(
    phone: Phone, split: int, draft: int, ahead: int, share: float, sampling: Sampling
) -> None:
    prompt = prompt_of(45)
    right = expected(checkpoint(), prompt, sampling, 24)
    async with cloud(checkpoint()) as server:
        guess = guessing(right, len(prompt), share, seed=draft)
        said = await speculate(phone, server.connection, prompt, guess, split=split, draft=draft, ahead=ahead,
                               sampling=sampling, max_tokens=24)  # fmt: skip
    assert said.ids == right
    if share == 1.0:
        assert said.deviations == 0
        assert said.rounds <= 3 + len(right) // draft
        assert said.done.accepted >= len(right) - said.rounds - draft
    if share == 0.0:
        assert said.done.accepted <= 2
        assert said.rounds >= len(right) - 2
    assert said.done.accepted <= said.done.drafted


@HOWS
@pytest.mark.parametrize("step_tokens", [8, 24])
@pytest.mark.parametrize("split", [0, 3])
async def test_a_small_budget_cuts_drafts_short_and_changes_nothing(
    phone: Phone, split: int, step_tokens: int, sampling: Sampling
) -> None:
    prompt = prompt_of(60)
    right = expected(checkpoint(), prompt, sampling, 20)
    async with cloud(checkpoint(), step_tokens=step_tokens, slots=6) as server:
        said = await asyncio.gather(*(
            speculate(phone, server.connection, prompt, guessing(right, 60, 0.9, seed), split=split, draft=16,
                      ahead=1, sampling=sampling, max_tokens=20)
            for seed in range(6)
        ))  # fmt: skip
        assert server.service.worker.load.tokens <= server.service.worker.load.steps * (step_tokens + 8)
    assert {one.ids for one in said} == {right}


@HOWS
async def test_among_strangers_of_every_kind(phone: Phone, sampling: Sampling) -> None:
    """Splits, plain answers, good and bad drafts at any depth, in the same steps."""
    draw = random.Random(7)
    async with cloud(checkpoint(), slots=16, step_tokens=64) as server:
        asked, wanted = [], []
        for seed in range(16):
            prompt, split = prompt_of(draw.randrange(3, 120), seed), draw.randrange(LAYERS + 1)
            right = expected(checkpoint(), prompt, sampling, 14)
            wanted.append(right)
            if seed % 3:
                guess = guessing(right, len(prompt), draw.random(), seed)
                asked.append(speculate(phone, server.connection, prompt, guess, split=split, ahead=draw.randrange(3),
                                       draft=draw.randrange(1, 9), sampling=sampling, max_tokens=14))  # fmt: skip
            else:
                asked.append(phone.ask(server.connection, prompt, split=split, sampling=sampling, max_tokens=14))
        heard = await asyncio.gather(*asked)
    assert [one.ids for one in heard] == wanted


@pytest.mark.parametrize("split", [0, 2])
async def test_a_phone_that_drafts_now_and_then(phone: Phone, split: int) -> None:
    """Between its drafts the server goes on alone, or with one hidden state a token."""
    prompt, rng = prompt_of(30), random.Random(3)
    right = expected(checkpoint(), prompt, SAMPLED, 40)
    good = guessing(right, 30, 0.8, seed=5)
    async with cloud(checkpoint()) as server:
        said = await speculate(
            phone, server.connection, prompt, lambda at: None if rng.random() < 0.5 else good(at), split=split,
            sampling=SAMPLED, max_tokens=40,
        )  # fmt: skip
    assert said.ids == right
    assert 0 < said.done.accepted < said.done.drafted


@pytest.mark.parametrize("split", [0, 2])
async def test_a_session_with_drafts_is_resumed_from_its_token_log(phone: Phone, split: int) -> None:
    prompt = prompt_of(40)
    right = expected(checkpoint(), prompt, SAMPLED, 20)
    guess = guessing(right, 40, 0.8)
    async with cloud(checkpoint()) as server:
        for known in (1, 7, 19):
            said = await speculate(phone, server.connection, prompt, guess, split=split, sampling=SAMPLED, ahead=1,
                                   max_tokens=20, delivered=right[:known])  # fmt: skip
            assert said.ids == right[known:]


@pytest.mark.parametrize("split", [0, 2])
@pytest.mark.parametrize("last", range(1, 9))
async def test_the_limit_ends_an_answer_inside_a_round(phone: Phone, split: int, last: int) -> None:
    prompt = prompt_of(20)
    right = expected(checkpoint(), prompt, GREEDY, last)
    async with cloud(checkpoint()) as server:
        guess = guessing(expected(checkpoint(), prompt, GREEDY, 40), 20, 1.0)
        said = await speculate(phone, server.connection, prompt, guess, split=split, draft=6, max_tokens=last, ahead=2)
    assert said.ids == right
    assert (said.done.reason, said.done.answer_tokens) == (Reason.LENGTH, last)


async def test_the_context_ends_an_answer_inside_a_round(phone: Phone) -> None:
    prompt = prompt_of(50)
    right = expected(checkpoint(), prompt, GREEDY, 40)
    async with cloud(checkpoint(), context=64) as server:
        guess = guessing(right, 50, 1.0)
        said = await speculate(phone, server.connection, prompt, guess, draft=8, ahead=3, max_tokens=14)
        alone = await phone.ask(server.connection, prompt, max_tokens=400)
    assert said.ids == alone.ids == right[:14]
    assert alone.done.reason is Reason.LENGTH


async def test_a_stop_string_ends_an_answer_inside_a_round(phone: Phone) -> None:
    prompt = prompt_of(20)
    right = expected(checkpoint(), prompt, GREEDY, 30)
    async with cloud(checkpoint()) as server:
        decode = server.service.tokenizer.decode
        text = decode(right)
        stop = text[len(text) // 2 :][:2]
        guess = guessing(right, 20, 1.0)
        plain = await phone.ask(server.connection, prompt, max_tokens=30, stop=(stop,))
        for draft in (1, 3, 8):
            said = await speculate(phone, server.connection, prompt, guess, draft=draft, max_tokens=30, stop=(stop,))
            assert said.ids == plain.ids
            assert said.done.reason is Reason.STOP
            assert said.done.accepted <= said.done.drafted
    assert stop in decode(plain.ids)


async def test_a_stop_token_ends_an_answer_inside_a_round(phone: Phone) -> None:
    """Of the drafts behind it nothing is told, right or not."""
    async with cloud(checkpoint()) as server:
        stops, prompt = server.service.model.config.stops, prompt_of(9)
        for seed in range(200):
            how = Sampling(temperature=3.0, seed=seed)
            right = expected(checkpoint(), prompt, how, 30)
            if right[-1] in stops and len(right) % 5:
                break
        guess = guessing(right, 9, 1.0)
        said = await speculate(phone, server.connection, prompt, guess, draft=4, sampling=how, max_tokens=30, ahead=1)
    assert said.ids == right
    assert said.done.reason is Reason.STOP


async def test_a_higher_attempt_takes_a_session_with_drafts_over(phone: Phone) -> None:
    prompt, name = prompt_of(40), b"a name of 16 byt"
    right = expected(checkpoint(), prompt, GREEDY, 30)
    async with cloud(checkpoint(), slots=1, waiting=0) as server:

        async def first() -> None:
            stuck = iter(range(400))
            await speculate(
                phone, server.connection, prompt,
                lambda at: right[at - 40] if next(stuck) < 8 and at < 60 else 7, max_tokens=400, request_id=name,
            )  # fmt: skip

        older = asyncio.create_task(first())
        while server.service.worker.load.steps < 5:
            await server.settled()
        said = await speculate(phone, server.connection, prompt, guessing(right, 40, 0.9), max_tokens=30,
                               delivered=right[:3], request_id=name, attempt=2)  # fmt: skip
        assert said.ids == right[3:]
        (ended,) = await asyncio.gather(older, return_exceptions=True)
        assert "superseded" in str(ended)
        while server.service.rooms.taken:
            await server.settled()
        assert await server.settled() == (0, 0)


async def test_every_token_of_a_round_is_counted(phone: Phone) -> None:
    prompt = prompt_of(40)
    right = expected(checkpoint(), prompt, GREEDY, 21)
    async with cloud(checkpoint()) as server:
        metrics = server.service.metrics
        said = await speculate(phone, server.connection, prompt, guessing(right, 40, 0.8), max_tokens=21)
        while server.service.rooms.taken:
            await server.settled()
        text = metrics.text().decode()
    found = {
        line.rpartition(" ")[0].partition("{")[0]: float(line.rpartition(" ")[2])
        for line in text.splitlines()
        if line.startswith("vllm:") and "_pos" not in line
    }
    assert found["vllm:generation_tokens_total"] == len(said.ids) == 21
    assert found["vllm:spec_decode_num_draft_tokens_total"] > said.done.drafted  # also those behind a wrong one
    assert said.done.accepted < said.done.drafted <= said.done.accepted + said.deviations
    assert found["vllm:spec_decode_num_accepted_tokens_total"] == said.done.accepted
    assert 0 < found["vllm:spec_decode_num_drafts_total"] < 21
    places = [
        float(line.rpartition(" ")[2])
        for place in range(4)
        for line in text.splitlines()
        if line.startswith("vllm:spec_decode_num_accepted_tokens_per_pos_total") and f'position="{place}"' in line
    ]
    assert sum(places) == said.done.accepted
    assert places == sorted(places, reverse=True)
    assert 'tandem_sessions_total{model_name="tiny-llama",outcome="done",route="speculative"} 1.0' in text


async def test_rates_are_not_those_of_verifications(phone: Phone) -> None:
    """A pass over drafts takes longer than one over a token, and shorter than a prompt of as many."""
    prompt = prompt_of(8)
    right = expected(checkpoint(), prompt, GREEDY, 79)
    async with cloud(checkpoint()) as server:
        await phone.ask(server.connection, prompt_of(100), max_tokens=4)
        before = server.service.worker.load
        await speculate(phone, server.connection, prompt, guessing(right, 8, 1.0), draft=39, ahead=1, max_tokens=79)
        after = server.service.worker.load
    assert 0 < after.steps - before.steps < 10
    assert (after.prefill_rate, after.decode_rate) == (before.prefill_rate, before.decode_rate)
