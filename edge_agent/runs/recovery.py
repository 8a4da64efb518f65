"""What an answer does when its path falls silent: every way to the next position is tried at once, the first wins."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any, Protocol

from edge_agent.link import Link
from edge_agent.runs.attempts import Attempts
from edge_agent.runs.session import Session, lost_s, suspicion_s
from edge_agent.runs.split import Front
from protocol.errors import LinkLost, SessionFault, WireError
from protocol.frames import Done, Hidden, Tokens
from protocol.transport.base import Connection

Connect = Callable[[], Awaitable[Connection]]
Won = tuple[Session, Tokens | Done]
Way = Coroutine[Any, Any, Won]


class Carrier(Protocol):
    """Whose answer it is: opens further attempts, and takes back those that lost."""

    async def opened(self, link: Link, connect: Connect, log: list[int], patience_s: float) -> Session:
        """A new attempt at a replica, to be `left`. Raises LinkLost."""

    async def left(self, session: Session) -> None:
        """Ends a session."""


async def recover(carrier: Carrier, attempts: Attempts, old: Session, log: list[int], front: Front | None) -> Won:
    """The session that goes on, and the first it says: the old one from a new socket, one at the same replica over
    another connection, or one at the next replica. The others are ended; the old one too, unless it won.

    Raises LinkLost, the old session left as it is, when nobody answered in time.
    """
    left_s = max(0.0, lost_s(old.link) - old.silent_s())
    race = Race(carrier, old, log, front)
    ways: list[Way] = [race.revived(), race.rival(old.link, lambda: old.link.another(old.connection, left_s), left_s)]
    if (other := attempts.other(old.link)) is not None:
        ways.append(race.rival(other, other.connect, left_s))
    won = await race.run(ways, left_s)
    if won[0] is old:
        old.link.revived(old.connection)
    else:
        await _give_up(carrier, old, won[0])
    return won


async def _give_up(carrier: Carrier, old: Session, new: Session) -> None:
    """Ends the old session, and draws the conclusions about its path."""
    silent = old.silent_s() >= suspicion_s(old.link)
    try:
        await carrier.left(old)
        if not silent:
            return
        if new.link is old.link and (old.connection.transport, new.connection.transport) == ("quic", "grpc"):
            old.link.dialler.doubt_udp()
            return
        if new.link is not old.link:
            old.link.lost(f"silent for {old.silent_s():.1f} s")
        await old.link.drop(old.connection)
    except BaseException:
        await carrier.left(new)
        raise


class Race:
    """Several sessions of one answer, each to be heard at the end of its token log."""

    def __init__(self, carrier: Carrier, old: Session, log: list[int], front: Front | None):
        self._carrier, self._old, self._log, self._front = carrier, old, log, front
        self._hidden: asyncio.Task[list[Hidden]] | None = None

    async def run(self, ways: list[Way], limit_s: float) -> Won:
        """The first way to succeed. The others have ended when this returns or raises."""
        self._hidden = asyncio.create_task(self._again())
        running = {asyncio.create_task(way) for way in ways}
        every, errors = set(running), list[WireError]()
        won: asyncio.Task[Won] | None = None
        try:
            async with asyncio.timeout(limit_s):
                while won is None and running:
                    done, running = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    for way in done:
                        error = way.exception()
                        if error is None:
                            won = won or way
                        elif isinstance(error, WireError):
                            errors.append(error)
                        else:
                            raise error
                if won is not None:
                    await self._hidden  # the front's own memory reaches to the end of the log again
        except TimeoutError:
            won = None
        finally:
            await self._end(every - {won} if won is not None else every)
        if won is None:
            silent = LinkLost(f"{self._old.link.address} was silent for {self._old.silent_s():.1f} s")
            raise next((one for one in errors if isinstance(one, SessionFault)), silent)
        return won.result()

    async def revived(self) -> Won:
        """The old session, once its path bears again."""
        await self._old.connection.move()
        return await self._heard(self._old)

    async def rival(self, link: Link, connect: Connect, patience_s: float) -> Won:
        """A new attempt; another where its connection was given up for a better one."""
        try:
            return await self._rival(link, connect, patience_s)
        except LinkLost:
            await link.dialler.settled()  # what it was offered early loses before the winner is known
            if not link.dialler.warm:
                raise
            return await self._rival(link, link.connect, patience_s)

    async def _rival(self, link: Link, connect: Connect, patience_s: float) -> Won:
        session = await self._carrier.opened(link, connect, self._log, patience_s)
        try:
            return await self._heard(session)
        except BaseException as error:
            if isinstance(error, SessionFault):
                link.refuse(error)
            await self._carrier.left(session)
            raise

    async def _heard(self, session: Session) -> Won:
        """What a session says when it has all hidden states that it needs."""
        assert self._hidden is not None
        if not session.accompanied:
            for hidden in await asyncio.shield(self._hidden):
                if hidden.position >= session.fed:
                    await session.send(hidden, watched=False)
        return session, await session.next(watched=False)

    async def _again(self) -> list[Hidden]:
        """All hidden states of the log; as large as the context, and held for the race only."""
        if self._front is None:
            return []
        fed = min(self._old.fed, len(self._log))  # where the old session goes on, a frame is to begin
        parts = ((self._log[:fed], 0), (self._log, fed))
        return [hidden for part, start in parts async for hidden in self._front.frames(part, start)]

    async def _end(self, ways: set[asyncio.Task[Won]]) -> None:
        assert self._hidden is not None
        self._hidden.cancel()
        for way in ways:
            way.cancel()
        for result in await asyncio.gather(*ways, return_exceptions=True):
            if isinstance(result, tuple) and result[0] is not self._old:
                await self._carrier.left(result[0])
        await asyncio.gather(self._hidden, return_exceptions=True)
