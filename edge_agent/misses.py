"""What predictions missed, by kind of plan: costs that no rate tells, such as crossing threads and packing frames."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields

from edge_agent.averages import Mean
from edge_agent.conditions import Missed, Misses
from edge_agent.cost import Pair
from edge_agent.decisions import Decision
from edge_agent.job import Route
from edge_agent.plan import Plan, hindsight

ANSWERS = 8.0  # that are remembered
ALL_WRONG = 1.0  # times the prediction: what one answer may teach at most, and half of it the other way
MOST_S = 10.0  # either way
FEW = 4  # later tokens of an answer, of which less is chance


class Surprises:
    """Averages of measured less predicted seconds, with the answer's real length and acceptance put in."""

    def __init__(self, pair: Pair):
        self._pair = pair
        self._found = {one.name: (Mean(0.0, 1.0, ANSWERS), Mean(0.0, 1.0, ANSWERS)) for one in fields(Misses)}

    @property
    def misses(self) -> Misses:
        """What is to be added to predictions."""
        return Misses(*(Missed(*(_within(mean.value, MOST_S) for mean in means)) for means in self._found.values()))

    def finished(self, decision: Decision) -> None:
        """An answer that went as planned, from its beginning to its end."""
        outcome, plan = decision.outcome, decision.plan
        first_s, later = outcome.first_token_s, outcome.tokens - 1
        straight = not outcome.moves and outcome.attempts <= 1 and len(outcome.legs) <= 1
        if not (outcome.complete and straight and first_s and outcome.route is plan.route):
            return
        accepted = outcome.accepted / outcome.drafted if outcome.drafted else None
        score = hindsight(decision.job, self._pair, decision.conditions, plan, outcome.tokens, accepted)
        if score is None:
            return
        first, token = self._found[self._kind(plan)]
        first.book(_bounded(first_s - score.first_token_s, score.first_token_s), 1)
        if later >= FEW:
            predicted_s = (score.total_s - score.first_token_s) / later
            token.book(_bounded((outcome.total_s - first_s) / later - predicted_s, predicted_s), 1)

    def _kind(self, plan: Plan) -> str:
        if plan.route is Route.LOCAL and plan.model == self._pair.tiny.name:
            return "tiny"
        return "assisted" if plan.route is Route.CLOUD and plan.draft else plan.route.value

    def kept(self) -> dict[str, object]:
        return {kind: [mean.kept() for mean in means] for kind, means in self._found.items()}

    def restore(self, kept: object) -> None:
        if isinstance(kept, Mapping):
            for kind, means in self._found.items():
                found = kept.get(kind)
                for mean, one in zip(means, found if isinstance(found, list) else [], strict=False):
                    mean.restore(one)


def _within(value: float, most: float) -> float:
    return min(max(value, -most), most)


def _bounded(missed_s: float, predicted_s: float) -> float:
    return min(max(missed_s, -0.5 * ALL_WRONG * predicted_s), ALL_WRONG * predicted_s)
