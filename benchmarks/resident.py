"""Resident memory while thousands of tokens are decoded: as a script does it, on the phone, and in the cloud's batch.

    python benchmarks/resident.py [--model NAME|DIR] [--tokens 10000] [--answer 160]

Each way is a process of its own, which first loads the model and makes two answers. Memory is read after every tenth
of the tokens; growth is counted from the second reading on, when every shape has been seen.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path

import psutil
import torch
from rich.console import Console
from rich.table import Table

from cloud_server.config import ServerConfig
from cloud_server.service import Service
from edge_agent.conditions import Meter
from edge_agent.runs.local import PhoneModel, generate
from edge_agent.state import State
from split_model.compute import Compute, release_heap
from split_model.model import Model
from split_model.runner import Runner
from split_model.sampling import Sampling
from split_model.source import find_model
from split_model.tokenizer import ChatTokenizer

ROWS = 8  # at once in the cloud's batch
PROMPT = 48
READINGS = 10


def sampling(answer: int) -> Sampling:
    return Sampling(temperature=1.0, seed=answer)


def prompt(answer: int) -> tuple[int, ...]:
    """Another one, and another length, for each answer."""
    return tuple(10 + (answer * 31 + i * 7) % 400 for i in range(PROMPT + answer % 17))


def by_runner(folder: Path, most: int) -> Iterator[int]:
    """Tokens made, one answer after the other."""
    runner, answer = Runner(folder), 0
    while True:
        for _ in runner.tokens(prompt(answer), max_tokens=most, sampling=sampling(answer), stops=()):
            yield 1
        answer += 1


async def by_seat(folder: Path, most: int) -> AsyncIterator[int]:
    """On the phone; every other answer is the next turn of the one before."""
    compute = Compute(1)
    try:
        with tempfile.TemporaryDirectory() as state:
            model = await compute.call(Model.load, folder)
            phone, log, answer = PhoneModel(compute, model, 4, Meter(State(Path(state)))), list[int](), 0
            while True:
                log = [*log, *prompt(answer)] if answer % 2 else list(prompt(answer))
                seat = await phone.seat(model.config.layers, ids=log)
                async with aclosing(generate(seat, log, sampling(answer), (), most)) as tokens:
                    async for token in tokens:
                        log.append(token)
                        yield 1
                seat.close()
                answer += 1
    finally:
        await compute.aclose()


async def by_engine(folder: Path, most: int) -> AsyncIterator[int]:
    """In the cloud's batch, rows coming and going."""
    compute = Compute(1)
    try:
        model = await compute.call(Model.load, folder)
        service = Service(ServerConfig(folder, slots=ROWS), model, ChatTokenizer.load(folder), compute, None)
        made: asyncio.Queue[int] = asyncio.Queue(ROWS)

        async def rows(answer: int) -> None:
            while True:
                ids = list(prompt(answer))
                row = service.new_row(ids, len(ids), len(ids), 0, sampling(answer), most)
                row.owner = f"device {answer % 3}"
                service.worker.submit(row)
                while (emitted := await row.stream.next()).finish is None:
                    await made.put(len(emitted.ids))
                service.worker.drop(row)
                answer += ROWS

        tasks = [asyncio.create_task(rows(answer)) for answer in range(ROWS)]
        try:
            while True:
                yield await made.get()
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
    finally:
        await compute.aclose()


WAYS: dict[str, Callable[[Path, int], Iterator[int] | AsyncIterator[int]]] = {
    "runner": by_runner, "seat": by_seat, "engine": by_engine,
}  # fmt: skip


async def measured(way: str, folder: Path, tokens: int, most: int) -> dict[str, list[float]]:
    """Resident megabytes and seconds, at the start and after every tenth of the tokens."""
    found: dict[str, list[float]] = {"mb": [], "s": []}
    process, made, began = psutil.Process(), -2 * most, time.monotonic()
    release_heap()

    def count(new: int) -> bool:
        """Whether that was all."""
        nonlocal made
        made += new
        while made >= len(found["mb"]) * tokens / READINGS:
            found["mb"].append(process.memory_info().rss / 1e6)
            found["s"].append(time.monotonic() - began)
        return made >= tokens

    source = WAYS[way](folder, most)
    if isinstance(source, AsyncIterator):
        async with aclosing(source) as counts:  # type: ignore[type-var]
            async for new in counts:
                if count(new):
                    break
    else:
        for new in source:
            if count(new):
                break
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory while many tokens are decoded.")
    parser.add_argument("--model", default="assistant-20m", help="built-in name or checkpoint directory")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--answer", type=int, default=160, help="tokens of an answer")
    parser.add_argument("--way", choices=WAYS, help="in this process, as JSON")
    given = parser.parse_args()
    if given.way:
        for kept in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
            os.environ.setdefault(kept, "64")  # as both programs do, which else keep 1,024 compiled shapes
        torch.set_num_threads(1)
        print(json.dumps(asyncio.run(measured(given.way, find_model(given.model), given.tokens, given.answer))))
        return
    command = [sys.executable, __file__, "--model", given.model, "--tokens", str(given.tokens)]
    found = {
        way: json.loads(subprocess.run([*command, "--answer", str(given.answer), "--way", way], check=True,
                                       capture_output=True, text=True).stdout)
        for way in WAYS
    }  # fmt: skip
    table = Table(title=f"resident MB, {given.model}, {platform.machine()}, {os.cpu_count()} cores")
    for name in ("tokens", *WAYS):
        table.add_column(name, justify="right")
    for at in range(READINGS + 1):
        table.add_row(f"{at * given.tokens // READINGS:,}", *(f"{found[way]['mb'][at]:.1f}" for way in WAYS))
    table.add_section()
    table.add_row("growth", *(f"{found[way]['mb'][-1] - found[way]['mb'][1]:+.1f}" for way in WAYS))
    rates = (given.tokens / (found[way]["s"][-1] - found[way]["s"][0]) for way in WAYS)
    table.add_row("tokens/s", *(f"{rate:.0f}" for rate in rates))
    Console().print(table)


if __name__ == "__main__":
    main()
