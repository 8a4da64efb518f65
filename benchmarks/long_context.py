"""Long contexts: memory of a chunked prefill, and what sparse attention saves and loses while decoding.

    python benchmarks/long_context.py [--data FOLDER] [--lengths 2048,8192,16384,32768] [--texts 24]

Memory: peak resident memory above what was resident before and the KV itself, of a prompt in chunks of 128, in two
layers of a 135M shape with random weights (a layer gives back what it takes). Time: one stream of the whole shape on
keys and values that are noise. Attention is all that chooses, copies and weighs keys. Random weights choose pages
without meaning, so quality is judged on the built-in pair alone, with dialogues of `--data` (see training/data.py) laid
end to end up to its trained length: at every position of the second half, the greedy token and the loss of the next,
given the same text before; the first half is read whole, as a prompt is. The budget is scaled to the length.
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from random_models import SHAPES
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM

import split_model.layers
from split_model.attention import Span
from split_model.cache import Cache
from split_model.compute import release_heap
from split_model.model import Model
from split_model.source import find_model
from split_model.sparse import BUDGET, Budget
from split_model.tokenizer import ChatTokenizer
from training import data

CHUNK = 128
PREFILLED = (512, 2048, 8192, 32768)
PAIR = ("assistant-20m", "assistant-2m")
SHARES = (1 / 4, 3 / 8, 1 / 2)  # of the trained length that a token may read
TOKENS = 11  # timed at each length, by turns


def random_model(folder: Path, layers: int | None, context: int) -> Model:
    """Of the 135M shape."""
    config = copy.deepcopy(SHAPES["135m"][1])
    config.max_position_embeddings, config.dtype = context, torch.bfloat16
    config.num_hidden_layers = layers or config.num_hidden_layers
    AutoModelForCausalLM.from_config(config).to(torch.bfloat16).save_pretrained(folder)
    return Model.load(folder, check=False)


def resident(field: str) -> int:
    """Bytes that this process has in memory now (`VmRSS`) or had at most (`VmHWM`); Linux."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field))


def prefill_peak(model: Model, length: int) -> tuple[float, float]:
    """MB above the KV while a prompt is computed, and MB of KV."""
    cache = model.new_cache(1, length)
    prefill(model, cache, 2 * CHUNK)  # loads and compiles what the first step needs
    release_heap()  # of the length before
    written = model.stop * 2 * 2 * model.config.kv_heads * model.config.head_dim
    before = resident("VmRSS") - written * 2 * CHUNK
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    prefill(model, cache, length)
    return (resident("VmHWM") - before - written * length) / 1e6, written * length / 1e6


def prefill(model: Model, cache: Cache, length: int) -> None:
    for start in range(0, length, CHUNK):
        ids = torch.full((min(CHUNK, length - start),), 7)
        model.run(model.embed(ids), 0, model.stop, cache, model.tiles([Span(0, start, len(ids))]))


@contextmanager
def attention_timed() -> Iterator[list[float]]:
    """Seconds that attention takes, added up in the list's only entry."""
    spent, attend, bind = [0.0], split_model.layers.attend, Cache.bind

    def timed(work: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*arguments: Any) -> Any:
            began = time.perf_counter()
            try:
                return work(*arguments)
            finally:
                spent[0] += time.perf_counter() - began

        return measured

    setattr(split_model.layers, "attend", timed(attend))  # noqa: B010 - to the type checker they are no variables
    setattr(Cache, "bind", timed(bind))  # noqa: B010
    try:
        yield spent
    finally:
        setattr(split_model.layers, "attend", attend)  # noqa: B010
        setattr(Cache, "bind", bind)  # noqa: B010


@dataclass(frozen=True, slots=True)
class Decoded:
    """Milliseconds a token, in attention and in all; medians."""

    attention: float
    whole: float


@torch.inference_mode()
def decoded(model: Model, length: int) -> dict[bool, Decoded]:
    """Dense and sparse, one after the other, at the end of a context of `length`."""
    cache = model.new_cache(1, length)
    for layer in cache.memory:
        layer.normal_()
    x, times = model.embed(torch.tensor([7])), dict[bool, list[tuple[float, float]]]({False: [], True: []})
    with attention_timed() as spent:
        for round_ in range(TOKENS + 1):
            for sparse, found in times.items():
                spent[0], began = 0.0, time.perf_counter()
                model.run(x, 0, model.stop, cache, model.tiles([Span(0, length - 1, 1, sparse)]))
                if round_:  # the first one computes the bounds of all pages
                    found.append((1000 * spent[0], 1000 * (time.perf_counter() - began)))
    return {sparse: Decoded(*map(statistics.median, zip(*found, strict=True))) for sparse, found in times.items()}


@dataclass(frozen=True, slots=True)
class Quality:
    """Share of greedy tokens that are dense attention's, and the perplexity of both."""

    agreement: float
    dense: float
    sparse: float


