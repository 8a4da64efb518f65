"""The full model in the cloud: sessions on the wire, and the attempts that carry one answer through."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Collection
from dataclasses import dataclass
from functools import partial

from edge_agent.job import Job
from edge_agent.link import Link
from edge_agent.replicas import Links
from edge_agent.runs.attempts import Attempts
from edge_agent.runs.recovery import recover
from edge_agent.runs.session import LIFE_SIGN, Session, Silence, server_fault
from edge_agent.runs.speculative import Drafter, Feed
from edge_agent.runs.split import Front
from protocol.errors import LinkLost, SessionFault, WireError
from protocol.frames import Admitted, Digests, Done, Open, Reason, Tokens, WireSampling
from protocol.transport.base import Connection


@dataclass(frozen=True, slots=True)
class Identity:
    """What every Open says of this phone."""

    model: str
    digests: Digests
    exact: bool  # the phone's own self-check
    token: Callable[[], str] = str  # looked up for every session, since tokens are renewed; none by default


@dataclass(slots=True)
class Carried:
    """What happened to one answer on its way; written by its run alone."""

    transport: str | None = None
    replica: str | None = None
    attempts: int = 0
    early: bool = False
    exact: bool = True
    bytes_up: int = 0
    bytes_down: int = 0
    held: int | None = None  # positions that the first server held, where it was sent ids
    compute_s: float = 0.0
    queue_s: float = 0.0
    finish: Reason | None = None
    rounds: int = 0  # answers to drafts from here
    drafted: int = 0  # tokens that were proposed and looked at
    accepted: int = 0


class CloudRun:
    """Carries one answer: attempt after attempt, replica after replica, from the token log."""

    def __init__(self, job: Job, split: int, links: Links, me: Identity, stops: Collection[int], context: int,
                 front: Front | None = None, drafter: Drafter | None = None, cloud_draft: int = 0):  # fmt: skip
        self._job, self._split, self._links, self._me, self._stops = job, split, links, me, stops
        self._limit = min(len(job.prompt) + job.max_tokens, context)
        self._front, self._drafter, self._cloud_draft = front, drafter, cloud_draft
        self._feed: Feed | None = None  # of the session that carries the answer now
        self._link: Link  # that carries the answer now
        self.carried = Carried()
        self.hand_on = False  # the session stays open when `tokens` is closed, until `part`: the next takes it over
        self._sessions: set[Session] = set()  # that are open

    async def tokens(self, log: list[int]) -> AsyncGenerator[int, None]:
        """Answer tokens, each appended to the log first.

        Raises LinkLost when no replica answered within max(3 s, 6 RTT), SessionFault when every one refused.
        """
        attempts = Attempts(self._links)
        while True:
            self._link = attempts.next()
            try:
                async with contextlib.aclosing(self._attempt(attempts, self._link, log)) as tokens:
                    async for token in tokens:
                        yield token
                return
            except (LinkLost, SessionFault) as error:
                await attempts.failed(self._link, error, begun=len(log) > len(self._job.prompt))

    async def _attempt(self, attempts: Attempts, link: Link, log: list[int]) -> AsyncGenerator[int, None]:
        """The answer from where the log ends, by one session after the other as long as recoveries succeed."""
        known, patience_s = len(log), attempts.patience_s(link)
        bulk = self._front.size(len(log)) if self._front else 0
        session = await self.opened(link, partial(self._connected, link, bulk, patience_s), log, patience_s)
        try:
            self._accompany(session, log)
            while True:
                try:
                    frame = await self._next(session, log)
                except Silence:
                    before = session
                    session, frame = await recover(self, attempts, session, log, self._front)
                    self._link = session.link
                    if session is not before:
                        self._accompany(session, log, frame)
                if isinstance(frame, Done):
                    self._end(frame)
                    return
                for token in self._checked(session, frame, log):
                    log.append(token)
                    yield token
                    if token in self._stops or len(log) >= self._limit:
                        await self._last(session)
                        return
        finally:
            attempts.ended(session.heard_s, brought=len(log) > known, silent_s=session.silent_s())
            if self.hand_on:
                await session.leave_alone()
            else:
                if len(log) > known and not self._split:
                    session.link.left.add(log[:-1], self._job.wish.sparse)
                await self.left(session)

    def _accompany(self, session: Session, log: list[int], heard: Tokens | Done | None = None) -> None:
        """Begins to draft for a session that has been heard to say something, perhaps."""
        if self._drafter is None:
            return
        self._feed = Feed(self._drafter, session, log, self._front, self._limit, self._stops, self._counted)
        if isinstance(heard, Tokens):
            self._feed.heard(heard)
        session.accompany(self._feed)

    def _counted(self, rounds: int, drafted: int, accepted: int) -> None:
        self.carried.rounds += rounds
        self.carried.drafted += drafted
        self.carried.accepted += accepted

    async def part(self) -> None:
        """Ends what was kept for the run that took over."""
        for session in tuple(self._sessions):
            await self.left(session)

    @property
    def moved(self) -> int:
        """Bytes both ways, those of open sessions included."""
        going = sum(one.bytes_up + one.bytes_down for one in self._sessions)
        return self.carried.bytes_up + self.carried.bytes_down + going

    async def _next(self, session: Session, log: list[int]) -> Tokens | Done:
        """What the server says next, once it has all hidden states that it needs for it."""
        began, before = time.monotonic(), session.sent
        if self._front is not None and self._drafter is None:
            async with contextlib.aclosing(self._front.frames(log, session.fed)) as frames:
                async for hidden in frames:
                    await session.send(hidden)
        frame = await session.next()
        session.link.carried(session.connection, session.sent - before, time.monotonic() - began)
        return frame

    def _checked(self, session: Session, frame: Tokens, log: list[int]) -> tuple[int, ...]:
        if session.admitted is None or frame.position != len(log):
            raise server_fault(f"tokens at position {frame.position}, expected {len(log)} and Admitted before")
        self.carried.transport, self.carried.replica = session.connection.transport, str(session.link.address)
        self._note(session.admitted)
        return frame.ids

    async def _connected(self, link: Link, bulk: int, patience_s: float) -> Connection:
        try:
            async with asyncio.timeout(patience_s):
                return await link.connect(bulk)
        except TimeoutError:
            raise LinkLost(f"{link.address} did not answer within {patience_s:.1f} s") from None

    async def opened(self, link: Link, connect: Callable[[], Awaitable[Connection]], log: list[int],
                     patience_s: float) -> Session:  # fmt: skip
        """A new attempt at a replica, to be `left`. Raises LinkLost."""
        connection = await connect()
        channel = await connection.open()
        self.carried.attempts += 1
        try:
            await channel.send(self._open_frame(connection, log))
            link.dialler.spoke()
        except BaseException:
            await channel.aclose()
            raise
        asked = () if self._split else tuple(log)
        session = Session(link, connection, channel, patience_s, asked, self._job.wish.sparse)
        self._sessions.add(session)
        return session

    async def left(self, session: Session) -> None:
        """Books what a session has moved, and ends it."""
        self._sessions.discard(session)
        self.carried.bytes_up += session.bytes_up
        self.carried.bytes_down += session.bytes_down
        session.link.observe()
        await session.aclose()

    def _open_frame(self, connection: Connection, log: list[int]) -> Open:
        job, me, how = self._job, self._me, self._job.sampling
        return Open(
            request_id=job.id,
            attempt=self.carried.attempts,
            model=me.model,
            digests=me.digests,
            split=self._split,
            sampling=WireSampling(how.temperature, how.top_p, how.top_k, how.seed),
            max_tokens=job.max_tokens,
            prompt_length=len(job.prompt),
            log_length=len(log),
            log=() if self._split else tuple(log),
            stop=job.stop,
            ticket_age_s=connection.ticket_age_s,
            token=me.token(),
            draft=self._drafter.most if self._drafter else 0,
            cloud_draft=self._cloud_draft,
            sparse=self._job.wish.sparse,
        )

    async def _last(self, session: Session) -> None:
        """The answer is complete; what the server says of its time is welcome, not needed."""
        with contextlib.suppress(WireError, TimeoutError):
            async with asyncio.timeout(LIFE_SIGN):
                frame = await session.next(watched=False)
            if isinstance(frame, Done):
                self._end(frame)

    def _note(self, admitted: Admitted) -> None:
        """Exact only if all servers' numbers are that gave tokens, and in a split the phone's, by the same numerics.

        What was asked for in 8 bits or sparse is not.
        """
        same = admitted.digests.numerics == self._me.digests.numerics and self._me.exact
        wish = self._job.wish
        whole = not wish.sparse and (not self._split or wish.hidden_bits == 16)
        self.carried.exact &= admitted.exact and (same or not self._split) and whole
        self.carried.early |= admitted.early
        if self.carried.held is None and not self._split:
            self.carried.held = admitted.held

    def _end(self, done: Done) -> None:
        self.carried.finish, self.carried.queue_s, self.carried.compute_s = done.reason, done.queue_s, done.compute_s
        drafted, accepted = (self._feed.drafted, self._feed.accepted) if self._feed else (0, 0)
        self._counted(0, done.drafted - drafted, done.accepted - accepted)  # the server knows better
