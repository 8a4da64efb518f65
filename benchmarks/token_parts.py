"""Where the time of one token goes: microseconds in each part of the model, timed as it runs.

    python benchmarks/token_parts.py [--shape 135m] [--precision int8] [--threads 2] [--rows 1]

With `--rows` more than 1, of a prompt of so many positions instead. Timing adds about 0.2 µs a call; the total without
is printed beside.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import random_models
import torch
from rich.console import Console
from rich.table import Table

from split_model import layers
from split_model.attention import Span
from split_model.cache import Cache
from split_model.model import Model
from split_model.settings import Precision

BEHIND, ROUNDS, TOKENS = 64, 9, 40  # positions before a token; tokens of a round
PARTS = {"input_norm": "norms", "inner_norm": "norms", "qkv": "products", "out": "products", "gate_up": "products",
         "down": "products"}  # fmt: skip


class Clock:
    """Seconds and calls by part; `wrap` has a function counted."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)

    def wrap(self, part: str, function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def run(*args: object) -> torch.Tensor:
            began = time.perf_counter()
            found = function(*args)
            self.seconds[part] += time.perf_counter() - began
            self.calls[part] += 1
            return found

        return run

    def watch(self, model: Model) -> None:
        """Has everything in `model` counted."""
        model._layers = tuple(
            replace(layer, **{name: self.wrap(part, getattr(layer, name)) for name, part in PARTS.items()})
            for layer in model._layers
        )
        for name, part in (("attend", "attention"), ("turned", "rotation, writing KV"), ("silu_", "SiLU")):
            setattr(layers, name, self.wrap(part, getattr(layers, name)))
        for name, part in (("logits", "head"), ("embed", "embedding"), ("tiles", "cutting tiles")):
            setattr(model, name, self.wrap(part, getattr(model, name)))


def passes(model: Model, cache: Cache, rows: int, count: int) -> float:
    """Seconds for each of `count` tokens, or prompts."""
    began = time.perf_counter()
    for index in range(count):
        start = BEHIND + index if rows == 1 else 0
        x = model.embed(torch.arange(rows))
        x = model.run(x, 0, model.stop, cache, model.tiles([Span(0, start, rows)]))
        model.logits(x[-1:]).argmax().item()
    return (time.perf_counter() - began) / count


def main() -> None:
    parser = argparse.ArgumentParser(description="Where the time of one token goes.")
    parser.add_argument("--shape", choices=random_models.SHAPES, default="135m")
    parser.add_argument("--precision", type=Precision, choices=list(Precision), default=Precision.INT8)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rows", type=int, default=1)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    with tempfile.TemporaryDirectory(prefix="tandem-parts-") as folder:
        random_models.save(given.shape, Path(folder))
        model = Model.load(Path(folder), precision=given.precision, check=False)
    cache, count = model.new_cache(1, max(512, given.rows)), TOKENS if given.rows == 1 else 4
    cache.take()
    passes(model, cache, given.rows, count)
    whole = statistics.median(passes(model, cache, given.rows, count) for _ in range(ROUNDS))
    clock = Clock()
    clock.watch(model)
    timed = statistics.median(passes(model, cache, given.rows, count) for _ in range(ROUNDS))
    table = Table(title=f"{random_models.SHAPES[given.shape][0]} shape, {given.precision}, {given.threads} threads, "
                        f"{given.rows} row{'s' if given.rows > 1 else ''}")  # fmt: skip
    for column in ("part", "calls", "µs each", "µs"):
        table.add_column(column, justify="left" if column == "part" else "right")
    every, rest = ROUNDS * count, 1e6 * timed
    for part, seconds in sorted(clock.seconds.items(), key=lambda item: -item[1]):
        took, calls = 1e6 * seconds / every, clock.calls[part] / every
        rest -= took
        table.add_row(part, f"{calls:.0f}", f"{took / calls:.1f}", f"{took:,.0f}")
    table.add_row("all else", "", "", f"{rest:,.0f}")
    table.add_row("in all; without timing", "", "", f"{1e6 * timed:,.0f}; {1e6 * whole:,.0f}")
    Console(width=100).print(table)
    print(f"medians of {ROUNDS}; {platform.machine()}, {os.cpu_count()} processors, torch {torch.__version__}")


if __name__ == "__main__":
    main()
