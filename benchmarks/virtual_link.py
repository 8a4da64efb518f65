"""A clock of events, and a link in its time: rate, delay, jitter, loss and what mends it, and a window that opens.

Written for benchmarks/selector.py, apart from the formulas of edge_agent/cost.py, which it is to test.
"""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import netlab  # noqa: F401 - it makes deploy/netem importable
from profiles import Profile

PAYLOAD, AROUND = 1200, 65  # bytes of a packet that carry frames, and headers around them
FRAME_S = 0.0005  # to send or to take a frame, in Python: half of what a frame there and back took over loopback
ACK_S = 0.025  # that an acknowledgement may wait (RFC 9002's max_ack_delay)
REORDER = 9 / 8  # round trips after which a packet counts as lost once a later one was acknowledged (RFC 9002, 6.1.2)
LIMIT_S = 600.0
FIRST_WINDOW = 10 * PAYLOAD


class Clock:
    """Virtual seconds."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._number = count()

    def at(self, time: float, then: Callable[[], None]) -> None:
        heapq.heappush(self._events, (max(time, self.now), next(self._number), then))

    def run(self, done: Callable[[], bool]) -> None:
        """Until it is done. Raises RuntimeError when it never is."""
        while not done():
            if not self._events or self.now > LIMIT_S:
                raise RuntimeError(f"the answer is not complete after {self.now:.3f} s")
            self.now, _, then = heapq.heappop(self._events)
            then()


class Worker:
    """A machine that does one thing after the other."""

    def __init__(self, clock: Clock):
        self._clock, self._free = clock, 0.0

    def do(self, seconds: float, then: Callable[[], None]) -> None:
        self._free = max(self._free, self._clock.now) + seconds
        self._clock.at(self._free, then)

    @property
    def free_at(self) -> float:
        return max(self._free, self._clock.now)


@dataclass(slots=True)
class Losses:
    """Of packets, as netem draws them: independent, or in runs."""

    share: float
    burst: float
    order: random.Random
    _bad: bool = False

    def next(self) -> bool:
        if not self.share:
            return False
        if self.burst <= 1:
            return self.order.random() < self.share
        leave = 1 / self.burst
        enter = self.share * leave / (1 - self.share)
        self._bad = self.order.random() < (1 - leave if self._bad else enter)
        return self._bad


class Way:
    """One direction of a link: messages arrive whole and in order, as those of one stream do."""

    def __init__(self, clock: Clock, profile: Profile, up: bool, order: random.Random, cold: bool = False):
        self._clock, self._order = clock, order
        self._rate = (profile.up_mbit if up else profile.down_mbit) * 1e6 / 8
        self._rtt, self._jitter = profile.rtt_ms / 1e3, profile.jitter_ms / 2e3  # the jitter is both ways together
        self._losses = Losses(profile.loss / 100, profile.burst, order)
        content = 2 * self._rate * self._rtt
        self._window = FIRST_WINDOW if cold else max(FIRST_WINDOW, content)
        self._free = self._last = self._delivered = 0.0
        self.bytes = 0

    def send(self, size: int, then: Callable[[], None], next_s: float = math.inf) -> None:
        """`then` when all of it has come; `next_s`: seconds after which more is sent, and shows what was lost."""
        began, arrived = self._clock.now + FRAME_S, 0.0
        packets = max(1, math.ceil(size / PAYLOAD))
        self.bytes += size + packets * AROUND
        for number in range(packets):
            waits = self._rtt * int(math.log2(1 + number * PAYLOAD / self._window)) if self._rtt else 0.0
            piece = min(PAYLOAD, size - number * PAYLOAD) + AROUND
            follows_s = 0.0 if packets - number > 3 else next_s
            arrived = max(arrived, self._carry(began + waits, piece, follows_s))
        if packets * PAYLOAD > self._window:
            self._window = min(2 * self._window, max(self._window, 2 * self._rate * self._rtt))
        self._delivered = max(self._delivered, arrived)
        self._clock.at(self._delivered + FRAME_S, then)

    def _carry(self, start: float, piece: int, follows_s: float, tries: int = 0) -> float:
        """When one packet arrives, however often it must be sent."""
        left = start + piece / self._rate
        if not tries:
            self._free = left = max(self._free, start) + piece / self._rate
        if all(self._losses.next() for _ in range(2 if tries else 1)):  # an alarm sends two packets (RFC 9002, 6.2.4)
            alarm = (self._rtt + max(4 * self._jitter / 2, 0.001) + ACK_S) * 2 ** min(tries, 4)
            noticed = min(alarm, max(REORDER * self._rtt, self._rtt + follows_s))
            return self._carry(left + noticed, piece, math.inf, tries + 1)
        arrives = left + self._rtt / 2 + self._order.uniform(-self._jitter, self._jitter)
        if not tries:  # netem keeps the order of what it does not lose
            self._last = arrives = max(arrives, self._last)
        return arrives
