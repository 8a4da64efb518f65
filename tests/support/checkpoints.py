"""Small random checkpoints in Hugging Face layout, made once per process."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('role ' + message['role'] + ' is unknown') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
SPECIAL = ["<|bos|>", "<|end|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
_made: list[tempfile.TemporaryDirectory[str]] = []


def save_tokenizer(folder: Path, vocabulary: int = 512) -> Tokenizer:
    """A byte-level BPE with a chat template; every byte is among its entries."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=vocabulary, special_tokens=SPECIAL, initial_alphabet=alphabet,
                                  show_progress=False)  # fmt: skip
    words = [f"{a}{b} the table for {a} at {b}" for a in ("res", "hot", "tra", "bo", "ev") for b in ("ing", "er", "el")]
    tokenizer.train_from_iterator(words * 4, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|bos|>", "eos_token": "<|end|>", "pad_token": "<|pad|>", "add_bos_token": True,
              "chat_template": TEMPLATE, "tokenizer_class": "PreTrainedTokenizerFast"}  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer


def save_model(folder: Path, *, family: str = "Llama", seed: int = 0, dtype: torch.dtype = torch.float32,
               shard: str | None = None, blur: float = 0.0, **shape: Any) -> Any:  # fmt: skip
    """A random model of a family of transformers'; `shape` overrides its config, `shard` is the largest file size.

    With `blur`, its weights have so much noise, as a share of their own spread, and only so often agree. It also moves
    norms from 1 and biases from 0, where they begin.
    """
    wanted = {
        "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 5, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "intermediate_size": 160, "max_position_embeddings": 1024,
        "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
        "initializer_range": 0.2,
    }  # fmt: skip
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**{**wanted, **shape})
    model = getattr(transformers, f"{family}ForCausalLM")(config).to(dtype).eval()
    with torch.no_grad():
        for weights in model.parameters() if blur else ():
            weights += blur * 0.2 * torch.randn_like(weights)
    model.save_pretrained(folder, **({"max_shard_size": shard} if shard else {}))
    return model


@cache
def checkpoint(**shape: Any) -> Path:
    """A folder with a random model and a tokenizer, kept until the process ends. Arguments as in `save_model`."""
    _made.append(tempfile.TemporaryDirectory(prefix="checkpoint-"))
    folder = Path(_made[-1].name) / "tiny-llama"
    folder.mkdir()
    save_model(folder, **shape)
    save_tokenizer(folder, shape.get("vocab_size", 512))
    return folder


def change(folder: Path, **entries: Any) -> Path:
    """Rewrites fields of config.json; "absent" leaves one out."""
    path = folder / "config.json"
    kept = {**json.loads(path.read_text()), **entries}
    path.write_text(json.dumps({key: value for key, value in kept.items() if value != "absent"}))
    return folder


def rewrite(folder: Path, **tensors: torch.Tensor | None) -> Path:
    """Rewrites tensors by name, with `__` for its dots; None leaves one out."""
    path = folder / "model.safetensors"
    kept = {**load_file(path), **{name.replace("__", "."): tensor for name, tensor in tensors.items()}}
    save_file({name: tensor for name, tensor in kept.items() if tensor is not None}, path)
    return folder
