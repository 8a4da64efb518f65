"""How many tokens to draft: where it pays, where it does not, and what is learned from rounds."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from split_model.drafting import (
    GAIN,
    LENGTHS,
    Acceptance,
    Wanting,
    best_draft,
    best_together,
    token_seconds,
    tokens_per_round,
)

shares = st.floats(0.0, 1.0)
seconds = st.floats(0.0, 10.0)


def always(share: float) -> Acceptance:
    return Acceptance(prior=share)


def line(share: float, draft: int, alone_s: float, draft_s: float) -> float:
    """The longest round trip with which drafts pay: DESIGN's inequality, with a verification as long as one token."""
    return alone_s * sum(share**place for place in range(1, draft + 1)) - draft * draft_s


@pytest.mark.parametrize(
    ("alone_ms", "share", "rtt_ms"),
    [
        (100, 0.5, 47), (100, 0.7, 144), (100, 0.85, 265), (100, 0.9, 319),
        (50, 0.5, None), (50, 0.7, 47), (50, 0.85, 108), (50, 0.9, 134),
        (30, 0.5, None), (30, 0.7, 8), (30, 0.85, 45), (30, 0.9, 61),
        (20, 0.5, None), (20, 0.7, None), (20, 0.85, 13), (20, 0.9, 24),
    ],
)  # fmt: skip
def test_drafts_of_five_pay_up_to_the_published_round_trip(alone_ms: int, share: float, rtt_ms: int | None) -> None:
    alone_s, limit = alone_ms / 1e3, line(share, 5, alone_ms / 1e3, 0.01)
    assert (round(limit * 1e3) if limit > 0 else None) == rtt_ms
    for away_s in (limit * 0.99, limit * 1.01):
        if limit > 0:
            taken = token_seconds(always(share), 5, 0.01, lambda n: alone_s, away_s, ahead=False)
            assert (taken < alone_s) == (away_s < limit)


@given(shares, st.floats(0.001, 0.2), st.floats(0.0001, 0.1), st.integers(1, 8), st.floats(0.5, 1.5))
def test_the_choice_flips_at_the_line(share: float, alone_s: float, draft_s: float, limit: int, off: float) -> None:
    """Which is the longest of all drafts that are allowed: a short draft may pay where a long one does not."""
    best = max(line(share, draft, alone_s, draft_s) for draft in range(1, limit + 1))
    away_s = max(0.0, best * off)
    assume(abs(away_s - best) > 1e-6)
    chosen = best_draft(always(share), draft_s, lambda n: alone_s, away_s, alone_s, limit, ahead=False)
    assert (chosen > 0) == (away_s < best)


@given(shares, seconds, seconds, seconds, seconds, st.integers(0, 16), st.booleans())
def test_the_choice_is_within_its_limit_and_never_worse_than_none(
    share: float, draft_s: float, pass_s: float, away_s: float, alone_s: float, limit: int, ahead: bool
) -> None:
    def verify_s(n: int) -> float:
        return pass_s * (1 + n / 10)

    chosen = best_draft(always(share), draft_s, verify_s, away_s, alone_s, limit, ahead)
    assert 0 <= chosen <= limit
    costs = [token_seconds(always(share), n, draft_s, verify_s, away_s, ahead) for n in range(1, limit + 1)]
    if chosen:
        assert costs[chosen - 1] == min(costs) < alone_s
    else:
        assert all(cost >= alone_s for cost in costs)


@given(st.floats(0.001, 1.0), st.integers(1, 8), st.booleans())
def test_nothing_is_drafted_that_is_never_accepted(alone_s: float, limit: int, ahead: bool) -> None:
    assert best_draft(always(0.0), 1e-6, lambda n: alone_s, 0.0, alone_s, limit, ahead) == 0


@given(shares, st.floats(0.0001, 0.1), st.floats(0.0001, 0.1), seconds, st.integers(1, 8))
def test_going_ahead_never_costs_time(share: float, draft_s: float, pass_s: float, away_s: float, draft: int) -> None:
    """Of drafts that are accepted alike at every place; E tokens a round are fewer than it takes to be rejected."""
    waiting = token_seconds(always(share), draft, draft_s, lambda n: pass_s, away_s, ahead=False)
    ahead = token_seconds(always(share), draft, draft_s, lambda n: pass_s, away_s, ahead=True)
    assert ahead <= waiting * (draft + 1) / draft * (1 + 1e-9)


def test_going_ahead_hides_the_round_trip_of_perfect_drafts() -> None:
    taken = token_seconds(always(1.0), 4, 0.01, lambda n: 0.03, 5.0, ahead=True)
    assert taken == pytest.approx(0.04 / 4)
    nearly = token_seconds(always(1 - 1e-12), 4, 0.01, lambda n: 0.03, 5.0, ahead=True)
    assert nearly == pytest.approx(taken, rel=1e-3)


