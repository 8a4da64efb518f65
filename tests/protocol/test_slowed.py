"""Refusals: a prefix has some at once, further ones wait."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.types import Message, Receive, Scope, Send

from protocol.http_gate import Slowed
from protocol.prefixes import PLACES, REFUSALS_AT_ONCE, REFUSALS_PER_S, SLOWEST_S, Pace
from support.clock import Clock


async def app(scope: Scope, receive: Receive, send: Send) -> None:
    await send({"type": "http.response.start", "status": int(scope["path"]), "headers": []})


@pytest.fixture
def time() -> Clock:
    return Clock()


@pytest.fixture
def pace(time: Clock) -> Pace:
    return Pace(time)


def test_some_refusals_come_at_once_and_more_of_them_wait(pace: Pace, time: Clock) -> None:
    waits = [pace.wait_s("a") for _ in range(REFUSALS_AT_ONCE + 2)]
    assert waits[:REFUSALS_AT_ONCE] == pytest.approx([0.0] * REFUSALS_AT_ONCE, abs=1e-6)
    assert waits[REFUSALS_AT_ONCE:] == pytest.approx([1 / REFUSALS_PER_S, 2 / REFUSALS_PER_S])
    assert pace.wait_s("b") == 0.0
    time.now += 1.0
    assert pace.wait_s("a") == 0.0  # ten more by now


def test_no_refusal_waits_for_long_and_nothing_piles_up(pace: Pace, time: Clock) -> None:
    assert max(pace.wait_s("a") for _ in range(10_000)) == SLOWEST_S
    time.now += SLOWEST_S + REFUSALS_AT_ONCE / REFUSALS_PER_S
    assert [pace.wait_s("a") for _ in range(REFUSALS_AT_ONCE)] == pytest.approx([0.0] * REFUSALS_AT_ONCE, abs=1e-6)
    for place in range(2 * PLACES):
        pace.wait_s(str(place))
    assert len(pace._paid) == PLACES


@pytest.mark.anyio
@pytest.mark.parametrize(("status", "slow"), [(200, False), (400, False), (429, False), (401, True), (413, True)])
async def test_only_refusals_of_strangers_wait(pace: Pace, status: int, slow: bool) -> None:
    for _ in range(REFUSALS_AT_ONCE):
        pace.wait_s("192.0.2.0/24")
    sent: list[Message] = []
    scope: dict[str, Any] = {"type": "http", "path": str(status), "client": ("192.0.2.7", 1)}

    async def receive() -> Message:
        raise AssertionError

    async def send(message: Message) -> None:
        sent.append(message)

    answering = asyncio.create_task(Slowed(app, pace)(scope, receive, send))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert bool(sent) is not slow
    await answering
    assert [message["status"] for message in sent] == [status]
