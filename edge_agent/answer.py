"""One answer on its way: its tokens made into text, its end booked."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import AsyncGenerator, Sequence
from typing import Literal, Protocol

from edge_agent.conditions import Conditions
from edge_agent.decisions import Decision, Outcome
from edge_agent.job import Job, Route
from edge_agent.legs import Host, Legs
from edge_agent.plan import Plan
from edge_agent.runs.local import Seat
from protocol.errors import WireError
from protocol.frames import Reason
from protocol.reply import Piece
from split_model.tokenizer import TextStream


class Owner(Host, Protocol):
    """Whose answer it is, and who keeps the book."""

    def finished(self, decision: Decision, log: Sequence[int]) -> None:
        """An answer has ended, with this token log."""


class Answer:
    """An async iterator of pieces. Closing it, or forgetting it, gives back whatever it holds."""

    def __init__(self, owner: Owner, job: Job, plan: Plan, now: Conditions, seat: Seat | None, began: float):
        self.job, self.plan, self.now = job, plan, now
        self.outcome: Outcome | None = None
        self.legs = Legs(owner, job, plan, now, seat)
        self._owner, self._means, self._began = owner, owner.means, began
        self._seat = seat  # of the tiny model, filled with the prompt
        if seat is not None:
            weakref.finalize(self, seat.close).atexit = False
        self._log = list(job.prompt)
        self._tokens = 0
        self._first_s: float | None = None
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
        log = self._log
        finish = "cancelled"
        try:
            async with contextlib.aclosing(self.legs.tokens(log)) as tokens:
                async for token in tokens:
                    self._note_token()
                    new = "" if token in self.legs.stops else text.push(token)
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
        if self.legs.carried.finish is Reason.STOP:
            return True
        return self._tokens > 0 and log[-1] in self.legs.stops

    def _end(self, finish: str) -> None:
        """Books the answer, once, and gives its place back."""
        if self.outcome is None:
            self.outcome = self._ended(finish)
            self._owner.finished(Decision(self.job, self.plan, self.now, self.outcome), self._log)
        if self._seat is not None:
            self._seat.close()

    def _ended(self, finish: str) -> Outcome:
        plan, legs, carried = self.plan, self.legs, self.legs.carried
        return Outcome(
            route=legs.running.route,
            split=legs.running.split,
            model=legs.running.model,
            finish=finish,
            tokens=self._tokens,
            first_token_s=self._first_s,
            total_s=time.monotonic() - self._began,
            exact=not legs.tiny and not self.job.wish.sparse and carried.exact and self._means.full.model.exact,
            degraded=plan.degraded or (legs.tiny and plan.route is not Route.LOCAL),
            reason=legs.reason,
            transport=carried.transport,
            replica=carried.replica,
            attempts=carried.attempts,
            early_data=carried.early,
            bytes_up=carried.bytes_up,
            bytes_down=carried.bytes_down,
            queue_s=carried.queue_s,
            cloud_compute_s=carried.compute_s,
            held_edge=legs.held,
            held_cloud=carried.held,
            rounds=carried.rounds,
            drafted=carried.drafted,
            accepted=carried.accepted,
            moves=legs.moves,
            legs=legs.known,
        )
