"""One answer on its way: tokens by the plan's route, made into text; the phone goes on when the cloud is lost."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass
from typing import Literal

from edge_agent.conditions import Conditions
from edge_agent.decisions import Decision, Outcome
from edge_agent.job import Job, Quality, Route
from edge_agent.plan import Plan
from edge_agent.replicas import Links
from edge_agent.runs.attempts import ELSEWHERE
from edge_agent.runs.cloud import Carried, CloudRun, Identity
from edge_agent.runs.local import PhoneModel, Seat, generate
from edge_agent.runs.split import Front
from protocol.errors import FaultCode, LinkLost, SessionFault, WireError
from protocol.frames import Reason
from protocol.reply import Piece
from split_model.tokenizer import ChatTokenizer, TextStream

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


class Answer:
    """An async iterator of pieces. Closing it, or forgetting it, gives back whatever it holds."""

    def __init__(self, means: Means, job: Job, plan: Plan, now: Conditions, seat: Seat | None, began: float,
                 finished: Callable[[Decision], None]):  # fmt: skip
        self.job, self.plan, self.now = job, plan, now
        self.outcome: Outcome | None = None
        self._means, self._began, self._finished = means, began, finished
        self._seat = seat  # of the tiny model, filled with the prompt
        if seat is not None:
            weakref.finalize(self, seat.close).atexit = False
        self._tokens = 0
        self._first_s: float | None = None
        self._route, self._split, self._model, self._reason = plan.route, plan.split, plan.model, plan.reason
        self._carried = Carried()
        self._aborted: WireError | None = None
        self._patience: asyncio.Timeout | None = None  # while a piece is being made
        self._pieces: AsyncGenerator[Piece, None] | None = None  # made late: until then nothing refers back to this

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Piece:
        if self._aborted is not None:
            raise self._aborted
        if self._pieces is None:
            self._pieces = self._run()
        try:
            async with asyncio.timeout(None) as self._patience:
                return await anext(self._pieces)
        except TimeoutError:
            if self._aborted is None:
                raise
            raise self._aborted from None
        finally:
            self._patience = None

    @property
    def so_far(self) -> Outcome:
        """What it has come to until now; `finish` is "running" until it has ended."""
        return self.outcome or self._ended("running")

    def abort(self, error: WireError) -> None:
        """Ends the answer where it stands; whoever reads it gets the error."""
        if self._aborted is None and self._patience is not None:
            self._patience.reschedule(0)
        self._aborted = self._aborted or error
        if self._pieces is None:
            self._end("cancelled")

    async def aclose(self) -> None:
        if self._pieces is not None:
            await self._pieces.aclose()
        self._end("cancelled")  # for one that never began

    async def _run(self) -> AsyncGenerator[Piece, None]:
        text = TextStream(self._means.tokenizer, self.job.stop)
        log = list(self.job.prompt)
        finish = "cancelled"
        try:
            async with contextlib.aclosing(self._made(log)) as tokens:
                async for token in tokens:
                    self._note_token()
                    new = "" if token in self._stops else text.push(token)
                    if text.stopped:
                        break
                    yield Piece(new, 1)
            ended: Literal["stop", "length"] = "stop" if text.stopped or self._stopped(log) else "length"
            finish = ended
            yield Piece(new + text.finish(), 1, ended) if text.stopped else Piece(text.finish(), 0, ended)
        except Exception as error:
            finish = f"failed: {error if isinstance(error, WireError) else type(error).__name__}"
            raise
        finally:
            self._end(finish)

    def _note_token(self) -> None:
        self._tokens += 1
        if self._first_s is None:
            self._first_s = time.monotonic() - self._began

    def _stopped(self, log: list[int]) -> bool:
        if self._carried.finish is Reason.STOP:
            return True
        return self._tokens > 0 and log[-1] in self._stops

    async def _made(self, log: list[int]) -> AsyncGenerator[int, None]:
        """The answer's tokens, each in the log by the time it is given out."""
        if self.plan.route is Route.LOCAL:
            phone = self._phone(self.plan.model)
        else:
            try:
                async with contextlib.aclosing(self._shared(log)) as tokens:
                    async for token in tokens:
                        yield token
                return
            except (LinkLost, SessionFault) as error:
                phone = self._spare(error, log)
                self._route, self._split, self._model = Route.LOCAL, 0, phone.config.name
                self._reason += f"; then the cloud was lost ({error}), and {self._model} finished on the phone"
        async with contextlib.aclosing(self._local(phone, log)) as tokens:
            async for token in tokens:
                yield token

    async def _local(self, phone: PhoneModel, log: list[int]) -> AsyncGenerator[int, None]:
        config, job = phone.config, self.job
        limit = min(len(job.prompt) + job.max_tokens, config.context) - len(log)
        held = self._seat if phone is self._means.tiny else None
        seat = held or await phone.seat(config.layers)
        try:
            async with contextlib.aclosing(generate(seat, log, job.sampling, config.stops, limit)) as tokens:
                async for token in tokens:
                    log.append(token)
                    yield token
        finally:
            seat.close()

    async def _shared(self, log: list[int]) -> AsyncGenerator[int, None]:
        means, split = self._means, self.plan.split
        seat = await means.full.seat(split) if split else None
        try:
            config, bits = means.full.config, self.job.wish.hidden_bits
            front = Front(seat, means.full.compute, len(self.job.prompt), bits) if seat else None
            run = CloudRun(self.job, split, means.links, means.me, config.stops, config.context, front)
            self._carried = run.carried
            async with contextlib.aclosing(run.tokens(log)) as tokens:
                async for token in tokens:
                    yield token
        finally:
            if seat is not None:
                seat.close()

    def _spare(self, error: LinkLost | SessionFault, log: list[int]) -> PhoneModel:
        """The model on the phone that finishes the answer. Raises the error where quality or the error forbids it."""
        means, wish = self._means, self.job.wish
        code = error.code if isinstance(error, SessionFault) else None
        if code is not None and (code not in ELSEWHERE or (code in OURS and wish.route is not None)):
            raise error
        if means.full.whole:
            return means.full
        if wish.quality is Quality.BEST or len(log) >= means.tiny.config.context:
            raise error
        return means.tiny

    @property
    def _stops(self) -> frozenset[int]:
        return self._phone(self._model).config.stops

    def _phone(self, model: str) -> PhoneModel:
        return self._means.tiny if model == self._means.tiny.config.name else self._means.full

    def _end(self, finish: str) -> None:
        """Books the answer, once, and gives its place back."""
        if self.outcome is None:
            self.outcome = self._ended(finish)
            self._finished(Decision(self.job, self.plan, self.now, self.outcome))
        if self._seat is not None:
            self._seat.close()

    def _ended(self, finish: str) -> Outcome:
        plan, carried = self.plan, self._carried
        tiny = self._model == self._means.tiny.config.name
        return Outcome(
            route=self._route,
            split=self._split,
            model=self._model,
            finish=finish,
            tokens=self._tokens,
            first_token_s=self._first_s,
            total_s=time.monotonic() - self._began,
            exact=not tiny and carried.exact and self._means.full.model.exact,
            degraded=plan.degraded or (tiny and plan.route is not Route.LOCAL),
            reason=self._reason,
            transport=carried.transport,
            replica=carried.replica,
            attempts=carried.attempts,
            early_data=carried.early,
            bytes_up=carried.bytes_up,
            bytes_down=carried.bytes_down,
            queue_s=carried.queue_s,
            cloud_compute_s=carried.compute_s,
        )
