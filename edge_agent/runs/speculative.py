"""Drafts by the tiny model on the phone: made and sent ahead, and compared with what the full model says."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import replace

from edge_agent.link import Link
from edge_agent.runs.local import CHUNK, Drafted, PhoneModel, Seat
from edge_agent.runs.pace import Length, Pace
from edge_agent.runs.session import Session
from edge_agent.runs.split import Front
from protocol.frames import Draft, Tokens
from split_model.drafting import Acceptance
from split_model.sampling import Sampling

NEAR_S = 0.02  # round trip up to which drafts wait for the first token: sooner they would only hold it up
LEAST = 0.1  # chance that all of the path is right, below which nothing more is put behind it
Chance = Callable[[float], float]
Counted = Callable[[int, int, int], None]  # rounds, tokens drafted, tokens accepted


def usual(entropy: float) -> float:
    """The chance that a tiny model's token is the full one's, by its entropy in nats: the table of assistant-2m."""
    return 1 / (1 + math.pow(entropy / 3.2, 2.2))


class Drafter:
    """The tiny model's part in one answer, whatever the number of its sessions. To be closed.

    Proposes `most` tokens at a time, or with `steady` False as many as pay, none if none do. `seat` may hold a
    beginning of the prompt.
    """

    def __init__(self, tiny: PhoneModel, pace: Pace, sampling: Sampling, most: int, acceptance: Acceptance, *,
                 steady: bool = False, chance: Chance = usual, seat: Seat | None = None):  # fmt: skip
        self.tiny, self.pace, self.most, self.steady, self.chance = tiny, pace, most, steady, chance
        self.acceptance = acceptance
        self.filled = seat.position if seat else 0  # positions in the KV that are those of the token log
        self._sampling, self._seat, self._closed = sampling, seat, False

    def close(self) -> None:
        """Gives the tiny model's place back."""
        self._closed = True
        if self._seat is not None:
            self._seat.close()

    async def ready(self, ids: Sequence[int]) -> bool:
        """Whether there is a place for the tiny model; it is taken as soon as there is, for what is known by now."""
        if self._seat is None and not self._closed and not self.tiny.free.locked():
            self._seat = await self.tiny.seat(self.tiny.config.layers, ids=ids)
            self.filled = self._seat.position
        return self._seat is not None

    def length(self, link: Link, position: int, drafting: bool) -> Length:
        """Of the next draft."""
        if self.steady:
            return self.pace.fixed(link, position, self.most)
        return self.pace.best(self.acceptance, link, position, self.most, drafting)

    async def read(self, ids: Sequence[int]) -> None:
        """Has the tiny model know what it lacks of these."""
        assert self._seat is not None
        while (start := self.filled) < len(ids):
            piece = ids[start : start + CHUNK]
            async for _ in self._seat.run(piece, start):
                pass
            self.filled = start + len(piece)

    async def made(self, ids: Sequence[int], count: int, more: Callable[[Sequence[Drafted]], bool]) -> list[Drafted]:
        """Up to `count` tokens behind `ids`; `filled` stays before them until the caller has judged them."""
        assert self._seat is not None
        self.filled = min(self.filled, len(ids) - 1)
        if len(ids) - self.filled > CHUNK:
            await self.read(ids[:-1])
        start, began = self.filled, time.perf_counter()
        found = await self._seat.draft(ids[start:], start, count, self._sampling, more)
        if len(ids) - start == 1:
            self.pace.drafted(len(found), time.perf_counter() - began)
        return found


