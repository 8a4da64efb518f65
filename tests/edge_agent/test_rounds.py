"""Rounds of drafts: what they cost by hand, and the line where they begin to pay."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_agent.conditions import Rates
from edge_agent.cost import shared, speculative
from edge_agent.job import Quality, Route
from edge_agent.plan import choose
from edge_agent.rounds import AHEAD, ahead, best, in_turn
from edge_agent.traffic import DRAFT_BYTES, digits, on_the_wire
from protocol.frames import Draft, encode
from split_model.drafting import Acceptance, token_seconds
from split_model.flops import head_flops, layer_flops
from support.edge import cloud, conditions, job, pair, phone

PAIR = pair()
ANSWER = 41  # tokens, of which 40 come behind the first


def test_a_round_in_turn_by_hand() -> None:
    """Two drafts, 0.5 and then 0.4 accepted: 1 + 0.5 + 0.2 tokens a round."""
    rounds = in_turn([0.5, 0.4], made_s=0.02, verify_s=0.05, away_s=0.1)
    assert rounds.token_s == pytest.approx(0.17 / 1.7)
    assert (rounds.compute_s, rounds.network_s) == (pytest.approx(0.07 / 1.7), pytest.approx(0.1 / 1.7))
    assert (rounds.trips, rounds.verified) == (pytest.approx(1 / 1.7), pytest.approx(2 / 1.7))


def test_rounds_ahead_by_hand() -> None:
    """0.2 of the drafts pass whole; the others bring 0.7 drafts less 0.2 on average and the token that was right."""
    rounds = ahead([0.5, 0.4], made_s=0.02, up_s=0.01, verify_s=0.05, rtt_s=0.1)
    tokens = 0.5 + 0.2 + 0.8
    assert rounds.compute_s == pytest.approx((0.8 * 0.07 + 0.2 * 0.05) / tokens)
    assert rounds.network_s == pytest.approx(0.8 * 0.11 / tokens)
    assert rounds.trips == pytest.approx(0.8 / tokens)
    assert rounds.sent == pytest.approx(2 * (1 + 0.8 * 3) / tokens)  # three more drafts are on their way in vain


def test_where_all_drafts_pass_the_slowest_stage_sets_the_pace() -> None:
    for made, up, verify in [(0.3, 0.1, 0.2), (0.1, 0.3, 0.2), (0.1, 0.2, 0.3)]:
        assert ahead([1.0] * 4, made, up, verify, rtt_s=0.1).token_s == pytest.approx(0.3 / 4)


def test_where_all_drafts_pass_on_a_long_way_as_many_are_verified_as_may_be_under_way() -> None:
    assert ahead([1.0] * 5, 0.1, 0.1, 0.3, rtt_s=3.5).token_s == pytest.approx(4.0 / (AHEAD * 5))


@given(st.floats(0, 0.99), st.integers(1, 16), st.floats(1e-4, 0.1), st.floats(1e-4, 0.2), st.floats(0, 1))
def test_rounds_are_those_that_the_drafting_phone_reckons_with(
    a: float, count: int, draft_s: float, verify_s: float, rtt_s: float
) -> None:
    acceptance = Acceptance(prior=a)
    found = ahead([a] * count, count * draft_s, 0.0, verify_s, rtt_s, window=1e9).token_s
    assert found == pytest.approx(token_seconds(acceptance, count, draft_s, lambda n: verify_s, rtt_s, ahead=True))
    found = in_turn([a] * count, count * draft_s, verify_s, rtt_s).token_s
    assert found == pytest.approx(token_seconds(acceptance, count, draft_s, lambda n: verify_s, rtt_s, ahead=False))


@pytest.mark.parametrize(
    ("a", "count", "made", "verify", "rtt"),
    [(0.8, 4, 0.03, 0.05, 0.12), (0.95, 5, 0.02, 0.03, 0.4), (0.6, 2, 0.1, 0.02, 0.01), (0.9, 8, 0.05, 0.05, 0.0)],
)
def test_rounds_ahead_take_as_long_as_a_pipeline_that_is_played_through(
    a: float, count: int, made: float, verify: float, rtt: float
) -> None:
    """A phone, a line and a cloud, event by event, over many tokens."""
    draw, now, tokens, done = random.Random(1), 0.0, 0, [0.0]
    for _ in range(20_000):  # from one rejection to the next
        phone = cloud_free = now
        done = [now] * AHEAD  # when the answers to the latest drafts were back
        while True:
            phone = max(phone, done[-AHEAD]) + made
            cloud_free = max(cloud_free, phone + rtt / 2) + verify
            done = [*done[1:], cloud_free + rtt / 2]
            passed = next((at for at in range(count) if draw.random() > a), count)
            tokens += passed
            if passed < count:
                break
        tokens, now = tokens + 1, cloud_free + rtt / 2
    assert now / tokens == pytest.approx(ahead([a] * count, made, 0.0, verify, rtt).token_s, rel=0.05)


def test_drafts_in_vain_are_bounded_by_what_may_be_under_way() -> None:
    assert ahead([0.0], made_s=1e-9, up_s=0.0, verify_s=0.1, rtt_s=10.0).sent == pytest.approx(AHEAD)


@pytest.mark.parametrize(
    ("alone_ms", "lines"),
    [(100, (47, 144, 265, 319)), (50, (-5, 47, 108, 134)), (30, (-25, 8, 45, 61)), (20, (-35, -11, 13, 24))],
)
def test_the_line_of_drafting_in_turn(alone_ms: float, lines: tuple[float, ...]) -> None:
    """DESIGN section 4: five drafts of 10 ms each pay below this round trip (ms), at an acceptance of 0.5 to 0.9."""
    for a, line in zip((0.5, 0.7, 0.85, 0.9), lines, strict=True):
        for rtt, pays in [(line - 2, True), (line + 2, False)]:
            rounds = in_turn([a] * 5, 0.05, alone_ms / 1000, max(0.0, rtt) / 1000)
            assert (rounds.token_s < alone_ms / 1000) == (pays and rtt > 0)


def _tokens_by(route: Route, a: float, rtt_s: float, **changes: object) -> float:
    """Seconds for the later tokens of an answer, predicted."""
    there = cloud(rtt_s=rtt_s, up=1e9, down=1e9, **changes)
    now = conditions(phone=phone(tiny=Rates(1e9, 1e5)), cloud=there, answer_tokens=ANSWER, agreement=a)
    long = job(max_tokens=ANSWER)
    if route is Route.CLOUD:
        score = shared(long, PAIR.full, 0, now, there)
    else:
        score = speculative(long, PAIR, 0, 5, now, there)
    return score.total_s - score.first_token_s


@pytest.mark.parametrize("a", [0.5, 0.7, 0.85, 0.9])
def test_the_prediction_flips_where_drafting_ahead_stops_paying(a: float) -> None:
    """The round trip below which drafts pay, worked out from the formula, is where the two scores cross."""
    one = 3 * layer_flops(PAIR.full, 5, 40) / 40 + head_flops(PAIR.full)
    rates = Rates(1e9, one / 0.1)  # 100 ms a token, and hardly more for further positions
    alone, whole = 0.1, a**5
    made = 5 * (layer_flops(PAIR.tiny, 5, 40) / 40 + head_flops(PAIR.tiny)) / 1e5
    waits = whole**AHEAD / (1 - whole**AHEAD)  # for each rejection, where the way back is the longest part
    steady = made + alone + whole / (1 - whole) * alone
    line = (alone / (1 - a) - steady + waits * (AHEAD * alone - made - alone)) / (1 + waits)
    if line + made + alone < AHEAD * alone:  # short enough that nothing is waited for
        line = alone / (1 - a) - steady
    assert line > 0
    for rtt, pays in [(0.99 * line, True), (1.01 * line, False)]:
        drafted, plain = (_tokens_by(route, a, rtt, rates=rates) for route in (Route.SPECULATIVE, Route.CLOUD))
        assert (drafted < plain) == pays


def _chosen(rtt_s: float, a: float, **changes: object) -> Route:
    full = Rates(1e9, 1e5)  # 3.8e3 FLOPs a token: 38 ms in the cloud
    there = cloud(rtt_s=rtt_s, up=1e9, down=1e9, rates=full, **changes)
    here = phone(tiny=Rates(1e9, 1e6), full=Rates(1e5, 1e3))
    now = conditions(phone=here, cloud=there, answer_tokens=ANSWER, agreement=a)
    return choose(job(max_tokens=ANSWER, quality=Quality.BEST), PAIR, now).route


def test_the_choice_flips_with_the_round_trip_and_the_acceptance() -> None:
    assert _chosen(0.01, 0.8) is Route.SPECULATIVE
    assert _chosen(0.5, 0.8) is Route.CLOUD
    assert _chosen(0.01, 0.1) is Route.CLOUD


def test_a_slow_phone_and_a_fast_cloud_never_speculate() -> None:
    for rtt_s in (0.0, 0.001, 0.02, 0.2):
        fast = cloud(rtt_s=rtt_s, up=1e9, down=1e9, rates=Rates(1e9, 1e9))
        now = conditions(cloud=fast, answer_tokens=ANSWER, agreement=0.95)
        assert choose(job(max_tokens=ANSWER, quality=Quality.BEST), PAIR, now).route is Route.CLOUD


def test_the_best_draft_is_longer_where_more_are_accepted_and_the_way_is_long() -> None:
    def count(a: float, rtt_s: float) -> int:
        return best(lambda n: ahead([a] * n, n * 0.01, 0.0, 0.05 + n * 0.002, rtt_s)).draft

    assert count(0.5, 0.05) < count(0.8, 0.05) <= count(0.95, 0.05)
    assert count(0.8, 0.0) <= count(0.8, 0.1)


def test_the_tiny_model_may_read_the_prompt_while_the_cloud_does() -> None:
    """Drafting begins when both are through: only what the phone takes longer is added."""
    there = cloud(rates=Rates(1e9, 1e5))
    quick, slow = (conditions(phone=phone(tiny=Rates(rate, 1e6)), cloud=there) for rate in (1e9, 1e4))
    fast, late = (speculative(job(prompt=30), PAIR, 0, 4, now, there) for now in (quick, slow))
    one = layer_flops(PAIR.tiny, 29, 1)
    tiny_s = (one + head_flops(PAIR.tiny)) / 1e6 + (layer_flops(PAIR.tiny, 0, 30) - one) / 1e4
    assert late.first_token_s == fast.first_token_s
    assert late.total_s - fast.total_s == pytest.approx(tiny_s - fast.first_token_s)


def test_places_that_are_known_replace_the_mean() -> None:
    there = cloud()
    worse = conditions(cloud=there, agreement=0.9, places=(0.2, 0.2))
    usual = conditions(cloud=there, agreement=0.9)
    assert speculative(job(), PAIR, 0, 2, worse, there).total_s > speculative(job(), PAIR, 0, 2, usual, there).total_s


def test_a_round_without_a_split_is_under_100_bytes() -> None:
    """Eight drafts, with all that a packet puts around them; and the model knows the frame's size."""
    size = len(encode(Draft(300, tuple(range(4000, 4008)), 7))) + 4
    assert on_the_wire(size) < 100
    assert abs(size - DRAFT_BYTES - 8 * digits(4096)) < 4
