"""The training loop, and the command that trains one model alone: `python -m training.train`.

One loop serves both jobs: a set of learners reads the same batches, with or without a teacher whose logits are
computed once for all of them (see `distill`). Weights are kept in fp32 and worked on in bf16; matrices are
updated by Muon, everything else by AdamW; the rate warms up, stays, and falls to nothing over the last part.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from training import data

SHAPES = {
    "assistant-20m": {"hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12,
                      "num_attention_heads": 6, "num_key_value_heads": 2},
    "assistant-2m": {"hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4,
                     "num_attention_heads": 3, "num_key_value_heads": 1},
}  # fmt: skip
CONTEXT = 1024


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how fast to train; the run ends at `tokens` or `minutes`, whichever comes first."""

    tokens: int
    minutes: float
    batch_tokens: int = 8192
    short_block: int = 256  # most of the run reads short rows: attention is a third of the cost of long ones
    short_part: float = 0.85
    matrix_rate: float = 4e-3
    other_rate: float = 4e-3
    warm_part: float = 0.02
    fall_part: float = 0.6
    seed: int = 1


def new_model(shape: str, tokenizer: Tokenizer, seed: int) -> LlamaForCausalLM:
    """A randomly initialised model of one of `SHAPES`, with the tokenizer's special ids in its config."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(), head_dim=64, max_position_embeddings=CONTEXT, rms_norm_eps=1e-5,
        rope_theta=10000.0, tie_word_embeddings=True, bos_token_id=data.special_id(tokenizer, data.BOS),
        eos_token_id=data.special_id(tokenizer, data.END), pad_token_id=data.special_id(tokenizer, data.PAD),
        use_cache=False, **SHAPES[shape],
    )  # fmt: skip
    return LlamaForCausalLM(config)


class Learner:
    """One model in training: fp32 weights, their bf16 working copy, and its optimisers."""

    def __init__(
        self, name: str, model: LlamaForCausalLM, recipe: Recipe, temperature: float = 0.0, weight: float = 0.0
    ):
        self.name, self.temperature, self.weight = name, temperature, weight
        self.model = model
        self.work = LlamaForCausalLM(model.config).to(torch.bfloat16)
        inner = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
        rest = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
        self.optimisers: tuple[torch.optim.Optimizer, ...] = (
            torch.optim.Muon(inner, lr=recipe.matrix_rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0),
        )
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the fp32 weights into the working copy."""
        for work, kept in zip(self.work.parameters(), self.model.parameters(), strict=True):
            work.copy_(kept)

    def backward(self, rows: torch.Tensor, teacher: torch.Tensor | None, share: float) -> float:
        """Adds `share` of this batch's gradient; returns the cross-entropy in nats per token."""
        logits = self.work(input_ids=rows[:, :-1]).logits.float().flatten(0, 1)
        hard = F.cross_entropy(logits, rows[:, 1:].flatten())
        loss = hard
        if self.temperature and teacher is not None:
            soft = distillation_loss(logits, teacher, self.temperature)
            loss = self.weight * soft + (1 - self.weight) * hard
        (loss * share).backward()
        return float(hard.detach())

    @torch.no_grad()
    def step(self, rate: float) -> None:
        """One update at `rate` (1 is the recipe's own)."""
        for kept, work in zip(self.model.parameters(), self.work.parameters(), strict=True):
            kept.grad, work.grad = work.grad.float() if work.grad is not None else None, None
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group.setdefault("full_rate", group["lr"]) * rate
            optimiser.step()
            optimiser.zero_grad()
        self.refresh()

    def state(self) -> dict[str, Any]:
        return {"model": self.model.state_dict(), "optimisers": [o.state_dict() for o in self.optimisers]}

    def restore(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        self.refresh()


def distillation_loss(student: torch.Tensor, teacher: torch.Tensor, temperature: float) -> torch.Tensor:
    """`KL(teacher ‖ student) · T²` in nats per token, both softened by T (Hinton et al. 2015, arXiv 1503.02531).

    `student`, `teacher`: logits `[tokens, vocabulary]`.
    """
    target = F.log_softmax(teacher / temperature, dim=-1)
    mine = F.log_softmax(student / temperature, dim=-1)
    return F.kl_div(mine, target, log_target=True, reduction="batchmean") * temperature**2


def rate_at(done: float, recipe: Recipe) -> float:
    """The rate's share of its full value when `done` (0…1) of the run is over."""
    warm = min(1.0, (done + 1e-3) / recipe.warm_part)
    fall = min(1.0, (1.0 - done) / recipe.fall_part)
    return max(0.0, min(warm, fall))


def batches(documents: list[list[int]], recipe: Recipe, block: int, first: int) -> Iterator[torch.Tensor]:
    """Endless batches `[rows, block + 1]` of `batch_tokens`, reshuffled each epoch, from batch number `first` on."""
    rows, number, epoch = max(1, recipe.batch_tokens // block), 0, 0
    while True:
        blocks = data.packed(documents, block, recipe.seed * 1000 + epoch)
        if len(blocks) < rows:
            raise ValueError(f"{len(blocks)} blocks of {block} tokens, a batch needs {rows}")
        for start in range(0, len(blocks) - rows + 1, rows):
            if number >= first:
                yield blocks[start : start + rows]
            number += 1
        epoch += 1


@torch.no_grad()
def perplexity(
    model: LlamaForCausalLM, documents: Sequence[list[int]], tokenizer: Tokenizer, progress: bool = False
) -> float:
    """Perplexity per token of assistant turns, their end marks included, each given all that went before."""
    assistant, end = data.special_id(tokenizer, data.ASSISTANT), data.special_id(tokenizer, data.END)
    ordered = sorted(documents, key=len)
    total, count = 0.0, 0
    for start in tqdm(range(0, len(ordered), 8), desc="dev", leave=False, disable=not progress):
        group = [ids[: CONTEXT + 1] for ids in ordered[start : start + 8]]
        width = max(map(len, group))
        rows = torch.tensor([ids + [0] * (width - len(ids)) for ids in group])
        mask = torch.tensor([data.assistant_mask(ids, assistant, end) + [False] * (width - len(ids)) for ids in group])
        logits = model(input_ids=rows[:, :-1]).logits.float()
        losses = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="none")
        total += float(losses[mask[:, 1:].flatten()].sum())
        count += int(mask[:, 1:].sum())
    return math.exp(total / count)


def fit(
    learners: Sequence[Learner], teacher: LlamaForCausalLM | None, documents: list[list[int]],
    dev: list[list[int]], tokenizer: Tokenizer, recipe: Recipe, folder: Path,
) -> dict[str, object]:  # fmt: skip
    """Trains all learners on the same batches, with checkpoints in `folder`; resumes from one when it is there."""
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / "checkpoint.pt"
    steps = tokens = 0
    spent = 0.0
    history: list[dict[str, float]] = []
    if checkpoint.exists():
        kept = torch.load(checkpoint, weights_only=True)
        steps, tokens, spent, history = kept["steps"], kept["tokens"], kept["spent"], kept["history"]
        for learner in learners:
            learner.restore(kept[learner.name])

    def save() -> None:
        state: dict[str, object] = {learner.name: learner.state() for learner in learners}
        state |= {"steps": steps, "tokens": tokens, "spent": spent, "history": history}
        torch.save(state, checkpoint.with_suffix(".new"))
        checkpoint.with_suffix(".new").replace(checkpoint)

    def measure() -> None:
        row = {"tokens": float(tokens), "minutes": spent / 60}
        row |= {learner.name: perplexity(learner.work, sample, tokenizer) for learner in learners}
        history.append(row)
        tqdm.write(json.dumps({k: round(v, 3) for k, v in row.items()}))
        save()

    sample = random.Random(recipe.seed).sample(dev, min(96, len(dev)))
    bar = tqdm(total=recipe.tokens, initial=tokens, unit="tok", unit_scale=True, smoothing=0.05, desc=folder.name)
    done = max(tokens / recipe.tokens, spent / 60 / recipe.minutes)
    sources: dict[int, Iterator[torch.Tensor]] = {}
    while done < 1.0:
        began = time.monotonic()
        block = recipe.short_block if done < recipe.short_part else CONTEXT
        if block not in sources:
            sources[block] = batches(documents, recipe, block, steps)
        batch = next(sources[block])
        micro = batch.split(max(1, 2048 // block))
        loss = 0.0
        for rows in micro:
            with torch.no_grad():
                target = None if teacher is None else teacher(input_ids=rows[:, :-1]).logits.float().flatten(0, 1)
            for learner in learners:
                loss += learner.backward(rows, target, 1 / len(micro)) / len(micro) / len(learners)
        for learner in learners:
            learner.step(rate_at(done, recipe))
        steps += 1
        tokens += batch.shape[0] * block
        spent += time.monotonic() - began
        bar.update(batch.shape[0] * block)
        bar.set_postfix(loss=f"{loss:.3f}", minutes=f"{spent / 60:.1f}")
        done = max(tokens / recipe.tokens, spent / 60 / recipe.minutes)
        if steps % 150 == 0:
            measure()
        elif steps % 25 == 0:
            save()
    measure()
    bar.close()
    return {"recipe": asdict(recipe), "steps": steps, "tokens": tokens, "minutes": spent / 60, "history": history}


def prepare(source: Path, tokenizer_folder: Path) -> tuple[Tokenizer, list[list[int]], list[list[int]]]:
    """The tokenizer (trained when `tokenizer_folder` has none) and the encoded train and dev dialogues."""
    train_split, dev_split = data.read(source, "train"), data.read(source, "dev")
    if not (tokenizer_folder / "tokenizer.json").exists():
        data.save_tokenizer(data.train_tokenizer(train_split, 4096), tokenizer_folder, CONTEXT)
    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    return tokenizer, data.encode(tokenizer, train_split), data.encode(tokenizer, dev_split)


def export(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the model as a Hugging Face checkpoint directory: bf16 safetensors, config, tokenizer."""
    half = LlamaForCausalLM(model.config).to(torch.bfloat16)
    half.load_state_dict(model.state_dict())
    half.config.use_cache = True
    half.save_pretrained(folder)
    data.save_tokenizer(tokenizer, folder, CONTEXT)


def arguments(about: str, defaults: Iterable[tuple[str, float]]) -> argparse.ArgumentParser:
    """The options both training commands share."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--data", type=Path, required=True, help="folder of dialogues (see training/data.py)")
    parser.add_argument("--work", type=Path, required=True, help="folder for the tokenizer and checkpoints")
    parser.add_argument("--out", type=Path, required=True, help="folder for the finished checkpoint directory")
    for name, value in defaults:
        parser.add_argument(f"--{name}", type=float, default=value)
    return parser


def main() -> None:
    parser = arguments("Train one model of the pair on its own.", (("tokens", 14e6), ("minutes", 120), ("rate", 4e-3)))
    parser.add_argument("--model", choices=sorted(SHAPES), default="assistant-20m")
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--start", type=Path, help="checkpoint directory to begin from (default: random weights)")
    given = parser.parse_args()
    tokenizer, documents, dev = prepare(given.data, given.work / "tokenizer")
    recipe = Recipe(int(given.tokens), given.minutes, given.batch_tokens, matrix_rate=given.rate,
                    other_rate=given.rate, seed=given.seed)  # fmt: skip
    model = new_model(given.model, tokenizer, recipe.seed)
    if given.start:
        model = LlamaForCausalLM.from_pretrained(given.start, dtype=torch.float32)
        model.config.use_cache = False
    learner = Learner(given.model, model, recipe)
    report = fit([learner], None, documents, dev, tokenizer, recipe, given.work / given.model)
    export(learner.model, tokenizer, given.out)
    (given.work / given.model / "report.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