def test_going_ahead_is_what_a_simulation_says() -> None:
    """Chunks of 4 until one is rejected, each as long as the slower of drafting and verifying; then the way back."""
    share, draft, draft_s, pass_s, away_s = 0.8, 4, 0.01, 0.03, 0.1
    rng, spent, made = random.Random(1), 0.0, 0
    for _ in range(20_000):
        right = 0
        while rng.random() < share:
            right += 1
        made += right + 1
        spent += draft * draft_s + away_s + pass_s + right // draft * max(draft * draft_s, pass_s)
    told = token_seconds(always(share), draft, draft_s, lambda n: pass_s, away_s, ahead=True)
    assert told == pytest.approx(spent / made, rel=0.02)


@given(st.lists(shares, max_size=16))
def test_a_round_has_at_least_one_token_and_at_most_one_more_than_its_drafts(given_shares: list[float]) -> None:
    assert 1.0 <= tokens_per_round(given_shares) <= len(given_shares) + 1


@given(st.floats(0.0, 0.99), st.integers(1, 16))
def test_tokens_of_a_round_follow_the_closed_form(share: float, draft: int) -> None:
    assert tokens_per_round([share] * draft) == pytest.approx((1 - share ** (draft + 1)) / (1 - share))


@given(shares, st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=60))
def test_shares_stay_shares(prior: float, rounds: list[tuple[int, int]]) -> None:
    acceptance = Acceptance(prior)
    for drafted, accepted in rounds:
        acceptance.seen(max(drafted, accepted), accepted)
    assert all(0.0 <= share <= 1.0 for share in (*acceptance.shares(10), acceptance.mean))


def test_places_are_learned_apart_and_unseen_ones_are_like_the_mean() -> None:
    acceptance = Acceptance()
    for index in range(400):  # the first always, the second every other time, the third never
        acceptance.seen(4, 1 + index % 2)
    assert acceptance.share(0) > 0.95
    assert acceptance.share(1) == pytest.approx(0.5, abs=0.05)
    assert acceptance.share(2) < 0.1
    assert acceptance.share(3) == acceptance.share(7) == acceptance.mean
    assert acceptance.mean == pytest.approx(1.5 / 2.5, abs=0.03)


def test_the_recent_counts_more() -> None:
    acceptance = Acceptance()
    for _ in range(1000):
        acceptance.seen(1, 1)
    for _ in range(150):
        acceptance.seen(1, 0)
    assert acceptance.mean < 0.1


@pytest.mark.parametrize(("drafted", "accepted"), [(1, 2), (1, -1), (-1, -1)])
def test_a_round_that_cannot_be_is_refused(drafted: int, accepted: int) -> None:
    with pytest.raises(ValueError, match=f"{accepted} accepted of {drafted}"):
        Acceptance().seen(drafted, accepted)


@pytest.mark.parametrize("prior", [-0.1, 1.1, math.nan])
def test_a_prior_is_a_share(prior: float) -> None:
    with pytest.raises(ValueError, match="prior"):
        Acceptance(prior)


@given(shares, st.floats(0.0001, 0.1), st.floats(0.0, 0.01), st.integers(1, 40), st.integers(1, 40))
def test_a_batch_of_one_drafts_what_costs_the_least_time_a_token(
    share: float, draft_s: float, position_s: float, limit: int, budget: int
) -> None:
    def step_s(positions: int) -> float:
        return 0.05 + position_s * positions

    def token_s(draft: int) -> float:
        made = min(draft, limit)  # the batch drafts so many, of which this row takes what it may
        return (draft * draft_s + step_s(1 + draft)) / tokens_per_round(always(share).shares(made))

    fit = [draft for draft in LENGTHS if 1 + draft <= budget]
    many, draft = best_together([Wanting(limit, always(share), 0.0)], 1, budget, lambda _: draft_s, step_s)
    least = min((token_s(draft) for draft in fit), default=math.inf)
    assert many == (draft > 0)
    assert (token_s(draft) if draft else step_s(1) / GAIN) <= min(least, step_s(1) / GAIN) * (1 + 1e-9)


def test_drafts_for_one_row_must_make_up_for_those_that_wait() -> None:
    good, bad = Wanting(8, always(0.9), 0.0), Wanting(8, always(0.0), 0.0)

    def chosen(*likely: Wanting, rows: int) -> tuple[int, int]:
        return best_together(likely, rows, 128, lambda many: 0.005, lambda positions: 0.02)

    assert chosen(good, rows=1) == chosen(good, rows=9) == (1, 6)  # rows that want none do not count
    assert chosen(good, good, bad, bad, rows=4)[0] == 2
    assert chosen(good, *[bad] * 7, rows=8) == (0, 0)
    assert best_together([good], 1, 128, lambda many: 0.005, lambda positions: 0.0) == (0, 0)  # nothing is measured
    unread = Wanting(8, always(0.9), 0.1)
    assert chosen(unread, rows=1) == (0, 0)
