"""What `GET /` shows: a page of static files, and events of what runs, was decided and is known, while one looks."""

from __future__ import annotations

import asyncio
import math
import time
import weakref
from collections import deque
from dataclasses import asdict, dataclass, replace
from itertools import takewhile
from operator import attrgetter
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from edge_agent.agent import Agent
from edge_agent.answer import Answer
from edge_agent.conditions import Conditions
from edge_agent.decisions import Decision, describe, described, measured
from edge_agent.job import Route
from protocol.api_errors import ApiError
from protocol.process import either
from protocol.reply import EventStream, sse

LISTENERS = 8  # at once; a browser opens six connections to one host
EVERY_S = 0.25  # between two events to one listener
SAMPLE_S = 1.0
SAMPLES = 300  # kept, taken while somebody listens
HEADERS = {
    "content-security-policy": "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-cache",
}


@dataclass(frozen=True, slots=True)
class Sample:
    """The phone and its best link at a time of the wall clock; rates in bytes/s. No `replica`: there is no cloud."""

    at: float
    cpu_load: float
    battery: float | None
    plugged: bool | None
    governor: str  # what it goes by
    leaves: float | None = None  # of the local rate; None where the governor is off
    level: float | None = None  # of the power or temperature, 1 at the limit
    replica: str | None = None
    rtt_ms: float | None = None
    up: float | None = None
    down: float | None = None
    wait_ms: float | None = None
    trouble: str | None = None

    @classmethod
    def of(cls, now: Conditions, at: float) -> Sample:
        phone, cloud = now.phone, now.cloud
        power = phone.power
        leaves = None if power.level is None else power.share
        here = cls(round(at, 3), phone.cpu_load, phone.battery, phone.plugged, power.source, leaves, power.level)
        if cloud is None:
            return here
        return replace(
            here,
            replica=cloud.address,
            rtt_ms=round(cloud.rtt_s * 1000, 3),
            up=round(cloud.up),
            down=round(cloud.down),
            wait_ms=round(cloud.wait_s * 1000, 3),
            trouble=cloud.unreachable or cloud.refused,
        )


class Page(StaticFiles):
    """The static files. They hold nothing of the agent's, so that the page can ask for the key."""

    def __init__(self) -> None:
        super().__init__(directory=Path(__file__).parent / "page")

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers.update(HEADERS)
        return response

    async def index(self, http: Request) -> Response:
        return await self.get_response("index.html", http.scope)


class Dashboard:
    """Events for at most LISTENERS; nothing is sampled while there are none."""

    def __init__(self, agent: Agent):
        self.agent, self.closing = agent, asyncio.Event()
        self._samples: deque[Sample] = deque(maxlen=SAMPLES)
        self._due = -math.inf
        self._listeners: weakref.WeakSet[Listener] = weakref.WeakSet()

    async def events(self) -> Response:
        """A stream of events that begins with a snapshot. Raises ApiError 429 or 503."""
        if self.agent.draining or self.closing.is_set():
            raise ApiError(503, "the agent is shutting down", code="draining", retry_after_s=1)
        if len(self._listeners) >= LISTENERS:
            message = f"{len(self._listeners)} listeners to events, which is the limit"
            raise ApiError(429, message, code="too_many_listeners", retry_after_s=5)
        listener = Listener(self)
        self._listeners.add(listener)
        return EventStream(listener, headers={"cache-control": "no-store"})

    def close(self) -> None:
        """Ends every stream at once."""
        self.closing.set()

    def left(self, listener: Listener) -> None:
        self._listeners.discard(listener)

    def sample(self) -> Sample:
        """The phone and its best link now, taken at most once in SAMPLE_S for all listeners."""
        now = time.monotonic()
        if now >= self._due:
            self._due = now + SAMPLE_S
            self._samples.append(Sample.of(self.agent.conditions(), time.time()))
        return self._samples[-1]

    def samples(self) -> list[Sample]:
        """What was sampled, and what decisions were made on, the oldest first."""
        known = (Sample.of(one.conditions, one.at - one.outcome.total_s) for one in self.agent.decisions.latest())
        return sorted((*known, *self._samples), key=attrgetter("at"))[-SAMPLES:]


class Listener:
    """One stream: whoever reads slowly gets fewer events, since each tells what is new to that listener alone."""

    def __init__(self, board: Dashboard):
        self._board = board
        self._live: list[dict[str, object]] | None = None  # None before the snapshot
        self._sample: Sample | None = None
        self._decision: Decision | None = None
        self._draining = False

    def __aiter__(self) -> Listener:
        return self

    async def __anext__(self) -> str:
        if self._live is None:
            return sse(self._snapshot())
        while not self._board.closing.is_set():
            await either(self._board.closing, limit_s=EVERY_S)
            if news := self._news():
                return sse(news)
        raise StopAsyncIteration

    async def aclose(self) -> None:
        self._board.left(self)

    def _snapshot(self) -> dict[str, object]:
        pair, news = self._board.agent.pair, self._news()
        about = {"tiny": pair.tiny.name, "full": pair.full.name, "edge_layers": pair.edge_layers,
                 "layers": pair.full.layers}  # fmt: skip
        samples = [asdict(one) for one in self._board.samples()]
        return {"answers": [], "decision": None} | news | {"agent": about, "samples": samples}

    def _news(self) -> dict[str, object]:
        """What this listener has not heard of yet."""
        board, news = self._board, dict[str, object]()
        live = [_progress(one) for one in board.agent.under_way]
        if live or live != self._live:
            self._live = news["live"] = live
        if (sample := board.sample()) is not self._sample:
            self._sample = sample
            news["samples"] = [asdict(sample)]
        if new := list(takewhile(lambda one: one is not self._decision, board.agent.decisions.latest())):
            self._decision = new[0]
            news["answers"] = [_ended(one) for one in reversed(new)]
            news["decision"] = described(new[0])
        if board.agent.draining != self._draining:
            self._draining = news["draining"] = board.agent.draining
        return news


def _progress(answer: Answer) -> dict[str, object]:
    """An answer under way, without a word of it."""
    return {
        "id": answer.job.id.hex(),
        "prompt_tokens": len(answer.job.prompt),
        "max_tokens": answer.job.max_tokens,
        "quality": answer.job.wish.quality.value,
        "plan": describe(replace(answer.plan, candidates=())),
        "so_far": measured(answer.so_far),
    }


def _ended(one: Decision) -> dict[str, object]:
    """A finished answer in brief."""
    found = measured(one.outcome)
    names = ("route", "split", "model", "finish", "tokens", "first_token_ms", "total_ms")
    return {
        "id": one.job.id.hex(),
        "at": round(one.at, 3),
        **{name: found[name] for name in names},
        "draft": one.plan.draft,
        "predicted": describe(replace(one.plan, candidates=()))["predicted"],
        "bytes": one.outcome.bytes_up + one.outcome.bytes_down,
        "cloud_bytes": cloud_bytes(one),
    }


def cloud_bytes(one: Decision) -> int | None:
    """Bytes up and down that the cloud would have taken for this very answer, as predicted.

    None where there was no cloud to ask, or no whole answer.
    """
    clouds = (rated.score for rated in one.plan.candidates if rated.score.route is Route.CLOUD)
    cloud = min(clouds, key=lambda score: score.draft, default=None)
    if cloud is None or not one.outcome.complete:
        return None
    expected = max(1.0, min(one.job.max_tokens, one.conditions.answer_tokens))
    return round(cloud.bytes_up + cloud.bytes_down * one.outcome.tokens / expected)
