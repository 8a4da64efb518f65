"""Two connections to one replica: gRPC beside a QUIC connection that is in doubt, and what becomes of each."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from edge_agent.dial import Dialler
from protocol.errors import LinkLost
from protocol.transport.base import Address, Connection, ServerChannel
from protocol.transport.memory import MemoryConnection
from support.edge import always

pytestmark = pytest.mark.anyio
HERE = Address("here", 1)


async def nothing(channel: ServerChannel) -> None:
    await channel.handshake()


class Named(MemoryConnection):
    """Says which transport it stands for, and where it is."""

    def __init__(self, transport: str = "quic", moves: bool = True):
        super().__init__(nothing)
        self.transport = transport
        self.astray = False
        self.moves, self.moved = moves, 0

    def displaced(self) -> bool:
        return self.astray

    async def move(self) -> bool:
        self.moved += 1
        self.astray = self.astray and not self.moves
        return self.moves


def dialler(quic: Connection | None, grpc: Callable[[Address], Awaitable[Connection]] | None) -> Dialler:
    async def refuse(address: Address) -> Connection:
        raise LinkLost("nobody listens")

    clock = asyncio.get_running_loop().time
    return Dialler(HERE, refuse if quic is None else always(quic), grpc, lambda _: None, lambda _: None, clock)


async def hang(address: Address) -> Connection:
    await asyncio.Event().wait()
    raise AssertionError


async def test_grpc_beside_quic_is_dialled_once_for_all_and_closed_at_the_end() -> None:
    dialled = 0

    async def grpc(address: Address) -> Connection:
        nonlocal dialled
        dialled += 1
        await asyncio.sleep(0)
        return Named("grpc")

    quic = Named()
    dial = dialler(quic, grpc)
    assert await dial.connect(60) is quic
    found = await asyncio.gather(*(dial.connect_grpc(60) for _ in range(5)))
    assert len(set(found)) == dialled == 1
    assert await dial.connect_grpc(60) is found[0]
    assert await dial.connect(60) is quic
    await found[0].aclose()
    other = await dial.connect_grpc(60)
    assert other is not found[0]
    await dial.aclose()
    assert quic.closed
    assert other.closed


async def test_grpc_that_does_not_come_in_time_is_a_lost_link_and_goes_on_for_others() -> None:
    gate = asyncio.Event()

    async def slow(address: Address) -> Connection:
        await gate.wait()
        return Named("grpc")

    dial = dialler(Named(), slow)
    with pytest.raises(LinkLost, match="no gRPC to here:1 within"):
        await dial.connect_grpc(0.0)
    gate.set()
    assert (await dial.connect_grpc(60)).transport == "grpc"
    await dial.aclose()


async def test_without_grpc_there_is_none_beside() -> None:
    dial = dialler(Named(), None)
    with pytest.raises(LinkLost, match="no gRPC"):
        await dial.connect_grpc(60)
    await dial.aclose()


async def test_a_dial_beside_that_is_under_way_ends_with_the_rest() -> None:
    dial = dialler(Named(), hang)
    waiting = asyncio.create_task(dial.connect_grpc(60))
    await asyncio.sleep(0)
    await dial.aclose()
    with pytest.raises((LinkLost, asyncio.CancelledError)):
        await waiting


async def test_a_refusal_over_udp_starts_grpc_at_once_and_is_remembered() -> None:
    """What a firewall that answers with ICMP looks like."""
    grpc = Named("grpc")
    dial = dialler(None, always(grpc))
    async with asyncio.timeout(20):
        assert await dial.connect(60) is grpc
    assert dial.udp_blocked
    await dial.aclose()


async def test_quic_follows_the_machine_and_grpc_is_closed() -> None:
    quic, grpc = Named(), Named("grpc", moves=False)
    dial = dialler(quic, always(grpc))
    await dial.connect(60)
    await dial.connect_grpc(60)
    await dial.follow()
    assert quic.moved == grpc.moved == 0
    quic.astray = grpc.astray = True
    await dial.follow()
    assert quic.moved == 1
    assert not quic.closed
    assert grpc.closed
    assert dial.second is None
    await dial.aclose()


async def test_quic_does_not_follow_to_where_udp_is_known_to_be_blocked() -> None:
    quic, grpc = Named(), Named("grpc")
    dial = dialler(quic, always(grpc))
    await dial.connect(60)
    dial.udp.block(dial.network)
    quic.astray = True
    await dial.follow()
    assert quic.closed
    assert await dial.connect(60) is grpc
    await dial.aclose()


async def test_a_session_that_lost_a_connection_may_dial_while_it_is_closed() -> None:
    class Slow(Named):
        async def aclose(self) -> None:
            await super().aclose()
            lost.set()
            await gate.wait()

    lost, gate, other = asyncio.Event(), asyncio.Event(), Named()
    dial = dialler(Slow(), None)
    first = await dial.connect(60)
    dial._quic = always(other)
    dropping = asyncio.create_task(dial.drop(first))
    await lost.wait()
    again = asyncio.create_task(dial.connect(60))
    await asyncio.sleep(0)
    gate.set()
    await dropping
    assert await again is other
    await dial.aclose()
