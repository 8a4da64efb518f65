"""One attempt at one replica, on the wire."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from edge_agent.link import Link
from protocol.errors import LinkLost, SessionFault, WireError
from protocol.frames import Admitted, Done, Fault, Hidden, Load, ServerFrame, Tokens
from protocol.transport.base import ClientChannel, Connection

INBOX = 64  # frames read and not yet taken
LIFE_SIGN = 0.25  # seconds after which a server says something in any case
SUSPICION_S, SUSPICION_TRIPS = 1.0, 3  # silence after which a path is given up: the longer of the two


class Session:
    """One attempt on one replica. Frames are read as they come; credit and silence are watched."""

    def __init__(self, link: Link, connection: Connection, channel: ClientChannel, patience_s: float):
        self.channel = channel
        self.admitted: Admitted | None = None
        self._link, self._connection, self._patience_s = link, connection, patience_s
        self._inbox: deque[Tokens | Done] = deque()
        self._changed = asyncio.Event()
        self._error: WireError | None = None
        self._credit = self._sent = 0
        self._opened_at = time.monotonic()
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
        while self._sent + len(frame.data) > self._credit or self._error:
            await self._wait()
        self._sent += len(frame.data)
        try:
            await self.channel.send(frame)
        except LinkLost:
            await asyncio.wait({self._reader}, timeout=LIFE_SIGN)  # a fault that came before the end says more
            raise self._error or LinkLost("the server ended the session") from None

    async def _wait(self) -> None:
        if self._error is not None:
            raise self._error
        self._changed.clear()
        trips = SUSPICION_TRIPS * self._link.rtt_s
        limit = max(SUSPICION_S, trips) + LIFE_SIGN if self.admitted else self._patience_s
        try:
            async with asyncio.timeout(limit):
                await self._changed.wait()
        except TimeoutError:
            await self._link.drop(self._connection)
            raise LinkLost(f"{self._link.address} was silent for {limit:.1f} s") from None

    async def _read(self) -> None:
        try:
            while True:
                self._take(await self.channel.receive())
                self._changed.set()
                while len(self._inbox) >= INBOX:
                    self._changed.clear()
                    await self._changed.wait()
        except WireError as error:
            self._error = error
            self._changed.set()

    def _take(self, frame: ServerFrame) -> None:
        match frame:
            case Admitted():
                self.admitted, self._credit = frame, frame.credit
                self._link.answered_in(time.monotonic() - self._opened_at)
                self._link.found()
            case Load():
                self._link.heard(frame)
                self._credit = max(self._credit, frame.credit)
            case Fault(code, message, retry_after_s):
                raise SessionFault(code, message, retry_after_s)
            case _:
                self._inbox.append(frame)
