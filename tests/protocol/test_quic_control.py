"""Delivery rate and round trip as a simulated path has them."""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable

import pytest
from aioquic.quic.congestion.base import create_congestion_control
from aioquic.quic.congestion.cubic import CubicCongestionControl
from aioquic.quic.packet import QuicPacketType
from aioquic.quic.packet_builder import QuicSentPacket
from aioquic.tls import Epoch

from protocol.transport.base import ServerTls, Trust
from protocol.transport.quic_connection import MendedConnection
from protocol.transport.quic_control import NAME, MeasuredCubic
from support.quic_pair import CLIENT, SERVER, Pair, phone


class Path:
    """Moves datagrams between a connected pair at `rate` bytes/s upwards, `delay` seconds each way."""

    def __init__(self, pair: Pair, rate: float, delay: float):
        assert pair.server
        self.pair, self.server, self.rate, self.delay = pair, pair.server, rate, delay
        self.free_at = pair.now
        self.events: list[tuple[float, int, Callable[[], None]]] = []
        self.order = itertools.count()

    def _later(self, at: float, what: Callable[[], None]) -> None:
        heapq.heappush(self.events, (at, next(self.order), what))

    def _move(self) -> None:
        now = self.pair.now
        for data, _ in self.pair.client.datagrams_to_send(now=now):
            self.free_at = max(self.free_at, now) + len(data) / self.rate
            self._later(self.free_at + self.delay, lambda data=data: self._arrive(self.server, data))  # type: ignore[misc]
        for data, _ in self.server.datagrams_to_send(now=now):
            self._later(now + self.delay, lambda data=data: self._arrive(self.pair.client, data))  # type: ignore[misc]

    def _arrive(self, end: MendedConnection, data: bytes) -> None:
        end.receive_datagram(data, CLIENT if end is self.server else SERVER, now=self.pair.now)

    def run(self, seconds: float) -> None:
        until = self.pair.now + seconds
        while True:
            self._move()
            timers = [at for end in (self.pair.client, self.server) if (at := end.get_timer()) is not None]
            at = min([*timers, self.events[0][0] if self.events else until])
            if at >= until:
                return
            self.pair.now = max(self.pair.now, at)
            while self.events and self.events[0][0] <= self.pair.now:
                heapq.heappop(self.events)[2]()
            for end in (self.pair.client, self.server):
                if (timer := end.get_timer()) is not None and timer <= self.pair.now:
                    end.handle_timer(now=self.pair.now)


@pytest.fixture
def pair(trust: Trust, tls: ServerTls) -> Pair:
    pair = Pair(phone(trust), tls)
    pair.start()
    pair.settle()
    return pair


@pytest.mark.parametrize("rate", [50_000, 200_000, 1_000_000])
def test_a_long_transfer_measures_the_path(pair: Pair, rate: int) -> None:
    pair.client.send_stream_data(0, bytes(min(2 * rate, 2_000_000)))
    Path(pair, rate, 0.04).run(1.5)
    control = pair.client.control
    assert control.delivery_rate == pytest.approx(rate, rel=0.1)
    assert control.min_rtt_s is not None
    assert control.min_rtt_s == pytest.approx(0.08, rel=0.4)


def test_a_flow_with_little_to_say_measures_no_rate(pair: Pair) -> None:
    path = Path(pair, 1_000_000, 0.04)
    for _ in range(30):
        pair.client.send_stream_data(0, bytes(300))
        path.run(0.1)
    assert pair.client.control.delivery_rate is None
    assert pair.client.control.rtt_s == pytest.approx(0.08, rel=0.2)


def test_a_rate_outlives_what_was_measured_by_a_busy_flow(pair: Pair) -> None:
    path = Path(pair, 200_000, 0.04)
    pair.client.send_stream_data(0, bytes(300_000))
    path.run(2)
    busy = pair.client.control.delivery_rate
    for _ in range(20):
        pair.client.send_stream_data(0, bytes(300))
        path.run(0.1)
    assert pair.client.control.delivery_rate == busy


def test_a_path_that_slows_down_is_noticed(pair: Pair) -> None:
    path = Path(pair, 400_000, 0.02)
    pair.client.send_stream_data(0, bytes(1_200_000))
    path.run(2)
    path.rate = 100_000
    path.run(4)
    assert pair.client.control.delivery_rate == pytest.approx(100_000, rel=0.15)


def packet(number: int, at: float) -> QuicSentPacket:
    return QuicSentPacket(Epoch.ONE_RTT, True, True, False, number, QuicPacketType.ONE_RTT, at, 1200)


def test_it_is_cubic_in_all_it_does() -> None:
    """The same packets, acks and losses leave both with the same window."""
    ours, plain = create_congestion_control(NAME, max_datagram_size=1200), CubicCongestionControl(1200)
    assert isinstance(ours, MeasuredCubic)
    now = 1.0
    for number in range(400):
        sent = packet(number, now)
        now += 0.01
        for control in (ours, plain):
            control.on_packet_sent(packet=sent)
            if number % 50 == 49:
                control.on_packets_lost(now=now, packets=iter([sent]))
            elif number % 50 == 48:
                control.on_packets_expired(packets=iter([sent]))
            else:
                control.on_packet_acked(now=now, packet=sent)
                control.on_rtt_measurement(now=now, rtt=0.01)
        assert (ours.congestion_window, ours.bytes_in_flight) == (plain.congestion_window, plain.bytes_in_flight)
    assert not ours._departures
