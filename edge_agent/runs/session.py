"""One attempt at one replica, on the wire."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from edge_agent.cost import on_the_wire
from edge_agent.link import Link
from protocol.errors import BadFrame, FaultCode, LinkLost, SessionFault, WireError
from protocol.frames import Admitted, Done, Fault, Hidden, Load, ServerFrame, Tokens
from protocol.limits import HIDDEN_CREDIT
from protocol.transport.base import ClientChannel, Connection

INBOX = 64  # frames read and not yet taken
LIFE_SIGN = 0.25  # seconds after which a server says something in any case
SUSPICION_S, SUSPICION_TRIPS = 1.0, 3  # silence after which a path is given up: the longer of the two


def suspicion_s(link: Link) -> float:
    """Seconds of silence after which a path is suspected."""
    return max(SUSPICION_S, SUSPICION_TRIPS * link.rtt_s)


def server_fault(what: str) -> SessionFault:
    """What a server should not have sent: its fault, not the app's, so that the answer may go on elsewhere."""
    return SessionFault(FaultCode.INTERNAL, f"the server sent {what}")


class Session:
    """One attempt on one replica. Frames are read as they come; credit and silence are watched."""

    def __init__(self, link: Link, connection: Connection, channel: ClientChannel, patience_s: float):
        self.channel = channel
        self.admitted: Admitted | None = None
        self._link, self._connection, self._patience_s = link, connection, patience_s
        self._inbox: deque[Tokens | Done] = deque()
        self._changed = asyncio.Event()
        self._error: WireError | None = None
        self._credit, self._sent = HIDDEN_CREDIT, 0  # every session begins with that much
        self._opened_at = time.monotonic()
        self.heard_s = 0.0  # from then to the latest frame
        self.bytes_up, self.bytes_down = on_the_wire(channel.bytes_up), 0  # estimated from the sizes of the frames
        self._silence: asyncio.Timeout | None = None  # while something is waited for
        self._reader = asyncio.create_task(self._read())

    async def aclose(self) -> None:
        """Ends the session at once; the server frees its slot. Done before it first waits, so it stands a cancel."""
        self._reader.cancel()
        await self.channel.aclose()
        await asyncio.gather(self._reader, return_exceptions=True)

    async def next(self) -> Tokens | Done:
        """The next tokens, or the end. Raises LinkLost after a silence, SessionFault when the server refuses."""
        while not self._inbox:
            await self._wait()
        self._changed.set()  # the reader may be waiting for room
        return self._inbox.popleft()

    async def send(self, frame: Hidden) -> None:
        """Sends hidden states once the server's credit covers them."""
        while self._error or not self._may_send(frame.size):
            await self._wait()
        self._sent += frame.size
        before = self.channel.bytes_up
        async with self._listening():
            try:
                await self.channel.send(frame)
            except LinkLost:
                await asyncio.wait({self._reader}, timeout=LIFE_SIGN)  # a fault that came before the end says more
                raise self._error or LinkLost("the server ended the session") from None
        self.bytes_up += on_the_wire(self.channel.bytes_up - before)

    def _may_send(self, size: int) -> bool:
        """Within the credit; and no more work is done for a server that should have admitted the session by now."""
        expected = self.admitted is not None or time.monotonic() < self._opened_at + self._patience_s
        return expected and self._sent + size <= self._credit

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._changed.clear()
        async with self._listening():
            await self._changed.wait()

    @property
    def _limit_s(self) -> float:
        return suspicion_s(self._link) + LIFE_SIGN if self.admitted else self._patience_s

    @asynccontextmanager
    async def _listening(self) -> AsyncIterator[None]:
        """Gives the path up, and raises LinkLost, when no frame comes for too long."""
        try:
            async with asyncio.timeout(self._limit_s) as self._silence:
                yield
        except TimeoutError:
            await self._link.drop(self._connection)
            raise LinkLost(f"{self._link.address} was silent for {self._limit_s:.1f} s") from None
        finally:
            self._silence = None

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
        if self._silence is not None and not self._silence.expired():
            self._silence.reschedule(asyncio.get_running_loop().time() + self._limit_s)
        self._changed.set()

    def _take(self, frame: ServerFrame) -> None:
        match frame:
            case Admitted():
                self.admitted, self._credit = frame, max(self._credit, frame.credit)
                self._link.answered_in(time.monotonic() - self._opened_at)
                self._link.found()
            case Load():
                self._link.heard(frame)
                self._credit = max(self._credit, frame.credit)
            case Fault(code, message, retry_after_s):
                raise SessionFault(code, message, retry_after_s)
            case _:
                self._inbox.append(frame)
