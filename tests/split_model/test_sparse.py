"""Sparse decoding: what is read, that bounds follow what is written, and that nobody else notices."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

from split_model.attention import Span
from split_model.cache import Cache
from split_model.model import Model
from split_model.readers import Scored
from split_model.settings import Precision
from split_model.sparse import SPREAD, Budget
from support.checkpoints import checkpoint, save_model

SMALL = Budget(page=16, first=1, best=3, recent=2, whole=1, least=150)
LENGTH = 400


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.load(checkpoint(), check=False, budget=SMALL)


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(6, 512, (length,), generator=torch.Generator().manual_seed(seed))


def forward(model: Model, cache: Cache, spans: Sequence[Span], ids: torch.Tensor) -> torch.Tensor:
    return model.logits(model.run(model.embed(ids), model.first, model.stop, cache, model.tiles(spans)))


def filled(model: Model, ids: torch.Tensor, slots: int = 1) -> Cache:
    cache = model.new_cache(slots)
    for slot in range(slots):
        assert cache.take() == slot
    forward(model, cache, [Span(0, 0, len(ids))], ids)
    return cache


def bounds(cache: Cache, slot: int, pages: int) -> torch.Tensor:
    """Of the first pages, computed anew from the keys."""
    keys = cache.memory[:, slot, 0, :, : pages * cache.budget.page].unflatten(2, (pages, -1)).float()
    most, least = keys.amax(3), keys.amin(3)
    return torch.cat([(most + least) / 2, (most - least) / 2 * SPREAD], 3).to(cache.memory.dtype)


def assert_bounded(cache: Cache, slot: int, pages: int) -> None:
    assert torch.equal(cache.bounds[:, slot, :, :pages], bounds(cache, slot, pages))


def test_short_contexts_are_read_whole(model: Model) -> None:
    ids = prompt(SMALL.least)
    cache = filled(model, ids[:-1])
    last = SMALL.least - 1
    dense = forward(model, cache, [Span(0, last, 1)], ids[-1:])
    assert torch.equal(forward(model, cache, [Span(0, last, 1, sparse=True)], ids[-1:]), dense)
    assert model.tiles([Span(0, last, 1, sparse=True)]).parts[0].pages is None
    assert model.tiles([Span(0, last + 1, 1, sparse=True)]).parts[0].pages is not None


def test_prompts_are_read_whole(model: Model) -> None:
    ids = prompt(LENGTH)
    cache = filled(model, ids[:300])
    dense = forward(model, cache, [Span(0, 300, 100)], ids[300:])
    assert torch.equal(forward(model, cache, [Span(0, 300, 100, sparse=True)], ids[300:]), dense)


@pytest.mark.parametrize("precision", [Precision.FP32, Precision.BF16])
def test_a_budget_of_all_pages_gives_what_dense_attention_gives(precision: Precision) -> None:
    """In another order, hence not the same bits."""
    everything = Budget(page=16, first=1, best=20, recent=3, least=23 * 16)
    model = Model.load(checkpoint(), check=False, precision=precision, budget=everything)
    ids, at = prompt(24 * 16), 24 * 16 - 7
    cache = filled(model, ids[:at])
    dense = forward(model, cache, [Span(0, at, 1)], ids[at : at + 1])
    sparse = forward(model, cache, [Span(0, at, 1, sparse=True)], ids[at : at + 1])
    assert (sparse - dense).abs().max() <= (1e-5 if precision is Precision.FP32 else 0.05) * dense.abs().max()


def test_the_first_and_the_recent_pages_are_always_read(model: Model) -> None:
    cache = filled(model, prompt(LENGTH))
    (part,) = model.tiles([Span(0, LENGTH, 1, sparse=True)]).parts
    assert part.pages is not None
    queries = torch.randn(2, 2, 16, generator=torch.Generator().manual_seed(1)).to(model.dtype)
    count = LENGTH // 16 + 1
    scored = Scored(0, (cache.bounds[0, :, :, :count],), part.pages.hidden(count, model.dtype))
    chosen = part.pages.chosen(scored(0, queries))
    assert chosen[:, -3:].tolist() == [[0, 24, 25]] * 2
    assert all(len(set(pages)) == 6 and set(pages[:3]) <= set(range(1, 24)) for pages in chosen.tolist())


def test_the_pages_with_the_highest_bounds_are_read(model: Model) -> None:
    cache, page = filled(model, prompt(LENGTH)), 11
    query = torch.ones(2, 2, 16, dtype=model.dtype)
    cache.memory[:, 0, 0] = 0
    cache.memory[:, 0, 0, :, page * 16 + 5] = 1
    bound = cache.bind(model.tiles([Span(0, LENGTH, 1, sparse=True)]))
    keys, _, mask = bound.readers[0](3, query)
    assert keys.shape == (2, 96, 16)
    assert keys.sum() == 2 * 16
    assert mask.flatten().tolist()[: LENGTH % 16 + 1] == [0.0] * (LENGTH % 16 + 1)
    assert len(bound.readers[0](0, query)[0][0]) == 512  # the model's first layer reads them all


def test_bounds_follow_what_is_written_again(model: Model) -> None:
    ids = prompt(LENGTH)
    cache = filled(model, ids)
    at = LENGTH - 1
    forward(model, cache, [Span(0, at, 1, sparse=True)], ids[-1:])
    recent = LENGTH // 16 - 2
    assert_bounded(cache, 0, recent)
    forward(model, cache, [Span(0, 200, 120)], prompt(120, seed=5))  # back, and on with other tokens
    for position in range(320, LENGTH):
        forward(model, cache, [Span(0, position, 1, sparse=True)], ids[position : position + 1])
    assert_bounded(cache, 0, recent)
    for position in (300, 303, 310):  # as a rejected draft goes back
        forward(model, cache, [Span(0, position, 9, sparse=True)], prompt(9, seed=position))
    forward(model, cache, [Span(0, 319, 81)], prompt(81, seed=6))
    forward(model, cache, [Span(0, LENGTH, 1, sparse=True)], ids[-1:])
    assert_bounded(cache, 0, LENGTH // 16 + 1 - 2)


def test_a_copied_slot_has_its_own_bounds(model: Model) -> None:
    ids = prompt(LENGTH)
    cache = filled(model, ids, slots=2)
    other = prompt(LENGTH, seed=3)
    forward(model, cache, [Span(1, 0, LENGTH)], other)
    for slot in (0, 1):
        forward(model, cache, [Span(slot, LENGTH, 1, sparse=True)], ids[:1])
    cache.copy(0, 1, 300)
    forward(model, cache, [Span(1, 300, 1, sparse=True)], ids[300:301])
    assert_bounded(cache, 1, 300 // 16 + 1 - 2)
    alone = filled(model, ids[:300])
    again = forward(model, cache, [Span(1, 300, 1, sparse=True)], ids[300:301])
    assert torch.equal(again, forward(model, alone, [Span(0, 300, 1, sparse=True)], ids[300:301]))


def test_a_freed_slot_has_no_bounds(model: Model) -> None:
    cache = filled(model, prompt(LENGTH))
    forward(model, cache, [Span(0, LENGTH, 1, sparse=True)], prompt(1))
    assert cache.bounds.any()
    forward(model, cache, [Span(0, 20, 1)], prompt(1))  # going back, the bounds of later pages count no more
    cache.free(0)
    assert not cache.bounds.any()
    assert not cache.memory.any()


def test_a_sparse_neighbour_changes_no_bit(model: Model) -> None:
    """Neither of a dense row nor of another sparse one, whatever drafts they verify."""
    ids = prompt(LENGTH)
    cache = filled(model, ids[:300], slots=4)
    for slot in range(1, 4):
        cache.copy(0, slot, 300)
    kinds = {0: False, 1: True, 2: True, 3: False}
    alone = {}
    for slot, sparse in kinds.items():
        cache.copy(0, slot, 300)
        alone[slot] = torch.cat([forward(model, cache, [Span(slot, at, 1, sparse)], ids[at : at + 1])
                                 for at in range(300, 310)])  # fmt: skip
    assert torch.equal(alone[0], alone[3])
    assert torch.equal(alone[1], alone[2])
    assert not torch.equal(alone[0], alone[1])
    spans = [Span(slot, 300, count, kinds[slot]) for slot, count in ((2, 10), (0, 1), (3, 10), (1, 7))]
    rows = forward(model, cache, spans, torch.cat([ids[300 : span.stop] for span in spans]))
    for span, own in zip(spans, rows.split([span.count for span in spans]), strict=True):
        assert torch.equal(own, alone[span.slot][: span.count]), span


def test_a_model_with_a_window_reads_all_of_it(tmp_path: Path) -> None:
    save_model(tmp_path, family="Mistral", num_hidden_layers=1, sliding_window=64)
    model = Model.load(tmp_path, check=False, budget=SMALL)
    assert all(part.pages is None for part in model.tiles([Span(0, 900, 1, sparse=True)]).parts)


@pytest.mark.parametrize("wrong", [{"page": 24}, {"best": 0}, {"recent": 1}, {"first": -1}, {"least": 50}])
def test_a_budget_that_makes_no_sense_is_refused(wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"page|chosen"):
        Budget(**wrong)
