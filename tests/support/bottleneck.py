"""Connected pairs that share one bottleneck, in virtual time."""

from __future__ import annotations

import heapq
import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from aioquic.quic.events import StreamDataReceived

from protocol.transport.quic_connection import MendedConnection
from support.quic_pair import CLIENT, SERVER, Pair, drained

LATE = 0.001  # seconds that a sender's timers are late, at most: else flows would meet in step
TICK = 1e-6  # seconds: aioquic's timer may be due without anything to do at that very moment


class Bottleneck:
    """Carries what phones send (or, `down`, servers) at `rate` bytes/s in all behind a queue of `room` bytes, losing
    some; `delay` seconds each way. The other direction has the delay alone. Readers take all that arrives."""

    def __init__(
        self,
        *pairs: Pair,
        rate: float,
        delay: float = 0.035,
        room: float = 1e9,
        loss: float = 0.0,
        seed: int = 1,
        down: bool = False,
    ):
        ends = [(pair.server, pair.client) if down else (pair.client, pair.server) for pair in pairs]
        self._flows = [(sender, reader) for sender, reader in ends if sender and reader]
        self.rate, self.delay, self.room, self.loss = rate, delay, room, loss
        self.now = max(pair.now for pair in pairs)
        self.taken = [0 for _ in pairs]  # bytes of stream 0
        self.waits: list[float] = []  # seconds in the queue, of every datagram
        self._dark = False
        self._free_at = self.now
        self._left = [self.now for _ in pairs]
        self._random = random.Random(seed)
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()

    def _later(self, at: float, what: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at, next(self._order), what))

    def _move(self) -> None:
        for number, (sender, reader) in enumerate(self._flows):
            for data, _ in sender.datagrams_to_send(now=self.now):
                self._left[number] = max(self._left[number], self.now + self._random.uniform(0, LATE))
                self._later(self._left[number], lambda number=number, data=data: self._queue(number, data))  # type: ignore[misc]
            for data, _ in reader.datagrams_to_send(now=self.now):
                self._later(self.now + self.delay, lambda sender=sender, data=data: self._arrive(sender, data))  # type: ignore[misc]

    def _queue(self, number: int, data: bytes) -> None:
        wait = max(self._free_at - self.now, 0.0)
        if self._random.random() < self.loss or wait * self.rate > self.room:
            return
        self.waits.append(wait)
        self._free_at = self.now + wait + len(data) / self.rate
        self._later(self._free_at + self.delay, lambda: self._read(number, data))

    def _read(self, number: int, data: bytes) -> None:
        reader = self._flows[number][1]
        self._arrive(reader, data)
        self.taken[number] += sum(len(e.data) for e in drained(reader) if isinstance(e, StreamDataReceived))
        reader.taken(0, self.taken[number])

    def _arrive(self, end: MendedConnection, data: bytes) -> None:
        if not self._dark:
            end.receive_datagram(data, SERVER if end.configuration.is_client else CLIENT, now=self.now)

    def run(self, seconds: float, until: Callable[[], object] = lambda: False) -> float:
        """Tells how long it took for `until` to come true, `seconds` if it did not."""
        begin = self.now
        ends = [end for flow in self._flows for end in flow]
        while not until():
            self._move()
            timers = [at for end in ends if (at := end.get_timer()) is not None]
            at = min([*timers, self._events[0][0] if self._events else begin + seconds])
            if at >= begin + seconds:
                self.now = begin + seconds
                return seconds
            self.now = max(self.now + TICK, at)
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()
            for end in ends:
                if (timer := end.get_timer()) is not None and timer <= self.now:
                    end.handle_timer(now=self.now)
        return self.now - begin

    def rates(self, seconds: float) -> list[float]:
        """What each flow's reader takes from now on, in bytes/s."""
        before = list(self.taken)
        self.run(seconds)
        return [(now - then) / seconds for now, then in zip(self.taken, before, strict=True)]

    @contextmanager
    def dark(self) -> Iterator[None]:
        """Nothing arrives within."""
        self._dark = True
        try:
            yield
        finally:
            self._dark = False
