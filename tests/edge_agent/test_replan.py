"""When the rest of an answer moves, and when it had better not."""

from __future__ import annotations

import random
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import pytest

from edge_agent.conditions import Conditions, Rates
from edge_agent.cost import Pair
from edge_agent.decisions import Leg
from edge_agent.job import Job, Privacy, Route
from edge_agent.plan import choose
from edge_agent.replan import EVERY_S, EVERY_TOKENS, HOLD_S, Lookout, Move, Progress, Room, changes, weighed
from support.edge import cloud, conditions, job, pair, phone, shape

PAIR = replace(pair(), full=shape("full", context=1024), tiny=shape("tiny", layers=1, context=1024))
CLOUD, LOCAL = Leg(Route.CLOUD, 0, 0, "full"), Leg(Route.LOCAL, 0, 0, "full")
SPLIT = Leg(Route.SPLIT, 2, 0, "full")
TINY = Leg(Route.LOCAL, 0, 0, "tiny")
ROOM = Room()
WEAK = phone(tiny=Rates(1, 1), full=Rates(1e6, 1e5))  # its tiny model is of no use, the full one takes 12 ms a token
NEAR = cloud(rtt_s=0.02, up=1e6, down=1e6, rates=Rates(1e7, 1e6))


def best_rest(job: Job, running: Leg, at: Progress, pair: Pair, now: Conditions, room: Room) -> Leg | None:
    """`weighed`, at once."""
    weighing = weighed(job, running, at, pair, now, room)
    while True:
        try:
            next(weighing)
        except StopIteration as end:
            found: Leg | None = end.value
            return found


def around(**changed: Any) -> Conditions:
    """A phone and a cloud whose choice is the cloud, but for what is changed of the cloud."""
    return conditions(phone=WEAK, cloud=replace(NEAR, **changed), answer_tokens=200.0)


def asked(**wish: Any) -> Job:
    return job(prompt=20, max_tokens=400, **wish)


def at(tokens: int, seconds: float = 1.0, moved: int = 0) -> Progress:
    return Progress(20 + tokens, seconds, moved)


def look(lookout: Lookout, running: Leg, now: list[Conditions], every_s: float = 0.5) -> list[tuple[float, Move]]:
    """Every move, and when, of an answer that makes eight tokens under each of the conditions."""
    moves: list[tuple[float, Move]] = []
    for step, there in enumerate(now, 1):
        for token in range(8):
            progress = at(8 * step + token, every_s * (step + token / 8))
            if lookout.due(progress) and (move := lookout.better(running, progress, partial(replace, there), ROOM)):
                moves.append((progress.seconds, move))
                running = move.leg
    return moves


def test_the_rest_stays_where_nothing_has_changed() -> None:
    assert choose(asked(), PAIR, around()).route is Route.CLOUD
    assert best_rest(asked(), CLOUD, at(30), PAIR, around(), ROOM) is None
    assert look(Lookout(PAIR, asked(), around()), CLOUD, [around()] * 40) == []


def test_a_link_that_gets_worse_moves_the_rest_to_the_phone_and_back() -> None:
    slow = around(rates=Rates(1e4, 1e4))
    lookout = Lookout(PAIR, asked(), around())
    ((when, move),) = look(lookout, CLOUD, [around()] * 2 + [slow] * 10)
    assert (move.leg.route, move.leg.model) == (Route.LOCAL, "full")
    assert 2.0 <= when < 2.5  # the second look at it
    assert move.words == "local (the cloud at 0.01 of its rate)"
    ((_, back),) = look(Lookout(PAIR, asked(), slow), LOCAL, [slow] * 2 + [around()] * 10)
    assert back.leg.route is Route.CLOUD


def test_a_round_trip_that_grows_moves_a_split() -> None:
    far = around(rtt_s=0.5)
    ((_, move),) = look(Lookout(PAIR, asked(), around()), SPLIT, [far] * 4)
    assert move.leg.route in (Route.CLOUD, Route.LOCAL)
    assert move.words.endswith("(round trip 20 → 500 ms)")


