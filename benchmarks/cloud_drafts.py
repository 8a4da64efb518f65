"""Sessions with drafts by the cloud's own tiny model against none, all together, on the real session code.

    python benchmarks/cloud_drafts.py [--data FOLDER] [--sessions 1 2 4 8 16] [--answer 48]

Real prompts, greedy answers of the full model; every answer is checked against that of the model in one process.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from batching import Bench, record
from netlab import TINY
from rich.console import Console
from rich.table import Table
from traces import conversations

from cloud_server.config import ServerConfig
from cloud_server.service import Service
from protocol.limits import MAX_DRAFT
from split_model.compute import Compute
from split_model.model import Model
from split_model.source import find_model
from split_model.tokenizer import ChatTokenizer

FULL = "assistant-20m"


async def run(data: Path | None, counts: Sequence[int], answer: int, rounds: int, threads: int | None) -> None:
    compute, folder = Compute(threads), find_model(FULL)
    model = await compute.call(Model.load, folder)
    tiny = await compute.call(Model.load, find_model(TINY))
    model.config = replace(model.config, stops=frozenset())  # every answer runs to its full length
    tokenizer = ChatTokenizer.load(folder)
    service = Service(ServerConfig(folder, slots=max(counts)), model, tokenizer, compute, None, tiny)
    await service.worker.warm_up(96)
    bench = Bench(service)
    prompts = [tokenizer.chat(messages) for messages in conversations(data, max(counts))]
    recorded = [await compute.call(record, model, 0, prompt, answer) for prompt in prompts]
    table = Table(title=f"{FULL} with drafts by {TINY} beside it: {answer} tokens out, all sessions together")
    for column in ("sessions", "decoding, tok/s: no drafts", "drafts", "ratio", "accepted", "whole answers: ratio"):
        table.add_column(column, justify="right")
    for count in counts:
        chosen = [recorded[index % len(recorded)] for index in range(count)]
        pairs, before = [], _counts(service)
        for _ in range(rounds):
            pairs.append([await bench.measure(chosen, True, drafts) for drafts in (0, MAX_DRAFT)])
        made, right = (new - old for new, old in zip(_counts(service), before, strict=True))
        without, with_, ratio, whole = (
            statistics.median(values)
            for values in zip(
                *((a.decode_rate, b.decode_rate, b.decode_rate / a.decode_rate, b.rate / a.rate) for a, b in pairs),
                strict=True,
            )
        )
        share = f"{right:.0f} of {made:.0f}"
        table.add_row(str(count), f"{without:.0f}", f"{with_:.0f}", f"{ratio:.2f}", share, f"{whole:.2f}")
    await bench.connection.aclose()
    await compute.aclose()
    Console(width=110).print(table)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, {torch.backends.cpu.get_cpu_capability()}"
    print(f"medians of {rounds} interleaved rounds; {machine}, torch {torch.__version__}, threads: {threads or 'all'}")


def _counts(service: Service) -> tuple[float, float]:
    """Tokens drafted and accepted so far."""
    read = service.metrics.registry.get_sample_value
    names = ("vllm:spec_decode_num_draft_tokens_total", "vllm:spec_decode_num_accepted_tokens_total")
    made, right = (read(name, {"model_name": FULL}) or 0.0 for name in names)
    return made, right


def main() -> None:
    parser = argparse.ArgumentParser(description="Drafts made in the cloud, with many sessions.")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of dialogues, whose dev split is asked")
    parser.add_argument("--sessions", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--answer", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int)
    given = parser.parse_args()
    asyncio.run(run(given.data, given.sessions, given.answer, given.rounds, given.threads))


if __name__ == "__main__":
    main()
