"""One attempt at one replica, on the wire."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from edge_agent.link import Link
from edge_agent.traffic import on_the_wire
from protocol.errors import BadFrame, FaultCode, LinkLost, SessionFault, WireError
from protocol.frames import Admitted, Done, Draft, Fault, Hidden, Load, ServerFrame, Tokens
from protocol.limits import HIDDEN_CREDIT
from protocol.transport.base import ClientChannel, Connection

INBOX = 64  # frames read and not yet taken
LIFE_SIGN = 0.25  # seconds after which a server says something in any case
SUSPICION_S, SUSPICION_TRIPS = 1.0, 3  # silence after which a path is suspected: the longer of the two


LOST_S, LOST_TRIPS = 3.0, 6  # time without any replica after which the cloud is lost


class Silence(Exception):
    """A path says nothing; whether it is gone is not known, and the session may go on."""


def suspicion_s(link: Link) -> float:
    """Seconds of silence after which a path is suspected."""
    return max(SUSPICION_S, SUSPICION_TRIPS * link.rtt_s)


def lost_s(link: Link) -> float:
    """Seconds of silence after which the cloud counts as lost."""
    return max(LOST_S, LOST_TRIPS * link.rtt_s)


def server_fault(what: str) -> SessionFault:
    """What a server should not have sent: its fault, not the app's, so that the answer may go on elsewhere."""
    return SessionFault(FaultCode.INTERNAL, f"the server sent {what}")


class Companion(Protocol):
    """What runs beside a session; its error is the session's."""

    def heard(self, frame: Tokens) -> None:
        """Tokens as they come, though nobody may have taken them yet."""

    async def run(self) -> None:
        """Until it is cancelled."""


