"""One attempt on the wire, seen from the phone: credit, silence, and what it counts."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

import pytest

import edge_agent.runs.session
import protocol.transport.base
from edge_agent.link import Link
from edge_agent.runs.session import Session, Silence
from edge_agent.traffic import PACKET_OVERHEAD
from protocol.errors import FaultCode, LinkLost, SessionFault
from protocol.frames import Admitted, Digests, Hidden, Load, Tokens
from protocol.limits import HIDDEN_CREDIT, TENSOR_CHUNK
from protocol.transport.base import Address, ServerChannel
from protocol.transport.memory import MemoryConnection
from support.edge import always
from support.eventually import eventually

pytestmark = pytest.mark.anyio
ADMITTED = Admitted(Digests(bytes(16), bytes(16), bytes(16)), True, 0, HIDDEN_CREDIT, False)
ALIVE = Load(1, 0, 1, 0.0, 1e9, 1e9, 0.0, HIDDEN_CREDIT, False)


def chunk(rows: int = TENSOR_CHUNK // 2) -> Hidden:
    return Hidden(0, rows, 1, bytes(2 * rows))


@asynccontextmanager
async def session(
    serve: Callable[[ServerChannel], Awaitable[None]], patience_s: float = 60.0
) -> AsyncIterator[Session]:
    connection = MemoryConnection(serve)
    made = Session(Link(Address("here", 1), always(connection)), connection, await connection.open(), patience_s)
    try:
        yield made
    finally:
        await made.aclose()
        await connection.aclose()


@pytest.fixture(autouse=True)
def no_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers that do not read do not notice that they are left."""
    monkeypatch.setattr(protocol.transport.base, "GRACE", 0.0)


async def stays(channel: ServerChannel) -> None:
    await asyncio.Event().wait()


async def send_all(made: Session) -> None:
    """More than fits on the way."""
    for _ in range(HIDDEN_CREDIT // TENSOR_CHUNK):
        await made.send(chunk())


async def test_sending_into_a_black_hole_is_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge_agent.runs.session, "SUSPICION_S", 0.0)

    async def serve(channel: ServerChannel) -> None:
        await channel.send(ADMITTED)
        await stays(channel)

    async with session(serve) as made:
        await eventually(lambda: made.admitted)
        with pytest.raises(Silence):
            await send_all(made)
        assert not made.connection.closed


async def test_a_server_that_lives_and_does_not_admit_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryConnection, "silent_s", lambda self: 0.0)
    monkeypatch.setattr(edge_agent.runs.session, "LOST_S", 0.1)
    async with session(stays) as made:
        with pytest.raises(LinkLost, match=r"here:1 did not admit the session within"):
            await made.next()
        assert made.connection.closed


async def test_any_frame_is_a_sign_of_life_while_sending() -> None:
    alive = asyncio.Event()

    async def serve(channel: ServerChannel) -> None:
        await channel.send(ADMITTED)
        await alive.wait()
        await channel.send(ALIVE)
        await stays(channel)

    async with session(serve) as made:
        await eventually(lambda: made.admitted)
        task = asyncio.create_task(send_all(made))
        await eventually(lambda: made._changed._waiters or made.fed)
        before = made.heard_s
        alive.set()
        await eventually(lambda: made.heard_s > before)
        assert not task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def test_a_session_begins_with_credit_and_sends_no_more() -> None:
    async with session(stays) as made:
        for _ in range(32):
            await made.send(chunk(1024))
        made.sent = HIDDEN_CREDIT
        waiting = asyncio.create_task(made.send(chunk(1)))
        await eventually(lambda: made._changed._waiters)
        assert made.channel.bytes_up < 32 * 2100
        waiting.cancel()
        await asyncio.gather(waiting, return_exceptions=True)


async def test_no_work_is_done_for_a_server_that_should_have_admitted_by_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(MemoryConnection, "silent_s", lambda self: 0.0)
    monkeypatch.setattr(edge_agent.runs.session, "LOST_S", 0.1)
    async with session(stays, patience_s=0.0) as made:
        with pytest.raises(LinkLost, match="did not admit"):
            await made.send(chunk(1))
        assert made.channel.bytes_up == 0


async def test_bytes_are_counted_with_the_packets_that_carry_them() -> None:
    async def serve(channel: ServerChannel) -> None:
        for frame in (ADMITTED, Tokens(5, (7,)), Tokens(6, (8,))):
            await channel.send(frame)
        await stays(channel)

    async with session(serve) as made:
        await made.next()
        await made.next()
        await made.send(chunk(1))
        await made.send(chunk(1000))
        assert made.bytes_down == made.channel.bytes_down + 3 * PACKET_OVERHEAD
        assert made.bytes_up == made.channel.bytes_up + (1 + 2) * PACKET_OVERHEAD


async def test_what_is_no_frame_is_the_server_s_fault() -> None:
    async def serve(channel: ServerChannel) -> None:
        await channel._down.put(b"\xff" * 9)  # type: ignore[attr-defined]
        await stays(channel)

    async with session(serve) as made:
        with pytest.raises(SessionFault, match="the server sent what is no frame") as fault:
            await made.next()
        assert fault.value.code is FaultCode.INTERNAL
