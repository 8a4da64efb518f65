"""A prompt's hidden states in 8 bits: half the bytes, the same on every attempt, and never called exact."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import torch

from edge_agent.agent import Agent
from edge_agent.job import Job, Route, Wish
from edge_agent.runs.split import Front
from protocol.frames import Hidden
from protocol.tensor import pack, unpack
from split_model.attention import Span
from split_model.sampling import Sampling, sample
from support.cloud import Cloud, cloud
from support.edge import agent, always, begin, checkpoints, text_of
from support.phone import expected, runner

pytestmark = pytest.mark.anyio
PROMPT = tuple(6 + i % 500 for i in range(150))  # two pieces of work on the phone
SPLIT = 2
SAMPLED = Sampling(temperature=0.9, top_p=0.95, seed=7)


def job(max_tokens: int = 16, **wish: object) -> Job:
    asked = {"route": Route.SPLIT, "split": SPLIT, "hidden_bits": 8} | wish
    return Job(os.urandom(16), PROMPT, max_tokens, SAMPLED, (), Wish(**asked))  # type: ignore[arg-type]


def reference(max_tokens: int) -> str:
    """The whole model in one process, its prompt rounded between two layers, a piece at a time."""
    model, tokenizer = runner(checkpoints()[1]).model, runner(checkpoints()[1]).tokenizer
    cache, ids, position = model.new_cache(1), list(PROMPT), 0
    pieces = [ids[:128], ids[128:]]
    for _ in range(max_tokens):
        for piece in pieces:
            tiles = model.tiles([Span(0, position, len(piece))])
            x = model.run(model.embed(torch.tensor(piece)), 0, SPLIT, cache, tiles)
            if position < len(PROMPT):
                x = torch.cat([unpack(frame, model.config.width) for frame in pack(x, 0, 8)])
            x = model.run(x, SPLIT, model.config.layers, cache, tiles)
            position += len(piece)
        ids += sample(model.logits(x[-1:]), [position], [SAMPLED])
        pieces = [ids[-1:]]
    return tokenizer.decode(ids[len(PROMPT) :])


@pytest.fixture
async def server() -> AsyncIterator[Cloud]:
    async with cloud(checkpoints()[1]) as made:
        yield made


async def test_an_answer_is_the_rounded_model_s_and_says_that_it_is_not_exact(server: Cloud, tmp_path: Path) -> None:
    async with agent(tmp_path, always(server.connection), edge_layers=SPLIT) as made:
        answer, whole = await begin(made, job()), await begin(made, job(hidden_bits=16))
        assert await text_of(answer) == reference(16)
        assert await text_of(whole) == runner(checkpoints()[1]).tokenizer.decode(
            expected(checkpoints()[1], PROMPT, SAMPLED, 16)
        )
    assert answer.outcome is not None
    assert whole.outcome is not None
    assert (answer.outcome.exact, whole.outcome.exact) == (False, True)
    assert (answer.plan.hidden_bits, whole.plan.hidden_bits) == (8, 16)
    assert not answer.outcome.degraded
    saved = len(PROMPT) * (64 - 4)  # of two bytes a channel one, less a scale; and packets
    assert saved < whole.outcome.bytes_up - answer.outcome.bytes_up < 1.2 * saved
    assert 0.8 < answer.plan.score.bytes_up / answer.outcome.bytes_up < 1.2


async def test_a_plan_without_hidden_states_stays_exact(server: Cloud, tmp_path: Path) -> None:
    async with agent(tmp_path, always(server.connection), edge_layers=SPLIT) as made:
        answer = await begin(made, job(route=Route.CLOUD, split=None))
        await text_of(answer)
    assert answer.outcome is not None
    assert answer.outcome.exact
    assert answer.plan.hidden_bits is None


async def test_another_replica_gets_the_same_and_goes_on_with_the_same_text(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        first, second = [await stack.enter_async_context(cloud(checkpoints()[1])) for _ in range(2)]
        dials = always(first.connection), always(second.connection)
        made = await stack.enter_async_context(agent(tmp_path, *dials, edge_layers=SPLIT))
        answer = await begin(made, job(max_tokens=40))
        begun = "".join([(await anext(answer)).text for _ in range(10)])
        used = first if first.connection._sessions else second
        await used.connection.aclose()
        assert begun + await text_of(answer) == reference(40)
        assert answer.outcome is not None
        assert answer.outcome.attempts == 2
        assert not answer.outcome.exact


async def sent(made: Agent, log: Sequence[int]) -> list[Hidden]:
    """By a new attempt."""
    seat = await made.means.full.seat(SPLIT)
    try:
        front = Front(seat, made.means.full.compute, len(PROMPT), 8)
        return [frame async for frame in front.frames(log, 0)]
    finally:
        seat.close()


async def test_every_attempt_sends_the_same_and_what_was_answered_as_it_is(tmp_path: Path) -> None:
    async with agent(tmp_path, edge_layers=SPLIT) as made:
        first, later = await sent(made, PROMPT), await sent(made, (*PROMPT, *range(20, 33)))
    assert [frame.rows for frame in first] == [128, 22]
    assert all(frame.scaled is not None for frame in first)
    assert later[:2] == first
    assert [(frame.position, frame.rows, frame.scaled) for frame in later[2:]] == [(150, 13, None)]


async def test_a_prompt_that_ends_with_a_piece_of_work_is_rounded_to_its_end(tmp_path: Path) -> None:
    async with agent(tmp_path, edge_layers=SPLIT) as made:
        seat = await made.means.full.seat(SPLIT)
        front = Front(seat, made.means.full.compute, 128, 8)
        log = list(PROMPT[:128])
        prompt = [frame async for frame in front.frames(log, 0)]
        log.append(9)
        answer = [frame async for frame in front.frames(log, 128)]
        seat.close()
    assert [(frame.rows, frame.scaled is None) for frame in (*prompt, *answer)] == [(128, False), (1, True)]
