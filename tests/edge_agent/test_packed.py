"""A phone that has packed parts instead of whole checkpoints, with a cloud that has the whole one."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from edge_agent.agent import Agent, running
from edge_agent.config import AgentConfig
from edge_agent.job import Job, Route
from edge_agent.link import Link
from protocol.transport.base import Address
from split_model.config import ModelError
from split_model.pack import pack
from split_model.sampling import Sampling
from split_model.settings import Precision
from support.cloud import Cloud, cloud
from support.edge import always, begin, checkpoints, job, text_of
from support.phone import expected, prompt_of, runner

pytestmark = pytest.mark.anyio
PROMPT = prompt_of(40)
HELD = 3


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model in int8, and three layers of the full one in bf16 and in int8."""
    folder, (tiny, full) = tmp_path_factory.mktemp("packed"), checkpoints()
    pack(tiny, folder / "tiny", None, Precision.INT8)
    pack(full, folder / "bf16", HELD, Precision.BF16)
    pack(full, folder / "int8", HELD, Precision.INT8)
    pack(full, folder / "none", 0, Precision.BF16)
    return folder


@pytest.fixture
async def real() -> AsyncIterator[Cloud]:
    async with cloud(checkpoints()[1]) as made:
        yield made


def phone(packed: Path, state: Path, full: str, **changes: int) -> AgentConfig:
    return AgentConfig(packed / "tiny", packed / full, state=state, threads=1, **changes)


def wish(**wanted: object) -> Job:
    return replace(job(max_tokens=12, **wanted), prompt=PROMPT)


async def answered(made: Agent, asked: Job) -> tuple[str, bool]:
    """Its text, and whether it said that it is exact."""
    answer = await begin(made, asked)
    text = await text_of(answer)
    assert answer.outcome is not None
    assert answer.outcome.route is asked.wish.route
    return text, answer.outcome.exact


def truth() -> str:
    full = runner(checkpoints()[1])
    ids = expected(checkpoints()[1], PROMPT, Sampling(), 12)
    return full.tokenizer.decode([one for one in ids if one not in full.model.config.stops])


async def test_every_route_gives_the_text_of_the_whole_model(packed: Path, real: Cloud, tmp_path: Path) -> None:
    link = Link(Address("memory", 1), always(real.connection))
    async with running(phone(packed, tmp_path, "bf16"), [link]) as made:
        assert (made.pair.edge_layers, made.pair.full.name) == (HELD, "big-1")
        for route, split in ((Route.CLOUD, None), (Route.SPLIT, 1), (Route.SPLIT, HELD), (Route.SPECULATIVE, 0),
                             (Route.SPECULATIVE, HELD)):  # fmt: skip
            assert await answered(made, wish(route=route, split=split)) == (truth(), True), f"{route} {split}"
        with pytest.raises(ValueError, match=f"split {HELD + 1}, the phone holds layers for 1 to {HELD}"):
            await made.decide(wish(route=Route.SPLIT, split=HELD + 1))
        local = await begin(made, wish(route=Route.LOCAL))
        await text_of(local)
        assert local.outcome is not None
        assert (local.outcome.model, local.outcome.exact) == ("small-1", False)


async def test_layers_in_integers_are_taken_but_not_exact(packed: Path, real: Cloud, tmp_path: Path) -> None:
    link = Link(Address("memory", 1), always(real.connection))
    async with running(phone(packed, tmp_path, "int8"), [link]) as made:
        text, exact = await answered(made, wish(route=Route.SPLIT, split=HELD))
        assert text
        assert not exact
        assert (await answered(made, wish(route=Route.CLOUD)))[0] == truth()


async def test_a_phone_without_any_layers_drafts_and_asks(packed: Path, real: Cloud, tmp_path: Path) -> None:
    link = Link(Address("memory", 1), always(real.connection))
    async with running(phone(packed, tmp_path, "none"), [link]) as made:
        assert made.pair.edge_layers == 0
        for route in (Route.CLOUD, Route.SPECULATIVE):
            assert await answered(made, wish(route=route)) == (truth(), True)


async def test_more_layers_than_are_packed_are_refused(packed: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=f"4 layers of .*bf16 on the phone, it has {HELD}"):
        async with running(phone(packed, tmp_path, "bf16", edge_layers=4), []):
            pass
