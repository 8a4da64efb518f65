"""Which plan is chosen, and what is said of those that are not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from edge_agent.conditions import Rates
from edge_agent.cost import Pair
from edge_agent.job import Privacy, Quality, Route, Wish
from edge_agent.plan import NoPlan, choose, steadiest
from edge_agent.rounds import LONGEST_DRAFT
from support.edge import cloud, conditions, job, pair, phone, shape

FAST_CLOUD = cloud(rtt_s=0.001, up=1e9, down=1e9, rates=Rates(1e9, 1e9))
SLOW_PHONE = phone()
FAST_PHONE = phone(tiny=Rates(1e9, 1e9), full=Rates(1e9, 1e9))


def test_candidates_are_both_models_here_the_cloud_and_every_split() -> None:
    plan = choose(job(), pair(), conditions())
    found = [(one.score.route, one.score.split, one.score.model) for one in plan.candidates]
    assert found == [
        (Route.LOCAL, 0, "tiny"), (Route.LOCAL, 0, "full"), (Route.CLOUD, 0, "full"),
        (Route.SPLIT, 1, "full"), (Route.SPLIT, 2, "full"), (Route.SPLIT, 3, "full"),
        *((Route.SPECULATIVE, split, "full") for split in range(4)),
    ]  # fmt: skip
    drafting = conditions(cloud=cloud(draft_rate=1e5))
    part = choose(job(), pair(edge_layers=1), drafting)
    assert [(one.score.route, one.score.split, one.score.draft > 0) for one in part.candidates] == [
        (Route.LOCAL, 0, False), (Route.CLOUD, 0, False), (Route.SPLIT, 1, False), (Route.CLOUD, 0, True),
        (Route.SPECULATIVE, 0, True), (Route.SPECULATIVE, 1, True),
    ]  # fmt: skip


def test_a_weak_phone_on_a_fast_link_uses_the_cloud_and_a_strong_one_on_a_slow_link_does_not() -> None:
    assert choose(job(), pair(), conditions(phone=SLOW_PHONE, cloud=FAST_CLOUD)).route is Route.CLOUD
    far = cloud(rtt_s=0.5)
    plan = choose(job(), pair(), conditions(phone=FAST_PHONE, cloud=far))
    assert (plan.route, plan.model) == (Route.LOCAL, "full")


def test_a_loaded_cloud_and_a_strong_phone_without_the_head_share_the_work() -> None:
    busy = cloud(rtt_s=0.001, up=1e9, down=1e9, rates=Rates(1e4, 1e4))
    plan = choose(job(), pair(edge_layers=2), conditions(phone=FAST_PHONE, cloud=busy))
    assert (plan.route, plan.split) == (Route.SPLIT, 2)


def test_the_chosen_plan_is_the_cheapest_that_may_run() -> None:
    plan = choose(job(quality=Quality.FAST), pair(), conditions())
    allowed = [one.score.cost for one in plan.candidates if not one.refusal]
    assert plan.score.cost == min(allowed)
    assert plan.reason == f"the cheapest of {len(allowed)} that may run"


@pytest.mark.parametrize(
    ("quality", "agreement", "model", "degraded"),
    [
        (Quality.FAST, 0.1, "tiny", False),
        (Quality.BALANCED, 0.8, "tiny", False),
        (Quality.BALANCED, 0.79, "full", False),
        (Quality.BEST, 0.99, "full", False),
    ],
)
def test_quality_is_a_floor_on_agreement(quality: Quality, agreement: float, model: str, degraded: bool) -> None:
    now = conditions(phone=FAST_PHONE, cloud=cloud(rtt_s=1), agreement=agreement)
    plan = choose(job(quality=quality), pair(edge_layers=0), now)
    assert (plan.model, plan.degraded) == (model, degraded)


def test_a_floor_that_is_not_reached_is_said_in_words() -> None:
    plan = choose(job(), pair(), conditions(agreement=0.5))
    assert plan.candidates[0].doubt == "agrees with the full model on 0.50 of the tokens, below 0.8"


ABSENT = [None, cloud(unreachable="no replica is reachable: gone"), cloud(refused="no")]


@pytest.mark.parametrize("there", ABSENT, ids=["none", "unreachable", "refused"])
@pytest.mark.parametrize(
    ("wish", "degraded"),
    [
        ({"quality": Quality.FAST}, True),
        ({"quality": Quality.BALANCED}, True),
        ({"tiny": True}, False),
        ({"route": Route.LOCAL}, False),
        ({"privacy": Privacy.DEVICE}, False),
    ],
    ids=str,
)
def test_a_tiny_model_that_answers_for_want_of_the_cloud_is_degraded_however_well_it_agrees(
    there: object, wish: dict[str, object], degraded: bool
) -> None:
    plan = choose(job(**wish), pair(edge_layers=0), conditions(cloud=there, agreement=0.9))
    assert (plan.model, plan.degraded) == ("tiny", degraded)
    chosen = choose(job(**wish), pair(edge_layers=0), conditions(phone=FAST_PHONE, cloud=cloud(), agreement=0.9))
    assert (chosen.model, chosen.degraded) == ("tiny", False)  # a working cloud was there to be chosen


@pytest.mark.parametrize("there", [None, cloud(unreachable="no replica is reachable: gone"), cloud(refused="no")])
def test_without_a_cloud_balanced_is_degraded_and_best_needs_the_full_model_here(there: object) -> None:
    now = conditions(cloud=there, agreement=0.5)
    plan = choose(job(), pair(edge_layers=1), now)
    assert (plan.route, plan.model, plan.degraded) == (Route.LOCAL, "tiny", True)
    whole = choose(job(quality=Quality.BEST), pair(), now)
    assert (whole.route, whole.model, whole.degraded) == (Route.LOCAL, "full", False)


def test_best_without_any_full_model_has_no_plan_and_says_why() -> None:
    with pytest.raises(NoPlan, match="quality 'best' needs 1; cloud: none is configured"):
        choose(job(quality=Quality.BEST), pair(edge_layers=1), conditions(cloud=None))
    with pytest.raises(NoPlan, match="wrong model"):
        choose(job(quality=Quality.BEST), pair(edge_layers=1), conditions(cloud=cloud(refused="wrong model")))


def test_an_unreachable_cloud_is_tried_where_nothing_else_may_run() -> None:
    gone = conditions(cloud=cloud(unreachable="no replica is reachable: gone"))
    plan = choose(job(quality=Quality.BEST), pair(edge_layers=0), gone)
    assert plan.route is Route.CLOUD
    assert plan.reason == "nothing else may run; no replica is reachable: gone"


def test_a_route_and_a_split_are_orders() -> None:
    now = conditions(phone=SLOW_PHONE, cloud=FAST_CLOUD)
    assert choose(job(route=Route.LOCAL), pair(edge_layers=0), now).model == "tiny"
    assert choose(job(route=Route.SPLIT), pair(), now).route is Route.SPLIT
    assert choose(job(route=Route.SPLIT, split=3), pair(), now).split == 3
    with pytest.raises(ValueError, match="split 3, the phone holds layers for 1 to 2"):
        choose(job(route=Route.SPLIT, split=3), pair(edge_layers=2), now)
    with pytest.raises(NoPlan):
        choose(job(route=Route.CLOUD), pair(), conditions(cloud=None))


def test_half_the_bytes_make_a_split_worth_it_on_a_thin_link() -> None:
    """Of two plans that are near each other the split wins once its hidden states are half as large."""
    wide, thin = replace(pair(edge_layers=2), full=shape(width=64)), cloud(rtt_s=0.001, up=1e4, rates=Rates(1e6, 1e6))
    now = conditions(phone=phone(tiny=Rates(10, 10), full=Rates(1e9, 1e9)), cloud=thin)
    routes = [choose(job(prompt=60, max_tokens=1, hidden_bits=bits), wide, now) for bits in (16, 8)]
    assert [plan.route for plan in routes] == [Route.CLOUD, Route.SPLIT]
    assert [plan.hidden_bits for plan in routes] == [None, 8]


def test_a_split_in_8_bits_agrees_a_little_less_and_is_not_degraded() -> None:
    plan = choose(job(route=Route.SPLIT, split=2, hidden_bits=8), pair(), conditions())
    assert (plan.hidden_bits, plan.score.agreement, plan.degraded) == (8, 0.99, False)
    whole = choose(job(route=Route.SPLIT, split=2), pair(), conditions())
    assert (whole.hidden_bits, whole.score.agreement) == (16, 1.0)
    cloud = next(one.score for one in plan.candidates if one.score.route is Route.CLOUD)
    assert cloud.agreement == 1


def test_privacy_keeps_everything_here() -> None:
    plan = choose(job(privacy=Privacy.DEVICE), pair(edge_layers=0), conditions(cloud=FAST_CLOUD))
    assert plan.route is Route.LOCAL
    refusals = {one.refusal for one in plan.candidates if one.score.route is not Route.LOCAL}
    assert refusals == {"privacy 'device' keeps everything on the phone"}


def test_the_tiny_model_by_name_is_not_degraded() -> None:
    plan = choose(job(tiny=True), pair(), conditions(cloud=FAST_CLOUD, agreement=0.1))
    assert (plan.model, plan.degraded) == ("tiny", False)


def test_a_prompt_beyond_the_tiny_context_is_refused_there() -> None:
    both = pair(edge_layers=0)
    long = job(prompt=63, quality=Quality.FAST)
    short_tiny = type(both)(type(both.tiny)(**{**_fields(both.tiny), "context": 32}), both.full, 0)
    plan = choose(long, short_tiny, conditions(phone=FAST_PHONE))
    assert plan.route is Route.CLOUD
    assert plan.candidates[0].refusal == "a prompt of 63 tokens, the context holds 32"


def _fields(record: object) -> dict[str, object]:
    return {name: getattr(record, name) for name in type(record).__dataclass_fields__}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"split": 2}, "split 2 goes with route 'split'"),
        ({"split": 2, "route": Route.CLOUD}, "not 'cloud'"),
        ({"privacy": Privacy.DEVICE, "route": Route.SPLIT}, "forbids route 'split'"),
        ({"tiny": True, "route": Route.CLOUD}, "on the phone only"),
        ({"tiny": True, "quality": Quality.BEST}, "quality 'best'"),
        ({"hidden_bits": 8, "quality": Quality.BEST}, "hidden states in 8 bits are not"),
        ({"hidden_bits": 4}, "4 bits, must be 8 or 16"),
        ({"sparse": True, "quality": Quality.BEST}, "sparse attention is not"),
    ],
)
def test_wishes_that_contradict_each_other_are_refused(wish: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Wish(**wish)  # type: ignore[arg-type]


def test_a_deadline_and_a_number_of_bytes_are_constraints() -> None:
    now = conditions(phone=SLOW_PHONE, cloud=FAST_CLOUD)
    free = choose(job(quality=Quality.BEST), pair(), now)
    assert free.route is Route.CLOUD
    size = round(free.score.bytes_up + free.score.bytes_down)
    assert choose(job(quality=Quality.BEST, max_bytes=size), pair(), now).route is Route.CLOUD
    spared = choose(job(quality=Quality.BEST, max_bytes=size - 1), pair(), now)
    assert (spared.route, spared.model) == (Route.LOCAL, "full")
    cloudy = next(one for one in spared.candidates if one.score.route is Route.CLOUD)
    assert cloudy.refusal == f"{size} bytes predicted, at most {size - 1} were asked for"
    assert choose(job(quality=Quality.BEST, deadline_s=free.score.total_s), pair(), now).route is Route.CLOUD
    late = choose(job(deadline_s=free.score.total_s * 1.001), pair(), now)
    assert {one.refusal for one in late.candidates if one.score.route is Route.LOCAL} == {
        f"{1000 * one.score.total_s:.0f} ms predicted, the deadline is {1001 * free.score.total_s:g} ms"
        for one in late.candidates
        if one.score.route is Route.LOCAL
    }


def test_what_cannot_be_met_now_has_no_plan_and_every_reason() -> None:
    now = conditions(phone=SLOW_PHONE, cloud=cloud(rtt_s=5.0))
    with pytest.raises(NoPlan, match=r"local: \d+ ms predicted, the deadline is 1 ms.*cloud: \d+ ms .*split: .*specul"):
        choose(job(deadline_s=0.001), pair(), now)
    with pytest.raises(NoPlan, match="cloud: none is configured"):
        choose(job(max_bytes=0, route=Route.CLOUD), pair(), conditions(cloud=None))


def test_bytes_that_can_never_do_are_a_mistake_of_the_caller() -> None:
    with pytest.raises(ValueError, match=r"max_bytes 100, an answer of one token takes \d{3} at least"):
        choose(job(max_bytes=100, route=Route.CLOUD), pair(), conditions())
    assert choose(job(max_bytes=0), pair(), conditions()).route is Route.LOCAL
    with pytest.raises(NoPlan):  # enough for a short answer, not for one of the usual length
        choose(job(max_bytes=700, max_tokens=60, route=Route.CLOUD), pair(), conditions())


@pytest.mark.parametrize(("saved", "route"), [(0.02, Route.CLOUD), (0.08, Route.SPLIT)])
def test_round_trips_must_be_worth_it(saved: float, route: Route) -> None:
    found = {
        one.score.route: one.score for one in choose(job(), pair(), conditions()).candidates if not one.score.draft
    }
    alone, split = found[Route.CLOUD], found[Route.SPLIT]
    assert split.trips > alone.trips
    assert steadiest([split, replace(alone, cost=(1 + saved) * split.cost)]).route is route
    assert steadiest([replace(found[Route.LOCAL], cost=0.99 * alone.cost), split, alone]).route is Route.LOCAL


def test_speculation_is_an_order_too() -> None:
    now = conditions(phone=SLOW_PHONE, cloud=FAST_CLOUD)
    plan = choose(job(route=Route.SPECULATIVE), pair(), now)
    assert (plan.route, plan.draft, plan.score.draft > 0) == (Route.SPECULATIVE, LONGEST_DRAFT, True)
    asked = choose(job(route=Route.SPECULATIVE, draft=5, split=2), pair(), now)
    assert (asked.split, asked.draft, asked.score.draft, asked.hidden_bits) == (2, 5, 5, 16)
    whole = choose(job(route=Route.SPECULATIVE, split=0), pair(), now)
    assert (whole.split, whole.hidden_bits) == (0, None)
    with pytest.raises(NoPlan, match="the context of what drafts holds 32"):
        choose(job(prompt=40, route=Route.SPECULATIVE), Pair(shape("tiny", context=32), shape(), 3), now)


@pytest.mark.parametrize(("draft", "chosen"), [(None, 0), (0, 0), (4, 4)])
def test_drafts_in_the_cloud_are_made_where_they_pay_or_are_asked_for(draft: int | None, chosen: int) -> None:
    slow = cloud(rtt_s=0.001, up=1e9, down=1e9, rates=Rates(1e9, 1e5), draft_rate=1e3)
    wish = {"route": Route.CLOUD, "draft": draft}
    assert choose(job(**wish), pair(), conditions(cloud=slow)).draft == chosen
    quick = replace(slow, draft_rate=1e7)
    assert (choose(job(route=Route.CLOUD), pair(), conditions(cloud=quick)).draft > 0) is True
    with pytest.raises(NoPlan, match="draft 4 was asked for"):
        choose(job(route=Route.CLOUD, draft=4), pair(), conditions(cloud=replace(slow, draft_rate=0.0)))


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"draft": 4}, "draft 4 goes with route 'speculative' or 'cloud', not 'auto'"),
        ({"draft": 0, "route": Route.SPECULATIVE}, "draft 0, must be 1 to 64 tokens"),
        ({"draft": 65, "route": Route.CLOUD}, "draft 65, must be 0 to 64 tokens"),
        ({"split": 0, "route": Route.SPLIT}, "split 0 is route 'cloud'"),
        ({"deadline_s": 0.0}, "a deadline of 0 ms"),
        ({"deadline_s": float("nan")}, "a deadline of nan ms"),
        ({"max_bytes": -1}, "max_bytes -1"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(wish: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Wish(**wish)  # type: ignore[arg-type]
