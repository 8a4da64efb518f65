"""The step loop: between the event loop, which submits rows, and the compute thread, which runs them."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from cloud_server.arrivals import Drafts
from cloud_server.drafter import Drafter
from cloud_server.engine import Engine
from cloud_server.rows import Emitted, Part, Row, Step
from cloud_server.scheduler import Scheduler
from protocol.errors import FaultCode, SessionFault
from protocol.frames import Draft, Hidden
from protocol.tensor import unpack
from split_model.compute import Compute
from split_model.flops import head_flops, layers_flops
from split_model.sampling import Sampling
from split_model.sparse import BUDGET

log = logging.getLogger(__name__)
GATHER = 0.5  # of the last step's time: the longest wait for rows on their way back, if all of them are
WARM_DRAFT = 8  # tokens of a draft, at most, while the first rates are measured
MOST_FIRST = 0.75  # of a step over many positions that its first one may be thought to have taken
MEMORY = 0.9  # weight of the past in every running average


@dataclass(frozen=True, slots=True)
class WorkerLoad:
    """The worker's state after its latest step; rates in FLOP/s."""

    running: int = 0
    waiting: int = 0
    steps: int = 0
    tokens: int = 0
    slots: int = 1
    prefill_rate: float = 0.0
    decode_rate: float = 0.0
    draft_rate: float = 0.0  # of the tiny model here
    residence_s: float = 1.0  # how long a row keeps its slot

    @property
    def wait_s(self) -> float:
        """Expected wait for a slot: the line drains `slots` rows in one residence."""
        behind = self.running + self.waiting + 1 - self.slots
        return max(0, behind) * self.residence_s / self.slots


StepSeen = Callable[[Step, float], None]  # the step and its seconds; called on the event loop


