"""Distils the tiny model from the full one: `python -m training.distill`.

Students with different temperatures, and one that never sees the teacher, learn from the same batches in one run,
so that the teacher is asked once and the comparison is fair. The one that agrees best with the full model's own
answers on dev dialogues is exported.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaForCausalLM

from training.evaluate import agreement, answers
from training.train import Learner, Recipe, arguments, export, fit, new_model, perplexity, prepare

TINY = "assistant-2m"


def main() -> None:
    parser = arguments("Distil the tiny model from the full one.", (("tokens", 8e6), ("minutes", 60), ("rate", 4e-3)))
    parser.add_argument("--teacher", type=Path, required=True, help="checkpoint directory of the full model")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[5.0, 2.0, 1.0])
    parser.add_argument("--weight", type=float, default=0.7, help="of the teacher's part of the loss")
    given = parser.parse_args()
    tokenizer, documents, dev = prepare(given.data, given.work / "tokenizer")
    teacher = LlamaForCausalLM.from_pretrained(given.teacher, dtype=torch.bfloat16).eval()
    recipe = Recipe(int(given.tokens), given.minutes, matrix_rate=given.rate, other_rate=given.rate)
    learners = [
        Learner(f"T={t:g}", new_model(TINY, tokenizer, recipe.seed), recipe, t, given.weight)
        for t in given.temperatures
    ]
    learners.append(Learner("alone", new_model(TINY, tokenizer, recipe.seed), recipe))
    report = fit(learners, teacher, documents, dev, tokenizer, recipe, given.work / TINY)

    made = answers(teacher, dev, tokenizer, 160)
    rows: dict[str, dict[str, float]] = {}
    for learner in learners:
        agreed = agreement(learner.work, made)
        rows[learner.name] = {"agreement": agreed.share, "perplexity": perplexity(learner.work, dev, tokenizer, True)}
        print(learner.name, json.dumps(rows[learner.name]), flush=True)
    best = max(learners, key=lambda learner: rows[learner.name]["agreement"])
    export(best.model, tokenizer, given.out)
    report |= {"students": rows, "exported": best.name, "weight": given.weight}
    (given.work / TINY / "report.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
