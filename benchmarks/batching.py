"""Sessions together against one after the other, on the real session code over the memory transport.

Every session has its own entry, from 0 to L in turn, so that one step carries rows of all entries. What its phone
computes, the hidden states of every position, is recorded before the clock starts, so that the cloud alone is timed.

    python benchmarks/batching.py [--model NAME|DIR] [--prompt 100] [--answer 48]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from cloud_server.config import ServerConfig
from cloud_server.service import Service
from cloud_server.session import Session
from protocol.frames import Done, Open, Tokens, WireSampling
from protocol.tensor import pack
from protocol.transport.base import ServerChannel
from protocol.transport.memory import MemoryConnection
from split_model.attention import Span
from split_model.compute import Compute
from split_model.model import Model
from split_model.source import find_model
from split_model.tokenizer import ChatTokenizer


@dataclass(frozen=True, slots=True)
class Recorded:
    """What one phone will send: its prompt, the hidden states of every position as they leave layer `entry - 1`."""

    entry: int
    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    hidden: torch.Tensor | None


@dataclass(frozen=True, slots=True)
class Measured:
    """One run: answer tokens a second, over all its time and while decoding only, and the share that steps took."""

    rate: float
    decode_rate: float
    in_steps: float


def noise(model: Model, seed: int, length: int) -> list[int]:
    """A prompt of random ids."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(6, model.config.vocabulary, (length,), generator=generator).tolist()
    return ids


def record(model: Model, entry: int, prompt: Sequence[int], answer: int) -> Recorded:
    """The whole model's own answer, greedily, and the hidden states that a phone would compute on the way."""
    cache, log = model.new_cache(1), list(prompt)
    states, x = [], model.embed(torch.tensor(log))
    start, layers = 0, model.config.layers
    while True:
        tiles = model.tiles([Span(0, start, len(x))])
        middle = model.run(x, 0, entry, cache, tiles)
        states.append(middle)
        last = model.run(middle, entry, layers, cache, tiles)[-1:]
        if len(log) == len(prompt) + answer:
            break
        log.append(int(model.logits(last).argmax()))
        start, x = len(log) - 1, model.embed(torch.tensor(log[-1:]))
    return Recorded(entry, tuple(prompt), tuple(log[len(prompt) :]), torch.cat(states) if entry else None)


async def session(connection: MemoryConnection, service: Service, what: Recorded, drafts: int = 0) -> list[float]:
    """One phone: sends what was recorded, checks the answer, returns when each token came.

    `drafts`: tokens that the cloud's own tiny model may propose at a time.
    """
    length = len(what.prompt)
    log = () if what.entry else what.prompt
    opened = Open(os.urandom(16), 1, service.model.config.name, service.digests, what.entry, WireSampling(),
                  len(what.ids), length, length, log, cloud_draft=drafts)  # fmt: skip
    channel = await connection.open()
    ids: list[int] = []
    times: list[float] = []
    try:
        await channel.send(opened)
        if what.hidden is not None:
            for frame in pack(what.hidden[:length], 0):
                await channel.send(frame)
        while not isinstance(frame := await channel.receive(), Done):
            if isinstance(frame, Tokens):
                ids += frame.ids
                times += [time.perf_counter()] * len(frame.ids)
                if what.hidden is not None and len(ids) < len(what.ids):
                    at = frame.position
                    await channel.send(next(pack(what.hidden[at : at + 1], at)))
    finally:
        await channel.aclose()
    if tuple(ids) != what.ids:
        raise SystemExit(f"entry {what.entry}: the answer differs from the whole model's in one process")
    return times


class Bench:
    """One service, the connection to it, and the seconds of every step since the last run began."""

    def __init__(self, service: Service):
        self.service = service
        self.steps: list[float] = []
        service.worker.seen = lambda _, seconds: self.steps.append(seconds)
        self.connection = MemoryConnection(self._handle)

    async def _handle(self, channel: ServerChannel) -> None:
        await Session(self.service, channel).serve()

    async def measure(self, all_of: Sequence[Recorded], together: bool, drafts: int = 0) -> Measured:
        """Runs the sessions at once, or one after the other."""
        self.steps.clear()
        began = time.perf_counter()
        if together:
            times = await asyncio.gather(*(session(self.connection, self.service, one, drafts) for one in all_of))
            first, last = max(one[0] for one in times), min(one[-1] for one in times)  # all are decoding between these
            decoded, decoding = sum(first < at <= last for one in times for at in one), last - first
        else:
            times = [await session(self.connection, self.service, one, drafts) for one in all_of]
            decoded, decoding = sum(len(one) - 1 for one in times), sum(one[-1] - one[0] for one in times)
        wall = time.perf_counter() - began
        return Measured(sum(map(len, times)) / wall, decoded / decoding, sum(self.steps) / wall)


async def run(folder: Path, prompt: int, answer: int, counts: Sequence[int], rounds: int, threads: int | None) -> None:
    compute = Compute(threads)
    model = await compute.call(Model.load, folder)
    model.config = replace(model.config, stops=frozenset())  # every answer runs to its full length
    config = ServerConfig(folder, slots=max(counts), threads=threads)
    service = Service(config, model, ChatTokenizer.load(folder), compute, None)
    bench = Bench(service)
    entries = model.config.layers + 1
    recorded = [
        await compute.call(record, model, index % entries, noise(model, index, prompt), answer)
        for index in range(max(counts))
    ]
    await bench.measure(recorded, together=True)
    table = Table(title=f"{model.config.name}: {prompt} tokens in, {answer} out, entries 0 to {entries - 1} mixed")
    names = ["one by one, tok/s", "together", "ratio"]
    for column in ("sessions", *names, "decoding: " + names[0], *names[1:], "together: in steps"):
        table.add_column(column, justify="right")
    for count in counts:
        chosen = recorded[:count]
        pairs = [(await bench.measure(chosen, False), await bench.measure(chosen, True)) for _ in range(rounds)]
        row = [str(count)]
        for rates in ([(a.rate, b.rate) for a, b in pairs], [(a.decode_rate, b.decode_rate) for a, b in pairs]):
            one, all_ = (statistics.median(pair[i] for pair in rates) for i in (0, 1))
            row += [f"{one:.0f}", f"{all_:.0f}", f"{statistics.median(b / a for a, b in rates):.1f}"]
        table.add_row(*row, f"{statistics.median(pair[1].in_steps for pair in pairs):.0%}")
    await bench.connection.aclose()
    await compute.aclose()
    Console(width=110).print(table)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    threads = f"torch {torch.__version__}, {torch.get_num_threads()} threads"
    print(f"medians of {rounds} interleaved rounds; {machine}, {threads}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Batched sessions against one after the other.")
    parser.add_argument("--model", default="assistant-20m")
    parser.add_argument("--prompt", type=int, default=100)
    parser.add_argument("--answer", type=int, default=48)
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 4, 16, 32])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    asyncio.run(run(find_model(given.model), given.prompt, given.answer, given.sessions, given.rounds, given.threads))


if __name__ == "__main__":
    main()
