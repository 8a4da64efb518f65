"""Which network leads to a replica, and what is known of each: whether it lets UDP through."""

from __future__ import annotations

import asyncio
import ipaddress
import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass

from edge_agent.conditions import interface
from protocol.transport.base import Address, Way

BLOCKED_S, BLOCKED_MOST_S = 300.0, 86_400.0  # a network without UDP is tried again after, first and at most
NETWORKS = 32  # remembered of one replica


class Toward:
    """The network that leads to one address; its name is looked up once, since its route says enough afterwards."""

    def __init__(self, address: Address):
        self._address = address
        self._there: tuple[int, object] | None = None

    async def name(self) -> str:
        """The interface and the prefix that this machine sends from, empty where there is no route."""
        if self._there is None:
            try:
                found = await asyncio.get_running_loop().getaddrinfo(
                    self._address.host, self._address.port, type=socket.SOCK_DGRAM
                )
            except OSError:
                return ""
            self._there = found[0][0], found[0][4]
        way = Way.now(*self._there)
        return "" if way is None else f"{interface(way.here)} {prefix(way.here)}"


def prefix(address: str) -> str:
    """/24 or /64, so that a new address from the same network makes no new network."""
    plain = ipaddress.ip_address(address.partition("%")[0])
    return str(ipaddress.ip_network((plain, 24 if plain.version == 4 else 64), strict=False))


@dataclass(slots=True)
class Block:
    """`until` by the clock; `span_s` is how long it was thought blocked at the latest."""

    until: float
    span_s: float


class UdpMemory:
    """The networks on which one replica was not reached over UDP: for 5 minutes, then twice as long, to a day.

    After a day without a block it begins anew.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._blocks: dict[str, Block] = {}  # by network, the latest news last
        self.on_change: Callable[[], None] = lambda: None

    def blocked(self, network: str) -> bool:
        block = self._blocks.get(network)
        return block is not None and block.until > self._clock()

    def block(self, network: str) -> None:
        """UDP got no answer where TCP did."""
        if self.blocked(network):
            return
        now, before = self._clock(), self._blocks.pop(network, None)
        again = before is not None and now - before.until < BLOCKED_MOST_S
        span_s = min(2 * before.span_s, BLOCKED_MOST_S) if before and again else BLOCKED_S
        self._blocks[network] = Block(now + span_s, span_s)
        if len(self._blocks) > NETWORKS:
            del self._blocks[next(iter(self._blocks))]
        self.on_change()

    def passes(self, network: str) -> None:
        """A handshake got through. That is not much: if nothing else does, the next block is twice as long."""
        if self.blocked(network):
            self._blocks[network].until = self._clock()
            self.on_change()

    def kept(self) -> dict[str, object]:
        """For the disk: by the wall clock, since the other one starts anew with the machine."""
        to_wall = time.time() - self._clock()
        return {name: [block.until + to_wall, block.span_s] for name, block in self._blocks.items()}

    def read(self, kept: object) -> None:
        """Takes back what was kept; no block lasts longer than it was meant to, whatever became of the wall clock."""
        now = time.time()
        for name, values in list(kept.items())[-NETWORKS:] if isinstance(kept, dict) else ():
            if isinstance(values, list) and len(values) == 2 and all(map(_sound, values)):
                span_s = min(max(values[1], BLOCKED_S), BLOCKED_MOST_S)
                self._blocks[name] = Block(self._clock() + min(values[0] - now, span_s), span_s)


def _sound(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
