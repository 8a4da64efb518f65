"""KV memory: slots are handed out once, come back clean, and have bounds."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest
import torch

from split_model.attention import Span, reach
from split_model.cache import Cache, OutOfSlots
from split_model.config import ModelError
from split_model.model import Model
from support.checkpoints import checkpoint

MODEL = Model.load(checkpoint(), check=False)


def fill(cache: Cache, slot: int, start: int, count: int) -> None:
    x = MODEL.embed(torch.full((count,), 9))
    MODEL.run(x, cache.first, cache.first + len(cache.memory), cache, MODEL.tiles([Span(slot, start, count)]))


def test_slots_run_out_and_come_back() -> None:
    cache = MODEL.new_cache(3)
    assert [cache.take() for _ in range(3)] == [0, 1, 2]
    assert cache.free_slots == 0
    with pytest.raises(OutOfSlots, match="all 3 slots"):
        cache.take()
    cache.free(1)
    assert cache.free_slots == 1
    assert cache.take() == 1


@pytest.mark.parametrize("slot", [0, 1, -1, 3])
def test_a_slot_that_is_not_taken_cannot_be_freed(slot: int) -> None:
    cache = MODEL.new_cache(3)
    cache.free(cache.take())
    with pytest.raises(ValueError, match=f"slot {slot} is not taken"):
        cache.free(slot)


def test_memory_is_zero_at_the_start_and_after_free() -> None:
    cache = MODEL.new_cache(2)
    assert not cache.memory.any()
    first, second = cache.take(), cache.take()
    for start, count in ((0, 50), (50, 1), (51, 60), (20, 5)):  # the highest position is not the last one written
        fill(cache, first, start, count)
    fill(cache, second, 0, 7)
    kept = cache.memory[:, second].clone()
    cache.free(first)
    assert not cache.memory[:, first].any()
    assert torch.equal(cache.memory[:, second], kept)
    cache.free(second)
    assert not cache.memory.any()


def test_one_step_may_write_a_slot_again_after_it_was_freed() -> None:
    cache = MODEL.new_cache(1)
    tiles, x = MODEL.tiles([Span(0, 0, 9)]), MODEL.embed(torch.full((9,), 9))
    for _ in range(2):
        slot = cache.take()
        MODEL.run(x, 0, 5, cache, tiles)
        cache.free(slot)
        assert not cache.memory.any()


def test_a_memory_shorter_than_the_context_has_its_own_bound() -> None:
    cache = MODEL.new_cache(1, context=100)
    assert cache.memory.shape[4] == 128
    fill(cache, 0, 0, 100)
    with pytest.raises(ValueError, match="positions up to 101, the KV memory holds 100"):
        fill(cache, 0, 100, 1)


def test_more_memory_than_the_system_has_is_refused_by_its_size() -> None:
    config = replace(Model.load(checkpoint(), 0, 0, head=False).config, context=1 << 40)
    with pytest.raises(ModelError, match=r"no \d+ GB of memory for its sessions: shorten --context"):
        Cache(config, 1000)


def test_a_model_may_be_given_less_context_than_it_has() -> None:
    model = Model.load(checkpoint(), context=100)
    assert (model.config.context, model.new_cache(1).context) == (100, 100)
    assert model.weights_digest == Model.load(checkpoint(), 0, 0, head=False).weights_digest
    assert Model.load(checkpoint(), 0, 0, head=False, context=1 << 20).config.context == 1024


def test_a_memory_for_some_layers() -> None:
    assert len(Model.load(checkpoint(), 2, 4, check=False).new_cache(1).memory) == 2


@pytest.mark.parametrize("span", [Span(0, 0, 0), Span(0, -1, 2), Span(0, 1020, 5), Span(0, 5, -2)])
def test_positions_outside_the_context_are_refused(span: Span) -> None:
    with pytest.raises(ValueError, match="outside the context of 1024"):
        MODEL.tiles([span])


def test_a_slot_stands_once_in_a_step() -> None:
    with pytest.raises(ValueError, match="share a slot"):
        MODEL.tiles([Span(0, 0, 1), Span(1, 0, 1), Span(0, 5, 1)])


def test_tiles_count_positions() -> None:
    assert len(MODEL.tiles([Span(0, 3, 70), Span(4, 1000, 1)])) == 71


def test_the_head_of_a_step_is_cut_as_if_the_rest_had_never_been_there() -> None:
    generator = random.Random(3)
    for _ in range(40):
        spans = [
            Span(slot, generator.choice([0, 100, 126, 255, 700]), generator.choice([1, 1, 1, 2, 40]))
            for slot in generator.sample(range(20), 9)
        ]
        tiles, count = MODEL.tiles(spans), generator.randrange(1, 10)
        fresh = MODEL.tiles(spans[:count])
        head = tiles.head(len(fresh))
        assert head.spans == fresh.spans
        assert len(head) == len(fresh)
        assert [(p.slots, p.width, p.keys, p.rows) for p in head.parts] == [
            (p.slots, p.width, p.keys, p.rows) for p in fresh.parts
        ]
        for name in ("slots", "positions", "turns", "sources", "places"):
            ours, theirs = getattr(head, name), getattr(fresh, name)
            assert ours is theirs is None or torch.equal(ours, theirs), name


def test_reach_covers_its_position_and_grows_in_few_steps() -> None:
    lengths = [reach(position) for position in range(4096)]
    assert all(length > position for position, length in enumerate(lengths))
    assert lengths == sorted(lengths)
    assert len(set(lengths)) == 4 + 14
