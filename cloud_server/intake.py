"""What a phone may send of its hidden states and drafts: within its credit, no flood, and in time.

What they must follow is known to the row (`Row.expects`, `Row.propose`).
"""

from __future__ import annotations

import time

from cloud_server.rows import MOST_PENDING, Row
from protocol import limits
from protocol.errors import BadFrame, FaultCode, SessionFault
from protocol.frames import Draft, Hidden


class Intake:
    """The account of one session's frames; sizes in bytes of hidden states, of all that was sent."""

    def __init__(self, row: Row, vocabulary: int):
        self._row, self._vocabulary = row, vocabulary
        self._granted = limits.HIDDEN_CREDIT
        self._received = 0
        self._idle = 0  # frames since the last token that brought no row nearer to its next one, as far as is known
        self._owed_since = time.monotonic()

    @property
    def half_used(self) -> bool:
        """Whether the phone should hear of more credit now."""
        return self._room() - self._granted >= limits.HIDDEN_CREDIT // 2

    def credit(self) -> int:
        """What the phone is granted from now on: never less, and only so much beyond what was computed."""
        self._granted = max(self._granted, self._room())
        return self._granted

    def told(self) -> None:
        """The phone knows all tokens so far."""
        self._owed_since, self._idle = time.monotonic(), 0

    def hidden(self, frame: Hidden) -> None:
        """Books a frame. Raises SessionFault for one that should not have come."""
        if not self._row.entry:
            raise SessionFault(FaultCode.BAD_REQUEST, "hidden states in a session that sent token ids")
        self._received += frame.size
        if self._received > self._granted:
            raise SessionFault(
                FaultCode.OVER_CREDIT, f"{self._received} bytes of hidden states, credit {self._granted}"
            )
        if frame.epoch < self._row.drafts.epoch:
            self._count_idle()
        else:
            self._owed_since = time.monotonic()

    def draft(self, frame: Draft) -> None:
        """Books a frame. Raises SessionFault for one that should not have come."""
        drafts = self._row.drafts
        if not drafts.by_phone:
            raise SessionFault(FaultCode.BAD_REQUEST, "Draft in a session without drafts by the phone")
        if len(frame.tokens) > drafts.limit:
            raise BadFrame(f"draft of {len(frame.tokens)} tokens, this session's limit is {drafts.limit}")
        if self._row.entry and not frame.tokens:
            raise BadFrame("draft of 0 tokens in a split, which waits for hidden states alone")
        if frame.tokens and max(frame.tokens) >= self._vocabulary:
            raise BadFrame(f"token id {max(frame.tokens)} in a draft, the vocabulary has {self._vocabulary}")
        self._count_idle()

    def check_owed(self) -> None:
        """Raises SessionFault SILENT for a phone that could send what its row waits for, and for long has not."""
        if not self._row.starved or time.monotonic() - self._owed_since <= limits.HIDDEN_WAIT:
            return
        if not self._row.entry:
            raise SessionFault(FaultCode.SILENT, f"no drafts for {limits.HIDDEN_WAIT:g} s")
        if self._received + limits.TENSOR_CHUNK <= self._granted:
            raise SessionFault(FaultCode.SILENT, f"no hidden states for {limits.HIDDEN_WAIT:g} s")

    def _count_idle(self) -> None:
        self._idle += 1
        if self._idle > MOST_PENDING:
            raise BadFrame(f"{self._idle} drafts and stale frames since the last token, limit {MOST_PENDING}")

    def _room(self) -> int:
        return limits.HIDDEN_CREDIT + self._row.hidden.freed
