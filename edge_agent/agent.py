"""The agent: models, replicas and memory of the past, and one decision per request."""

from __future__ import annotations

import asyncio
import time
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from functools import partial

from edge_agent.answer import Answer
from edge_agent.conditions import Conditions, Machine, Meter, Phone, hottest, network_kind
from edge_agent.config import AgentConfig
from edge_agent.cost import Pair
from edge_agent.credentials import Credentials
from edge_agent.decisions import Decision, Decisions
from edge_agent.governor import Governor, governed
from edge_agent.idle import Idle, Written
from edge_agent.job import Job, Privacy, Quality, Route
from edge_agent.learned import Agreement, Learned, sampled
from edge_agent.legs import Legs, Means, Watch
from edge_agent.link import Link
from edge_agent.metrics import Metrics
from edge_agent.plan import Plan, choose
from edge_agent.power import Sensors
from edge_agent.replan import Lookout
from edge_agent.replicas import Links
from edge_agent.runs.cloud import Identity
from edge_agent.runs.local import PhoneModel, Seat
from edge_agent.state import State
from protocol.errors import FaultCode, SessionFault
from protocol.frames import Digests
from protocol.transport.base import Trust
from split_model.compute import Compute, release_heap
from split_model.config import ModelConfig, ModelError
from split_model.model import Model
from split_model.part import Part
from split_model.prefix import expiring
from split_model.tokenizer import ChatTokenizer


class Busy(Exception):
    """As many answers are under way as may be."""


@dataclass(frozen=True, slots=True)
class Decided:
    """A job's plan and its grounds; `seat` has the prompt in the tiny model's KV and is to be used or closed."""

    job: Job
    plan: Plan
    now: Conditions
    seat: Seat | None
    began: float

    def close(self) -> None:
        """For a job that is not run."""
        if self.seat is not None:
            self.seat.close()


