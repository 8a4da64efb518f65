"""Bulk goes over QUIC, and over gRPC where that was measured to be twice as fast."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from edge_agent.bulk import BULK, LIFE_S, BulkRates
from edge_agent.link import Link
from protocol.errors import LinkLost
from protocol.transport.base import Address, ServerChannel
from protocol.transport.memory import MemoryConnection
from support.clock import Clock
from support.edge import always

USUAL = 1e6  # bytes/s


@pytest.fixture
def time() -> Clock:
    return Clock()


@pytest.fixture
def rates(time: Clock) -> BulkRates:
    return BulkRates(time)


def test_nothing_measured_means_quic(rates: BulkRates) -> None:
    assert not rates.prefers_grpc("here", USUAL)
    rates.sent("here", "grpc", BULK, 0.001)
    assert not rates.prefers_grpc("here", USUAL)


@pytest.mark.parametrize(("quic", "trial"), [(0.24, True), (0.26, False)])
def test_grpc_is_tried_where_quic_is_far_slower_than_usual(rates: BulkRates, quic: float, trial: bool) -> None:
    rates.sent("here", "quic", BULK, BULK / (quic * USUAL))
    assert rates.prefers_grpc("here", USUAL) is trial


@pytest.mark.parametrize(("times", "moves"), [(1.9, False), (2.1, True)])
def test_bulk_moves_where_grpc_was_twice_as_fast(rates: BulkRates, times: float, moves: bool) -> None:
    rates.sent("here", "quic", BULK, 1.0)
    rates.sent("here", "grpc", BULK, 1.0 / times)
    assert rates.prefers_grpc("here", USUAL) is moves
    assert not rates.prefers_grpc("elsewhere", USUAL)


def test_what_was_measured_is_believed_for_a_while(rates: BulkRates, time: Clock) -> None:
    rates.sent("here", "quic", BULK, 1.0)
    rates.sent("here", "grpc", BULK, 0.1)
    time.now += LIFE_S + 1
    assert not rates.prefers_grpc("here", USUAL)


def test_small_things_say_nothing_and_memory_is_bounded(rates: BulkRates) -> None:
    rates.sent("here", "quic", BULK - 1, 100.0)
    assert rates.rate("here", "quic") is None
    for network in range(1000):
        rates.sent(str(network), "quic", BULK, 1.0)
    assert len(rates._rates) <= 64


class Over(MemoryConnection):
    def __init__(self, transport: str):
        async def handler(channel: ServerChannel) -> None:
            await channel.receive()

        super().__init__(handler)
        self.transport = transport


@pytest.fixture
async def link() -> AsyncIterator[Link]:
    made = Link(Address("here", 1), always(Over("quic")), always(Over("grpc")))
    yield made
    await made.aclose()


@pytest.mark.anyio
async def test_a_throttled_link_s_bulk_goes_by_grpc_and_the_rest_by_quic(link: Link) -> None:
    quic = await link.connect(BULK)
    assert quic.transport == "quic"
    link.carried(quic, BULK, 2.0)
    assert (await link.connect(BULK)).transport == "grpc"
    assert (await link.connect(BULK - 1)).transport == "quic"
    assert (await link.connect()).transport == "quic"


@pytest.mark.anyio
async def test_bulk_stays_where_there_is_no_grpc(link: Link) -> None:
    async def nowhere(address: Address) -> MemoryConnection:
        raise LinkLost("no")

    link.dialler._grpc = nowhere
    link.carried(await link.connect(), BULK, 2.0)
    assert (await link.connect(BULK)).transport == "quic"
