"""A model's layers on this phone: KV slots, and pieces of work that share the compute thread."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Collection, Sequence
from typing import NamedTuple, TypeVar

import torch

from edge_agent.conditions import Meter, Rates
from split_model.attention import Span
from split_model.compute import Compute
from split_model.flops import head_flops, layer_flops, layers_flops
from split_model.model import Model
from split_model.prefix import Prefixes, common
from split_model.sampling import Sampling, sample
from split_model.sparse import BUDGET
from split_model.states import States

CHUNK = 128  # prompt positions in one piece of work
MANY = 16  # positions from which on a piece counts as prefill
KEEP_S = 1800.0  # that a slot is kept for the conversation's next turn
PRIOR = Rates(10e9, 4e9)  # FLOP/s, for a model of which nothing is held
T = TypeVar("T")
Drafted = tuple[int, float]  # a token, and the entropy in nats of what it was drawn from


class PhoneModel:
    """Layers `[0, stop)` of a model with `slots` KV slots; asking for more waits."""

    def __init__(self, compute: Compute, model: Model, slots: int, meter: Meter):
        self.compute, self.model, self.meter = compute, model, meter
        self.config = model.config
        cache = model.new_cache(slots)
        self.states = States(slots, cache.context, model.config.width, model.dtype)  # of what a split has sent
        self.prefixes = Prefixes(cache, self.states, KEEP_S)
        self.free = asyncio.Semaphore(slots)
        self.whole = model.stop == model.config.layers
        self.share: Callable[[], float] = lambda: 1.0  # of the time that work may take, set by the energy governor
        self.key = f"{model.weights_digest.hex()}-{model.numerics.hex()}"

    def rates(self, cpu_load: float = 0.0, use: str = "decode") -> Rates:
        """What this machine does with the model now; `use` as in Meter."""
        return self.meter.rates(self.key, cpu_load, use) or PRIOR

    async def calibrate(self) -> None:
        """Measures both rates in well under a second, unless they are known from an earlier start."""
        if self.model.stop and self.meter.rates(self.key) is None:
            await self.compute.call(self._calibrate)

    def _calibrate(self) -> None:
        seat = Seat(self, self.model.stop)
        count = min(64, self.config.context // 2)
        try:
            for measured in (False, True):  # the first round warms up
                seat.position = 0
                for ids in (*([1] for _ in range(8)), [1] * count):
                    seat.piece(ids, Sampling(temperature=1.0) if self.whole else None, measured)
        finally:
            seat.free(keep=False)

    async def seat(self, layers: int, sparse: bool = False, ids: Sequence[int] = (), front: bool = False) -> Seat:
        """A session's place for layers `[0, layers)`, once there is one; to be closed. `sparse` as in Span.

        It begins with what is held of `ids`; with `front` hidden states are held too.
        """
        await self.free.acquire()
        return Seat(self, layers, sparse, ids, front)

    def held(self, ids: Sequence[int], layers: int, sparse: bool = False, front: bool = False) -> int:
        """How many positions a seat would begin with."""
        return self.prefixes.held(ids, Key(layers, sparse, front))


class Key(NamedTuple):
    """What a slot's KV was computed for; with `front` its hidden states behind these layers are there as well."""

    layers: int
    sparse: bool
    front: bool


