"""The watch over the replicas: what is lost is looked for, and no harder than need be."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

import edge_agent.dial
import edge_agent.link
from edge_agent.conditions import Network
from edge_agent.link import Link
from edge_agent.replicas import Links
from edge_agent.state import State
from protocol.errors import LinkLost
from protocol.transport.base import Address, Connection, ServerChannel
from protocol.transport.memory import MemoryConnection
from support.edge import always
from support.eventually import eventually

pytestmark = pytest.mark.anyio
HERE = Address("here", 1)


async def nothing(channel: ServerChannel) -> None:
    await channel.handshake()


class Blackholed(MemoryConnection):
    """Has a ticket, so that it is offered at once, and never completes its handshake."""

    transport = "quic"
    ticket_age_s = 1.0

    def __init__(self) -> None:
        super().__init__(nothing)

    async def handshake(self) -> None:
        await asyncio.Event().wait()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_agent.link, "FIRST_BACKOFF_S", 0.02)
    monkeypatch.setattr(edge_agent.dial, "SPEAK_WITHIN", 0.0)
    for module in (edge_agent.dial, edge_agent.link):
        monkeypatch.setattr(module, "RACE_LIMIT", 0.05)


@asynccontextmanager
async def watched(state: Path, *links: Link, kind: Callable[[str], Network] | None = None) -> AsyncIterator[Links]:
    made = Links(links, State(state), kind)
    made.start()
    try:
        yield made
    finally:
        await made.aclose()


async def test_a_replica_that_takes_early_data_and_says_nothing_is_dialled_once_a_backoff(tmp_path: Path) -> None:
    dialled: list[Connection] = []

    async def dial(address: Address) -> Connection:
        dialled.append(Blackholed())
        return dialled[-1]

    link = Link(HERE, dial)
    probes, probe = 0, link.probe

    async def counted() -> None:
        nonlocal probes
        probes += 1
        await probe()

    link.probe = counted  # type: ignore[method-assign]
    async with watched(tmp_path, link):
        await eventually(lambda: len(dialled) >= 3)
        assert probes <= len(dialled)
        assert link.unreachable == "no answer within 0.05 s"


async def test_a_replica_that_was_lost_while_a_connection_is_open_is_found_again(tmp_path: Path) -> None:
    connection = MemoryConnection(nothing)
    link = Link(HERE, always(connection))
    async with watched(tmp_path, link) as links:
        await eventually(lambda: link.dialler.warm)
        link.lost("the session ended")
        links.wake()
        await eventually(lambda: link.unreachable is None)
        assert link.dialler.connection is connection


async def test_an_open_connection_that_does_not_answer_a_probe_is_replaced(tmp_path: Path) -> None:
    """gRPC's own channel may be connecting again, for ever."""
    dead, good = MemoryConnection(nothing), MemoryConnection(nothing)
    waiting = [dead, good]

    async def dial(address: Address) -> Connection:
        return waiting.pop(0)

    link = Link(HERE, dial)
    async with watched(tmp_path, link) as links:
        await eventually(lambda: link.dialler.warm)
        dead.handshake = asyncio.Event().wait  # type: ignore[method-assign, assignment]
        link.lost("silent")
        links.wake()
        await eventually(lambda: link.unreachable is None)
        assert dead.closed
        assert link.dialler.connection is good


async def test_a_probe_that_breaks_is_not_made_again_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    probes = 0

    async def broken() -> None:
        nonlocal probes
        probes += 1
        raise RuntimeError

    link = Link(HERE, always(MemoryConnection(nothing)))
    link.probe = broken  # type: ignore[method-assign]
    async with watched(tmp_path, link):
        await eventually(lambda: link.unreachable)
        assert link.unreachable == "RuntimeError"
        assert link.retry_at > 0
    assert probes == caplog.text.count("a probe broke") >= 1


async def test_the_kind_of_network_is_asked_of_all_at_once_and_again_with_each_connection(tmp_path: Path) -> None:
    both, asked = threading.Barrier(2, timeout=20), []

    def kind(host: str) -> Network:
        asked.append(host)
        if len(asked) <= 2:
            both.wait()  # neither is asked after the other
        return Network.WIFI if asked.count(host) == 1 else Network.CELLULAR

    async def refuse(address: Address) -> Connection:
        raise LinkLost("no")

    moving, other = Link(Address("a", 1), always(MemoryConnection(nothing))), Link(Address("b", 1), refuse)
    moving.kind = other.kind = Network.WIRED
    async with watched(tmp_path, moving, other, kind=kind):
        await eventually(lambda: other.kind is Network.WIFI)
        await eventually(lambda: moving.kind is Network.CELLULAR)
    assert "b" not in asked[2:]
