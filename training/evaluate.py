"""Measures the finished pair and writes the table that ships beside the weights: `python -m training.evaluate`.

Two numbers matter: the perplexity of assistant turns in the dev split, and the share of the full model's own greedy
answer tokens that the tiny model would have chosen too. The second, by the tiny model's entropy, becomes
`agreement.json`, the table from which the agent predicts how well a local answer would do.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tqdm import tqdm
from transformers import LlamaForCausalLM

from training import data
from training.train import CONTEXT, perplexity, prepare

ANSWER = 64  # tokens, at most
EDGES = (0.05, 0.15, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0)  # nats


@dataclass(frozen=True, slots=True)
class Answer:
    """A dev prompt and what the full model answered, greedily; both are token ids."""

    prompt: tuple[int, ...]
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Agreement:
    """Per answer token, in order of the answers: the tiny model's entropy (nats), whether it agreed, and the entropy
    it had at the answer's first token."""

    entropy: torch.Tensor
    agreed: torch.Tensor
    first_entropy: torch.Tensor

    @property
    def share(self) -> float:
        return float(self.agreed.float().mean())

    def bins(self, by: torch.Tensor) -> list[dict[str, float | None]]:
        """Agreement by bins of `by` (one of the entropies); empty bins take that of all tokens."""
        edges, rows, low = [*EDGES, None], [], 0.0
        for edge in edges:
            inside = (by >= low) & (by < (edge if edge is not None else float("inf")))
            count = int(inside.sum())
            share = float(self.agreed[inside].float().mean()) if count else self.share
            rows.append({"entropy_below": edge, "agreement": round(share, 4), "tokens": count})
            low = edge or low
        return rows


def prompts(dev: Sequence[list[int]], tokenizer: Tokenizer, count: int, seed: int = 7) -> list[list[int]]:
    """Dev dialogues cut where one of their assistant turns begins, at most 400 tokens long."""
    assistant = data.special_id(tokenizer, data.ASSISTANT)
    draw = random.Random(seed)
    found = []
    for ids in draw.sample(list(dev), min(len(dev), 2 * count)):
        places = [at + 1 for at, token in enumerate(ids) if token == assistant and at < 400]
        found.append(ids[: draw.choice(places)])
    return found[:count]


@torch.no_grad()
def answers(full: LlamaForCausalLM, dev: Sequence[list[int]], tokenizer: Tokenizer, count: int) -> list[Answer]:
    """The full model's own greedy answers to `count` dev prompts."""
    end, pad = data.special_id(tokenizer, data.END), data.special_id(tokenizer, data.PAD)
    made, asked = [], sorted(prompts(dev, tokenizer, count), key=len)
    for start in tqdm(range(0, len(asked), 16), desc="answers"):
        group = asked[start : start + 16]
        width = max(map(len, group))
        ids = torch.tensor([[pad] * (width - len(p)) + p for p in group])
        out = full.generate(
            ids, attention_mask=ids.ne(pad).long(), max_new_tokens=ANSWER, do_sample=False, use_cache=True,
            eos_token_id=end, pad_token_id=pad,
        )  # fmt: skip
        for prompt, row in zip(group, out[:, width:].tolist(), strict=True):
            length = row.index(end) + 1 if end in row else len(row)
            made.append(Answer(tuple(prompt), tuple(row[:length])))
    return made


@torch.no_grad()
def agreement(tiny: LlamaForCausalLM, made: Sequence[Answer]) -> Agreement:
    """Runs the tiny model over the full model's answers."""
    entropy, agreed, first = [], [], []
    for answer in tqdm(made, desc="agreement"):
        ids = torch.tensor([answer.prompt + answer.ids])[:, : CONTEXT + 1]
        logits = tiny(input_ids=ids[:, :-1]).logits[0, len(answer.prompt) - 1 :].float()
        chance = logits.log_softmax(-1)
        here = -(chance.exp() * chance).sum(-1)
        entropy.append(here)
        agreed.append(logits.argmax(-1) == ids[0, len(answer.prompt) :])
        first.append(here[:1].expand(len(here)))
    return Agreement(torch.cat(entropy), torch.cat(agreed), torch.cat(first))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the finished pair; write agreement.json.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--full", type=Path, required=True)
    parser.add_argument("--tiny", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=400)
    given = parser.parse_args()
    tokenizer, _, dev = prepare(given.data, given.full)
    full = LlamaForCausalLM.from_pretrained(given.full, dtype=torch.bfloat16).eval()
    tiny = LlamaForCausalLM.from_pretrained(given.tiny, dtype=torch.bfloat16).eval()
    made = answers(full, dev, tokenizer, given.prompts)
    agreed = agreement(tiny, made)
    table = {
        "full": given.full.resolve().name,
        "by": "entropy in nats of the tiny model at the last prompt position",
        "agreement": round(agreed.share, 4),
        "bins": agreed.bins(agreed.first_entropy),
        "token_bins": agreed.bins(agreed.entropy),
        "answers": len(made),
    }
    (given.tiny / "agreement.json").write_text(json.dumps(table, indent=2) + "\n")
    for folder, model in ((given.full, full), (given.tiny, tiny)):
        print(
            f"{folder.name}: perplexity {perplexity(model, dev, tokenizer, progress=True):.3f} of dev assistant turns"
        )
    print(json.dumps(table, indent=2))


if __name__ == "__main__":
    main()
