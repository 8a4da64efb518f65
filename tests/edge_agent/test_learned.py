"""What answers teach: agreement and lengths, by entropy and by how tokens are drawn."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path

import pytest

from edge_agent.learned import (
    ANSWERS_KEPT,
    PAIRS,
    PRIOR,
    PRIOR_ANSWER,
    STEADY,
    TOKENS_KEPT,
    Agreement,
    Learned,
    Lengths,
)
from edge_agent.state import State
from split_model.sampling import Sampling
from split_model.source import find_model
from support.edge import pair

ROWS = ((1.0, 0.9, 500.0), (math.inf, 0.6, 500.0))
SAMPLED = Sampling(temperature=1.0)
PAIR = pair()


def test_agreement_comes_to_be_what_is_seen() -> None:
    table, draw = Agreement(ROWS, 0.75), random.Random(1)
    for _ in range(300):
        table.seen(0.5, False, sum(draw.random() < 0.5 for _ in range(40)), 40)
    assert table.at(0.5) == pytest.approx(0.5, abs=0.06)  # the table that ships keeps a say of a tenth
    assert table.at(2.0) == 0.6  # nothing was seen of others
    assert table.at(0.5, sampled=True) == 0.9
    assert table.mean() == pytest.approx(table.at(0.5), abs=0.03)


def test_a_few_tokens_hardly_move_what_ships() -> None:
    table = Agreement(ROWS, 0.75)
    table.seen(0.5, False, 0, 10)
    assert table.at(0.5) == pytest.approx(0.9 * STEADY / (STEADY + 10), abs=0.001)


def test_what_was_seen_long_ago_is_forgotten() -> None:
    """A pair whose agreement changes from 0 to 1 is known to agree after a few memories' worth of tokens."""
    table = Agreement(ROWS, 0.75)
    for agreed in (0, 40):
        for _ in range(500):
            table.seen(0.5, False, agreed, 40)
    assert table.at(0.5) > 0.98
    assert 4 * TOKENS_KEPT < 500 * 40


def test_greedy_and_sampled_learn_apart_and_what_ships_counts_less_for_sampled() -> None:
    table = Agreement(ROWS, 0.75)
    for sampled in (False, True):
        table.seen(0.5, sampled, 0, 100)
    assert table.at(0.5, sampled=True) < table.at(0.5) < 0.9


@pytest.mark.parametrize("entropy", [None, math.nan])
def test_an_entropy_that_is_not_known_teaches_the_mean_alone(entropy: float | None) -> None:
    table = Agreement(ROWS, 0.75)
    table.seen(entropy, False, 0, 500)
    assert (table.at(0.5), table.at(2.0)) == (0.9, 0.6)
    assert table.at(entropy) == table.mean() < 0.5


def test_single_tokens_learn_by_their_own_entropy() -> None:
    table = Agreement(ROWS, 0.75, token_bins=((1.0, 0.9, 300.0), (math.inf, 0.4, 300.0)))
    assert (table.token(0.1), table.token(5.0)) == (0.9, 0.4)
    table.seen_tokens(False, [(0.1, True), (5.0, False)] * 2000)
    assert table.token(0.1) > 0.98
    assert table.token(5.0) < 0.06
    assert table.at(0.1) == 0.9


def test_the_table_of_the_built_in_pair_says_less_the_less_sure_the_tiny_model_is() -> None:
    table = Agreement.read(find_model("assistant-2m"))
    chances = [table.token(entropy) for entropy in (0.01, 0.4, 0.9, 1.2, 1.8, 2.5, 5.0)]
    assert chances == sorted(chances, reverse=True)
    assert 0.7 < table.mean() < 0.9


def test_lengths_are_those_of_the_bin_once_it_has_some() -> None:
    lengths = Lengths()
    assert lengths.expected(None, False) == lengths.expected(0.5, False) == PRIOR_ANSWER
    for _ in range(60):
        lengths.seen(0.2, False, 10)
        lengths.seen(2.5, False, 90)
    assert lengths.expected(0.2, False) == pytest.approx(15, abs=5)
    assert lengths.expected(2.5, False) == pytest.approx(85, abs=5)
    assert lengths.expected(None, False) == pytest.approx(50, abs=4)
    assert lengths.expected(0.2, True) == PRIOR_ANSWER


def test_lengths_follow_a_change() -> None:
    lengths = Lengths()
    for tokens in (200, 20):
        for _ in range(int(4 * ANSWERS_KEPT)):
            lengths.seen(None, False, tokens)
    assert lengths.expected(None, False) == pytest.approx(20, abs=6)


def test_an_answer_that_was_cut_short_does_not_teach_that_answers_are_short() -> None:
    lengths = Lengths()
    lengths.seen(None, False, 8, cut=True)
    assert lengths.expected(None, False) == PRIOR_ANSWER
    lengths.seen(None, False, 400, cut=True)
    assert lengths.expected(None, False) > PRIOR_ANSWER


def _learned(folder: Path, key: str = "a-b") -> Learned:
    return Learned(Agreement(ROWS, 0.75), PAIR, State(folder), key)


