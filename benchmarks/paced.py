"""Stand-ins for other machines: the project's programs, with passes over the models that take longer than they do.

    python benchmarks/paced.py [--pace MS] [--slower TIMES] [--rows N] cloud serve …     (or: edge serve …)

`--pace`: all layers of the full model together take at least so long a pass, as on a larger model whose weights are
read once for up to 64 positions; of fewer layers, their share. `--slower`: every pass takes so many times what it
takes, but while a model is loaded and checked. The thread sleeps for the difference, and the numbers stay the model's
own. `--rows`: so many further answers without end in the cloud's batch. No part of the product: what is changed is
changed in this process alone.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Callable
from typing import Any

import cloud_server.__main__
import edge_agent.__main__
from split_model.model import Model

KNEE = 64  # positions
LARGE = 6  # layers: a model of fewer is no full one
FILLER = 200  # tokens of an answer that fills the batch


def stretch(pace_s: float, slower: float) -> None:
    """From now on, in this process."""
    run, logits, load = Model.run, Model.logits, Model.load.__func__  # type: ignore[attr-defined]
    loading = [0]

    def quickly(cls: type[Model], *words: Any, **more: Any) -> Model:
        loading[0] += 1
        try:
            made: Model = load(cls, *words, **more)
            return made
        finally:
            loading[0] -= 1

    def paced(model: Model, x: Any, start: int, stop: int, *more: Any) -> Any:
        began = time.perf_counter()
        made = run(model, x, start, stop, *more)
        took = time.perf_counter() - began
        share = (stop - start) / model.config.layers if model.config.layers > LARGE else 0.0
        least = pace_s * share * max(1.0, len(x) / KNEE)
        if not loading[0]:
            _sleep_until(began + slower * max(took, least))
        return made

    def slow(model: Model, x: Any) -> Any:
        began = time.perf_counter()
        made = logits(model, x)
        if not loading[0]:
            _sleep_until(began + slower * (time.perf_counter() - began))
        return made

    Model.run, Model.logits, Model.load = paced, slow, classmethod(quickly)  # type: ignore[method-assign, assignment]


def _sleep_until(time_s: float) -> None:
    left = time_s - time.perf_counter()
    if left > 0:
        time.sleep(left)


def crowd(rows: int) -> None:
    """From now on a server that is up has so many answers in its batch that never end."""
    from cloud_server import server
    from cloud_server.rows import Row
    from split_model.sampling import Sampling

    ready = server.make_app

    def filled(service: Any) -> Any:
        tasks.extend(asyncio.create_task(_answers(service.worker, seed)) for seed in range(rows))
        return ready(service)

    async def _answers(worker: Any, seed: int) -> None:
        while True:
            row = Row(0, [1] * 64, 64, 64, FILLER, Sampling(temperature=1.0, seed=seed), None)
            worker.submit(row)
            while (await row.stream.next()).finish is None:
                pass

    tasks: list[asyncio.Task[None]] = []
    server.make_app = filled


def main() -> int:
    parser = argparse.ArgumentParser(description="A program of the project on a slower machine, with a larger model.")
    parser.add_argument("--pace", type=float, default=0.0, metavar="MS")
    parser.add_argument("--slower", type=float, default=1.0, metavar="TIMES")
    parser.add_argument("--rows", type=int, default=0)
    parser.add_argument("program", choices=("cloud", "edge"))
    given, words = parser.parse_known_args()
    programs: dict[str, Callable[[list[str]], int]] = {
        "cloud": cloud_server.__main__.main,
        "edge": edge_agent.__main__.main,
    }
    stretch(given.pace / 1e3, given.slower)
    if given.rows:
        crowd(given.rows)
    return programs[given.program](words)


if __name__ == "__main__":
    sys.exit(main())
