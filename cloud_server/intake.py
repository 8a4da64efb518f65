"""What a phone may send of its hidden states: in order, of positions it can know, within its credit, and in time."""

from __future__ import annotations

import time
from collections import deque

from cloud_server.rows import Row
from protocol import limits
from protocol.errors import BadFrame, FaultCode, SessionFault
from protocol.frames import Hidden


class Intake:
    """The account of one session's hidden states; sizes in bytes, of all that was sent."""

    def __init__(self, row: Row):
        self._row = row
        self._granted = limits.HIDDEN_CREDIT
        self._received = self._computed = 0
        self._under_way: deque[tuple[int, int]] = deque()  # of each frame: the position behind it, and `_received`
        self._next = 0  # position of the next one
        self._known = row.first  # positions the phone may have some of
        self._owed_since = time.monotonic()

    @property
    def half_used(self) -> bool:
        """Whether the phone should hear of more credit now."""
        return self._room() - self._granted >= limits.HIDDEN_CREDIT // 2

    def credit(self) -> int:
        """What the phone is granted from now on: never less, and only so much beyond what was computed."""
        self._granted = max(self._granted, self._room())
        return self._granted

    def told(self, position: int) -> None:
        """The phone knows the token at this position."""
        self._known, self._owed_since = position + 1, time.monotonic()

    def take(self, hidden: Hidden) -> None:
        """Books a frame. Raises SessionFault for one that should not have come."""
        if not self._row.entry:
            raise SessionFault(FaultCode.BAD_REQUEST, "hidden states in a session that sent token ids")
        if hidden.position != self._next or self._next + hidden.rows > self._known:
            raise BadFrame(
                f"hidden states of positions {hidden.position} to {hidden.position + hidden.rows - 1}, "
                f"expected {self._next} to at most {self._known - 1}"
            )
        self._received += hidden.size
        if self._received > self._granted:
            raise SessionFault(
                FaultCode.OVER_CREDIT, f"{self._received} bytes of hidden states, credit {self._granted}"
            )
        self._next += hidden.rows
        self._under_way.append((self._next, self._received))
        self._owed_since = time.monotonic()

    def check_owed(self) -> None:
        """Raises SessionFault SILENT for a phone that has the credit, and for long has sent nothing."""
        owes = self._row.entry and self._next < self._known and self._received + limits.TENSOR_CHUNK <= self._granted
        if owes and time.monotonic() - self._owed_since > limits.HIDDEN_WAIT:
            raise SessionFault(FaultCode.SILENT, f"no hidden states for {limits.HIDDEN_WAIT:g} s")

    def _room(self) -> int:
        while self._under_way and self._under_way[0][0] <= self._row.done:
            self._computed = self._under_way.popleft()[1]
        return limits.HIDDEN_CREDIT + self._computed
