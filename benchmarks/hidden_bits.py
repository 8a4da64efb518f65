"""What 8-bit hidden states cost in agreement, by split, and what they save in bytes.

    python benchmarks/hidden_bits.py [--data FOLDER] [--texts 80] [--plot FILE.png]

Each text is a prompt and the full model's own greedy answer. The prompt's hidden states are rounded at the split and go
on; every position's next token is then compared with that of the same model without rounding. Prompts are dev
dialogues of `--data` (see training/data.py), or the demo's questions. "Large channels": what a model would lose that
has four channels 64 times as large as the others, as larger models have some (arXiv 2402.17762); they are made so on
the way to the wire, and are as before behind it.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import protocol.tensor
from protocol.frames import position_bytes
from protocol.tensor import pack, unpack
from split_model.attention import Span
from split_model.model import Model
from split_model.runner import Runner
from split_model.sampling import Sampling
from training import data

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "deploy"))
from demo import FULL, QUESTIONS

PIECE = 128  # positions that the phone packs at once
ANSWER, LONGEST = 40, 400  # tokens
OUTLIER = protocol.tensor.OUTLIER
LARGE, TIMES = 4, 64.0  # channels, and how much larger they are made; a power of two, so that bf16 loses nothing


@dataclass(frozen=True, slots=True)
class Text:
    """Token ids, of which the first `prompt` were asked, and the hidden states behind each layer, `[n, width]`."""

    ids: tuple[int, ...]
    prompt: int
    hidden: tuple[torch.Tensor, ...]
    chances: torch.Tensor  # log probabilities of the next token, `[n, vocabulary]`


@dataclass(frozen=True, slots=True)
class Way:
    """How hidden states are rounded: with outlier channels apart or not, and with a few channels made large or not."""

    name: str
    apart: bool
    large: bool


WAYS = (Way("8 bits", True, False), Way("none apart", False, False),
        Way("large channels", True, True), Way("large, none apart", False, True))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Loss:
    """Share of positions whose greedy next token is the same, in the prompt and in the answer; nats of divergence."""

    prompt: float
    answer: float
    divergence: float
    bytes: float  # a position, as sent


def prompts(runner: Runner, folder: Path | None, count: int) -> list[list[int]]:
    """Dev dialogues up to where the middle one of their assistant turns begins, or the demo's questions."""
    if folder is None:
        return [runner.prompt_ids(question) for question in QUESTIONS]
    dialogues = data.read(folder, "dev")
    found = []
    for one in dialogues[:: max(1, len(dialogues) // count)]:
        turns = [{"role": turn.role, "content": turn.content} for turn in one.turns]
        places = [at for at, turn in enumerate(turns) if at and turn["role"] == "assistant"]
        if places and len(ids := runner.tokenizer.chat(turns[: places[len(places) // 2]])) <= LONGEST:
            found.append(ids)
    return found[:count]


def read(runner: Runner, prompt: Sequence[int]) -> Text:
    model = runner.model
    ids = (*prompt, *runner.tokens(prompt, max_tokens=ANSWER, sampling=Sampling()))
    cache, tiles = model.new_cache(1), model.tiles([Span(0, 0, len(ids))])
    hidden = [model.embed(torch.tensor(ids))]
    for layer in range(model.config.layers):
        hidden.append(model.run(hidden[-1], layer, layer + 1, cache, tiles))
    return Text(ids, len(prompt), tuple(hidden), torch.log_softmax(model.logits(hidden[-1]), -1))


def rounded(x: torch.Tensor, way: Way) -> tuple[torch.Tensor, int]:
    """Hidden states as the cloud has them, and the bytes that they took."""
    protocol.tensor.OUTLIER = OUTLIER if way.apart else math.inf
    size = torch.ones(x.shape[1], dtype=torch.bfloat16)
    size[:: x.shape[1] // LARGE] = TIMES if way.large else 1.0
    frames = [frame for at in range(0, len(x), PIECE) for frame in pack(x[at : at + PIECE] * size, at, 8)]
    return torch.cat([unpack(frame, x.shape[1]) for frame in frames]) / size, sum(frame.size for frame in frames)


def loss(model: Model, texts: Sequence[Text], split: int, way: Way) -> Loss:
    same_prompt = same_answer = divergence = size = 0.0
    prompt, every = sum(text.prompt for text in texts), sum(len(text.ids) for text in texts)
    for text in texts:
        first, took = rounded(text.hidden[split][: text.prompt], way)
        x = torch.cat([first, text.hidden[split][text.prompt :]])
        tiles = model.tiles([Span(0, 0, len(x))])
        x = model.run(x, split, model.config.layers, model.new_cache(1), tiles)
        chances = torch.log_softmax(model.logits(x), -1)
        same = chances.argmax(-1) == text.chances.argmax(-1)
        same_prompt += float(same[: text.prompt].sum())
        same_answer += float(same[text.prompt :].sum())
        divergence += float((text.chances.exp() * (text.chances - chances)).sum())
        size += took
    return Loss(same_prompt / prompt, same_answer / (every - prompt), divergence / every, size / prompt)


def plot(found: dict[str, list[Loss]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    splits = range(1, len(found[WAYS[0].name]) + 1)
    for name, losses in found.items():
        upper.plot(splits, [100 * one.prompt for one in losses], marker=".", label=name)
        lower.semilogy(splits, [one.divergence for one in losses], marker=".", label=name)
    upper.set_ylabel("same next token, %")
    lower.set_ylabel("KL divergence, nats")
    lower.set_xlabel(f"split of {FULL}: layers on the phone")
    upper.legend()
    figure.savefig(file, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description="Agreement lost to 8-bit hidden states, by split.")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of dialogues, whose dev split is asked")
    parser.add_argument("--texts", type=int, default=80, help="of the data")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="needs matplotlib")
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, list[Loss]] = {way.name: [] for way in WAYS}
    with torch.inference_mode():
        runner = Runner(FULL)
        texts = [read(runner, prompt) for prompt in prompts(runner, given.data, given.texts)]
        for split in range(1, runner.model.config.layers + 1):
            for way in WAYS:
                found[way.name].append(loss(runner.model, texts, split, way))
    width, positions = runner.model.config.width, sum(text.prompt for text in texts)
    show(found, position_bytes(width, 16))
    answers = sum(len(text.ids) - text.prompt for text in texts)
    print(f"{len(texts)} texts, {positions} positions of prompts and {answers} of answers; torch {torch.__version__}")
    if given.plot:
        plot(found, given.plot)


def show(found: dict[str, list[Loss]], whole: int) -> None:
    """`whole`: bytes of a position in 16 bits."""
    table = Table(title=f"{FULL}: same greedy next token, in the prompt / in the answer behind it, %, and KL, nats")
    for column in ("split", "bytes a position", *(way.name for way in WAYS)):
        table.add_column(column, justify="right")
    for at, first in enumerate(found[WAYS[0].name]):
        row = [str(at + 1), f"{first.bytes:.0f} of {whole} ({first.bytes / whole:.2f})"]
        for way in WAYS:
            one = found[way.name][at]
            row.append(f"{100 * one.prompt:.2f} / {100 * one.answer:.2f}  {one.divergence:.5f}")
        table.add_row(*row)
    Console(width=150).print(table)


if __name__ == "__main__":
    main()
