"""A row's bits do not depend on the batch, the chunking, the split or what a slot held before."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence

import pytest
import torch

from split_model.attention import Span
from split_model.cache import Cache
from split_model.model import Model
from split_model.settings import Precision
from support.checkpoints import checkpoint

SHAPES = {
    "small": {},
    "built-in": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 6,
                 "head_dim": 64, "vocab_size": 4096, "tie_word_embeddings": True},
    "one key head": {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1, "head_dim": 64,
                     "num_hidden_layers": 2},
    "no groups": {"num_key_value_heads": 4, "num_hidden_layers": 2, "max_position_embeddings": 2048},
    "wide groups": {"hidden_size": 224, "num_attention_heads": 14, "num_key_value_heads": 2, "head_dim": 128,
                    "num_hidden_layers": 2},
    "window": {"family": "Mistral", "sliding_window": 150, "num_hidden_layers": 2},
}  # fmt: skip


@pytest.fixture(
    scope="module",
    params=[
        *((s, Precision.BF16) for s in SHAPES),
        *((s, Precision.INT8) for s in SHAPES),
        ("small", Precision.FP32),
        ("built-in", Precision.FP32),
        ("built-in", Precision.INT4),
    ],
    ids=lambda p: f"{p[0]}-{p[1]}",
)
def model(request: pytest.FixtureRequest) -> Model:
    shape, precision = request.param
    return Model.load(checkpoint(**SHAPES[shape]), precision=precision)


def prompt(length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(6, 512, (length,), generator=torch.Generator().manual_seed(seed))


def forward(model: Model, cache: Cache, spans: Sequence[Span], ids: torch.Tensor) -> torch.Tensor:
    return model.logits(model.run(model.embed(ids), model.first, model.stop, cache, model.tiles(spans)))


def alone(model: Model, ids: torch.Tensor, chunks: Iterable[int]) -> torch.Tensor:
    """Logits of every position, in one session that has the memory to itself."""
    cache = model.new_cache(1)
    slot, at, found = cache.take(), 0, []
    for count in chunks:
        found.append(forward(model, cache, [Span(slot, at, count)], ids[at : at + count]))
        at += count
    return torch.cat(found)


def test_the_self_check_agrees(model: Model) -> None:
    assert model.exact


@pytest.mark.parametrize("chunks", [[1] * 150, [7] * 21 + [3], [64, 86], [149, 1], [1, 149], [2, 3, 5, 140]])
def test_any_chunking_gives_the_same_bits(model: Model, chunks: list[int]) -> None:
    ids = prompt(150)
    assert torch.equal(alone(model, ids, chunks), alone(model, ids, [150]))


def test_long_contexts_give_the_same_bits(model: Model) -> None:
    length = model.config.context - 20
    ids = prompt(length)
    whole = alone(model, ids, [length])
    assert torch.equal(alone(model, ids, [256] * (length // 256) + [length % 256]), whole)
    assert torch.equal(alone(model, ids, [length - 60] + [1] * 50 + [10]), whole)


@pytest.mark.parametrize("seed", range(2))
def test_strangers_in_the_batch_change_no_bit(model: Model, seed: int) -> None:
    """32 sessions of mixed lengths come, prefill in mixed chunks, decode together and go; slots are reused."""
    chance = random.Random(seed)
    prompts = {name: prompt(chance.choice([3, 20, 70, 140, 330]), seed=100 * seed + name) for name in range(32)}
    cache = model.new_cache(12)
    waiting, running, found = list(prompts), {}, {name: [] for name in prompts}
    while waiting or running:
        while waiting and cache.free_slots:
            running[waiting.pop()] = [cache.take(), 0]
        spans, ids, names = [], [], []
        for name, (slot, at) in chance.sample(sorted(running.items()), k=chance.randint(1, len(running))):
            count = min(chance.choice([1, 1, 2, 5, 8, 64]), len(prompts[name]) - at)
            spans.append(Span(slot, at, count))
            ids.append(prompts[name][at : at + count])
            names.append(name)
        logits = forward(model, cache, spans, torch.cat(ids))
        for name, span, rows in zip(names, spans, logits.split([span.count for span in spans]), strict=True):
            found[name].append(rows)
            running[name][1] = span.stop
            if span.stop == len(prompts[name]):
                cache.free(running.pop(name)[0])
    for name, ids in prompts.items():
        assert torch.equal(torch.cat(found[name]), alone(model, ids, [len(ids)])), name


@pytest.mark.parametrize("count", [1, 2, 5, 16, 31])
def test_sessions_that_decode_together_decode_as_alone(model: Model, count: int) -> None:
    cache = model.new_cache(32)
    slots = [cache.take() for _ in range(count)]
    prompts = [prompt(20 + 13 * i, seed=i) for i in range(count)]
    for slot, ids in zip(slots, prompts, strict=True):
        forward(model, cache, [Span(slot, 0, len(ids) - 1)], ids[:-1])
    spans = [Span(slot, len(ids) - 1, 1) for slot, ids in zip(slots, prompts, strict=True)]
    together = forward(model, cache, spans, torch.cat([ids[-1:] for ids in prompts]))
    for row, ids in zip(together, prompts, strict=True):
        assert torch.equal(row, alone(model, ids, [len(ids)])[-1])


def test_writing_over_what_was_taken_back_leaves_no_trace(model: Model) -> None:
    ids, wrong = prompt(90), prompt(30, seed=9)
    cache = model.new_cache(1)
    slot = cache.take()
    forward(model, cache, [Span(slot, 0, 60)], ids[:60])
    forward(model, cache, [Span(slot, 60, 30)], wrong)
    again = forward(model, cache, [Span(slot, 60, 30)], ids[60:])
    assert torch.equal(again, alone(model, ids, [90])[60:])


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_poisoned_session_changes_no_other(model: Model, poison: float) -> None:
    ids = [prompt(length, seed=length) for length in (9, 40, 75, 130)]
    cache = model.new_cache(4)
    slots = [cache.take() for _ in ids]
    bad = 1
    x = model.embed(torch.cat([row[:-1] for row in ids]))
    x = x.clone()
    first = len(ids[0]) - 1
    x[first + 5 : first + 20] = poison
    spans = [Span(slot, 0, len(row) - 1) for slot, row in zip(slots, ids, strict=True)]
    model.run(x, 0, model.stop, cache, model.tiles(spans))
    spans = [Span(slot, len(row) - 1, 1) for slot, row in zip(slots, ids, strict=True)]
    logits = forward(model, cache, spans, torch.cat([row[-1:] for row in ids]))
    assert not logits[bad].isfinite().all()
    for i in (0, 2, 3):
        assert torch.equal(logits[i], alone(model, ids[i], [len(ids[i])])[-1])
    cache.free(slots[bad])
    assert cache.take() == slots[bad]
    after = forward(model, cache, [Span(slots[bad], 0, 33)], ids[3][:33])
    assert torch.equal(after, alone(model, ids[3][:33], [33]))


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(model: Model, threads: int) -> None:
    before, ids = torch.get_num_threads(), prompt(200)
    whole = alone(model, ids, [200])
    try:
        torch.set_num_threads(threads)
        assert torch.equal(alone(model, ids, [101, 1, 98]), whole)
    finally:
        torch.set_num_threads(before)


def test_any_split_gives_the_same_bits() -> None:
    folder, ids = checkpoint(), prompt(100)
    whole = Model.load(folder)
    expected = alone(whole, ids, [100])
    for split in range(whole.config.layers + 1):
        front = Model.load(folder, 0, split, head=False)
        back = Model.load(folder, split, embedding=False)
        caches = front.new_cache(1), back.new_cache(1)
        found, at = [], 0
        for count in (60, 1, 1, 38):
            spans = [Span(0, at, count)]
            x = front.run(front.embed(ids[at : at + count]), 0, split, caches[0], front.tiles(spans))
            x = back.run(x, split, whole.stop, caches[1], back.tiles(spans))
            found.append(back.logits(x))
            at += count
        assert torch.equal(torch.cat(found), expected), split


def test_rows_that_join_at_their_own_layers_share_the_rest() -> None:
    """One step in which every session enters at another layer, as the cloud runs it."""
    model = Model.load(checkpoint())
    ids = [prompt(30 + 11 * entry, seed=entry) for entry in range(model.stop + 1)]
    cache, x = model.new_cache(len(ids)), None
    tiles = model.tiles([Span(cache.take(), 0, len(row)) for row in ids])
    for entry, row in enumerate(ids):
        own = model.new_cache(1)
        hidden = model.run(model.embed(row), 0, entry, own, model.tiles([Span(0, 0, len(row))]))
        x = hidden if x is None else torch.cat([x, hidden])
        if entry < model.stop:
            x = model.run(x, entry, entry + 1, cache, tiles)
    logits = model.logits(x).split([len(row) for row in ids])
    for row, got in zip(ids, logits, strict=True):
        assert torch.equal(got, alone(model, row, [len(row)]))