class Seat:
    """One session's KV slot and how far it is filled. The slot is taken by the first piece of work."""

    def __init__(self, phone: PhoneModel, layers: int, sparse: bool = False, ids: Sequence[int] = (),
                 front: bool = False):  # fmt: skip
        self._phone, self._layers, self._sparse, self._key = phone, layers, sparse, Key(layers, sparse, front)
        self._place = phone.prefixes.claim(ids, self._key)
        self.position = self.reused = self._place.held
        self._ids = list(ids[: self.reused])  # of the positions in the slot
        self._slot: int | None = None
        self._last: torch.Tensor | None = None  # hidden state of the last position, [1, width]
        self._logits: torch.Tensor | None = None  # what the last token was drawn from, [1, vocabulary]
        self._closed = False
        self._drafting = False
        self._rest_until = 0.0  # what the governor asks for, before the next piece of work

    async def run(self, ids: Sequence[int], start: int | None = None) -> AsyncGenerator[torch.Tensor, None]:
        """Hidden states `[n, width]` of the next positions, or of those from `start` on, a piece at a time."""
        for at in range(0, len(ids), CHUNK):
            place = None if start is None else start + at
            yield await self._paced(self._forward, ids[at : at + CHUNK], place)

    async def draw(self, ids: Sequence[int], sampling: Sampling) -> int:
        """Runs the next positions through the whole model and draws the token that follows them."""
        early, late = ids[: max(0, len(ids) - 1) // CHUNK * CHUNK], ids[max(0, len(ids) - 1) // CHUNK * CHUNK :]
        async for _ in self.run(early):
            pass
        return await self._paced(self._draw, late, sampling)

    async def draft(self, ids: Sequence[int], start: int, count: int, sampling: Sampling,
                    more: Callable[[Sequence[Drafted]], bool]) -> list[Drafted]:  # fmt: skip
        """Up to `count` tokens behind `ids`, which stand from `start` on; `more` ends it, on the compute thread."""
        return await self._paced(self._draft, ids, start, count, sampling, more)

    async def _paced(self, work: Callable[..., T], *arguments: object) -> T:
        """A piece of work on the compute thread, once the phone has rested from the one before."""
        rest_s = self._rest_until - time.monotonic()
        if rest_s > 0:
            await asyncio.sleep(rest_s)
        began = time.monotonic()
        done = await self._phone.compute.call(work, *arguments)
        ended = time.monotonic()
        self._rest_until = ended + (ended - began) * (1 / self._phone.share() - 1)
        return done

    async def entropy(self) -> float:
        """Of the distribution after the last position, in nats."""
        return await self._phone.compute.call(self._entropy)

    @property
    def width(self) -> int:
        """Of the hidden states."""
        return self._phone.config.width

    def close(self) -> None:
        """Gives the place back, behind the piece of work that may be running. May be called twice."""
        if not self._closed:
            self._closed = True
            with contextlib.suppress(RuntimeError):  # the compute thread has ended, and the slots with it
                self._phone.compute.post(self._leave)

    # on the compute thread

    def piece(self, ids: Sequence[int], sampling: Sampling | None, measured: bool = True) -> tuple[torch.Tensor, int]:
        """Runs the next positions, and with `sampling` draws the token that follows (else it is -1)."""
        phone, model, began, start = self._phone, self._phone.model, time.perf_counter(), self.position
        x = self._last
        if ids:
            slot = self._taken()
            del self._ids[start:]
            tiles = model.tiles([Span(slot, start, len(ids), self._sparse)])
            x = model.run(model.embed(torch.tensor(ids)), 0, self._layers, phone.prefixes.cache, tiles)
            self.position, self._last = start + len(ids), x[-1:]
            self._ids += ids
            if self._key.front:
                phone.states.write(slot, start, x)
        assert x is not None, "nothing was run that a token could follow"
        self._logits = model.logits(x[-1:]) if sampling else None
        token = sample(self._logits, [self.position], [sampling])[0] if sampling and self._logits is not None else -1
        if measured:
            self._measure(start, len(ids), sampling is not None, time.perf_counter() - began)
        return x, token

    def _forward(self, ids: Sequence[int], start: int | None) -> torch.Tensor:
        """What a front has sent once is not computed again."""
        start = self.position if start is None else start
        known = common(self._ids[start : start + len(ids)], list(ids)) if self._key.front else 0
        self.position = start + known
        if not known:
            return self.piece(ids, None)[0]
        again = self._phone.states.read(self._taken(), start, known)
        return again if known == len(ids) else torch.cat([again, self.piece(ids[known:], None)[0]])

    def _draft(self, ids: Sequence[int], start: int, count: int, sampling: Sampling,
               more: Callable[[Sequence[Drafted]], bool]) -> list[Drafted]:  # fmt: skip
        self.position, self._drafting = start, True
        made: list[Drafted] = []
        try:
            while len(made) < count:
                _, token = self.piece(ids, sampling)
                made.append((token, self._entropy()))
                if not more(made):
                    break
                ids = [token]
        finally:
            self._drafting = False
        return made

    def _draw(self, ids: Sequence[int], sampling: Sampling) -> int:
        return self.piece(ids, sampling)[1]

    def _entropy(self) -> float:
        assert self._last is not None, "no position has been run"
        logits = self._phone.model.logits(self._last) if self._logits is None else self._logits
        chances = torch.log_softmax(logits[0].double(), dim=0)
        return max(0.0, -float((chances.exp() * chances).sum()))

    def _measure(self, start: int, count: int, drawn: bool, seconds: float) -> None:
        config = self._phone.config
        head, meter, key = head_flops(config) if drawn else 0.0, self._phone.meter, self._phone.key
        chooses = self._sparse and count <= BUDGET.together
        flops = layers_flops(config, range(self._layers), start, count, chooses) + head
        if count == 1 and self._layers:
            use = "draft" if self._drafting else "decode" if drawn or not self._phone.whole else "front"
            meter.sample(key, use, flops, seconds)
        elif count >= MANY and self._layers:
            meter.further(key, flops, seconds, self._layers * layer_flops(config, start, 1) + head)

    def _taken(self) -> int:
        if self._slot is None:
            self._slot = self._phone.prefixes.seat(self._place).slot
        return self._slot

    def _leave(self) -> None:
        """Lets the next session in only now: one that finds its beginning in a kept slot claims it at once."""
        try:
            self.free()
        finally:
            self._phone.compute.to_loop(self._phone.free.release)

    def free(self, keep: bool = True) -> None:
        """What was computed is kept for the conversation's next turn."""
        prefixes = self._phone.prefixes
        if self._slot is None:
            prefixes.give_back(self._place)
        else:
            prefixes.keep(self._slot, self._ids if keep else (), self._key, len(self._ids) if self._key.front else 0)
            self._slot = None


async def generate(
    seat: Seat, log: Sequence[int], sampling: Sampling, stops: Collection[int], limit: int
) -> AsyncGenerator[int, None]:
    """Up to `limit` more tokens behind the log, up to and with a stop; the seat's slot may hold a beginning of it."""
    pending = list(log[seat.position :])
    for _ in range(limit):
        token = await seat.draw(pending, sampling)
        yield token
        if token in stops:
            return
        pending = [token]