class Agent:
    """One user's models and replicas."""

    def __init__(self, config: AgentConfig, means: Means, machine: Machine, learned: Learned,
                 governor: Governor):  # fmt: skip
        self.config, self.means, self.learned = config, means, learned
        self.pair = Pair(means.tiny.config, means.full.config, means.full.model.stop)
        self.decisions = Decisions()
        self.draining = False
        self.watch: Callable[[Job, Conditions], Watch] = partial(Lookout, self.pair)
        self._machine, self._governor, self._deciding = machine, governor, 0
        self.idle = Idle(means.tiny, learned, lambda: bool(self._deciding or self.under_way), self._able)
        self._answers: weakref.WeakSet[Answer] = weakref.WeakSet()
        self.metrics = Metrics(lambda: len(self.under_way), lambda: float(bool(means.links) and means.links.reachable))

    @property
    def under_way(self) -> list[Answer]:
        """Answers that were begun and have not ended."""
        return [answer for answer in self._answers if answer.outcome is None]

    def conditions(self, aside: Legs | None = None) -> Conditions:
        """What a score depends on, now; the legs `aside` take nothing of the phone."""
        means, config, ranked = self.means, self.config, self.means.links.ranked()
        return Conditions(
            phone=self._phone(aside),
            cloud=ranked[0].cloud(config.price_s_per_mb, len(means.me.token())) if ranked else None,
            answer_tokens=self.learned.lengths.expected(None, False),
            agreement=self.learned.agreement.mean(),
            alpha=config.alpha,
            missed=self.learned.surprises.misses,
        )

    def _phone(self, aside: Legs | None = None) -> Phone:
        means, load = self.means, self._machine.load
        others = (answer.legs for answer in self.under_way if answer.legs is not aside)
        here = sum(legs.running.route is not Route.CLOUD for legs in others)
        return self._machine.phone(
            means.tiny.rates(load), means.full.rates(load), here, self._governor.power,
            means.tiny.rates(load, "draft"), means.full.rates(load, "front"),
        )  # fmt: skip

    async def decide(self, job: Job) -> Decided:
        """Scores every plan and picks one. Raises NoPlan, or ValueError for a wish that no plan can meet."""
        self._deciding += 1
        try:
            return await self._decided(job)
        finally:
            self._deciding -= 1
            self.idle.wake()

    async def _decided(self, job: Job) -> Decided:
        began, seat, kind = time.monotonic(), None, sampled(job.sampling)
        shares, lengths = self.learned.agreement, self.learned.lengths
        now = replace(self.conditions(), agreement=shares.mean(kind), answer_tokens=lengths.expected(None, kind))
        now = replace(now, places=self.learned.places(job.sampling, now.agreement))
        now = self._held(job, now)
        if self._worth_asking(job, now):
            seat = await self.means.tiny.seat(self.pair.tiny.layers, job.wish.sparse, job.prompt)
        try:
            if seat is not None:
                async for _ in seat.run(job.prompt[seat.position :]):
                    pass
                entropy = await seat.entropy()
                agreement, expected = shares.at(entropy, kind), lengths.expected(entropy, kind)
                places = self.learned.places(job.sampling, agreement)
                now = replace(now, agreement=agreement, places=places, answer_tokens=expected, entropy=entropy,
                              held_tiny=len(job.prompt))  # fmt: skip
            plan = choose(job, self.pair, now)
        except BaseException:
            if seat is not None:
                seat.close()
            raise
        if seat is not None and plan.model != self.pair.tiny.name and plan.route is not Route.SPECULATIVE:
            seat.close()
            seat = None
        return Decided(job, plan, now, seat, began)

    def _held(self, job: Job, now: Conditions) -> Conditions:
        """With what each site holds of the prompt already, by earlier turns."""
        tiny, full, ranked = self.means.tiny, self.means.full, self.means.links.ranked()
        ids, sparse = job.prompt, job.wish.sparse
        fronts = ((full.held(ids, split, sparse, front=True), split) for split in range(1, self.pair.edge_layers + 1))
        held_front, front = max(fronts, default=(0, 0))
        return replace(now, held_tiny=tiny.held(ids, self.pair.tiny.layers, sparse), held_front=held_front, front=front,
                       held_full=full.held(ids, self.pair.full.layers, sparse) if full.whole else 0,
                       held_cloud=ranked[0].left.held(ids, sparse) if ranked else 0)  # fmt: skip

    def answer(self, decided: Decided, jobs: Sequence[Job]) -> list[Answer]:
        """Begins the answers of one request, all by the plan of the first. Raises Busy."""
        if self.draining or len(self.under_way) + len(jobs) > self.config.requests:
            decided.close()
            why = "shutting down" if self.draining else f"limit {self.config.requests}"
            raise Busy(f"{len(self.under_way)} answers under way, {why}")
        seats = [decided.seat] + [None] * (len(jobs) - 1)
        answers = [
            Answer(self, job, decided.plan, decided.now, seat, decided.began)
            for job, seat in zip(jobs, seats, strict=True)
        ]
        self._answers.update(answers)
        return answers

    def abort(self) -> None:
        """Ends every answer with a fault that says why."""
        for answer in self.under_way:
            answer.abort(SessionFault(FaultCode.DRAINING, "the agent is shutting down", 1.0))

    def surroundings(self, legs: Legs) -> Conditions:
        """What the rest of an answer depends on, now, with what was known of it when it was decided."""
        for link in self.means.links.links:
            link.observe()
        then, places = legs.then, self.learned.places(legs.job.sampling, legs.then.agreement)
        now = replace(self.conditions(aside=legs), answer_tokens=then.answer_tokens, agreement=then.agreement,
                      places=places, entropy=then.entropy)  # fmt: skip
        return self._held(legs.job, now)

    def finished(self, decision: Decision, log: Sequence[int]) -> None:
        """Books an answer, and keeps the full model's for the tiny one to look at."""
        self.decisions.add(decision)
        self.metrics.finished(decision)
        job, outcome = decision.job, decision.outcome
        rounded = decision.plan.hidden_bits == 8 or job.wish.sparse
        whole = outcome.complete and outcome.model == self.pair.full.name and not rounded
        written = Written(tuple(log), len(job.prompt), job.sampling)
        private = job.wish.privacy is Privacy.DEVICE
        self.learned.finished(decision, rescored=whole and not private and self.idle.offer(written))
        self.idle.wake()

    def _able(self) -> bool:
        """Whether the phone has power to spare."""
        return self._phone().spare

    def _worth_asking(self, job: Job, now: Conditions) -> bool:
        """Whether the tiny model's entropy, from the best bin to the worst, could change the plan or its mark."""
        wish, tiny = job.wish, self.pair.tiny
        if wish.quality is not Quality.BALANCED or wish.tiny:
            return False
        if len(job.prompt) >= tiny.context or self.means.tiny.free.locked():
            return False
        low, high = self.learned.agreement.span(sampled(job.sampling))
        if low == high:
            return False
        best, worst = (choose(job, self.pair, replace(now, agreement=one)) for one in (high, low))
        return best.model == tiny.name and (best.model, best.degraded) != (worst.model, worst.degraded)


