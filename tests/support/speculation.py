"""A full model and a tiny one that often agrees with it, and answers whose drafts are made on the phone."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path

from edge_agent.agent import Agent, running
from edge_agent.config import AgentConfig
from edge_agent.dial import Connect
from edge_agent.job import Job
from edge_agent.link import Link
from edge_agent.runs.cloud import Carried, CloudRun
from edge_agent.runs.local import PhoneModel
from edge_agent.runs.pace import Pace
from edge_agent.runs.speculative import Drafter
from edge_agent.runs.split import Front
from protocol.transport.base import Address
from split_model.drafting import Acceptance
from split_model.sampling import Sampling
from support.checkpoints import save_model, save_tokenizer

BLUR = 0.05  # the tiny model then has half of the greedy tokens right, and nine of ten sampled ones
LAYERS = 3
PROMPT = tuple(range(3, 24))
GREEDY, SAMPLED = Sampling(), Sampling(temperature=1.0, seed=5)
_made: list[tempfile.TemporaryDirectory[str]] = []


@cache
def blurred(blur: float = BLUR) -> tuple[Path, Path]:
    """A tiny and a full model of three layers: the same but for the blur."""
    _made.append(tempfile.TemporaryDirectory(prefix="blurred-"))
    folders = (Path(_made[-1].name) / name for name in ("small-1", "big-1"))
    shape = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1,
             "intermediate_size": 64, "max_position_embeddings": 256}  # fmt: skip
    tiny, full = folders
    for folder, much in ((tiny, blur), (full, 0.0)):
        folder.mkdir()
        save_model(folder, blur=much, **shape)
        save_tokenizer(folder)
    return tiny, full


@cache
def small(context: int) -> Path:
    """The tiny model of `blurred` with a shorter context."""
    _made.append(tempfile.TemporaryDirectory(prefix="short-"))
    folder = Path(_made[-1].name) / "small-1"
    shutil.copytree(blurred()[0], folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"max_position_embeddings": context}))
    return folder


@asynccontextmanager
async def drafting_phone(
    state: Path, *clouds: Connect, tiny: Path | None = None, slots: int = 4
) -> AsyncIterator[Agent]:
    """An agent that holds the whole of both models; each cloud is a way to dial it, the first is preferred."""
    config = AgentConfig(tiny or blurred()[0], blurred()[1], state=state, threads=1, slots=slots)
    links = [Link(Address("replica", 1 + index), dial) for index, dial in enumerate(clouds)]
    async with running(config, links) as made:
        for index, link in enumerate(made.means.links.links):
            link.path.rtt_s = 0.001 * index
        yield made


def drafter(made: Agent, sampling: Sampling, draft: int, split: int = 0, tiny: PhoneModel | None = None,
            steady: bool = True, prior: float = 0.7) -> Drafter:  # fmt: skip
    """One that goes on drafting whatever it brings, if not told otherwise."""
    tiny = tiny or made.means.tiny
    pace = Pace(tiny, made.means.full, split)
    return Drafter(tiny, pace, sampling, draft, Acceptance(prior), steady=steady)


@asynccontextmanager
async def carrying(made: Agent, job: Job, split: int, by: Drafter | None,
                   stops: Collection[int] = ()) -> AsyncIterator[CloudRun]:  # fmt: skip
    """What carries an answer with these drafts, or with none."""
    means = made.means
    seat = await means.full.seat(split) if split else None
    try:
        front = Front(seat, means.full.compute, len(job.prompt), 16) if seat else None
        yield CloudRun(job, split, means.links, means.me, stops, means.full.config.context, front, by)
    finally:
        if by is not None:
            by.close()
        if seat is not None:
            seat.close()


async def speculate(made: Agent, draft: int, split: int = 0, sampling: Sampling = GREEDY, tokens: int = 24,
                    prompt: Sequence[int] = PROMPT, stops: Collection[int] = (),
                    by: Drafter | None = None) -> tuple[list[int], Carried]:  # fmt: skip
    """One answer's ids, `stops` among them, and what happened on its way."""
    job = Job(os.urandom(16), tuple(prompt), tokens, sampling)
    async with carrying(made, job, split, by or drafter(made, sampling, draft, split), stops) as run:
        return [token async for token in run.tokens(list(prompt))], run.carried
