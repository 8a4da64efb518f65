"""The tokens of one answer, made by one plan after the other: the text is the same, whoever makes the rest."""

from __future__ import annotations

import contextlib
import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Protocol

from edge_agent.conditions import Conditions
from edge_agent.decisions import Leg
from edge_agent.job import Job, Quality, Route
from edge_agent.learned import Learned
from edge_agent.plan import Plan
from edge_agent.replan import Move, Progress, Room
from edge_agent.replicas import Links
from edge_agent.runs.attempts import ELSEWHERE
from edge_agent.runs.cloud import Carried, CloudRun, Identity
from edge_agent.runs.local import PhoneModel, Seat, generate
from edge_agent.runs.pace import Pace
from edge_agent.runs.speculative import Drafter
from edge_agent.runs.split import Front
from protocol.errors import FaultCode, LinkLost, SessionFault
from split_model.tokenizer import ChatTokenizer

# Refusals that stand, and are told to an app that asked for the cloud by name.
OURS = frozenset({FaultCode.UNAUTHENTICATED, FaultCode.WRONG_MODEL, FaultCode.WRONG_TOKENIZER,
                  FaultCode.CONTEXT_LENGTH_EXCEEDED})  # fmt: skip


@dataclass(frozen=True, slots=True)
class Means:
    """What an answer may be made with."""

    tokenizer: ChatTokenizer
    tiny: PhoneModel
    full: PhoneModel
    links: Links
    me: Identity


class Watch(Protocol):
    """Looks out for a better plan; replan.Lookout, or a test's."""

    def due(self, at: Progress) -> bool:
        """Whether it is time to look."""

    def better(self, running: Leg, at: Progress, look: Callable[[], Conditions], room: Room) -> Move | None:
        """Where the rest goes on, if not where it runs."""

    def lost(self, at: Progress) -> None:
        """The cloud was lost, and the phone goes on."""


class Host(Protocol):
    """Whose answer it is."""

    means: Means
    learned: Learned
    watch: Callable[[Job, Conditions], Watch]

    def surroundings(self, legs: Legs) -> Conditions:
        """What a score of the rest depends on, now."""