def test_what_must_be_computed_again_is_paid_for() -> None:
    """Worth it for a short log, not for a long one."""
    slow = around(rates=Rates(1e7, 9e4))
    assert best_rest(asked(), CLOUD, at(0), PAIR, around(rates=Rates(1e7, 2e4)), ROOM) is not None
    heavy = replace(slow, phone=replace(WEAK, full=Rates(3e4, 3e5)))
    short, long = asked(), replace(asked(), prompt=(0,) * 500, max_tokens=380)
    assert best_rest(short, CLOUD, Progress(20, 1.0), PAIR, heavy, ROOM) is not None
    assert best_rest(long, CLOUD, Progress(500, 1.0), PAIR, heavy, ROOM) is None


def test_a_little_less_is_not_enough() -> None:
    fair = next(rate for rate in range(100, 1, -1) if _cheaper(float(rate) * 1e3))
    assert _cheaper(fair * 1e3)
    assert best_rest(asked(), CLOUD, at(30), PAIR, around(rates=Rates(1e7, fair * 1e3)), ROOM) is None


def _cheaper(decode: float) -> bool:
    """Whether the phone is the cheaper place for a new answer, when the cloud is so fast."""
    return choose(asked(), PAIR, around(rates=Rates(1e7, decode))).route is Route.LOCAL


@pytest.mark.parametrize("wish", [{"route": Route.CLOUD}, {"route": Route.SPLIT}, {"route": Route.SPLIT, "split": 2}])
def test_a_route_that_was_asked_for_by_name_stays(wish: dict[str, Any]) -> None:
    running = CLOUD if wish["route"] is Route.CLOUD else SPLIT
    now = around(rates=Rates(1e4, 1e4), rtt_s=1.0)
    found = best_rest(asked(**wish), running, at(30), PAIR, now, ROOM)
    assert found is None or (found.route is wish["route"] and "split" not in wish)
    assert best_rest(asked(), running, at(30), PAIR, now, ROOM) is not None


def test_nothing_leaves_the_phone_that_must_not() -> None:
    lame = replace(around(), phone=replace(WEAK, full=Rates(1e3, 1e3)))
    assert best_rest(asked(), LOCAL, at(30), PAIR, lame, ROOM) is not None
    assert best_rest(asked(privacy=Privacy.DEVICE), LOCAL, at(30), PAIR, lame, ROOM) is None
    assert best_rest(asked(route=Route.LOCAL), LOCAL, at(30), PAIR, lame, ROOM) is None


def test_bytes_that_are_left_are_not_overrun() -> None:
    lame = replace(around(), phone=replace(WEAK, full=Rates(1e3, 1e3)))
    wish = asked(max_bytes=60_000)
    assert best_rest(wish, LOCAL, at(30, moved=0), PAIR, lame, ROOM) is not None
    assert best_rest(wish, LOCAL, at(30, moved=59_000), PAIR, lame, ROOM) is None


def test_the_text_is_never_made_by_two_models_of_free_will() -> None:
    lame = replace(around(), phone=replace(WEAK, full=Rates(1e3, 1e3)), agreement=0.99)
    assert best_rest(asked(), TINY, at(30), PAIR, lame, ROOM) is None
    quick = replace(lame, phone=phone(tiny=Rates(1e12, 1e12), full=Rates(1e3, 1e3)), cloud=None)
    assert best_rest(asked(), LOCAL, at(30), PAIR, quick, ROOM) is None


def test_a_text_that_is_not_exactly_the_full_model_s_stays_where_it_is() -> None:
    slow = around(rates=Rates(1e4, 1e4))
    assert best_rest(asked(), CLOUD, at(30), PAIR, slow, Room(exact=False)) is None
    eight = asked(hidden_bits=8)
    strong = replace(around(rtt_s=1e-4, rates=Rates(1e4, 1e4)), phone=phone(full=Rates(1e8, 1e8)))
    part = replace(PAIR, edge_layers=2)  # the phone has no head: only a split can use it
    assert best_rest(asked(), CLOUD, at(30), part, strong, ROOM) is not None
    assert best_rest(eight, CLOUD, at(30), part, strong, ROOM) is None


