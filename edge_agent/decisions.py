"""What was decided, on what grounds, and how it went."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field

from edge_agent.conditions import Conditions, average
from edge_agent.cost import Score
from edge_agent.job import Job, Route
from edge_agent.plan import Candidate, Plan

KEPT = 256
PRIOR_TOKENS = 40.0


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
    """The latest KEPT of them, and the answer length that they teach."""

    def __init__(self) -> None:
        self._kept: deque[Decision] = deque(maxlen=KEPT)
        self.answer_tokens = PRIOR_TOKENS

    def add(self, decision: Decision) -> None:
        self._kept.append(decision)
        if decision.outcome.complete:
            self.answer_tokens = average(self.answer_tokens, float(decision.outcome.tokens))

    def latest(self) -> Iterator[Decision]:
        """The newest first."""
        return reversed(self._kept)

    def described(self) -> Iterator[dict[str, object]]:
        """The newest first, for people and tools."""
        return map(described, self.latest())


def described(one: Decision) -> dict[str, object]:
    """A decision as the endpoints show it."""
    return {
        "id": one.job.id.hex(),
        "at": round(one.at, 3),
        "prompt_tokens": len(one.job.prompt),
        "max_tokens": one.job.max_tokens,
        "plan": describe(one.plan),
        "conditions": asdict(one.conditions),
        "measured": measured(one.outcome),
    }


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