class Feed:
    """The drafts of one session: its companion, see runs.session."""

    def __init__(self, drafter: Drafter, session: Session, log: Sequence[int], front: Front | None, limit: int,
                 stops: Collection[int], counted: Counted):  # fmt: skip
        self._drafter, self._session, self._front = drafter, session, front
        self._limit, self._stops, self._counted = limit, stops, counted
        self._ids = list(log)  # what is known, and behind it the path: what was proposed and is not confirmed
        self._known = self._began = len(log)
        self._chances: list[float] = []  # of the path's tokens
        self._epoch = 0  # how often in this session a token was another than proposed
        self._fed = session.fed  # positions whose hidden states were sent, and not in vain
        self._alone_in: int | None = None  # the epoch in which the server was told to go on alone, while that stands
        self._asked: tuple[float, int] | None = None  # when the path began, and with how many tokens
        self._changed, self._ended = asyncio.Event(), False
        self.drafted = self.accepted = 0

    def heard(self, frame: Tokens) -> None:
        """Compares with the path; a token that is another than proposed ends it."""
        if frame.position != self._known:
            return  # not what a server may say: whoever takes the frame ends the session
        path = self._ids[self._known :]
        same = next((i for i, (a, b) in enumerate(zip(path, frame.ids, strict=False)) if a != b), None)
        deviates = same is not None
        right = min(len(path), len(frame.ids)) if same is None else same
        self._learn(right, deviates, bool(path))
        self._known += len(frame.ids)
        if deviates or len(path) < len(frame.ids) or frame.epoch > self._epoch:
            first = self._known - len(frame.ids) + right
            self._ids[first:] = frame.ids[right:]
            self._chances = []
            if deviates or frame.epoch > self._epoch:
                self._fed, self._drafter.filled = min(self._fed, first), min(self._drafter.filled, first)
                self._epoch = max(self._epoch + deviates, frame.epoch)
        else:
            del self._chances[: len(frame.ids)]
        self._changed.set()

    def _learn(self, right: int, deviates: bool, any_path: bool) -> None:
        if not any_path:
            return
        drafted = right + deviates
        self._drafter.acceptance.seen(drafted, right)
        self.drafted, self.accepted = self.drafted + drafted, self.accepted + right
        self._counted(1, drafted, right)
        if self._asked is not None:
            at, drafts = self._asked
            self._asked = None
            self._drafter.pace.verified(self._session.link, self._known, drafts, time.monotonic() - at)

    async def run(self) -> None:
        try:
            await self._feed()  # the first token waits for nothing else
            while True:
                self._changed.clear()
                length = self._length() if await self._drafter.ready(self._ids[: self._known]) else None
                count = self._count(length) if length else 0
                if not length or not count:
                    went_on = await self._alone()
                elif self._early:
                    await self._drafter.read(tuple(self._ids[:-1]))
                    went_on = not self._early
                else:
                    await self._propose(length, count)
                    went_on = True
                if not went_on:
                    await self._changed.wait()
        finally:
            self._ended = True
            self._drafter.filled = min(self._drafter.filled, self._known)

    @property
    def _over(self) -> bool:
        return self._known >= self._limit or self._ids[self._known - 1] in self._stops

    @property
    def _early(self) -> bool:
        """The first token is not there, and will be soon."""
        return self._known == self._began and self._session.link.rtt_s <= NEAR_S

    def _length(self) -> Length:
        return self._drafter.length(self._session.link, self._known, self._alone_in is None)

    def _count(self, length: Length) -> int:
        """How many tokens to propose now."""
        path = len(self._ids) - self._known
        room = min(self._limit - 1, self._drafter.tiny.config.context) - len(self._ids)
        if room <= 0 or self._over or self._ids[-1] in self._stops:
            return 0
        if path and (path + length.tokens > length.window or not self._likely(self._chances)):
            return 0
        return min(length.tokens, room)

    def _likely(self, chances: Sequence[float]) -> bool:
        return self._drafter.steady or math.prod(chances) > LEAST

    async def _propose(self, length: Length, count: int) -> None:
        """Drafts behind the path and sends what of it is news; what has deviated meanwhile is dropped."""
        drafter, epoch, at = self._drafter, self._epoch, len(self._ids)
        path, chances = list(self._chances), list[float]()

        def more(made: Sequence[Drafted]) -> bool:
            """Whether to go on; on the compute thread, which may look at what the loop knows by now."""
            stale = self._ended or epoch != self._epoch or not _agree(made, self._ids[at:])
            if stale or made[-1][0] in self._stops:
                return False
            chances.append(drafter.chance(made[-1][1]))
            # Where nothing is under way that could be waited for, one more is to bring more than it holds up the rest.
            hurried = not path and not drafter.steady
            pays = not hurried or math.prod(chances) * length.token_s > length.draft_s
            return pays and self._likely([*path, *chances])

        made = await drafter.made(tuple(self._ids), count, more)
        if epoch != self._epoch:
            return
        known = self._ids[at:]  # by now, behind the path
        if not _agree(made, known):
            drafter.filled = at
        else:
            drafter.filled = at + len(made) - 1
            if len(made) > len(known):
                await self._send(made[len(known) :])

    async def _send(self, made: Sequence[Drafted]) -> None:
        tokens, position, epoch = tuple(token for token, _ in made), len(self._ids), self._epoch
        if position == self._known > self._began:
            self._asked = time.monotonic(), len(tokens)
        self._ids += tokens
        self._chances += [self._drafter.chance(entropy) for _, entropy in made]
        self._alone_in = None
        await self._session.send(Draft(position, tokens, epoch), watched=False)
        if epoch == self._epoch:
            await self._feed()

    async def _alone(self) -> bool:
        """Has the server go on without a draft where there is none; False when there is nothing to be said."""
        if len(self._ids) > self._known or self._over:
            return False
        if self._front is not None:
            owed = self._fed < self._known
            await self._feed()
            return owed
        if self._alone_in == self._epoch:
            return False
        self._alone_in = self._epoch
        await self._session.send(Draft(self._known, (), self._epoch), watched=False)
        return True

    async def _feed(self) -> None:
        """Sends the hidden states of all that is known and proposed."""
        if self._front is None:
            return
        epoch = self._epoch
        async with contextlib.aclosing(self._front.frames(tuple(self._ids), self._fed)) as frames:
            async for frame in frames:
                if epoch != self._epoch:
                    return
                await self._session.send(replace(frame, epoch=epoch), watched=False)
                if epoch == self._epoch:
                    self._fed = frame.position + frame.rows


def _agree(made: Sequence[Drafted], known: Sequence[int]) -> bool:
    return all(token == other for (token, _), other in zip(made, known, strict=False))
