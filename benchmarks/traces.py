"""What the real pair says of dev prompts: the full model's answers, and at each position the tiny one's own token."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from netlab import QUESTIONS

from split_model.attention import Span
from split_model.runner import Runner
from split_model.sampling import Sampling, sample
from training import data

LONGEST = 1600  # characters of a prompt: some 300 tokens
Messages = list[dict[str, str]]


@dataclass(frozen=True, slots=True)
class Trace:
    """One answer of the full model; its last token may be the one that ends it.

    `drafts[i]` is the tiny model's own token, by the same keyed noise, where the answer's token `i` stands, given all
    that is before; `entropies[i]`, in nats, is of what it was drawn from.
    """

    prompt: tuple[int, ...]
    ids: tuple[int, ...]
    drafts: tuple[int, ...]
    entropies: tuple[float, ...]
    sampling: Sampling

    @property
    def right(self) -> tuple[bool, ...]:
        """Which drafts are accepted."""
        return tuple(draft == token for draft, token in zip(self.drafts, self.ids, strict=True))

    def rounds(self, length: int) -> Iterator[tuple[int, int]]:
        """Drafted and accepted tokens of each round, with drafts of this length."""
        at, right = 0, self.right
        while at < len(right):
            part = right[at : at + length]
            accepted = part.index(False) if False in part else len(part)
            yield len(part), accepted
            at += accepted + 1


@torch.inference_mode()
def record(
    tiny: Runner, full: Runner, prompt: Sequence[int], sampling: Sampling, most: int, *, endless: bool = False
) -> Trace:
    """At most `most` tokens; `endless`: exactly so many, whatever the model says."""
    ids = tuple(full.tokens(prompt, max_tokens=most, sampling=sampling, stops=() if endless else None))
    log = [*prompt, *ids[:-1]]
    model = tiny.model
    tiles = model.tiles([Span(0, 0, len(log))])
    x = model.run(model.embed(torch.tensor(log)), 0, model.config.layers, model.new_cache(1), tiles)
    logits = model.logits(x[len(prompt) - 1 :])
    places = range(len(prompt), len(prompt) + len(ids))
    drafts = sample(logits, list(places), [sampling] * len(ids))
    chances = torch.log_softmax(logits.double(), -1)
    entropies = (-(chances.exp() * chances).sum(-1)).tolist()
    return Trace(tuple(prompt), ids, tuple(drafts), tuple(entropies), sampling)


def conversations(folder: Path | None, count: int) -> list[Messages]:
    """Dev dialogues up to where the middle one of their assistant turns begins, or the demo's questions."""
    if folder is None:
        return [[{"role": "user", "content": question}] for question in QUESTIONS][:count]
    dialogues, found = data.read(folder, "dev"), list[Messages]()
    for one in dialogues[:: max(1, len(dialogues) // (2 * count))]:
        turns = [{"role": turn.role, "content": turn.content} for turn in one.turns]
        places = [at for at, turn in enumerate(turns) if at and turn["role"] == "assistant"]
        asked = turns[: places[len(places) // 2]] if places else []
        if asked and sum(len(turn["content"]) for turn in asked) <= LONGEST:
            found.append(asked)
    return found[:count]


def how(number: int) -> Sampling:
    """Every other answer is sampled, the rest are greedy."""
    return Sampling(temperature=0.7, seed=7) if number % 2 else Sampling()


def recorded(tiny: Runner, full: Runner, folder: Path | None, count: int, most: int, *,
             endless: bool = False) -> list[Trace]:  # fmt: skip
    """Of conversations of the dev split below the folder; a half is greedy, the other sampled."""
    return [record(tiny, full, full.prompt_ids(asked), how(number), most, endless=endless)
            for number, asked in enumerate(conversations(folder, count))]  # fmt: skip


def altered(trace: Trace, share: float, order: random.Random) -> Trace:
    """With drafts of which this share is right: where too many are, other tokens are put in, or the right ones."""
    drafts = []
    now = sum(trace.right) / len(trace.ids)
    for draft, token in zip(trace.drafts, trace.ids, strict=True):
        if draft == token and now > share:
            draft = token if order.random() < share / now else token ^ 1
        elif draft != token and now < share:
            draft = token if order.random() < (share - now) / (1 - now) else draft
        drafts.append(draft)
    return replace(trace, drafts=tuple(drafts))
