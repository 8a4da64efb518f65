"""Dialogues on disk become chat text, and chat text becomes packed token blocks.

Two layouts are read. A folder of `*.jsonl.gz`, one dialogue a line (`{"id", "services", "turns": [{"role",
"content"}]}`), where names that end in `-dev.jsonl.gz` are the dev split; or the published folders of the
Schema-Guided Dialogue set (`train/dialogues_*.json`, `dev/dialogues_*.json`). Its test split is never read.
"""

from __future__ import annotations

import gzip
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

BOS, END, PAD, SYSTEM, USER, ASSISTANT = "<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL = (BOS, END, PAD, SYSTEM, USER, ASSISTANT)
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role ' + message['role'] + ' is not one of system, user, assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Turn:
    """What one speaker said; `role` is `system`, `user` or `assistant`."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Dialogue:
    """One conversation, in order."""

    id: str
    turns: tuple[Turn, ...]

    def text(self) -> str:
        """The whole conversation as the chat template writes it."""
        return BOS + "".join(f"<|{turn.role}|>{turn.content}{END}" for turn in self.turns)


def _system_line(dialogue_id: str, services: list[str]) -> str | None:
    """A system message for about every fourth dialogue, so that apps which send one meet a trained token."""
    draw = random.Random(dialogue_id).random()
    if draw < 0.12:
        return "You are a helpful assistant."
    if draw < 0.25 and services:
        return "You are an assistant for " + " and ".join(s.split("_")[0].lower() for s in services) + "."
    return None


def _dialogue(dialogue_id: str, services: list[str], said: Iterator[Turn]) -> Dialogue:
    line = _system_line(dialogue_id, services)
    head = (Turn("system", line),) if line else ()
    return Dialogue(dialogue_id, head + tuple(said))


def _read_lines(path: Path) -> Iterator[Dialogue]:
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        for line in lines:
            one = json.loads(line)
            said = (Turn(turn["role"], turn["content"].strip()) for turn in one["turns"])
            yield _dialogue(one["id"], one.get("services", []), said)


def _read_published(path: Path) -> Iterator[Dialogue]:
    roles = {"USER": "user", "SYSTEM": "assistant"}
    for one in json.loads(path.read_text(encoding="utf-8")):
        said = (Turn(roles[turn["speaker"]], turn["utterance"].strip()) for turn in one["turns"])
        yield _dialogue(one["dialogue_id"], one.get("services", []), said)


def read(folder: Path, split: str) -> list[Dialogue]:
    """All dialogues of `split` (`train` or `dev`) below `folder`. Raises FileNotFoundError when there are none."""
    lines = sorted(folder.glob("*.jsonl.gz"))
    found = [d for p in lines if p.name.endswith("-dev.jsonl.gz") == (split == "dev") for d in _read_lines(p)]
    found += [d for p in sorted(folder.glob(f"{split}/dialogues_*.json")) for d in _read_published(p)]
    if not found:
        raise FileNotFoundError(f"no {split} dialogues in {folder}: expected *.jsonl.gz or {split}/dialogues_*.json")
    return found


def train_tokenizer(dialogues: list[Dialogue], vocabulary: int) -> Tokenizer:
    """A byte-level BPE of `vocabulary` entries: the special tokens first, every byte among them."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((turn.content for d in dialogues for turn in d.turns), trainer)
    return tokenizer


def special_id(tokenizer: Tokenizer, token: str) -> int:
    """The id of one of SPECIAL. Raises ValueError for a tokenizer that was not made here."""
    found = tokenizer.token_to_id(token)
    if found is None:
        raise ValueError(f"the tokenizer has no {token}")
    return found


def save_tokenizer(tokenizer: Tokenizer, folder: Path, context: int) -> None:
    """Writes `tokenizer.json` and the `tokenizer_config.json` that carries the chat template."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BOS,
        "eos_token": END,
        "pad_token": PAD,
        "add_bos_token": True,
        "additional_special_tokens": [SYSTEM, USER, ASSISTANT],
        "model_max_length": context,
        "clean_up_tokenization_spaces": False,
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")


def encode(tokenizer: Tokenizer, dialogues: list[Dialogue]) -> list[list[int]]:
    """Token ids of each dialogue, in the order given."""
    return [e.ids for e in tokenizer.encode_batch([d.text() for d in dialogues], add_special_tokens=False)]


def packed(documents: list[list[int]], block: int, seed: int) -> torch.Tensor:
    """Shuffled documents laid end to end in rows: int64 `[blocks, block + 1]`, the last token shared with no row."""
    order = list(range(len(documents)))
    random.Random(seed).shuffle(order)
    flat = torch.tensor([token for index in order for token in documents[index]])
    rows = len(flat) // (block + 1)
    return flat[: rows * (block + 1)].view(rows, block + 1)


def assistant_mask(ids: list[int], assistant: int, end: int) -> list[bool]:
    """True for the tokens an assistant turn is scored on: its words and the end mark that closes it."""
    mask, inside = [], False
    for token in ids:
        mask.append(inside)
        if token == assistant:
            inside = True
        elif token == end:
            inside = False
    return mask
