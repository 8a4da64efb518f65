"""One engine with one model in a process of its own, for local_engine.py: a JSON request per line in, times out."""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch

from split_model.attention import Span
from split_model.model import Model
from split_model.sampling import sample
from split_model.settings import Precision, Sampling

CHUNK = 512  # positions of a prompt in one pass
CONTEXT = 1024
STREAM = 1 << 28  # bytes read to find the bandwidth: far more than any cache holds


class Engine(Protocol):
    """Greedy decoding of one stream."""

    weights: int  # bytes that every token reads

    def tokens(self, prompt: Sequence[int], count: int) -> Iterator[object]:
        """Something for each of `count` tokens, as soon as its id is known; none ends the answer."""
        ...

    def use(self, threads: int) -> None: ...


class Ours:
    """This project's, as `split_model.runner` uses it."""

    def __init__(self, folder: Path, kind: str):
        self._model = Model.load(folder, precision=Precision(kind), check=False)
        self._cache = self._model.new_cache(1, CONTEXT)
        self.weights = round(_parameters(folder) * BITS[kind] / 8)

    def tokens(self, prompt: Sequence[int], count: int) -> Iterator[object]:
        slot, at, pending = self._cache.take(), 0, list(prompt)
        try:
            for _ in range(count):
                for start in range(0, len(pending), CHUNK):
                    ids = pending[start : start + CHUNK]
                    x = self._model.embed(torch.tensor(ids))
                    tiles = self._model.tiles([Span(slot, at, len(ids))])
                    x = self._model.run(x, 0, self._model.stop, self._cache, tiles)
                    at += len(ids)
                pending = sample(self._model.logits(x[-1:]), [at], [Sampling()])
                yield pending
        finally:
            self._cache.free(slot)

    def use(self, threads: int) -> None:
        torch.set_num_threads(threads)


class Transformers:
    """Hugging Face's, with `generate`."""

    def __init__(self, folder: Path, kind: str):
        from transformers import AutoModelForCausalLM

        self._model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
        self.weights = _parameters(folder) * 2

    def tokens(self, prompt: Sequence[int], count: int) -> Iterator[object]:
        found: list[float] = []
        ids = torch.tensor([list(prompt)])
        with torch.inference_mode():
            self._model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, min_new_tokens=count,
                                 do_sample=False, pad_token_id=0, streamer=_Stamps(found))  # fmt: skip
        return iter(found[1:])  # the first is the prompt

    def use(self, threads: int) -> None:
        torch.set_num_threads(threads)


class _Stamps:
    """Notes when `generate` hands on the prompt and each token."""

    def __init__(self, found: list[float]):
        self._found = found

    def put(self, value: object) -> None:
        self._found.append(time.perf_counter())

    def end(self) -> None:
        pass


class Llama:
    """llama.cpp through its C interface."""

    def __init__(self, path: Path, kind: str):
        import llama_cpp

        self._c: Any = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda *_: None)
        llama_cpp.llama_log_set(self._quiet, None)
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx = wanted.n_batch = wanted.n_ubatch = CONTEXT
        self._context = llama_cpp.llama_init_from_model(self._model, wanted)
        if not self._context:
            raise SystemExit(f"llama.cpp did not load {path}")
        self._sampler = llama_cpp.llama_sampler_init_greedy()
        self.weights = int(llama_cpp.llama_model_size(self._model))

    def tokens(self, prompt: Sequence[int], count: int) -> Iterator[object]:
        c = self._c
        c.llama_memory_clear(c.llama_get_memory(self._context), False)
        ids = (c.llama_token * len(prompt))(*prompt)
        for _ in range(count):
            if c.llama_decode(self._context, c.llama_batch_get_one(ids, len(ids))):
                raise SystemExit("llama.cpp could not decode")
            token = c.llama_sampler_sample(self._sampler, self._context, -1)
            ids = (c.llama_token * 1)(token)
            yield token

    def use(self, threads: int) -> None:
        self._c.llama_set_n_threads(self._context, threads, threads)


BITS = {"fp32": 32, "bf16": 16, "int8": 8, "int8-fast": 8, "int4": 5}  # of a weight; in int4 its group has two numbers
ENGINES = {"ours": Ours, "transformers": Transformers, "llama.cpp": Llama}


def _parameters(folder: Path) -> int:
    """Weights that a token reads: every one, as both shapes tie their head to the embedding."""
    from safetensors import safe_open

    count = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            count += sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    return count


def run_once(engine: Engine, prompt: int, answer: int) -> dict[str, float]:
    """Seconds to the first token, and for each one after it."""
    ids = [(37 * index) % 4001 + 5 for index in range(prompt)]
    began = time.perf_counter()
    stamps = [(thing if isinstance(thing, float) else time.perf_counter()) for thing in engine.tokens(ids, answer)]
    return {"first_s": stamps[0] - began, "next_s": (stamps[-1] - stamps[0]) / max(1, answer - 1)}


def bandwidth() -> float:
    """Bytes a second of a streaming read by all threads, the best of several."""
    numbers, best = torch.ones(STREAM // 4), 0.0
    for _ in range(6):
        began = time.perf_counter()
        numbers.sum()
        best = max(best, STREAM / (time.perf_counter() - began))
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("engine", choices=[*ENGINES, "read"])
    parser.add_argument("--kind", default="")
    parser.add_argument("--model", type=Path)
    given = parser.parse_args()
    engine = None if given.engine == "read" else ENGINES[given.engine](given.model, given.kind)
    print(json.dumps({"weights": engine.weights if engine else 0}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if engine is None:
            torch.set_num_threads(asked["threads"])
            print(json.dumps({"bandwidth": bandwidth()}), flush=True)
        else:
            engine.use(asked["threads"])
            print(json.dumps(run_once(engine, asked["prompt"], asked["answer"])), flush=True)


if __name__ == "__main__":
    main()
