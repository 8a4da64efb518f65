"""Early data of the real programs on a link that loses packets. Every case, without a link: test_early_cases.py."""

from __future__ import annotations

from pathlib import Path

import pytest

from split_model.sampling import Sampling
from support.netem import Agent, Ends, Link, Said, expected

pytestmark = pytest.mark.whole_netem
QUESTION, PLAN, PORT = "Where can I eat at night?", {"route": "cloud"}, 4500
LONG = "the table for bo at el "  # 12 bytes on the wire


def ask(agent: Agent, question: str = QUESTION) -> Said:
    """Its first request; the answer is checked."""
    said = agent.ask(question, PLAN)
    assert said.gist == expected(question, Sampling(), 12)
    return said


@pytest.fixture(autouse=True)
def lossy(link: Link) -> None:
    link.use("lte_lossy")


@pytest.mark.parametrize("retry", [(), ("--retry-above", 0)], ids=["at once", "with a Retry"])
def test_a_phone_that_was_here_sends_its_request_early(retry: tuple[object, ...], ends: Ends, tmp_path: Path) -> None:
    with ends.cloud(*retry, port=PORT):
        with ends.agent(tmp_path, port=PORT) as agent:
            assert not ask(agent).plan["early_data"]
        with ends.agent(tmp_path, port=PORT) as agent:
            assert ask(agent).plan["transport"] in ("quic", "grpc")  # a lost flight loses the race


def test_a_restarted_server_answers_a_request_that_came_early(ends: Ends, tmp_path: Path) -> None:
    with ends.cloud(port=PORT), ends.agent(tmp_path, port=PORT) as agent:
        ask(agent)
    with ends.cloud(port=PORT), ends.agent(tmp_path, port=PORT) as agent:
        assert not ask(agent).plan["early_data"]


def test_the_server_is_restarted_under_a_running_agent(ends: Ends, tmp_path: Path) -> None:
    with ends.cloud(port=PORT) as first, ends.agent(tmp_path, port=PORT) as agent:
        ask(agent)
        first.end()
        with ends.cloud(port=PORT):
            ask(agent)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("kilobytes", [8, 40])
def test_a_long_request_with_a_ticket(kilobytes: int, ends: Ends, tmp_path: Path) -> None:
    question = LONG * (kilobytes * 1000 // 12)
    with ends.cloud(port=PORT):
        with ends.agent(tmp_path, port=PORT) as agent:
            ask(agent)
        with ends.agent(tmp_path, port=PORT) as agent:
            said = ask(agent, question)
            assert said.plan["bytes_up"] > 900 * kilobytes