@torch.inference_mode()
def logits(model: Model, ids: Sequence[int], sparse: bool) -> torch.Tensor:
    """Of the second half's positions, in steps no longer than a page."""
    cache, half, found = model.new_cache(1), len(ids) // 2, []
    for start in range(0, half, CHUNK):
        piece = ids[start : min(start + CHUNK, half)]
        model.run(model.embed(torch.tensor(piece)), 0, model.stop, cache, model.tiles([Span(0, start, len(piece))]))
    for start in range(half, len(ids), BUDGET.page):
        piece = ids[start : start + BUDGET.page]
        tiles = model.tiles([Span(0, start, len(piece), sparse)])
        found.append(model.logits(model.run(model.embed(torch.tensor(piece)), 0, model.stop, cache, tiles)))
    return torch.cat(found)


def quality(name: str, budget: Budget, texts: Sequence[Sequence[int]]) -> Quality:
    model = Model.load(find_model(name), check=False, budget=budget)
    same, places, losses = 0, 0, [0.0, 0.0]
    for ids in texts:
        both = [logits(model, ids, sparse) for sparse in (False, True)]
        same += int((both[0].argmax(-1) == both[1].argmax(-1)).sum())
        places += len(both[0])
        for way, own in enumerate(both):
            after = torch.tensor(ids[-len(own) + 1 :])
            losses[way] += float(F.cross_entropy(own[:-1], after, reduction="sum"))
    dense, sparse = (math.exp(loss / (places - len(texts))) for loss in losses)
    return Quality(same / places, dense, sparse)


def scaled(length: int, share: float) -> Budget:
    """As many chosen pages as the share leaves, and from the second half on."""
    best = round(length * share) // BUDGET.page - BUDGET.first - BUDGET.recent
    return replace(BUDGET, best=best, least=length // 2)


def show_memory(console: Console, folder: Path) -> None:
    model = random_model(folder, 2, PREFILLED[-1])
    table = Table("positions", "KV, MB", "peak above it, MB", title=f"Prefill in chunks of {CHUNK}, two layers")
    for length in PREFILLED:
        above, kv = prefill_peak(model, length)
        table.add_row(f"{length:,}", f"{kv:.1f}", f"{above:.1f}")
    console.print(table)


def show_time(console: Console, folder: Path, lengths: Sequence[int]) -> None:
    model = random_model(folder, None, max(lengths))
    table = Table("positions", "keys read", "attention, ms", "token, ms", "sparse: keys", "attention, ms", "token, ms",
                  "less in attention", title="Decoding one stream, 135M shape, random weights")  # fmt: skip
    for length in lengths:
        found = decoded(model, length)
        dense, sparse = found[False], found[True]
        table.add_row(f"{length:,}", f"{length:,}", f"{dense.attention:.1f}", f"{dense.whole:.1f}", f"{BUDGET.read:,}",
                      f"{sparse.attention:.1f}", f"{sparse.whole:.1f}",
                      f"{100 * (1 - sparse.attention / dense.attention):.0f} %")  # fmt: skip
    console.print(table)


def show_quality(console: Console, folder: Path, count: int) -> None:
    table = Table("model", "keys read", "same greedy token", "perplexity, dense", "sparse",
                  title="The built-in pair at its trained length")  # fmt: skip
    for name in PAIR:
        context = Model.load(find_model(name), 0, 0, head=False, check=False).config.context
        tokenizer = ChatTokenizer.load(find_model(name))
        documents = [tokenizer.encode(one.text()) for one in data.read(folder, "dev")]
        texts = data.packed(documents, context - 1, 0)[:count].tolist()
        for share in SHARES:
            budget = scaled(context, share)
            found = quality(name, budget, texts)
            table.add_row(name, f"{budget.read} of {context // 2} to {context}", f"{100 * found.agreement:.1f} %",
                          f"{found.dense:.3f}", f"{found.sparse:.3f}")  # fmt: skip
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory, time and quality at long contexts.")
    parser.add_argument("--data", type=Path, help="folder of dialogues; without it quality is not judged")
    parser.add_argument("--lengths", default="2048,8192,16384,32768", help="of contexts to decode at")
    parser.add_argument("--texts", type=int, default=24, help="of the trained length, to judge quality on")
    parser.add_argument("--threads", type=int, default=1)
    given = parser.parse_args()
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "32")  # both as edge-agent does
    os.environ.setdefault("LRU_CACHE_CAPACITY", "64")
    torch.set_num_threads(given.threads)
    console, lengths = Console(), [int(length) for length in given.lengths.split(",")]
    what = f"{platform.machine()}, {os.cpu_count()} processors, {torch.backends.cpu.get_cpu_capability()}"
    console.print(f"{what}, torch {torch.__version__}, bf16, {given.threads} threads, medians of {TOKENS}")
    with tempfile.TemporaryDirectory() as folder:
        show_memory(console, Path(folder) / "two")
        show_time(console, Path(folder) / "whole", lengths)
    if given.data is not None:
        show_quality(console, given.data, given.texts)


if __name__ == "__main__":
    main()
