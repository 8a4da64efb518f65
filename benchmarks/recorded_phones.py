"""Phones that draft what was recorded, at a pace of their own: the agent's own session code, without a model.

Many of them fit into one process and do not slow each other down, as those of many people do not.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from netlab import Target
from traces import Trace

from edge_agent.conditions import Cloud, Rates
from edge_agent.job import Job
from edge_agent.link import Link
from edge_agent.replicas import Links
from edge_agent.runs.cloud import CloudRun, Identity
from edge_agent.runs.local import Drafted
from edge_agent.runs.pace import Pace
from edge_agent.runs.speculative import Drafter
from edge_agent.state import State
from protocol.frames import Digests
from protocol.transport.quic import connect_quic
from protocol.transport.tickets import TicketStore
from split_model.config import ModelConfig
from split_model.drafting import Acceptance
from split_model.flops import head_flops, layer_flops
from split_model.model import Model
from split_model.sampling import Sampling
from split_model.tokenizer import ChatTokenizer

LONGEST = 16  # tokens of a draft
AT = 150  # positions before the one that a rate is given for


@dataclass(frozen=True, slots=True)
class Carriage:
    """One answer: seconds from asking to each of its tokens, rounds of drafts, tokens drafted and accepted, bytes."""

    times: tuple[float, ...]
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    bytes_up: int = 0

    @property
    def total_s(self) -> float:
        return self.times[-1]

    @property
    def token_s(self) -> float:
        """From one token to the next, on average."""
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


class RecordedSeat:
    """In the place of the tiny model's: takes `draft_s` for a token, and reads a prompt in no time."""

    def __init__(self, trace: Trace, draft_s: float):
        self.position = 0
        self._trace, self._draft_s = trace, draft_s

    async def run(self, ids: Sequence[int], start: int | None = None) -> AsyncGenerator[None, None]:
        yield None

    async def draft(self, ids: Sequence[int], start: int, count: int, sampling: Sampling,
                    more: Callable[[Sequence[Drafted]], bool]) -> list[Drafted]:  # fmt: skip
        trace, made = self._trace, list[Drafted]()
        first, began = start + len(ids) - len(trace.prompt), time.monotonic()
        for place in range(first, min(first + count, len(trace.ids))):
            await asyncio.sleep(max(0.0, began + (place - first + 1) * self._draft_s - time.monotonic()))
            made.append((trace.drafts[place], trace.entropies[place]))
            if not more(made):
                break
        return made

    def close(self) -> None:
        """Holds nothing."""


class Phones:
    """All phones of one process, on one connection; the models' shapes are those of the built-in pair."""

    def __init__(self, links: Links, me: Identity, tiny: ModelConfig, full: ModelConfig, draft_s: float):
        self.links, self._me, self._tiny, self._full, self._draft_s = links, me, tiny, full, draft_s
        flops = tiny.layers * layer_flops(tiny, AT, 1) + head_flops(tiny)
        self.rates = Rates(32 * flops / draft_s, flops / draft_s)

    async def answer(self, trace: Trace, draft: int | None, acceptance: Acceptance | None = None,
                     chance: Callable[[float], float] = lambda _: 1.0) -> Carriage:  # fmt: skip
        """By the cloud alone (None), with as many drafts as pay (0), or always so many at a time.

        Raises SystemExit for another text than the recorded one.
        """
        job = Job(os.urandom(16), trace.prompt, len(trace.ids), trace.sampling)
        drafter = None if draft is None else self._drafter(trace, draft, acceptance or Acceptance(), chance)
        run = CloudRun(job, 0, self.links, self._me, frozenset(), self._full.context, None, drafter)
        log, times, asked = list(trace.prompt), list[float](), time.monotonic()
        async with contextlib.aclosing(run.tokens(log)) as tokens:
            async for _ in tokens:
                times.append(time.monotonic() - asked)
        if log[len(trace.prompt) :] != list(trace.ids):
            raise SystemExit(f"the answer with drafts {draft} differs from that of one process")
        done = run.carried
        return Carriage(tuple(times), done.rounds, done.drafted, done.accepted, done.bytes_up)

    def cloud(self) -> Cloud:
        """As a score sees it now."""
        link = self.links.links[0]
        link.observe()
        return link.cloud(0.0, len(self._me.token()))

    def _drafter(self, trace: Trace, draft: int, acceptance: Acceptance, chance: Callable[[float], float]) -> Drafter:
        async def seat(layers: int) -> RecordedSeat:
            return RecordedSeat(trace, self._draft_s)

        room = SimpleNamespace(locked=lambda: False)
        model: Any = SimpleNamespace(config=self._tiny, free=room, seat=seat, rates=lambda: self.rates)
        full: Any = SimpleNamespace(config=self._full, rates=lambda: self.rates)
        return Drafter(model, Pace(model, full, 0), trace.sampling, draft or LONGEST, acceptance, steady=draft > 0,
                       chance=chance)  # fmt: skip


@contextlib.asynccontextmanager
async def phones(target: Target, tiny: Path, full: Path, folder: Path, draft_s: float) -> AsyncIterator[Phones]:
    """Over QUIC, with what a connection learns forgotten from one use to the next."""
    empty = Model.load(full, 0, 0, embedding=False, head=False, check=False)
    digests = Digests(empty.weights_digest, ChatTokenizer.load(full).digest, empty.numerics)
    connect = partial(connect_quic, trust=target.trust, tickets=TicketStore(folder / "tickets"))
    links = Links([Link(target.wire, connect)], State(folder / f"state-{os.urandom(4).hex()}"))
    me = Identity(empty.config.name, digests, True, lambda: target.token)
    links.start()
    try:
        yield Phones(links, me, ModelConfig.read(tiny), empty.config, draft_s)
    finally:
        await links.aclose()