def test_what_was_learned_is_kept_for_its_pair(tmp_path: Path) -> None:
    first = _learned(tmp_path)
    first.agreement.seen(0.5, True, 10, 300)
    first.agreement.seen_tokens(False, [(0.2, False)] * 50)
    first.lengths.seen(0.5, False, 7)
    first.save()
    again, other = _learned(tmp_path), _learned(tmp_path, "c-d")
    assert again.agreement.at(0.5, True) == pytest.approx(first.agreement.at(0.5, True)) != 0.9
    assert again.agreement.token(0.2) == pytest.approx(first.agreement.token(0.2))
    assert again.lengths.expected(0.5, False) == pytest.approx(first.lengths.expected(0.5, False)) != PRIOR_ANSWER
    assert (other.agreement.at(0.5, True), other.lengths.expected(0.5, False)) == (0.9, PRIOR_ANSWER)


def test_only_the_latest_pairs_are_kept(tmp_path: Path) -> None:
    for key in range(PAIRS + 4):
        _learned(tmp_path, str(key)).save()
    kept = json.loads((tmp_path / "agreement.json").read_text())
    assert list(kept) == [str(key) for key in range(4, PAIRS + 4)]


def test_other_bins_than_those_on_disk_begin_anew(tmp_path: Path) -> None:
    first = _learned(tmp_path)
    first.agreement.seen(0.5, False, 0, 500)
    first.save()
    again = Learned(Agreement(((2.0, 0.9, 500.0), (math.inf, 0.6, 500.0)), 0.75), PAIR, State(tmp_path), "a-b")
    assert again.agreement.at(0.5) == 0.9


BROKEN = [
    "{", "[]", '{"a-b": 3}', '{"a-b": {"agreement": 1, "lengths": {}}}', '{"a-b": {"agreement": [{}, 1, null]}}',
    '{"a-b": {"agreement": [{"limits": [1.0, null], "seen": [[1e999, 1], [-1, 1], ["x", 2], 7]}], "lengths": [{}]}}',
    '{"a-b": {"agreement": [{"limits": [1.0, null], "seen": [[NaN, NaN], [1, NaN], [0, 1]]}], "lengths": []}}',
    '{"a-b": {"agreement": [{"limits": [1.0, null], "seen": 3}], "lengths": [[], {"limits": 1, "seen": [[1,1]]}]}}',
]  # fmt: skip


@pytest.mark.parametrize("text", BROKEN)
def test_a_bad_file_does_not_stop_a_start(tmp_path: Path, text: str) -> None:
    (tmp_path / "agreement.json").write_text(text)
    learned = _learned(tmp_path)
    assert (learned.agreement.at(0.5), learned.agreement.mean()) == (0.9, 0.75)
    assert learned.lengths.expected(None, False) == PRIOR_ANSWER
    learned.save()


def test_counts_on_disk_weigh_no_more_than_they_may(tmp_path: Path) -> None:
    seen = {"limits": [1.0, None], "seen": [[1e12, 0], [1e12, 0], [0, 0]]}
    kept = {"a-b": {"agreement": [seen], "lengths": []}}
    (tmp_path / "agreement.json").write_text(json.dumps(kept))
    table = _learned(tmp_path).agreement
    for _ in range(400):
        table.seen(0.5, False, 40, 40)
    assert table.at(0.5) > 0.9


def test_drafts_begin_with_what_is_known_and_all_answers_of_a_kind_share_what_they_teach(tmp_path: Path) -> None:
    learned = _learned(tmp_path)
    assert learned.acceptance(Sampling()).mean == 0.75
    learned.acceptance(Sampling()).seen(5, 0)
    assert learned.acceptance(Sampling(seed=3)).mean < 0.75
    assert learned.acceptance(SAMPLED).mean == 0.75
    assert learned.chance(SAMPLED)(0.5) == learned.agreement.token(0.5, True)


def test_the_table_of_agreement_is_read_by_entropy(tmp_path: Path) -> None:
    bins = [
        {"entropy_below": 0.5, "agreement": 0.9, "tokens": 300},
        {"entropy_below": None, "agreement": 0.5, "tokens": 100},
    ]
    (tmp_path / "agreement.json").write_text(json.dumps({"bins": bins, "by": "entropy"}))
    table = Agreement.read(tmp_path)
    assert [table.at(entropy) for entropy in (0.0, 0.49, 0.5, 9.0)] == [0.9, 0.9, 0.5, 0.5]
    assert table.mean() == pytest.approx(0.8)


def test_bins_of_few_tokens_are_read_as_their_neighbours(tmp_path: Path) -> None:
    rows = [(0.1, 1.0, 0), (0.2, 1.0, 29), (0.3, 0.9, 30), (0.4, 0.2, 3), (0.5, 0.7, 500), (None, 1.0, 0)]
    bins = [{"entropy_below": below, "agreement": share, "tokens": count} for below, share, count in rows]
    (tmp_path / "agreement.json").write_text(json.dumps({"bins": bins[::-1]}))
    table = Agreement.read(tmp_path)
    assert [table.at(entropy) for entropy in (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)] == [0.9, 0.9, 0.9, 0.7, 0.7, 0.7]
    (tmp_path / "agreement.json").write_text(json.dumps({"bins": bins[:2]}))
    assert Agreement.read(tmp_path).at(0.0) == pytest.approx(1.0)  # the mean: there is nothing else


@pytest.mark.parametrize("text", [None, "{", "{}", '{"bins": []}', '{"bins": [{"entropy_below": "x"}]}', "[]"])
def test_a_missing_or_broken_table_leaves_the_prior(tmp_path: Path, text: str | None) -> None:
    if text is not None:
        (tmp_path / "agreement.json").write_text(text)
    table = Agreement.read(tmp_path)
    assert {table.at(entropy) for entropy in (0.0, 1.0, 99.0)} == {table.mean(), PRIOR}
    assert table.span() == (PRIOR, PRIOR)
