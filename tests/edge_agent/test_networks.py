"""What is remembered of networks without UDP, and for how long."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from edge_agent.link import Link
from edge_agent.networks import BLOCKED_MOST_S, BLOCKED_S, NETWORKS, UdpMemory, prefix
from edge_agent.replicas import Links
from edge_agent.state import State
from protocol.transport.base import Address, ServerChannel
from protocol.transport.memory import MemoryConnection
from support.clock import Clock
from support.edge import always

HERE = Address("here", 1)
WIFI, CELLULAR = "wlan0 192.168.1.0/24", "rmnet0 10.1.2.0/24"


async def nothing(channel: ServerChannel) -> None:
    await channel.handshake()


def test_one_network_says_nothing_of_another() -> None:
    udp = UdpMemory(Clock())
    udp.block(CELLULAR)
    assert udp.blocked(CELLULAR)
    assert not udp.blocked(WIFI)


def test_a_block_doubles_from_five_minutes_to_a_day_and_begins_anew_after_a_day_without() -> None:
    clock = Clock()
    udp, spans = UdpMemory(clock), []
    for _ in range(12):
        udp.block(WIFI)
        began = clock.now
        clock.now = udp._blocks[WIFI].until - 1
        assert udp.blocked(WIFI)
        udp.block(WIFI)  # while it lasts, this is no news
        clock.now += 1
        assert not udp.blocked(WIFI)
        spans.append(clock.now - began)
    assert spans[:4] == [BLOCKED_S, 2 * BLOCKED_S, 4 * BLOCKED_S, 8 * BLOCKED_S]
    assert spans[-2:] == [BLOCKED_MOST_S, BLOCKED_MOST_S]
    clock.now += BLOCKED_MOST_S
    udp.block(WIFI)
    assert udp._blocks[WIFI].span_s == BLOCKED_S


def test_a_handshake_that_passes_ends_a_block_and_is_not_enough_to_forget_it() -> None:
    """Some networks let a handshake through, and nothing after it."""
    clock = Clock()
    udp = UdpMemory(clock)
    udp.block(WIFI)
    udp.passes(WIFI)
    assert not udp.blocked(WIFI)
    udp.block(WIFI)
    clock.now += 1.5 * BLOCKED_S
    assert udp.blocked(WIFI)


def test_only_the_latest_networks_are_remembered() -> None:
    udp = UdpMemory(Clock())
    for number in range(NETWORKS + 5):
        udp.block(str(number))
    assert not udp.blocked("4")
    assert udp.blocked("5")
    assert len(udp.kept()) == NETWORKS


@pytest.mark.parametrize("boot", [5.0, 1e6])
def test_what_is_kept_means_the_same_after_a_restart(boot: float) -> None:
    before = UdpMemory(Clock())
    before.block(CELLULAR)
    clock = Clock(boot)
    after = UdpMemory(clock)
    after.read(json.loads(json.dumps(before.kept())))
    assert after.blocked(CELLULAR)
    clock.now += BLOCKED_S - 5
    assert after.blocked(CELLULAR)
    clock.now += 10
    assert not after.blocked(CELLULAR)


def test_a_wall_clock_that_was_set_back_makes_no_block_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    before = UdpMemory(Clock())
    before.block(CELLULAR)
    kept, now = before.kept(), time.time()
    monkeypatch.setattr(time, "time", lambda: now - 365 * 86_400)
    clock = Clock()
    after = UdpMemory(clock)
    after.read(kept)
    clock.now += BLOCKED_S + 1
    assert not after.blocked(CELLULAR)


@pytest.mark.parametrize(
    "kept",
    [None, 3, [], {"a": None}, {"a": [1]}, {"a": ["x", 1]}, {"a": [1, None]}, {"a": [float("nan"), 300]},
     {"a": [1e300, float("inf")]}, {str(n): [2e9, 1.0] for n in range(100)}],
)  # fmt: skip
def test_what_is_kept_badly_blocks_nothing_for_long(kept: object) -> None:
    clock = Clock()
    udp = UdpMemory(clock)
    udp.read(kept)
    assert len(udp.kept()) <= NETWORKS
    clock.now += BLOCKED_S + 1
    assert not any(udp.blocked(name) for name in ("a", "99"))


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("192.168.1.77", "192.168.1.0/24"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("fe80::1%wlan0", "fe80::/64"),
        ("127.0.0.1", "127.0.0.0/24"),
    ],
)
def test_addresses_of_one_network_have_one_name(address: str, named: str) -> None:
    assert prefix(address) == named


@pytest.mark.anyio
async def test_networks_are_known_at_the_next_start(tmp_path: Path) -> None:
    state = State(tmp_path)

    def start() -> Links:
        return Links([Link(HERE, always(MemoryConnection(nothing)))], state)

    first = start()
    first.links[0].dialler.udp.block(CELLULAR)  # kept at once: a phone's programs are killed, not ended
    (again,) = start().links
    again.dialler.network = CELLULAR
    assert again.dialler.udp_blocked
    again.dialler.network = WIFI
    assert not again.dialler.udp_blocked
    await first.aclose()