class Legs:
    """One answer's legs: the one that runs, those that are over, and what they carried; `then`: when it was decided."""

    def __init__(self, host: Host, job: Job, plan: Plan, now: Conditions, seat: Seat | None):
        self.running = Leg(plan.route, plan.split, plan.draft, plan.model)
        self.over: list[Leg] = []
        self.moves, self.reason, self.carried = 0, plan.reason, Carried()
        self.held: int | None = None  # positions of the prompt that the phone held, where its layers were to run
        self.job, self.then = job, now
        self._host, self._means = host, host.means
        self._seat = seat  # of the tiny model, filled with the prompt
        self._watch, self._began = host.watch(job, now), time.monotonic()
        self._next: Move | None = None
        self._run: CloudRun | None = None  # of the leg that runs, or of the one before while its session is still open

    @property
    def known(self) -> tuple[Leg, ...]:
        """Every leg so far, in order."""
        return (*self.over, self.running)

    @property
    def stops(self) -> frozenset[int]:
        return self._phone.config.stops

    @property
    def tiny(self) -> bool:
        """Whether the tiny model answers, or has finished the answer."""
        return self.running.model == self._means.tiny.config.name

    @property
    def _phone(self) -> PhoneModel:
        return self._means.tiny if self.tiny else self._means.full

    async def tokens(self, log: list[int]) -> AsyncGenerator[int, None]:
        """The answer's tokens, each in the log by the time it is given out."""
        while True:
            self._next = None
            try:
                async with contextlib.aclosing(self._leg(log)) as tokens:
                    async for token in tokens:
                        self.running = replace(self.running, tokens=self.running.tokens + 1)
                        yield token
            except (LinkLost, SessionFault) as error:
                spare = self._spare(error, log)
                self._watch.lost(self._progress(log))
                self._turn(Leg(Route.LOCAL, 0, 0, spare.config.name))
                self.reason += f"; then the cloud was lost ({error}), and {spare.config.name} took over on the phone"
                continue
            if self._next is None:
                return
            self.moves += 1
            self.reason += f"; at token {len(log) - len(self.job.prompt)} moved to {self._next.words}"
            self._turn(self._next.leg)

    def _turn(self, leg: Leg) -> None:
        if self.running.tokens:
            self.over.append(self.running)
        self.running = leg

    async def _leg(self, log: list[int]) -> AsyncGenerator[int, None]:
        """One leg's tokens, until the answer is complete or its rest is better made by the next leg."""
        former, self._run = self._run, None
        try:
            made = self._local(log) if self.running.route is Route.LOCAL else self._shared(log)
            async with contextlib.aclosing(made) as tokens:
                async for token in tokens:
                    if former is not None:
                        await former.part()
                        former = None
                    yield token
                    self._next = self._better(log, token)
                    if self._next is not None:
                        if self._run is not None:
                            self._run.hand_on = self._next.leg.route is not Route.LOCAL
                        return
        finally:
            if former is not None:
                await former.part()

    def _better(self, log: list[int], token: int) -> Move | None:
        at, means = self._progress(log), self._means
        limit = min(len(self.job.prompt) + self.job.max_tokens, self._phone.config.context)
        if token in self.stops or at.length >= limit or not self._watch.due(at):
            return None
        exact = self.carried.exact and not self.job.wish.sparse
        room = Room(not means.full.free.locked(), not means.tiny.free.locked(), exact)
        return self._watch.better(self.running, at, partial(self._host.surroundings, self), room)

    def _progress(self, log: list[int]) -> Progress:
        moved = self._run.moved if self._run is not None else self.carried.bytes_up + self.carried.bytes_down
        return Progress(len(log), time.monotonic() - self._began, moved)

    async def _local(self, log: list[int]) -> AsyncGenerator[int, None]:
        phone, job = self._phone, self.job
        config = phone.config
        limit = min(len(job.prompt) + job.max_tokens, config.context) - len(log)
        held = self._seat if self.tiny else None
        seat = held or await phone.seat(config.layers, job.wish.sparse, log)
        self._found(seat)
        try:
            async with contextlib.aclosing(generate(seat, log, job.sampling, config.stops, limit)) as tokens:
                async for token in tokens:
                    log.append(token)
                    yield token
        finally:
            seat.close()

    async def _shared(self, log: list[int]) -> AsyncGenerator[int, None]:
        means, job, split = self._means, self.job, self.running.split
        config, bits = means.full.config, job.wish.hidden_bits
        seat = await means.full.seat(split, job.wish.sparse, log, front=True) if split else None
        self._found(seat)
        drafter = self._drafter() if self.running.route is Route.SPECULATIVE else None
        in_cloud = self.running.draft if self.running.route is Route.CLOUD else 0
        try:
            front = Front(seat, means.full.compute, len(job.prompt), bits) if seat else None
            run = CloudRun(job, split, means.links, means.me, config.stops, config.context, front, drafter, in_cloud)
            run.carried = self.carried
            self._run = run
            async with contextlib.aclosing(run.tokens(log)) as tokens:
                async for token in tokens:
                    yield token
        finally:
            if drafter is not None:
                drafter.close()
            if seat is not None:
                seat.close()

    def _found(self, seat: Seat | None) -> None:
        if seat is not None and not self.over and not self.running.tokens:
            self.held = seat.reused

    def _drafter(self) -> Drafter:
        """For the running leg; takes over the tiny model's place. A draft that was asked for stays as long as that."""
        means, job, leg = self._means, self.job, self.running
        seat, self._seat = self._seat, None
        pace, learned = Pace(means.tiny, means.full, leg.split, job.wish.sparse), self._host.learned
        return Drafter(means.tiny, pace, job.sampling, leg.draft, learned.acceptance(job.sampling),
                       steady=job.wish.draft is not None, chance=learned.chance(job.sampling), seat=seat)  # fmt: skip

    def _spare(self, error: LinkLost | SessionFault, log: list[int]) -> PhoneModel:
        """The model on the phone that goes on. Raises the error where quality or the error forbids it."""
        means, wish = self._means, self.job.wish
        code = error.code if isinstance(error, SessionFault) else None
        if code is not None and (code not in ELSEWHERE or (code in OURS and wish.route is not None)):
            raise error
        if means.full.whole:
            return means.full
        if wish.quality is Quality.BEST or len(log) >= means.tiny.config.context:
            raise error
        return means.tiny
