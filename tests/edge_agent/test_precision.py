"""A phone and a cloud that hold weights in their own ways."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.agent import Agent
from edge_agent.answer import Outcome
from edge_agent.job import Quality, Route
from split_model.settings import Precision
from support.cloud import cloud
from support.edge import agent, always, begin, checkpoints, job, text_of

pytestmark = pytest.mark.anyio
INT8, FAST, BF16 = Precision.INT8, Precision.INT8_FAST, Precision.BF16


async def said(made: Agent, **wish: object) -> tuple[str, Outcome]:
    answer = await begin(made, job(prompt=30, max_tokens=12, **wish))
    text = await text_of(answer)
    assert answer.outcome is not None
    return text, answer.outcome


@pytest.mark.parametrize(
    ("here", "there", "exact"),
    [(INT8, INT8, True), (INT8, BF16, False), (BF16, INT8, False), (FAST, FAST, False)],
)
async def test_a_split_is_exact_where_both_multiply_alike(
    tmp_path: Path, here: Precision, there: Precision, exact: bool
) -> None:
    _, full = checkpoints()
    async with (
        cloud(full, precision=there) as served,
        agent(tmp_path, always(served.connection), edge_layers=2, precision=here) as made,
    ):
        split, outcome = await said(made, route=Route.SPLIT, split=2, quality=Quality.BALANCED)
        whole, alone = await said(made, route=Route.CLOUD)
    assert (outcome.route, outcome.exact, alone.exact) == (Route.SPLIT, exact, exact)
    assert split == whole or not exact


async def test_both_models_on_the_phone_have_their_own(tmp_path: Path) -> None:
    async with agent(tmp_path, edge_layers=5, tiny_precision=Precision.INT4, precision=INT8) as made:
        tiny, full = made.means.tiny.model, made.means.full.model
        assert (tiny.precision, full.precision) == (Precision.INT4, INT8)
        _, outcome = await said(made, route=Route.LOCAL)
    assert outcome.tokens == 12
