"""Keyed sampling: the generator, the filters, the distribution, and what a draw may depend on."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from split_model.sampling import Sampling, gumbel, philox, sample

# Known answers of philox4x32-10 from Random123's kat_vectors: counter, key, result.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


def words(text: str) -> tuple[np.ndarray, ...]:
    return tuple(np.array([int(word, 16)], dtype=np.uint64) for word in text.split())


@pytest.mark.parametrize(("counter", "key", "result"), KNOWN)
def test_philox_gives_the_published_answers(counter: str, key: str, result: str) -> None:
    assert philox(words(counter), words(key)) == words(result)


def logits(rows: int, vocabulary: int, seed: int = 0, scale: float = 3.0) -> torch.Tensor:
    return torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed)) * scale


def draws(row: torch.Tensor, how: Sampling, count: int) -> list[int]:
    return sample(row.expand(count, -1), range(count), [how] * count)


def test_greedy_takes_the_smallest_of_equals() -> None:
    row = torch.tensor([[0.0, 2.0, 1.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert sample(row, [0, 0], [Sampling(), Sampling(seed=9)]) == [1, 0]


@pytest.mark.parametrize(
    "how", [Sampling(1.0), Sampling(0.6), Sampling(1.7), Sampling(1.0, top_k=7), Sampling(0.9, top_p=0.8)]
)
def test_draws_follow_the_distribution(how: Sampling) -> None:
    row, count = logits(1, 40, seed=3, scale=1.0), 20_000
    chance = torch.softmax(row[0].double() / how.temperature, 0)
    order = chance.argsort(descending=True)
    if how.top_k:
        chance[order[how.top_k :]] = 0
    before = chance[order].cumsum(0) - chance[order]
    chance[order[before >= how.top_p * chance.sum()]] = 0
    expected = (chance / chance.sum()).numpy() * count
    found = np.bincount(draws(row, how, count), minlength=40)
    assert not found[expected == 0].any()
    assert stats.chisquare(found[expected > 0], expected[expected > 0]).pvalue > 1e-3


def test_draws_at_neighbouring_positions_and_seeds_are_independent() -> None:
    row = torch.zeros(1, 4)
    for firsts, seconds in (
        (draws(row, Sampling(1.0, seed=1), 8000), draws(row, Sampling(1.0, seed=2), 8000)),
        (draws(row, Sampling(1.0), 8001)[:-1], draws(row, Sampling(1.0), 8001)[1:]),
    ):
        table = np.zeros((4, 4))
        np.add.at(table, (firsts, seconds), 1)
        assert stats.chi2_contingency(table).pvalue > 1e-3


@settings(deadline=None, max_examples=60)
@given(
    rows=st.lists(
        st.tuples(
            st.integers(0, 9),
            st.integers(0, 1 << 20),
            st.builds(
                Sampling,
                temperature=st.sampled_from([0.0, 0.01, 0.7, 1.3]),
                top_p=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
                top_k=st.sampled_from([0, 1, 5, 600]),
                seed=st.integers(-(1 << 63), 1 << 64),
            ),
        ),
        min_size=1,
        max_size=12,
    )
)
def test_a_row_does_not_depend_on_the_others(rows: list[tuple[int, int, Sampling]]) -> None:
    table = logits(10, 500)
    pick, positions, how = (list(column) for column in zip(*rows, strict=True))
    together = sample(table[pick], positions, how)
    alone = [sample(table[[i]], [at], [one])[0] for i, at, one in rows]
    assert together == alone


def test_noise_is_the_same_for_any_choice_of_ids() -> None:
    place, seed = np.array([77], dtype=np.uint64), np.array([123456789], dtype=np.uint64)
    every = np.arange(70_000)
    whole = gumbel(every, np.zeros_like(every), place, seed)
    some = np.flatnonzero(np.random.default_rng(0).random(70_000) < 0.01)
    assert np.array_equal(gumbel(some, np.zeros_like(some), place, seed), whole[some])
    assert whole.min() > -3.14
    assert whole.max() < 22.88


def test_filters_keep_what_they_say() -> None:
    row = torch.tensor([[0.5, 0.2, 0.2, 0.06, 0.04]]).log()
    assert set(draws(row, Sampling(1.0, top_k=2), 400)) == {0, 1}  # 1 and 2 are equal: the smaller id stays
    assert set(draws(row, Sampling(1.0, top_p=0.5), 400)) == {0}
    assert set(draws(row, Sampling(1.0, top_p=0.69), 400)) == {0, 1}
    assert set(draws(row, Sampling(1.0, top_p=0.71), 400)) == {0, 1, 2}
    assert set(draws(row, Sampling(1.0, top_k=3, top_p=0.79), 400)) == {0, 1, 2}  # top-p after top-k: 0.5, 0.7 of 0.9
    assert set(draws(row, Sampling(1.0, top_p=0.0), 50)) == {0}


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("how", [Sampling(), Sampling(1.0), Sampling(0.5, 0.9, 5)])
def test_a_poisoned_row_draws_something_and_disturbs_no_other(poison: float, how: Sampling) -> None:
    table = logits(3, 64)
    expected = sample(table, [1, 2, 3], [how] * 3)
    table[1] = poison
    found = sample(table, [1, 2, 3], [how] * 3)
    assert [found[0], found[2]] == [expected[0], expected[2]]
    assert 0 <= found[1] < 64