class Worker:
    """Owns the scheduler and the engine; its public methods are called on the event loop and never wait."""

    def __init__(
        self, compute: Compute, engine: Engine, scheduler: Scheduler, slots: int, seen: StepSeen | None = None,
        drafter: Drafter | None = None,
    ):  # fmt: skip
        self._compute, self._engine, self._scheduler, self.seen = compute, engine, scheduler, seen
        self._drafter = drafter
        self._stepping = False
        self._awaited: list[Row] = []  # rows that the next step waits for, until `_until`
        self._until = 0.0
        self.load = WorkerLoad(slots=slots)

    def submit(self, row: Row, instead_of: Row | None = None) -> None:
        """Queues the row; `instead_of` hands its slot on."""
        self._post(self._submit, row, instead_of)

    def feed(self, row: Row, frame: Hidden | Draft) -> None:
        """Gives a row what its phone sent; what it should not have sent ends the row with a fault on its stream."""
        self._post(self._feed, row, frame, time.perf_counter())

    def pause(self, row: Row, paused: bool) -> None:
        self._post(self._pause, row, paused)

    def drop(self, row: Row) -> None:
        """Frees the row's slot before the next step; harmless for a row that has ended."""
        self._post(self._drop, row)

    def do(self, function: Callable[..., None], *arguments: object) -> None:
        """Runs it on the compute thread, between two steps."""
        self._post(function, *arguments)

    def _post(self, function: Callable[..., None], *arguments: object) -> None:
        with contextlib.suppress(RuntimeError):  # the compute thread is closed, and every row with it
            self._compute.post(function, *arguments)

    async def warm_up(self, length: int) -> None:
        """Runs a prompt of `length` tokens and a few more, three times: the first rates are measured, warm ones."""
        for warm in (False, False, True):
            self.load = replace(self.load, prefill_rate=0.0, decode_rate=self.load.decode_rate if warm else 0.0)
            await self._rehearse(Row(0, [1] * length, length, length, 8, Sampling(), None))
        if self._drafter is not None:
            for warm in (False, False, True):
                drafts = Drafts(WARM_DRAFT, local=True)
                await self._rehearse(Row(0, [1] * length, length, length, 4 * WARM_DRAFT, Sampling(), None, drafts))
                self._post(self._drafter.forget, not warm)

    async def _rehearse(self, row: Row) -> None:
        self.submit(row)
        try:
            while (await row.stream.next()).finish is None:
                pass
        finally:
            self.drop(row)

    def _submit(self, row: Row, instead_of: Row | None) -> None:
        if instead_of is None:
            self._scheduler.add(row)
        else:
            self._scheduler.hand_on(instead_of, row)
        self._wake()

    def _feed(self, row: Row, frame: Hidden | Draft, came: float) -> None:
        if row.ended:
            return
        starved = row.starved
        try:
            if isinstance(frame, Draft):
                row.propose(frame)
            elif row.expects(frame):
                row.hidden.push(unpack(frame, self._engine.model.config.width), frame.size)
            else:
                self._compute.to_loop(row.stream.computed.set)  # its bytes are free again
        except SessionFault as fault:
            self._scheduler.drop(row)
            self._compute.to_loop(row.stream.put, fault)
        if starved and not row.starved:
            row.away_s = came - row.left
        self._wake()

    def _pause(self, row: Row, paused: bool) -> None:
        row.paused = paused
        self._wake()

    def _drop(self, row: Row) -> None:
        self._scheduler.drop(row)
        self._wake()

    def _wake(self) -> None:
        if not self._stepping:
            self._stepping = True
            self._post(self._step)

    def _step(self) -> None:
        self._gather()
        began = time.perf_counter()
        self._draft()
        step = self._scheduler.plan()
        if step is None:
            self._stepping = False
            self._publish()
            return
        try:
            self._run(step, time.perf_counter() - began)
        except Exception:  # whatever it is, the other rows go on
            log.exception("a step of %d rows failed", len(step.parts))
            self._fail(step)
        self._post(self._step)

    def _draft(self) -> None:
        if self._drafter is None:
            return
        try:
            self._drafter.propose(self._scheduler.rows, self._scheduler.step_tokens)
        except Exception:  # whatever it is, every answer can do without
            log.exception("drafting failed, there will be no more of it")
            self._drafter = None

    def _await_back(self, rows: list[Row], took: float) -> None:
        """The next step waits for rows that came back in time last time, the longer the greater their share is.

        One full step beats two partial ones, but few rows must not hold up many.
        """
        now = time.perf_counter()
        bound_s = GATHER * took * len(rows) / max(1, len(self._scheduler.rows))
        self._until = now + bound_s
        self._awaited = [row for row in rows if row.away_s < bound_s]
        for row in rows:
            row.left = now

    def _gather(self) -> None:
        """Lets awaited rows join the step that is about to be planned."""
        while any(row.starved for row in self._awaited):
            left = self._until - time.perf_counter()
            if left <= 0 or not self._compute.do_next(left):
                break
        self._awaited = []

    def _run(self, step: Step, drafting_s: float) -> None:
        began = time.perf_counter()
        emitted = self._scheduler.apply(step, self._engine.run(step))
        took = time.perf_counter() - began
        for part in step.parts:
            part.row.compute_s += drafting_s + took
        self._measure(step, took, emitted)
        if self._drafter is not None:
            self._drafter.learn(step, took, emitted)
        self._await_back([row for row, _ in emitted if row.starved], took)
        self._compute.to_loop(self._deliver, emitted, step, drafting_s + took)

    def _fail(self, step: Step) -> None:
        fault = SessionFault(FaultCode.INTERNAL, "the step failed on the server")
        for part in step.parts:
            self._scheduler.drop(part.row, keep=False)
            self._compute.to_loop(part.row.stream.put, fault)

    def _deliver(self, emitted: list[tuple[Row, Emitted]], step: Step, took: float) -> None:
        for part in step.parts:
            part.row.stream.computed.set()
        for row, item in emitted:
            row.stream.put(item)
        if self.seen is not None:
            self.seen(step, took)

    def _measure(self, step: Step, took: float, emitted: list[tuple[Row, Emitted]]) -> None:
        now, done = self.load, [self.flops(part) for part in step.parts]
        prefill, decode = now.prefill_rate, now.decode_rate
        if all(part.count == 1 for part in step.parts):
            decode = _average(decode, sum(done) / len(done) / took)
        elif step.tokens >= 32 and all(part.wanted <= 1 for part in step.parts):
            # What the step took beyond its first position: phones reckon with both rates.
            first = sum(done) / step.tokens if decode else 0.0
            first_s = min(first / decode, MOST_FIRST * took) if decode else 0.0
            prefill = _average(prefill, (sum(done) - first) / (took - first_s))
        residence = now.residence_s
        for row, item in emitted:
            if item.finish is not None and row.started is not None:
                residence = _average(residence, time.monotonic() - row.started)
        self.load = replace(now, prefill_rate=prefill, decode_rate=decode, residence_s=residence)
        self._publish(steps=1, tokens=step.tokens)

    def flops(self, part: Part) -> float:
        """What this server computed of a part: the layers from its entry on, and the head where tokens were drawn."""
        config, row = self._engine.model.config, part.row
        chooses = row.sparse and part.count <= BUDGET.together
        layers = layers_flops(config, range(row.entry, config.layers), part.start, part.count, chooses)
        return layers + part.wanted * head_flops(config)

    def _publish(self, steps: int = 0, tokens: int = 0) -> None:
        self.load = replace(
            self.load,
            running=len(self._scheduler.rows),
            waiting=len(self._scheduler.waiting),
            steps=self.load.steps + steps,
            tokens=self.load.tokens + tokens,
            draft_rate=self._drafter.rate if self._drafter else 0.0,
        )


def _average(old: float, new: float) -> float:
    return new if old == 0 else MEMORY * old + (1 - MEMORY) * new
