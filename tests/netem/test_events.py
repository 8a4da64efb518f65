"""What happens to a network in the middle of an answer, or before it, changes nothing of the answer."""

from __future__ import annotations

from typing import Any

import pytest

from split_model.sampling import Sampling
from support.netem import Agent, Ends, Link, expected
from support.programs import Program

QUESTION = "Where can I eat at night?"
WHOLE = pytest.mark.whole_netem
EVENTS = (
    ("blackhole", "--seconds", "2"),
    ("rebind", "--every", "1", "--times", "5"),
    ("silent-rebind",),
    ("move",),
    ("block-udp",),
    ("block-udp", "--icmp"),
    ("throttle-udp", "256kbit"),
    ("mtu", "1280"),
)
HARMLESS = ("blackhole", "rebind", "silent-rebind", "move")  # after which an agent thinks no worse of UDP
FROM_THE_START = (
    ("block-udp",),
    ("block-udp", "--icmp"),
    ("block-udp", "--after", "5"),
    ("throttle-udp", "256kbit"),
    ("mtu", "1280"),
)
SPLIT = {"route": "split", "split": 3}, 48
CLOUD = {"route": "cloud"}, 600


def named(event: tuple[str, ...]) -> str:
    return " ".join(event)


@pytest.mark.parametrize(
    ("plan", "length"), [pytest.param(*SPLIT, id="split"), pytest.param(*CLOUD, id="cloud", marks=WHOLE)]
)
@pytest.mark.parametrize("event", EVENTS, ids=named)
def test_in_the_middle_of_an_answer(
    event: tuple[str, ...], plan: dict[str, Any], length: int, link: Link, request: pytest.FixtureRequest
) -> None:
    agent: Agent = request.getfixturevalue("steady_agent" if event[0] in HARMLESS else "agent")
    link.use("wifi")
    said = agent.ask(QUESTION, plan, max_tokens=length, on_first=lambda: link.event(*event))
    assert said.gist == expected(QUESTION, Sampling(), length)


@pytest.mark.parametrize(("plan", "length"), [SPLIT, pytest.param(*CLOUD, marks=WHOLE)], ids=["split", "cloud"])
@pytest.mark.parametrize(
    "event",
    [pytest.param(one, id=named(one), marks=[] if "--after" in one else WHOLE) for one in FROM_THE_START],
)
def test_before_the_agent_comes(
    event: tuple[str, ...], plan: dict[str, Any], length: int, link: Link, ends: Ends, cloud: Program, tmp_path: Any
) -> None:
    link.use("wifi")
    link.event(*event)
    with ends.agent(tmp_path) as agent:
        said = agent.ask(QUESTION, plan, max_tokens=length)
    assert said.gist == expected(QUESTION, Sampling(), length)
