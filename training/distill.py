"""Distils the tiny model from the full one: `python -m training.distill`.

Students with different temperatures, and one that never sees the teacher, learn from the same batches in one run,
so that the teacher is asked once and the comparison is fair. The one that agrees best with the full model's own
answers on dev dialogues is then trained on and exported.
"""

from __future__ import annotations

import json
from dataclasses import replace
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
    parser.add_argument("--compare-tokens", type=float, default=2e6, help="budget of each student in the comparison")
    parser.add_argument("--compare-minutes", type=float, default=60)
    given = parser.parse_args()
    tokenizer, documents, dev = prepare(given.data, given.work / "tokenizer")
    teacher = LlamaForCausalLM.from_pretrained(given.teacher, dtype=torch.bfloat16).eval()
    short = Recipe(int(given.compare_tokens), given.compare_minutes, short_part=1.0, matrix_rate=given.rate,
                   other_rate=given.rate)  # fmt: skip
    # What the tiny model is short of is steps: a quarter of the batch, and a little less of the rate.
    long = replace(short, tokens=int(given.tokens), minutes=given.minutes, batch_tokens=2048, seed=2, short_part=0.85,
                   matrix_rate=0.75 * given.rate, other_rate=0.75 * given.rate)  # fmt: skip

    temperatures = {f"T={t:g}": t for t in given.temperatures} | {"alone": 0.0}
    learners = [Learner(n, new_model(TINY, tokenizer, 1), short, t, given.weight) for n, t in temperatures.items()]
    compared = fit(learners, teacher, documents, dev, tokenizer, short, given.work / f"{TINY}-compare")
    made = answers(teacher, dev, tokenizer, 160)
    students = {one.name: {"agreement": agreement(one.work, made).share} for one in learners}
    for one in learners:
        students[one.name]["perplexity"] = perplexity(one.work, dev, tokenizer, progress=True)
        print(one.name, json.dumps(students[one.name]), flush=True)

    best = max((one for one in learners if one.temperature), key=lambda one: students[one.name]["agreement"])
    learner = Learner(best.name, best.model, long, best.temperature, given.weight)
    trained = fit([learner], teacher, documents, dev, tokenizer, long, given.work / TINY)
    export(learner.model, tokenizer, given.out)
    report = {
        "weight": given.weight,
        "exported": best.name,
        "students": students,
        "compare": compared,
        "final": trained,
    }
    (given.work / TINY / "report.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
