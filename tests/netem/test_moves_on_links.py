"""A link that gets worse in the middle of an answer moves its rest to a better plan, and the text stays."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from split_model.sampling import Sampling
from support.netem import Ends, Link, expected

QUESTION = "Where can I eat at night?"
PORT = 4441
LAYER_MS = 24  # of the cloud; the phone takes well under 1 ms
LENGTH = 56


@pytest.fixture(scope="module")
def slow_cloud(link: Link, ends: Ends) -> Iterator[None]:
    with ends.cloud(port=PORT, layer_ms=LAYER_MS):
        yield


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.8, 0.95, 0, 7)], ids=["greedy", "seeded"])
@pytest.mark.parametrize(("before", "after"), [("wifi", "3g_lossy"), ("5g", "4g_slow")])
@pytest.mark.usefixtures("slow_cloud")
def test_a_split_gives_way_to_the_cloud(
    before: str, after: str, sampling: Sampling, link: Link, ends: Ends, tmp_path: Path
) -> None:
    """A quick phone, but for the last layer and the head, has a slow cloud: a split is best while that is near."""
    link.use(before)
    with ends.agent(tmp_path, "--edge-layers", 4, port=PORT) as agent:
        for plan in ({"route": "cloud"}, {"route": "split", "split": 4}):  # it learns how fast both are, and how far
            agent.ask(QUESTION, plan, max_tokens=24)
        said = agent.ask(QUESTION, {}, sampling, LENGTH, on_first=lambda: link.use(after))
    assert said.gist == expected(QUESTION, sampling, LENGTH)
    legs = said.plan["legs"]
    assert [leg["route"] for leg in legs[:2]] == ["split", "cloud"], said.plan
    assert (said.plan["moves"], said.plan["exact"]) == (len(legs) - 1, True)
    assert sum(leg["tokens"] for leg in legs) == said.tokens
    assert "moved to cloud (" in said.plan["reason"]
    assert "round trip" in said.plan["reason"]
