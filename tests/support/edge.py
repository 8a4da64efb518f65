"""Records and small checkpoints for tests of the edge agent."""

from __future__ import annotations

import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from pathlib import Path
from typing import Any

from edge_agent.agent import Agent, running
from edge_agent.answer import Answer
from edge_agent.conditions import Cloud, Conditions, Phone, Rates
from edge_agent.config import AgentConfig
from edge_agent.cost import Pair
from edge_agent.dial import Connect
from edge_agent.job import Job, Wish
from edge_agent.link import Link
from protocol.transport.base import Address, Connection
from split_model.config import ModelConfig
from split_model.rope import Rope
from split_model.sampling import Sampling
from support.checkpoints import save_model, save_tokenizer

_made: list[tempfile.TemporaryDirectory[str]] = []


def shape(name: str = "full", **changes: Any) -> ModelConfig:
    """Width 4, one head of 4, inner 8: 160 weights a layer, so sums are easily checked by hand."""
    values: dict[str, Any] = {
        "name": name, "vocabulary": 100, "width": 4, "layers": 3, "heads": 1, "kv_heads": 1, "head_dim": 4, "inner": 8,
        "context": 64, "rope": Rope(1e4), "rotary": 4, "norm_eps": 1e-6, "tied": True, "bos": None,
        "stops": frozenset({1}), "architecture": "LlamaForCausalLM", "interleaved": False, "window": None,
        "qkv_bias": False, "qk_norm": False, "post_norms": False, "fused_gate_up": False,
    }  # fmt: skip
    return ModelConfig(**{**values, **changes})


def pair(edge_layers: int = 3) -> Pair:
    return Pair(shape("tiny", layers=1), shape("full"), edge_layers)


def job(prompt: int = 5, max_tokens: int = 10, **wish: Any) -> Job:
    return Job(bytes(16), tuple(range(prompt)), max_tokens, Sampling(), (), Wish(**wish))


def phone(**changes: Any) -> Phone:
    return Phone(**{"tiny": Rates(1e4, 1e3), "full": Rates(1e4, 1e3), **changes})


def cloud(**changes: Any) -> Cloud:
    values: dict[str, Any] = {"address": "a:1", "rtt_s": 0.1, "up": 1e4, "down": 1e5, "rates": Rates(1e6, 1e5)}
    return Cloud(**{**values, **changes})


def conditions(**changes: Any) -> Conditions:
    return Conditions(**{"phone": phone(), "cloud": cloud(), **changes})


@cache
def checkpoints(**full: Any) -> tuple[Path, Path]:
    """A tiny and a full random model with one tokenizer; arguments change the full one's shape."""
    _made.append(tempfile.TemporaryDirectory(prefix="pair-"))
    folder = Path(_made[-1].name)
    shapes = {
        "small-1": {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64},
        "big-1": {"tie_word_embeddings": True, **full},
    }
    for seed, (name, values) in enumerate(shapes.items()):
        (folder / name).mkdir()
        save_model(folder / name, seed=seed, **values)
        save_tokenizer(folder / name)
    return folder / "small-1", folder / "big-1"


def always(connection: Connection) -> Connect:
    """A way to dial that finds this connection."""

    async def connect(address: Address) -> Connection:
        return connection

    return connect


@asynccontextmanager
async def agent(state: Path, *clouds: Connect, edge_layers: int | None = 0, **settings: Any) -> AsyncIterator[Agent]:
    """A running agent with the small pair; each cloud is a way to dial it."""
    tiny, full = checkpoints()
    config = AgentConfig(tiny, full, state=state, edge_layers=edge_layers, threads=1, **settings)
    links = [Link(Address("memory", 1 + index), dial) for index, dial in enumerate(clouds)]
    async with running(config, links) as made:
        yield made


async def begin(made: Agent, job: Job) -> Answer:
    """The job's answer, not yet begun to be read."""
    (answer,) = made.answer(await made.decide(job), [job])
    return answer


async def text_of(answer: Answer) -> str:
    """All of it."""
    return "".join([piece.text async for piece in answer])
