"""The built-in pair over real QUIC and gRPC, drafting on either side: the ids and the text of one process."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from cloud_server import keys
from cloud_server.config import ServerConfig
from cloud_server.server import CloudServer
from cloud_server.server import running as serving
from edge_agent.agent import Agent, running
from edge_agent.config import AgentConfig
from edge_agent.dial import Connect
from edge_agent.job import Job, Route, Wish
from edge_agent.link import Link
from edge_agent.runs.cloud import CloudRun
from protocol.transport.base import Trust
from protocol.transport.grpc import connect_grpc
from protocol.transport.quic import connect_quic
from split_model.sampling import Sampling
from split_model.source import find_model
from support.eventually import eventually
from support.phone import expected, runner
from support.speculation import speculate

pytestmark = pytest.mark.anyio
TINY, FULL = find_model("assistant-2m"), find_model("assistant-20m")
QUESTIONS = ("I want to find a restaurant in San Jose.", "Can you book me a one way flight to Seattle?")
BOTH = pytest.mark.parametrize("how", [Sampling(), Sampling(0.8, 0.95, 0, 7)], ids=["greedy", "sampled"])
TRANSPORTS = pytest.mark.parametrize("transport", ["quic", "grpc"])


@pytest.fixture
async def server(key_folder: Path) -> AsyncIterator[CloudServer]:
    config = ServerConfig(FULL, tiny=TINY, port=0, http_port=0, keys=key_folder, slots=16, threads=1)
    async with serving(config) as server:
        yield server


@asynccontextmanager
async def agent(transport: str, server: CloudServer, key_folder: Path, state: Path) -> AsyncIterator[Agent]:
    """One that knows the server by one transport alone."""
    trust = Trust((key_folder / "ca.pem").read_bytes())
    dial: Connect = partial(connect_grpc if transport == "grpc" else connect_quic, trust=trust)
    token = keys.issue(key_folder, "tester", 600)
    config = AgentConfig(TINY, FULL, token=token, state=state, threads=1)
    async with running(config, [Link(server.address, dial)]) as made:
        yield made


def prompts() -> list[list[int]]:
    return [runner(FULL).tokenizer.chat([{"role": "user", "content": question}]) for question in QUESTIONS]


@BOTH
@TRANSPORTS
async def test_drafts_on_the_phone_give_the_whole_model_s_ids(
    transport: str, how: Sampling, server: CloudServer, key_folder: Path, tmp_path: Path
) -> None:
    asked = [(prompt, split, draft) for prompt in prompts() for split, draft in ((0, 1), (0, 4), (6, 4), (12, 8))]
    async with agent(transport, server, key_folder, tmp_path) as made:
        stops = made.means.full.config.stops
        said = await asyncio.gather(
            *(speculate(made, draft, split, how, 24, prompt, stops) for prompt, split, draft in asked)
        )
    for (prompt, split, draft), (ids, carried) in zip(asked, said, strict=True):
        assert tuple(ids) == expected(FULL, prompt, how, 24), f"split {split}, drafts of {draft}"
        assert carried.exact
        assert carried.transport == transport
    assert sum(carried.accepted for _, carried in said) > sum(carried.drafted for _, carried in said) / 4


@BOTH
@TRANSPORTS
async def test_drafts_in_the_cloud_give_the_whole_model_s_ids(
    transport: str, how: Sampling, server: CloudServer, key_folder: Path, tmp_path: Path
) -> None:
    async def ids(made: Agent, prompt: Sequence[int], draft: int) -> tuple[int, ...]:
        means, job = made.means, Job(os.urandom(16), tuple(prompt), 24, how)
        config = means.full.config
        run = CloudRun(job, 0, means.links, means.me, config.stops, config.context, cloud_draft=draft)
        said = tuple([token async for token in run.tokens(list(prompt))])
        assert run.carried.accepted <= run.carried.drafted  # none where the server finds that they do not pay
        return said

    asked = [(prompt, draft) for prompt in prompts() for draft in (2, 8)]
    async with agent(transport, server, key_folder, tmp_path) as made:
        said = await asyncio.gather(*(ids(made, prompt, draft) for prompt, draft in asked))
    for (prompt, _), one in zip(asked, said, strict=True):
        assert one == expected(FULL, prompt, how, 24)


@BOTH
@pytest.mark.parametrize("wish", [
    Wish(Route.SPECULATIVE, draft=4),
    Wish(Route.SPECULATIVE, split=5, draft=3),
    Wish(Route.SPECULATIVE),
    Wish(Route.CLOUD, draft=4),
], ids=["drafts", "drafts over a split", "as many as pay", "drafts in the cloud"])  # fmt: skip
async def test_three_answers_that_a_stop_string_ends(
    wish: Wish, how: Sampling, server: CloudServer, key_folder: Path, tmp_path: Path
) -> None:
    prompt, stop = prompts()[0], ("the city",)
    samplings = [Sampling(how.temperature, how.top_p, how.top_k, how.seed + index) for index in range(3)]
    wanted = [runner(FULL).generate(QUESTIONS[0], max_tokens=40, sampling=one, stop=stop) for one in samplings]
    async with agent("quic", server, key_folder, tmp_path) as made:
        jobs = [Job(os.urandom(16), tuple(prompt), 40, one, stop, wish) for one in samplings]
        await speculate(made, 1, tokens=1, prompt=prompt)  # so that the agent knows what the server has
        decided = await made.decide(jobs[0])
        assert decided.plan.route is wish.route
        answers = made.answer(decided, jobs)
        said = await asyncio.gather(*(text(answer) for answer in answers))
        assert said == [(one.text, one.finish_reason) for one in wanted]
        outcomes = [answer.outcome for answer in answers]
        assert all(one is not None and one.exact and one.route is wish.route for one in outcomes)
        phones, slots = (made.means.tiny, made.means.full), {made.config.slots}
        await eventually(lambda: {one.free._value for one in phones} == slots)  # a draft under way ends first
    await server.service.worker._compute.call(lambda: None)
    assert server.service.rooms.taken == 0


async def text(answer: object) -> tuple[str, str | None]:
    pieces = [piece async for piece in answer]  # type: ignore[attr-defined]
    return "".join(piece.text for piece in pieces), pieces[-1].finish
