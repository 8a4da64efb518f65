"""What was decided, on what grounds, and how it went; never what was asked or answered."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice

from edge_agent.conditions import Conditions
from edge_agent.cost import Pair, Score
from edge_agent.job import Job, Route
from edge_agent.plan import Candidate, Plan

KEPT = 256


@dataclass(frozen=True, slots=True)
class Leg:
    """A part of an answer: the plan that made it, and how many tokens."""

    route: Route
    split: int
    draft: int
    model: str
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Outcome:
    """One finished answer; `route`, `split` and `model` are those that finished it, `reason` what changed on the way.

    Bytes are those of the frames, with the overhead of packets estimated as in the prediction.
    """

    route: Route
    split: int
    model: str
    finish: str  # "stop", "length", "cancelled" or "failed: …"
    tokens: int
    first_token_s: float | None
    total_s: float
    exact: bool
    degraded: bool
    reason: str
    transport: str | None = None
    replica: str | None = None
    attempts: int = 0
    early_data: bool = False
    bytes_up: int = 0
    bytes_down: int = 0
    queue_s: float = 0.0
    cloud_compute_s: float = 0.0
    held_edge: int | None = None  # positions of the prompt that were there, where the phone ran layers of the model
    held_cloud: int | None = None  # and where the cloud was sent ids
    rounds: int = 0  # of drafts that were looked at
    drafted: int = 0  # tokens in them
    accepted: int = 0
    moves: int = 0  # of the rest to a better plan; the loss of the cloud is none
    legs: tuple[Leg, ...] = ()

    @property
    def complete(self) -> bool:
        return self.finish in ("stop", "length")


@dataclass(frozen=True, slots=True)
class Decision:
    """A job (never its text), its plan and conditions, and its outcome."""

    job: Job
    plan: Plan
    conditions: Conditions
    outcome: Outcome
    at: float = field(default_factory=time.time)


class Decisions:
    """The latest KEPT of them."""

    def __init__(self) -> None:
        self._kept: deque[Decision] = deque(maxlen=KEPT)

    def add(self, decision: Decision) -> None:
        self._kept.append(decision)

    def latest(self) -> Iterator[Decision]:
        """The newest first."""
        return reversed(self._kept)

    def described(self, limit: int = KEPT) -> Iterator[dict[str, object]]:
        """The newest first, for people and tools."""
        return map(described, islice(self.latest(), limit))

    def lines(self, pair: Pair, limit: int = KEPT) -> Iterator[str]:
        """The newest first, each a line of JSON with the pair of models: all that `edge-agent replay` needs."""
        models = described_pair(pair)
        for one in self.described(limit):
            yield json.dumps(one | {"pair": models}, separators=(",", ":"), allow_nan=False) + "\n"


def described(one: Decision) -> dict[str, object]:
    """A decision as the endpoints show it, with all of its job that scores depend on, but no word of it."""
    job = one.job
    return {
        "id": job.id.hex(),
        "at": round(one.at, 3),
        "prompt_tokens": len(job.prompt),
        "max_tokens": job.max_tokens,
        "greedy": job.sampling.temperature == 0,
        "stop_bytes": [len(stop.encode()) for stop in job.stop],
        "wish": asdict(job.wish),
        "plan": describe(one.plan),
        "conditions": asdict(one.conditions),
        "measured": measured(one.outcome),
    }


def described_pair(pair: Pair) -> dict[str, object]:
    """Both models' shapes, as JSON has them."""
    shapes = {
        name: asdict(one) | {"stops": sorted(one.stops)} for name, one in (("tiny", pair.tiny), ("full", pair.full))
    }
    return {**shapes, "edge_layers": pair.edge_layers}


def describe(plan: Plan) -> dict[str, object]:
    """A plan as the endpoints show it; times in milliseconds, `cost` in seconds."""
    return {
        "route": plan.route.value,
        "split": plan.split,
        "model": plan.model,
        "reason": plan.reason,
        "degraded": plan.degraded,
        "hidden_bits": plan.hidden_bits,
        "draft": plan.draft,
        "predicted": _times(plan.score),
        "candidates": [_candidate(one, plan) for one in plan.candidates],
    }


def measured(outcome: Outcome) -> dict[str, object]:
    """An outcome as the endpoints show it."""
    found = asdict(outcome) | {"route": outcome.route.value}
    first, total = found.pop("first_token_s"), found.pop("total_s")
    return found | {"first_token_ms": None if first is None else _ms(first), "total_ms": _ms(total)}


def _candidate(one: Candidate, plan: Plan) -> dict[str, object]:
    score = one.score
    return {
        "route": score.route.value,
        "split": score.split,
        "draft": score.draft,
        "model": score.model,
        "cost": round(score.cost, 6),
        "network_ms": _ms(score.network_s),
        "compute_ms": _ms(score.compute_s),
        **_times(score),
        "bytes_up": round(score.bytes_up),
        "bytes_down": round(score.bytes_down),
        "agreement": score.agreement,
        "refused": one.refusal or one.doubt,
        "chosen": one.score == plan.score,
    }


def _times(score: Score) -> dict[str, float]:
    return {"first_token_ms": _ms(score.first_token_s), "total_ms": _ms(score.total_s)}


def _ms(seconds: float) -> float:
    return round(seconds * 1000, 3)
