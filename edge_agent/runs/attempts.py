"""Which replica carries an answer's next attempt, how long it may be silent, and when the cloud counts as lost."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter

from edge_agent.link import Link
from edge_agent.replicas import Links
from edge_agent.runs.session import lost_s, suspicion_s
from protocol.errors import FaultCode, LinkLost, SessionFault

PAUSE_S = 0.2  # between attempts, where one at the same replica has just brought nothing
ELSEWHERE = frozenset({FaultCode.BUSY, FaultCode.DRAINING, FaultCode.QUOTA, FaultCode.INTERNAL, FaultCode.SILENT,
                       FaultCode.REPLAYED, FaultCode.UNAUTHENTICATED, FaultCode.WRONG_MODEL,
                       FaultCode.WRONG_TOKENIZER, FaultCode.CONTEXT_LENGTH_EXCEEDED})  # fmt: skip


class Attempts:
    """The account of one answer's attempts. Begins when it is made."""

    def __init__(self, links: Links):
        self._links = links
        self._refused: dict[Link, float] = {}  # until when
        self._fruitless: Counter[Link] = Counter()  # attempts since the latest token
        self._heard_at = time.monotonic()  # moved on by the time that replicas were there

    def next(self) -> Link:
        """The replica to try."""
        return min(self._open(), key=self._fruitless.__getitem__)

    def patience_s(self, link: Link) -> float:
        """For this replica to admit the session: less where another, or a new connection, may do better."""
        left = self._left(link)
        others = any(not self._fruitless[one] for one in self._open() if one is not link)
        return max(0.1, min(left, suspicion_s(link)) if others or link.dialler.warm else left)

    def other(self, link: Link) -> Link | None:
        """The best other replica that may do better than a silent one."""
        return next((one for one in self._open() if one is not link and not one.unreachable), None)

    def ended(self, heard_s: float, brought: bool, silent_s: float = 0.0) -> None:
        """An attempt is over in which a replica was heard for so long, and tokens may have come; silent at the end."""
        if brought:
            self._heard_at = time.monotonic() - silent_s
            self._fruitless.clear()
        else:
            self._heard_at += heard_s

    async def failed(self, link: Link, error: LinkLost | SessionFault, begun: bool) -> None:
        """Returns when another attempt is worth making, else raises the error."""
        self._fruitless[link] += 1
        if isinstance(error, SessionFault):
            self._refuse(link, error)
        left, others = self._left(link), self._open()
        if isinstance(error, LinkLost) and not link.unreachable and left <= 0:
            link.lost(str(error))
        self._links.wake()
        hopeless = all(one.unreachable for one in others)
        if hopeless and isinstance(error, SessionFault):  # a replica that refuses shows that there is a network
            hopeless = all(self._fruitless[one] for one in others)
        if not others or left <= 0 or (hopeless and not begun):
            raise type(error)(f"no replica answers: {error}") if isinstance(error, LinkLost) else error
        if hopeless or self._fruitless[self.next()] > 1:
            await asyncio.sleep(min(left, PAUSE_S))

    def _refuse(self, link: Link, fault: SessionFault) -> None:
        if fault.code is FaultCode.SUPERSEDED:  # by an attempt of our own that lost a race; a higher one takes over
            return
        if fault.code not in ELSEWHERE:
            raise fault
        link.refuse(fault)
        if fault.code is not FaultCode.REPLAYED:
            load = fault.code in (FaultCode.BUSY, FaultCode.DRAINING, FaultCode.QUOTA)
            self._refused[link] = time.monotonic() + max(PAUSE_S, fault.retry_after_s) if load else math.inf

    def _open(self) -> list[Link]:
        """Those that have not refused, or only for a while that is over; the best first."""
        now = time.monotonic()
        return [link for link in self._links.ranked() if self._refused.get(link, 0.0) <= now]

    def _left(self, link: Link) -> float:
        """Seconds until a silent cloud counts as lost."""
        return lost_s(link) - (time.monotonic() - self._heard_at)
