"""While nothing is under way, the tiny model looks at what the full one has answered."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import torch

from edge_agent.learned import Learned, sampled
from edge_agent.runs.local import PhoneModel, Seat
from protocol.process import either
from split_model.model import Model
from split_model.sampling import Sampling, sample

log = logging.getLogger(__name__)
WAITING = 16  # answers, at most; of more, the oldest go
PIECE = 32  # positions: as long as an answer that begins may have to wait
QUIET_S = 2.0  # without an answer before any is looked at
AGAIN_S = 30.0  # until a phone is asked again that had no power to spare


@dataclass(frozen=True, slots=True)
class Written:
    """One answer of the full model: the ids of prompt and answer."""

    ids: tuple[int, ...]
    prompt: int
    sampling: Sampling


@dataclass(frozen=True, slots=True)
class Looked:
    """The tiny model's entropy (nats) at each token of an answer, and whether its own token was the same."""

    tokens: tuple[tuple[float, bool], ...]

    @property
    def agreed(self) -> int:
        return sum(same for _, same in self.tokens)


class Idle:
    """Scores one answer after the other, a small piece at a time, and gives way to whatever else there is to do.

    `busy`: answers are under way; `able`: the phone has power to spare. Both are asked before every piece.
    """

    def __init__(self, tiny: PhoneModel, learned: Learned, busy: Callable[[], bool], able: Callable[[], bool]):
        self._tiny, self._learned, self._busy, self._able = tiny, learned, busy, able
        self._written: deque[Written] = deque(maxlen=WAITING)
        self._changed = asyncio.Event()
        self.scored = 0

    def offer(self, written: Written) -> bool:
        """An answer of the full model's; returns whether it will be looked at, once the phone is left alone."""
        if not written.prompt < len(written.ids) < self._tiny.config.context or not self._able():
            return False
        self._written.append(written)
        self.wake()
        return True

    def wake(self) -> None:
        """Something has ended, or changed otherwise."""
        self._changed.set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Looks at answers until the block ends; nothing is under way then."""
        task = asyncio.create_task(self._run())
        task.add_done_callback(_complain)
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _run(self) -> None:
        while True:
            await self._quiet()
            written = self._written.pop()
            looked = await self._look(written)
            if looked is None:
                self._written.append(written)
            else:
                entropy, how = looked.tokens[0][0], sampled(written.sampling)
                self._learned.agreement.seen(entropy, how, looked.agreed, len(looked.tokens))
                self._learned.agreement.seen_tokens(how, looked.tokens)
                self.scored += 1

    async def _quiet(self) -> None:
        """Returns when there is something to look at, and has been nothing else to do for a while."""
        while True:
            self._changed.clear()
            if not self._written or self._busy():
                await self._changed.wait()
                continue
            if not self._able():
                await either(self._changed, limit_s=AGAIN_S)
                continue
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(QUIET_S):
                    await self._changed.wait()
                continue
            if not self._busy():
                return

    async def _look(self, written: Written) -> Looked | None:
        """None where something else came up."""
        if self._tiny.free.locked():
            return None
        seat = await self._tiny.seat(self._tiny.config.layers, ids=written.ids[: written.prompt])
        try:
            return await self._scored(seat, written)
        finally:
            seat.close()

    async def _scored(self, seat: Seat, written: Written) -> Looked | None:
        found: list[tuple[float, bool]] = []
        for start in range(seat.position, len(written.ids) - 1, PIECE):
            if self._busy() or not self._able():
                return None
            found += await self._tiny.compute.call(_judge, seat, self._tiny.model, written, start)
        return Looked(tuple(found))


def _judge(seat: Seat, model: Model, written: Written, start: int) -> list[tuple[float, bool]]:
    """The piece of positions from `start` on: of those before an answer's token, the entropy, and whether the token
    drawn there is the answer's. On the compute thread."""
    ids, end = written.ids, min(start + PIECE, len(written.ids) - 1)
    x, _ = seat.piece(ids[start:end], None, measured=False)
    first = max(start, written.prompt - 1)
    if first >= end:
        return []
    logits = model.logits(x[first - start :])
    chances = torch.log_softmax(logits.double(), dim=-1)
    entropies = (-(chances.exp() * chances).sum(-1)).clamp(min=0.0).tolist()
    drawn = sample(logits, range(first + 1, end + 1), [written.sampling] * (end - first))
    right = ids[first + 1 : end + 1]
    return [(entropy, token == one) for entropy, token, one in zip(entropies, drawn, right, strict=True)]


def _complain(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()) is not None:
        log.error("answers are no longer looked at while idle", exc_info=error)