class Session:
    """One attempt on one replica. Frames are read as they come; credit and silence are watched."""

    def __init__(self, link: Link, connection: Connection, channel: ClientChannel, patience_s: float,
                 asked: Sequence[int] = (), sparse: bool = False):  # fmt: skip
        self.link, self.connection, self.channel = link, connection, channel
        self.admitted: Admitted | None = None
        self.fed = 0  # positions whose hidden states have been sent
        self._patience_s = patience_s
        self._asked, self._sparse = asked, sparse  # ids of what the server was to know
        self._inbox: deque[Tokens | Done] = deque()
        self._changed = asyncio.Event()
        self._error: BaseException | None = None
        self._companion: Companion | None = None
        self._beside: asyncio.Task[None] | None = None  # the companion's
        self._credit, self.sent = HIDDEN_CREDIT, 0  # bytes of hidden states; every session begins with that much
        self._opened_at = time.monotonic()
        self.heard_s = 0.0  # from then to the latest frame
        self.bytes_up, self.bytes_down = on_the_wire(channel.bytes_up), 0  # estimated from the sizes of the frames
        self._reader = asyncio.create_task(self._read())

    async def aclose(self) -> None:
        """Ends the session at once; the server frees its slot. Done before it first waits, so it stands a cancel."""
        self._reader.cancel()
        beside = self._cancel_beside()
        await self.channel.aclose()
        await asyncio.gather(self._reader, *beside, return_exceptions=True)

    @property
    def accompanied(self) -> bool:
        """Whether a companion does the sending."""
        return self._companion is not None

    def accompany(self, companion: Companion) -> None:
        """Begins to run it; it hears of the tokens that nobody has taken yet."""
        self._companion = companion
        for frame in self._inbox:
            if isinstance(frame, Tokens):
                companion.heard(frame)
        self._beside = asyncio.create_task(companion.run())
        self._beside.add_done_callback(self._left_alone)

    async def leave_alone(self) -> None:
        """Ends the companion, not the session."""
        await asyncio.gather(*self._cancel_beside(), return_exceptions=True)

    def _cancel_beside(self) -> list[asyncio.Task[None]]:
        self._companion = None
        if self._beside is None:
            return []
        self._beside.cancel()
        return [self._beside]

    def _left_alone(self, beside: asyncio.Task[None]) -> None:
        error = None if beside.cancelled() else beside.exception()
        if error is not None and not isinstance(error, WireError):  # of the session's end the reader tells, in order
            self._error = self._error or error
            self._changed.set()

    def silent_s(self) -> float:
        """Seconds since the latest sign of life: a frame, or whatever else the connection sees."""
        return min(time.monotonic() - self._opened_at - self.heard_s, self.connection.silent_s())

    async def next(self, *, watched: bool = True) -> Tokens | Done:
        """The next tokens, or the end. Raises SessionFault when the server refuses, LinkLost when it is gone or does
        not admit the session in time, and while it is `watched`, Silence."""
        while not self._inbox:
            await self._change(watched)
        self._changed.set()  # the reader may be waiting for room
        return self._inbox.popleft()

    async def send(self, frame: Hidden | Draft, *, watched: bool = True) -> None:
        """Sends drafts, or hidden states once the server's credit covers them. Raises as `next` does."""
        size = frame.size if isinstance(frame, Hidden) else 0
        while self._error or not self._may_send(size):
            await self._change(watched)
        before = self.channel.bytes_up
        try:
            await self._patiently(lambda: self.channel.send(frame), watched)
        except LinkLost:
            await asyncio.wait({self._reader}, timeout=LIFE_SIGN)  # a fault that came before the end says more
            raise self._error or LinkLost("the server ended the session") from None
        self.sent += size
        if isinstance(frame, Hidden):
            self.fed = frame.position + frame.rows
        self.bytes_up += on_the_wire(self.channel.bytes_up - before)

    def _may_send(self, size: int) -> bool:
        """Within the credit; and no more work is done for a server that should have admitted the session by now."""
        expected = self.admitted is not None or time.monotonic() < self._opened_at + self._patience_s
        return expected and self.sent + size <= self._credit

    async def _change(self, watched: bool) -> None:
        if self._error is not None:
            raise self._error
        self._changed.clear()
        await self._patiently(self._changed.wait, watched)

    async def _patiently(self, wait: Callable[[], Awaitable[object]], watched: bool) -> None:
        """Waits as long as there is hope; what is waited for is begun anew after every look."""
        while True:
            left = self._left_s() if watched else None
            if left is not None and left <= 0:
                await self._despair()
            try:
                async with asyncio.timeout(left):
                    await wait()
                    return
            except TimeoutError:
                continue

    def _left_s(self) -> float:
        """Seconds until the server should have admitted the session, or its path is suspected."""
        open_s = time.monotonic() - self._opened_at
        if self.admitted is None and self.connection.ticket_age_s is not None:  # no handshake yet
            return self._patience_s - open_s
        silence = suspicion_s(self.link) - self.silent_s()
        return silence if self.admitted else min(silence, lost_s(self.link) - open_s)

    async def _despair(self) -> None:
        if self.admitted or self.silent_s() >= suspicion_s(self.link):
            raise Silence
        await self.link.drop(self.connection)
        open_s = time.monotonic() - self._opened_at
        raise LinkLost(f"{self.link.address} did not admit the session within {open_s:.1f} s")

    async def _read(self) -> None:
        try:
            while True:
                before = self.channel.bytes_down
                frame = await self.channel.receive()
                self.bytes_down += on_the_wire(self.channel.bytes_down - before)
                self._take(frame)
                self._heard()
                while len(self._inbox) >= INBOX:
                    self._changed.clear()
                    await self._changed.wait()
        except WireError as error:
            self._error = server_fault(f"what is no frame: {error.message}") if isinstance(error, BadFrame) else error
            self._changed.set()

    def _heard(self) -> None:
        self.heard_s = time.monotonic() - self._opened_at
        self._changed.set()

    def _take(self, frame: ServerFrame) -> None:
        match frame:
            case Admitted():
                self.admitted, self._credit = frame, max(self._credit, frame.credit)
                if self._asked:
                    self.link.left.told(self._asked, self._sparse, frame)
                self.link.answered_in(time.monotonic() - self._opened_at)
                self.link.found()
            case Load():
                self.link.heard(frame)
                self._credit = max(self._credit, frame.credit)
            case Fault(code, message, retry_after_s):
                raise SessionFault(code, message, retry_after_s)
            case _:
                self._inbox.append(frame)
                if self._companion is not None and isinstance(frame, Tokens):
                    self._companion.heard(frame)
