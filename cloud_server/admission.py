"""Who gets in: room for sessions, and each request id and attempt at most once."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

from cloud_server.rows import Row
from protocol.errors import FaultCode, SessionFault

REMEMBERED = 65_536  # request ids
REMEMBERED_S = 600.0  # far longer than a flight of early data can be accepted for


@dataclass(slots=True)
class Attempt:
    """The newest attempt at one request; `row` is set while it runs."""

    number: int
    seen: float
    row: Row | None = None


class RequestTable:
    """Attempts by (device, request id); the oldest finished ones are forgotten when the table is full."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._attempts: OrderedDict[tuple[str, bytes], Attempt] = OrderedDict()
        self._clock = clock

    def claim(self, device: str, request_id: bytes, number: int) -> tuple[Attempt, Row | None]:
        """Registers an attempt; returns it and the running row that it takes over, if there is one.

        Raises SessionFault REPLAYED when this attempt or a higher one was seen before.
        """
        self._forget()
        self.check(device, request_id, number)
        key = (device, request_id)
        known = self._attempts.get(key)
        attempt = Attempt(number, self._clock())
        self._attempts[key] = attempt
        self._attempts.move_to_end(key)
        return attempt, known.row if known else None

    def check(self, device: str, request_id: bytes, number: int) -> None:
        """Raises what `claim` would for a replay, and registers nothing."""
        known = self._attempts.get((device, request_id))
        if known is not None and number <= known.number:
            raise SessionFault(
                FaultCode.REPLAYED, f"attempt {number} of this request was seen, the newest is {known.number}"
            )

    def running(self, device: str, request_id: bytes) -> Row | None:
        """The row of the newest attempt, while it runs."""
        known = self._attempts.get((device, request_id))
        return known.row if known else None

    def knows(self, device: str, request_id: bytes) -> bool:
        return (device, request_id) in self._attempts

    def _forget(self) -> None:
        horizon = self._clock() - REMEMBERED_S
        while self._attempts:
            key, oldest = next(iter(self._attempts.items()))
            if len(self._attempts) < REMEMBERED and oldest.seen > horizon:
                return
            if oldest.row is not None:  # still running: ask again after the others
                self._attempts.move_to_end(key)
                oldest.seen = self._clock()
                if len(self._attempts) < REMEMBERED:
                    continue
                raise SessionFault(FaultCode.BUSY, f"{len(self._attempts)} requests under way", 1.0)
            del self._attempts[key]


class Rooms:
    """Counts sessions against slots and the waiting line; refuses when both are full, or when draining."""

    def __init__(self, slots: int, waiting: int):
        self.limit, self.taken, self.draining = slots + waiting, 0, False
        self.vacant = asyncio.Event()
        self.vacant.set()

    def enter(self, wait_s: float, replacing: bool = False) -> None:
        """Takes a place, to be given back by `leave`; `replacing` takes over one that is about to be left.

        Raises SessionFault BUSY or DRAINING.
        """
        if self.draining and not replacing:
            raise SessionFault(FaultCode.DRAINING, "the server is shutting down", 1.0)
        if self.taken >= self.limit and not replacing:
            message = f"{self.taken} sessions running and waiting, limit {self.limit}"
            raise SessionFault(FaultCode.BUSY, message, max(1.0, wait_s))
        self.taken += 1
        self.vacant.clear()

    def leave(self) -> None:
        self.taken -= 1
        if not self.taken:
            self.vacant.set()