@asynccontextmanager
async def running(config: AgentConfig, links: Sequence[Link] | None = None) -> AsyncIterator[Agent]:
    """Loads both models and watches the replicas; on leaving, everything is closed and what was learned is kept.

    `links` replaces those to `config.clouds`. Raises ModelError.
    """
    async with AsyncExitStack() as stack:
        state = State(config.state)
        compute = Compute(config.threads)
        stack.push_async_callback(compute.aclose)
        machine = Machine()
        meter = Meter(state)
        tokenizer = await asyncio.to_thread(_tokenizer, config)
        tiny, full = await _models(config, compute, meter)
        stack.callback(meter.save)
        replicas = Links(_links(config) if links is None else links, state, network_kind if links is None else None)
        stack.push_async_callback(replicas.aclose)
        digests = Digests(full.model.weights_digest, tokenizer.digest, full.model.numerics)
        credentials = Credentials(config.token, config.token_file, config.token_urls, config.ca)
        await stack.enter_async_context(credentials.renewing())
        me = Identity(full.config.name, digests, full.model.exact, credentials.token)
        key = f"{tiny.model.weights_digest.hex()}-{full.model.weights_digest.hex()}"
        pair = Pair(tiny.config, full.config, full.model.stop)
        learned = Learned(Agreement.read(config.tiny), pair, state, key)
        stack.callback(learned.save)
        replicas.start()
        release_heap()
        governor = Governor(config.power_limit_w, config.temperature_limit)
        for phone in (tiny, full):
            phone.share = lambda: governor.power.share
        await stack.enter_async_context(governed(governor, Sensors(config.sensors, hottest)))
        agent = Agent(config, Means(tokenizer, tiny, full, replicas, me), machine, learned, governor)
        await stack.enter_async_context(expiring(compute, tiny.prefixes, full.prefixes))
        await stack.enter_async_context(agent.idle.running())
        yield agent


async def _models(config: AgentConfig, compute: Compute, meter: Meter) -> tuple[PhoneModel, PhoneModel]:
    """The tiny model whole, and of the full one what the phone is to hold. Raises ModelError."""
    shape, packed = ModelConfig.read(config.full), Part.read(config.full)
    there = shape.layers if packed is None else packed.layers
    if packed is not None and there > shape.layers:
        raise ModelError(f"{packed.path}: {there} layers of a model with {shape.layers}")
    held = there if config.edge_layers is None else config.edge_layers
    if not 0 <= held <= there:
        raise ModelError(f"{held} layers of {config.full} on the phone, it has {there}")
    load = partial(Model.load, context=config.context)
    part = partial(load, embedding=held > 0, head=held == shape.layers, precision=config.precision)
    tiny = await compute.call(partial(load, config.tiny, precision=config.tiny_precision))
    full = await compute.call(part, config.full, 0, held)
    if tiny.config.name == full.config.name:
        raise ModelError(f"{config.tiny} and {config.full} have the same name {tiny.config.name!r}")
    phones = PhoneModel(compute, tiny, config.slots, meter), PhoneModel(compute, full, config.slots, meter)
    for phone in phones:
        await phone.calibrate()
    return phones


def _tokenizer(config: AgentConfig) -> ChatTokenizer:
    """The one that both models share."""
    tokenizer, other = ChatTokenizer.load(config.full), ChatTokenizer.load(config.tiny)
    if tokenizer.digest != other.digest:
        raise ModelError(f"{config.tiny} and {config.full} have different tokenizers; a pair shares one")
    return tokenizer


def _links(config: AgentConfig) -> list[Link]:
    # imported late: gRPC and aioquic cost memory and time that a phone without a cloud need not spend
    from protocol.transport.grpc import connect_grpc
    from protocol.transport.quic import connect_quic
    from protocol.transport.tickets import TicketStore

    trust, tickets = Trust(config.ca), TicketStore(config.state / "tickets")
    return [
        Link(address, partial(connect_quic, trust=trust, tickets=tickets), partial(connect_grpc, trust=trust))
        for address in config.clouds
    ]
