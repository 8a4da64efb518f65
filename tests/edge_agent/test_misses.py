"""What predictions miss is learned by route, and added to the next ones."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from edge_agent.conditions import Conditions, Missed, Misses
from edge_agent.decisions import Decision, Leg, Outcome
from edge_agent.job import Quality, Route
from edge_agent.misses import MOST_S, Surprises
from edge_agent.plan import Plan, choose, hindsight
from support.edge import cloud, conditions, job, pair

NOW = conditions(cloud=cloud(rtt_s=0.01))


def decided(now: Conditions = NOW, **wish: object) -> tuple[Plan, Conditions]:
    return choose(job(max_tokens=60, **wish), pair(), now), now


def ended(
    plan: Plan, now: Conditions, tokens: int, late_s: float = 0.0, slow_s: float = 0.0, **more: object
) -> Decision:
    """An answer of so many tokens, each so much later than predicted."""
    asked = job(max_tokens=60)
    known = hindsight(asked, pair(), now, plan, tokens, more.get("accepted", 0) / 10 if plan.draft else None)  # type: ignore[operator]
    assert known is not None
    outcome = Outcome(
        plan.route, plan.split, plan.model, "stop", tokens, known.first_token_s + late_s,
        known.total_s + late_s + (tokens - 1) * slow_s, True, False, "", attempts=1,
        drafted=10 if plan.draft else 0, **more,  # type: ignore[arg-type]
    )  # fmt: skip
    return Decision(asked, plan, now, outcome)


@pytest.mark.parametrize("route", [Route.LOCAL, Route.CLOUD, Route.SPLIT, Route.SPECULATIVE])
def test_what_was_missed_is_predicted_from_then_on(route: Route) -> None:
    plan, now = decided(route=route, quality=Quality.BEST)
    surprises = Surprises(pair())
    for _ in range(40):
        surprises.finished(ended(plan, now, 20, late_s=0.02, slow_s=0.003, **_accepted(plan)))
    missed = getattr(surprises.misses, route.value)
    assert (missed.first_s, missed.token_s) == (pytest.approx(0.02, rel=0.15), pytest.approx(0.003, rel=0.15))
    assert replace(surprises.misses, **{route.value: Missed()}) == Misses()
    asked = job(max_tokens=60, route=route, quality=Quality.BEST)
    before, after = (choose(asked, pair(), replace(now, missed=one)).score for one in (Misses(), surprises.misses))
    assert after.first_token_s - before.first_token_s == pytest.approx(missed.first_s)
    assert after.total_s - before.total_s == pytest.approx(missed.first_s + 39 * missed.token_s)


def _accepted(plan: Plan) -> dict[str, int]:
    return {"accepted": 7, "rounds": 3} if plan.draft else {}


def test_an_answer_whose_length_was_not_foreseen_is_no_surprise() -> None:
    plan, now = decided(route=Route.CLOUD)
    surprises = Surprises(pair())
    for tokens in (2, 5, 60):
        surprises.finished(ended(plan, now, tokens))
    assert surprises.misses == Misses()


def test_drafts_that_were_not_as_good_as_foreseen_are_no_surprise() -> None:
    plan, now = decided(route=Route.SPECULATIVE)
    surprises = Surprises(pair())
    surprises.finished(ended(plan, now, 20, accepted=1, rounds=9))
    found = surprises.misses.speculative
    assert (found.first_s, found.token_s) == (pytest.approx(0, abs=1e-9), pytest.approx(0, abs=1e-9))


OTHERWISE = [
    {"finish": "cancelled"}, {"moves": 1}, {"attempts": 2}, {"route": Route.LOCAL}, {"first_token_s": None},
    {"legs": (Leg(Route.CLOUD, 0, 0, "full"), Leg(Route.LOCAL, 0, 0, "tiny"))},
]  # fmt: skip


@pytest.mark.parametrize("changes", OTHERWISE, ids=str)
def test_an_answer_that_did_not_go_as_planned_teaches_nothing(changes: dict[str, object]) -> None:
    plan, now = decided(route=Route.CLOUD)
    found, surprises = ended(plan, now, 20, late_s=1.0), Surprises(pair())
    surprises.finished(replace(found, outcome=replace(found.outcome, **changes)))  # type: ignore[arg-type]
    assert surprises.misses == Misses()


def test_one_answer_that_hung_teaches_no_more_than_its_prediction_over_again() -> None:
    plan, now = decided(route=Route.CLOUD)
    surprises = Surprises(pair())
    surprises.finished(ended(plan, now, 20, late_s=60.0, slow_s=9.0))
    missed, score = surprises.misses.cloud, plan.score
    assert 0 < missed.first_s <= score.first_token_s
    assert 0 < missed.token_s <= score.total_s


def test_a_correction_never_makes_more_than_half_of_the_work_vanish() -> None:
    for route in Route:
        plain = choose(job(route=route, quality=Quality.BEST), pair(), NOW).score
        bad = replace(NOW, missed=Misses(*[Missed(-1e3, -1e3)] * 6))
        assert choose(job(route=route, quality=Quality.BEST), pair(), bad).score.compute_s == pytest.approx(
            plain.compute_s / 2
        )


def test_surprises_are_kept_and_what_makes_no_sense_on_disk_does_no_harm() -> None:
    plan, now = decided(route=Route.CLOUD)
    first, again = Surprises(pair()), Surprises(pair())
    first.finished(ended(plan, now, 20, late_s=0.02))
    again.restore(first.kept())
    assert again.misses.cloud.first_s == pytest.approx(first.misses.cloud.first_s) != 0
    for bad in (3, {"cloud": 3}, {"cloud": [3, [1, math.nan]]}, {"cloud": [[1, 1e300], [1, -1e300]]}):
        again.restore(bad)
    assert again.misses.cloud == Missed(MOST_S, -MOST_S)


def test_the_tiny_model_and_drafts_in_the_cloud_are_kinds_of_their_own() -> None:
    there = cloud(rtt_s=0.01, draft_rate=1e9)
    for wish, kind in (({"tiny": True}, "tiny"), ({"route": Route.CLOUD, "draft": 4}, "assisted")):
        plan, now = decided(conditions(cloud=there), **wish)
        surprises = Surprises(pair())
        surprises.finished(
            replace(ended(plan, now, 20, late_s=0.01, **_accepted(plan)), job=job(max_tokens=60, **wish))
        )
        assert getattr(surprises.misses, kind).first_s > 0
        assert replace(surprises.misses, **{kind: Missed()}) == Misses()
