"""What the control measures of a simulated path, and what it makes of it; aioquic's at both ends, in virtual time."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator

import pytest

import support.plain_control  # noqa: F401  # registers those controls
from protocol.limits import PING_AFTER
from protocol.transport.base import ServerTls, Trust
from protocol.transport.quic_bbr import NAME
from protocol.transport.quic_connection import MendedConnection
from support.bottleneck import Bottleneck
from support.quic_pair import Pair, phone

RATE, RTT = 500_000, 0.07  # bytes/s, seconds
CONTENT = RATE * RTT
PLENTY = 20_000_000
Pairs = Callable[..., Pair]


@pytest.fixture(autouse=True)
def steps() -> Iterator[None]:
    """Where a flow begins to probe is random."""
    state = random.getstate()
    random.seed(1)
    yield
    random.setstate(state)


@pytest.fixture
def connected(trust: Trust, tls: ServerTls) -> Pairs:
    def make(control: str = NAME) -> Pair:
        client = phone(trust, control=control)
        pair = Pair(client, tls, half_rtt=RTT / 2)
        pair.start()
        pair.settle()
        client.send_stream_data(0, b"")
        return pair

    return make


# measuring


@pytest.mark.parametrize("rate", [50_000, 200_000, 1_000_000])
def test_a_long_transfer_measures_the_path(connected: Pairs, rate: int) -> None:
    pair = connected()
    pair.client.send_stream_data(0, bytes(2 * rate))
    Bottleneck(pair, rate=rate, delay=0.04).run(1.5)
    control = pair.client.control
    assert control.delivery_rate == pytest.approx(rate, rel=0.1)
    assert control.min_rtt_s is not None
    assert control.min_rtt_s == pytest.approx(0.08, rel=0.4)


def test_a_flow_with_little_to_say_measures_no_rate(connected: Pairs) -> None:
    pair = connected()
    path = Bottleneck(pair, rate=1_000_000, delay=0.04)
    for _ in range(30):
        pair.client.send_stream_data(0, bytes(300))
        path.run(0.1)
    assert pair.client.control.delivery_rate is None
    assert pair.client.control.rtt_s == pytest.approx(0.08, rel=0.2)


def test_a_rate_outlives_what_was_measured_by_a_busy_flow(connected: Pairs) -> None:
    pair = connected()
    path = Bottleneck(pair, rate=200_000, delay=0.04)
    pair.client.send_stream_data(0, bytes(300_000))
    path.run(3)
    busy = pair.client.control.delivery_rate
    assert busy == pytest.approx(200_000, rel=0.15)
    for _ in range(20):
        pair.client.send_stream_data(0, bytes(300))
        path.run(0.1)
    assert pair.client.control.delivery_rate == busy


# one flow


def test_losses_do_not_slow_it(connected: Pairs) -> None:
    rates = {}
    for control in ("plain-cubic", "plain-reno", NAME):
        pair = connected(control)
        pair.client.send_stream_data(0, bytes(PLENTY))
        rates[control] = Bottleneck(pair, rate=RATE, room=2 * CONTENT, loss=0.02).rates(6)[0]
    assert rates[NAME] > 0.8 * RATE
    assert max(rates["plain-cubic"], rates["plain-reno"]) < 0.5 * RATE


@pytest.mark.parametrize("loss", [0.0, 0.01, 0.05])
def test_a_megabyte_takes_little_longer_than_it_must(connected: Pairs, loss: float) -> None:
    pair = connected()
    pair.client.send_stream_data(0, bytes(1_000_000))
    path = Bottleneck(pair, rate=1_500_000, room=6 * CONTENT, loss=loss)
    assert path.run(10, lambda: path.taken[0] == 1_000_000) < 1.4 * (1_000_000 / 1_500_000 + RTT)


def test_it_leaves_the_queue_empty(connected: Pairs) -> None:
    pair = connected()
    pair.client.send_stream_data(0, bytes(PLENTY))
    path = Bottleneck(pair, rate=RATE)
    path.run(2)
    assert max(path.waits) < 2.5 * RTT  # starting
    path.waits.clear()
    assert path.rates(3)[0] > 0.9 * RATE
    assert statistics.median(path.waits) < 0.2 * RTT
    assert max(path.waits) < RTT


def test_it_looks_for_the_round_trip_now_and_then(connected: Pairs) -> None:
    pair = connected()
    pair.client.send_stream_data(0, bytes(PLENTY))
    path = Bottleneck(pair, rate=100_000)
    path.run(3)
    path.delay *= 2
    path.run(14)
    assert pair.client.control.min_rtt_s == pytest.approx(2 * RTT, rel=0.3)
    assert path.rates(3)[0] > 0.85 * path.rate


@pytest.mark.parametrize("room", [0.25, 1, 4])
def test_it_follows_a_path_that_slows_down_and_recovers(connected: Pairs, room: float) -> None:
    pair = connected()
    pair.client.send_stream_data(0, bytes(PLENTY))
    path = Bottleneck(pair, rate=RATE, room=room * CONTENT)
    path.run(2)
    path.rate = RATE / 4
    path.run(4)
    path.waits.clear()
    assert path.rates(1)[0] > 0.85 * path.rate
    assert statistics.median(path.waits) < 2 * RTT
    assert pair.client.control.delivery_rate == pytest.approx(path.rate, rel=0.15)
    path.rate = RATE
    path.run(5)
    assert path.rates(1)[0] > 0.85 * path.rate


def test_it_gives_way_where_much_is_lost(connected: Pairs) -> None:
    """To a policer: nothing waits, and what is beyond the rate is lost."""
    pair = connected()
    pair.client.send_stream_data(0, bytes(PLENTY))
    path = Bottleneck(pair, rate=RATE, room=0.05 * CONTENT)
    path.run(3)
    before = pair.client.bytes_sent
    assert path.rates(3)[0] > 0.7 * RATE
    assert pair.client.bytes_sent - before < 1.15 * 3 * RATE


@pytest.mark.parametrize("down", [False, True], ids=["up", "down"])
@pytest.mark.parametrize("seconds", [0.5, 1.4, 2.0, 2.3])
def test_it_survives_a_blackhole(connected: Pairs, down: bool, seconds: float) -> None:
    """The phone asks for signs of life meanwhile. Then a round trip finds the path, and another tells what is lost."""
    pair = connected()
    sender = pair.server if down else pair.client
    assert sender
    if down:
        pair.client.send_stream_data(0, b"please")
    path = Bottleneck(pair, rate=RATE, loss=0.01, down=down)
    path.run(0.2)
    sender.send_stream_data(0, bytes(PLENTY))
    path.run(2)
    with path.dark():
        _ping(path, pair.client, seconds)
    _ping(path, pair.client, PING_AFTER + 4 * RTT)
    assert path.rates(1)[0] > 0.8 * RATE


def _ping(path: Bottleneck, client: MendedConnection, seconds: float) -> None:
    end = path.now + seconds
    while path.now < end:
        client.ask()
        path.run(min(PING_AFTER, end - path.now))


def test_a_start_that_loses_much_costs_no_connection(connected: Pairs) -> None:
    """A fast path without much of a queue loses every other packet of a round trip or two."""
    pair = connected()
    pair.client.send_stream_data(0, bytes(PLENTY))
    path = Bottleneck(pair, rate=8 * RATE, room=2 * CONTENT)
    assert pair.server
    stream, gaps = pair.server._streams, 0

    def look() -> bool:
        nonlocal gaps
        gaps = max(gaps, len(stream[0].receiver._ranges) if stream else 0)
        return pair.server is None or pair.server.ending is not None

    assert path.run(0.6, look) == 0.6
    assert gaps > 128


def test_a_request_does_not_wait_for_the_pacer(connected: Pairs) -> None:
    pair = connected()
    path = Bottleneck(pair, rate=1e9)
    pair.client.send_stream_data(0, bytes(11_000))
    assert path.run(1, lambda: path.taken[0] == 11_000) < 0.6 * RTT


# many flows


def shares(connected: Pairs, room: float, *controls: str) -> tuple[list[float], float]:
    """Bytes/s of each flow after the start, and the median wait in the queue, in round trips."""
    pairs = [connected(control) for control in controls]
    for pair in pairs:
        pair.client.send_stream_data(0, bytes(PLENTY))
    path = Bottleneck(*pairs, rate=RATE, room=room * CONTENT)
    path.run(2)
    path.waits.clear()
    return path.rates(6), statistics.median(path.waits) / RTT


@pytest.mark.parametrize("room", [0.5, 2])
def test_two_flows_share(connected: Pairs, room: float) -> None:
    rates, wait = shares(connected, room, NAME, NAME)
    assert max(rates) < 3 * min(rates)
    assert sum(rates) > 0.85 * RATE
    assert wait < 1.5


def test_it_shares_with_cubic(connected: Pairs) -> None:
    rates, wait = shares(connected, 2, NAME, "plain-cubic")
    assert max(rates) < 3 * min(rates)
    assert sum(rates) > 0.85 * RATE
    assert wait < 2


def test_a_flow_that_comes_later_gets_its_share(connected: Pairs) -> None:
    first, second = connected(), connected()
    path = Bottleneck(first, second, rate=RATE, room=2 * CONTENT)
    first.client.send_stream_data(0, bytes(PLENTY))
    path.run(3)
    second.client.send_stream_data(0, bytes(PLENTY))
    path.run(4)
    rates = path.rates(4)
    assert max(rates) < 3 * min(rates)


def test_books_are_kept_to_the_end(connected: Pairs) -> None:
    pair = connected()
    pair.client.send_stream_data(0, bytes(200_000))
    Bottleneck(pair, rate=RATE, loss=0.05).run(3)
    assert pair.client.control.bytes_in_flight == 0
    assert not pair.client.control._departures