def test_without_a_place_on_the_phone_it_is_not_moved_there() -> None:
    slow = around(rates=Rates(1e4, 1e4))
    assert best_rest(asked(), CLOUD, at(30), PAIR, slow, Room(full=False)) is None


def test_a_cloud_that_cannot_be_reached_is_no_place_to_go() -> None:
    lame = replace(around(unreachable="no replica is reachable"), phone=replace(WEAK, full=Rates(1e3, 1e3)))
    assert best_rest(asked(), LOCAL, at(30), PAIR, lame, ROOM) is None
    there = replace(around(), phone=lame.phone)
    lookout = Lookout(PAIR, asked(), there)
    lookout.lost(at(4, 0.5))
    ((when, move),) = look(lookout, LOCAL, [lame] * 6 + [there] * 10)
    assert 4.0 <= when < 4.5
    assert move.leg.route is Route.CLOUD
    assert "there again" not in move.words  # since the decision, nothing has changed
    assert look(Lookout(PAIR, asked(route=Route.CLOUD), lame), LOCAL, [there] * 3)[0][1].leg.route is Route.CLOUD


def test_looks_are_half_a_second_and_eight_tokens_apart() -> None:
    lookout = Lookout(PAIR, asked(), around())
    assert not lookout.due(at(EVERY_TOKENS - 1, 9.0))
    assert not lookout.due(at(99, EVERY_S - 0.01))
    assert lookout.due(at(EVERY_TOKENS, EVERY_S))
    lookout.better(CLOUD, at(EVERY_TOKENS, EVERY_S), around, ROOM)
    assert not lookout.due(at(EVERY_TOKENS * 2 - 1, 9.0))


def test_moves_are_two_seconds_apart_then_four_then_eight() -> None:
    slow = around(rates=Rates(1e4, 1e4))
    swinging = [slow if step // 2 % 2 else around() for step in range(200)]
    moves = look(Lookout(PAIR, replace(asked(), max_tokens=10_000), around()), CLOUD, swinging)
    apart = [later - sooner for (sooner, _), (later, _) in pairwise(moves)]
    assert len(apart) >= 3
    assert all(gap >= HOLD_S * 2**place for place, gap in enumerate(apart))


@pytest.mark.parametrize("seed", range(20))
def test_noise_moves_nothing(seed: int) -> None:
    """Round trips, rates and queues as they are measured: 40 % off, from look to look, around a place where two plans
    are equally good."""
    dice = random.Random(seed)
    even = next(rate for rate in range(100, 1, -1) if _cheaper(float(rate) * 1e3)) * 1e3

    def noisy() -> Conditions:
        rates = Rates(1e7 * dice.lognormvariate(0, 0.4), even * dice.lognormvariate(0, 0.2))
        there = around(rates=rates, rtt_s=0.02 * dice.lognormvariate(0, 0.4), up=1e6 * dice.lognormvariate(0, 0.4))
        return replace(there, phone=replace(WEAK, full=Rates(1e6, 1e5 * dice.lognormvariate(0, 0.1))))

    moves = look(Lookout(PAIR, asked(), noisy()), CLOUD, [noisy() for _ in range(120)])
    assert len(moves) <= 4  # in a minute; without hysteresis it would be some forty
    free = [_best(noisy()) for _ in range(120)]
    assert sum(one != two for one, two in pairwise(free)) > 20


def _best(now: Conditions) -> Route:
    return choose(asked(), PAIR, now).route


def test_changes_are_told_in_words() -> None:
    before = around()
    now = replace(around(rtt_s=0.3, up=1e5, down=5e5, wait_s=1.0, address="b:1"), phone=replace(WEAK, under_way=1))
    assert list(changes(before, now)) == [
        "the phone at 0.50 of its rate", "its tiny model at 0.50 of its rate", "round trip 20 → 300 ms",
        "up 8 → 0.8 Mbit/s", "down 8 → 4 Mbit/s", "the cloud's queue 0 → 1000 ms", "b:1 instead of a:1",
    ]  # fmt: skip
    assert list(changes(before, around(rtt_s=0.024, up=0.9e6))) == []
    assert list(changes(before, around(unreachable="gone"))) == ["gone"]
