"""What this machine's passes over the built-in pair take: samples, from which simulations draw."""

from __future__ import annotations

import random
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from split_model.attention import Span
from split_model.model import Model
from split_model.sampling import Sampling, sample

Samples = Mapping[int, Sequence[float]]  # by positions, ascending seconds
SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 64, 128)
WANTED = (1, 2, 4, 8, 16)  # positions that a token is drawn behind
BEHIND = 160  # positions that are in KV already
KNEE = 64  # positions that a larger model is assumed to take no longer for than for one: its weights are read once


@dataclass(frozen=True, slots=True)
class Speeds:
    """Seconds, by positions in a pass: of all layers of the full model, alone and with `others` further rows in the
    batch, of its head and sampling, and of the whole tiny model with both."""

    layers: dict[int, Samples]
    head: Samples
    tiny: Samples
    depth: int  # layers of the full model


@dataclass(frozen=True, slots=True)
class Site:
    """A machine: `slower` than this one, with a full model that takes `pace_s` a pass, or as it is."""

    speeds: Speeds = field(repr=False)
    slower: float = 1.0
    pace_s: float = 0.0
    others: int = 0  # further rows in the batch

    def full_s(self, layers: int, positions: int, wanted: int, order: random.Random) -> float:
        """A pass over so many positions in some layers of the full model, drawing behind `wanted` of them."""
        if not positions:
            return 0.0
        share = layers / self.speeds.depth
        seconds = draw(self.speeds.layers[self.others], positions, order) * share
        every = self.others + positions
        seconds = max(seconds, self.pace_s * share * max(1.0, every / KNEE))
        drawn = (wanted + self.others) if self.others else wanted
        return self.slower * (seconds + (draw(self.speeds.head, drawn, order) if drawn else 0.0))

    def tiny_s(self, positions: int, order: random.Random) -> float:
        """A pass over so many positions in the tiny model, drawing behind the last."""
        return self.slower * draw(self.speeds.tiny, positions, order)


def draw(samples: Samples, positions: int, order: random.Random) -> float:
    """One of the measured times; between two measured numbers of positions, and beyond them, in proportion."""
    sizes = list(samples)
    if positions in samples:
        return order.choice(samples[positions])
    at = min(max(bisect_left(sizes, positions), 1), len(sizes) - 1)
    small, large = sizes[at - 1], sizes[at]
    rank = order.random()
    low, high = (samples[size][int(rank * len(samples[size]))] for size in (small, large))
    return low + (high - low) * (positions - small) / (large - small)


@torch.inference_mode()
def measured(tiny: Model, full: Model, others: Sequence[int] = (0,), rounds: int = 40) -> Speeds:
    """On this thread, one thing after the other, the slowest twentieth left out: what else ran here is no property."""
    with_head, depth = Sampling(temperature=0.7), full.config.layers
    passes: dict[tuple[str, int, int], Callable[[], object]] = {}
    for more in others:
        cache = full.new_cache(more + 1, BEHIND + 2 * max(SIZES))
        for size in SIZES:
            spans = [Span(slot, BEHIND, 1) for slot in range(1, more + 1)]
            tiles = full.tiles([Span(0, BEHIND, size), *spans])
            x = full.embed(torch.ones(size + more, dtype=torch.long))
            passes["layers", more, size] = lambda x=x, tiles=tiles, cache=cache: full.run(x, 0, depth, cache, tiles)
    for size in sorted({*WANTED, *(1 + more for more in others)}):
        x, places = full.embed(torch.ones(size, dtype=torch.long)), [BEHIND] * size
        passes["head", 0, size] = lambda x=x, places=places: sample(full.logits(x), places, [with_head] * len(places))
    kept = tiny.new_cache(1, BEHIND + 2 * max(SIZES))
    for size in SIZES:
        passes["tiny", 0, size] = lambda size=size: _whole(tiny, kept, size, with_head)
    found: dict[tuple[str, int, int], list[float]] = {key: [] for key in passes}
    for number in range(rounds + 3):
        for key, run in passes.items():
            began = time.perf_counter()
            run()
            if number >= 3:  # warm by then
                found[key].append(time.perf_counter() - began)
    usual = {key: sorted(times)[: max(1, round(0.95 * len(times)))] for key, times in found.items()}

    def of(kind: str, more: int) -> dict[int, Sequence[float]]:
        return {size: usual[which, n, size] for which, n, size in usual if (which, n) == (kind, more)}

    return Speeds({more: of("layers", more) for more in others}, of("head", 0), of("tiny", 0), depth)


def _whole(model: Model, cache: object, size: int, sampling: Sampling) -> None:
    x = model.embed(torch.ones(size, dtype=torch.long))
    x = model.run(x, 0, model.config.layers, cache, model.tiles([Span(0, BEHIND, size)]))  # type: ignore[arg-type]
    sample(model.logits(x[-1:]), [BEHIND], [sampling])
