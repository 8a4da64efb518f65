"""A phone that moves, as it looks from inside one QUIC connection: how long the gap is, and what it costs."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import pytest

from protocol.frames import Draft, Tokens
from protocol.limits import PING_AFTER
from protocol.transport.base import Address, ServerChannel
from protocol.transport.quic import QuicClientChannel, connect_quic, serve_quic
from protocol.transport.quic_client import ClientLink
from protocol.transport.quic_sessions import QuicServerChannel, ServerLink
from support.virtual import run
from support.virtual_network import Lane, Network, Weather
from support.virtual_world import tls

SLACK_S = 0.02  # for the ack delay and timers' grain
COUNT = 8  # messages of 250 kB


@dataclass
class Stream:
    """Numbered tokens that a server sends one by one, and when they came."""

    network: Network
    phone: ClientLink
    server: ServerLink
    at: list[float] = field(default_factory=list)

    async def read(self, channel: QuicClientChannel) -> None:
        while True:
            assert await channel.receive() == Tokens(len(self.at), (len(self.at),))
            self.at.append(self.network.now)

    async def gap(self, seconds: float) -> float:
        """The longest time without a token in the seconds to come."""
        begin = len(self.at) - 1
        await asyncio.sleep(seconds)
        return max(later - one for one, later in itertools.pairwise([*self.at[begin:], self.network.now]))


async def count(period_s: float, channel: ServerChannel) -> None:
    await channel.receive()
    number = 0
    while True:
        await channel.send(Tokens(number, (number,)))
        number += 1
        await asyncio.sleep(period_s)


@asynccontextmanager
async def streaming(weather: Weather, period_s: float, settle_s: float = 3.0) -> AsyncIterator[Stream]:
    network = Network(weather, weather)
    network.host("cloud-0")
    files, trust = tls()
    listener = await serve_quic("cloud-0", 4433, files, partial(count, period_s))
    phone = await connect_quic(Address("cloud-0", 4433), trust)
    channel = await phone.open()
    assert isinstance(channel, QuicClientChannel)
    await channel.send(Draft(0, (0,)))
    await phone.handshake()
    (server,) = listener._dispatcher.links
    network.proven = lambda where: any(p.addr == where and p.is_validated for p in server.quic._network_paths)
    stream = Stream(network, phone, server)
    reading = asyncio.create_task(stream.read(channel))
    await asyncio.sleep(settle_s)
    network.begin()
    stream.at[:] = stream.at[:1] * len(stream.at)
    try:
        yield stream
        assert not reading.done(), reading.exception()
        assert not network.beyond, network.beyond
    finally:
        reading.cancel()
        await phone.aclose()
        await listener.aclose()


def displace(phone: ClientLink) -> None:
    """As if the socket had been made on another network."""
    assert phone._port is not None
    phone._port.way = replace(phone._port.way, here="192.0.2.7")


@pytest.mark.parametrize(("rtt", "period"), [(0.02, 0.02), (0.07, 0.05), (0.3, 0.25), (0.84, 0.25)])
@pytest.mark.parametrize("elsewhere", [False, True])
def test_a_move_of_the_agents_own_costs_at_most_three_round_trips(rtt: float, period: float, elsewhere: bool) -> None:
    async def scene() -> float:
        async with streaming(Weather(delay_s=rtt / 2), period) as stream:
            if elsewhere:
                displace(stream.phone)
                assert stream.phone.displaced()
            watching = asyncio.create_task(stream.gap(2.0 + 4 * rtt))
            assert await stream.phone.move()
            assert not stream.phone.displaced()
            return await watching

    assert run(scene) <= period + 3 * rtt + SLACK_S


@pytest.mark.parametrize(("rtt", "period"), [(0.02, 0.02), (0.07, 0.05), (0.3, 0.25), (0.3, 1.0), (0.84, 1.0)])
def test_a_silent_rebinding_costs_at_most_a_ping_and_two_round_trips(rtt: float, period: float) -> None:
    async def scene() -> float:
        async with streaming(Weather(delay_s=rtt / 2), period) as stream:
            watching = asyncio.create_task(stream.gap(3.0 + 4 * rtt))
            stream.network.rebind()
            return await watching

    assert run(scene) <= max(period, PING_AFTER + 2 * rtt) + SLACK_S


@pytest.mark.parametrize(("rtt", "dark"), [(0.02, 2.0), (0.07, 0.5), (0.07, 2.0), (0.3, 4.0), (0.84, 2.0)])
def test_after_a_blackhole_the_stream_goes_on_within_two_round_trips_and_a_ping(rtt: float, dark: float) -> None:
    async def scene() -> float:
        weather = Weather(delay_s=rtt / 2, blackholes=((0.5, 0.5 + dark),))
        async with streaming(weather, 0.05) as stream:
            await asyncio.sleep(0.5 + dark + 2.0 + 4 * rtt)
            return min(at for at in stream.at if at > 0.5 + dark) - 0.5 - dark

    assert run(scene) <= PING_AFTER + 2 * rtt + SLACK_S


@pytest.mark.parametrize("loss", [0.0, 0.05])
def test_a_rebinding_every_second_loses_nothing_and_leaves_nothing(loss: float) -> None:
    async def scene() -> None:
        async with streaming(Weather(delay_s=0.035, lose=loss), 0.05) as stream:
            for _ in range(20):
                gap = await stream.gap(1.0)
                assert gap < 1.0
                stream.network.rebind()
            quic = stream.server.quic
            assert len(quic._network_paths) <= 8
            assert len(stream.server.cids) <= 10

    run(scene)


@pytest.mark.parametrize("loss", [0.0, 0.05])
def test_a_phone_that_moves_a_hundred_times_does_not_run_out_of_connection_ids(loss: float) -> None:
    async def scene() -> None:
        async with streaming(Weather(delay_s=0.01, lose=loss), 0.05) as stream:
            for turn in range(100):
                if turn % 10 == 0:
                    displace(stream.phone)
                assert await stream.phone.move()
                assert await stream.gap(0.2) < (1.0 if loss else 0.1)
            await asyncio.sleep(1.0)
            for quic in (stream.phone.quic, stream.server.quic):
                assert quic._peer_cid_available
                assert not quic._retire_connection_ids
                assert quic._peer_cid.sequence_number > 50
                assert len(quic._network_paths) <= 8
            assert len(stream.server.cids) <= 10

    run(scene)


def test_moves_into_the_dark_use_up_what_there_is_and_no_more() -> None:
    async def scene() -> None:
        async with streaming(Weather(blackholes=((0.0, 3.0),)), 0.05) as stream:
            for _ in range(30):
                assert await stream.phone.move()
                await asyncio.sleep(0.1)
            await asyncio.sleep(3.0)
            assert stream.at[-1] > 3.5
            assert await stream.phone.move()
            assert await stream.gap(1.0) < 0.3

    run(scene)


def test_another_network_is_measured_anew_and_a_mere_port_is_not() -> None:
    async def scene() -> None:
        async with streaming(Weather(delay_s=0.035), 0.05) as stream:
            await stream.phone.move()
            assert stream.phone.facts().rtt_s == pytest.approx(0.07, rel=0.1)
            stream.network.up = stream.network.down = Lane(Weather(delay_s=0.15), random.Random(0))
            displace(stream.phone)
            await stream.phone.move()
            await asyncio.sleep(2.0)
            assert stream.phone.facts().rtt_s == pytest.approx(0.3, rel=0.1)
            assert stream.phone.facts().min_rtt_s == pytest.approx(0.3, rel=0.1)
            assert stream.phone.quic._loss.bytes_in_flight >= 0

    run(scene)


@pytest.mark.parametrize("how", ["move", "elsewhere", "rebind"])
@pytest.mark.parametrize("loss", [0.0, 0.01])
def test_what_is_on_its_way_up_during_a_move_arrives(how: str, loss: float) -> None:
    """2 MB at 12 Mbit/s take 1.4 s; each of the moves may cost a slow start."""

    async def scene() -> float:
        weather = Weather(delay_s=0.035, rate=1.5e6, lose=loss, queue=175)
        network, taken = Network(weather, weather), 0
        network.host("cloud-0")
        network.begin()
        files, trust = tls()
        done = asyncio.Event()

        async def take(channel: ServerChannel) -> None:
            nonlocal taken
            assert isinstance(channel, QuicServerChannel)
            while True:
                assert await channel.take() == bytes([taken]) * 250_000
                taken += 1
                if taken == COUNT:
                    done.set()

        async def move() -> None:
            while True:
                await asyncio.sleep(0.7)
                if how == "rebind":
                    network.rebind()
                    continue
                if how == "elsewhere":
                    displace(phone)
                await phone.move()

        listener = await serve_quic("cloud-0", 4433, files, take)
        phone = await connect_quic(Address("cloud-0", 4433), trust)
        await phone.handshake()
        channel, began, moving = await phone.open(), network.now, asyncio.create_task(move())
        assert isinstance(channel, QuicClientChannel)
        for number in range(COUNT):
            await channel.put(bytes([number]) * 250_000)
        await done.wait()
        took: float = network.now - began
        moving.cancel()
        await phone.aclose()
        await listener.aclose()
        return took

    assert run(scene) < (4.0 if how == "elsewhere" else 2.5)
