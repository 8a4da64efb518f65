"""On every link, by every route, greedy and sampled: the answer of one process."""

from __future__ import annotations

from typing import Any

import pytest

from split_model.sampling import Sampling
from support.netem import Agent, Link, expected, pair

QUESTION = "Where can I eat at night?"
SHORT = ("wifi", "lte_lossy", "3g_lossy")
PROFILES = [
    pytest.param(name, marks=[] if name in SHORT else pytest.mark.whole_netem)
    for name in ("wifi", "5g", "lte", "lte_lossy", "4g_slow", "3g_lossy", "edge_2g", "leo")
]
ROUTES: list[dict[str, Any]] = [
    {"route": "local", "quality": "fast"},
    {"route": "cloud"},
    {"route": "split", "split": 3},
    {"route": "speculative", "split": 0, "draft": 4},
    {"route": "speculative", "split": 2, "draft": 3},
]
SAMPLINGS = (Sampling(), Sampling(0.8, 0.95, 0, 7))


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=["greedy", "seeded"])
@pytest.mark.parametrize("plan", ROUTES, ids=["local", "cloud", "split", "drafts", "drafts over a split"])
@pytest.mark.parametrize("profile", PROFILES)
def test_the_answer_of_one_process(
    profile: str, plan: dict[str, Any], sampling: Sampling, link: Link, steady_agent: Agent
) -> None:
    link.use(profile)
    said = steady_agent.ask(QUESTION, plan, sampling)
    assert said.plan["route"] == plan["route"]
    assert said.plan["split"] == plan.get("split", 0)
    assert said.gist == expected(QUESTION, sampling, 12, pair()[plan["route"] != "local"])
