"""What a checkpoint directory says about its model, in one record."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from split_model.settings import Precision

ARCHITECTURES = ("LlamaForCausalLM",)
# An option that would change the numbers, with the value this package computes.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
}


class ModelError(Exception):
    """A checkpoint that cannot be used; the message is one line that names the file and the reason."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """The shape of a decoder; `stops` are the ids that end an answer, `stored` how weights lie there as integers."""

    name: str
    vocabulary: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    inner: int
    context: int
    rope_theta: float
    norm_eps: float
    tied: bool
    bos: int | None
    stops: frozenset[int]
    stored: Precision | None = None

    @classmethod
    def read(cls, folder: Path) -> ModelConfig:
        """Reads `config.json` and, where there is one, `generation_config.json`. Raises ModelError."""
        path = folder / "config.json"
        raw = read_object(path)
        _refuse_unsupported(raw, path)
        field = _Fields(raw, path)
        heads, width = field.integer("num_attention_heads"), field.integer("hidden_size")
        config = cls(
            name=folder.resolve().name,
            vocabulary=field.integer("vocab_size"),
            width=width,
            layers=field.integer("num_hidden_layers"),
            heads=heads,
            kv_heads=field.integer("num_key_value_heads", heads),
            head_dim=field.integer("head_dim", width // heads),
            inner=field.integer("intermediate_size"),
            context=field.integer("max_position_embeddings"),
            rope_theta=_rope_theta(raw, path),
            norm_eps=field.real("rms_norm_eps", 1e-6),
            tied=bool(raw.get("tie_word_embeddings", False)),
            bos=next(iter(_ids(raw, "bos_token_id", path)), None),
            stops=_stops(raw, folder),
            stored=_stored(raw, path),
        )
        if config.heads % config.kv_heads or config.head_dim % 2:
            raise ModelError(f"{path}: {config.heads} heads, {config.kv_heads} key heads, head_dim {config.head_dim}")
        return config

    @property
    def arithmetic(self) -> str:
        """What changes the numbers and does not show in the weights."""
        return repr((self.heads, self.kv_heads, self.head_dim, self.rope_theta, self.norm_eps, self.tied))


@dataclass(frozen=True, slots=True)
class _Fields:
    raw: Mapping[str, Any]
    path: Path

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.raw.get(name)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ModelError(f"{self.path}: {name} is {value!r}, not a positive integer")
        return value

    def real(self, name: str, default: float) -> float:
        value = self.raw.get(name, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or value < 0:
            raise ModelError(f"{self.path}: {name} is {value!r}, not a number of 0 or more")
        return float(value)


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`. Raises ModelError when it is missing or is none."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(found, dict):
        raise ModelError(f"{path}: a JSON object was expected, not {type(found).__name__}")
    return found


def _refuse_unsupported(raw: Mapping[str, Any], path: Path) -> None:
    names = raw.get("architectures") or [None]
    if names[0] not in ARCHITECTURES:
        raise ModelError(f"{path}: architecture {names[0]!r} is not supported, only {', '.join(ARCHITECTURES)}")
    for option, value in FIXED.items():
        if raw.get(option) not in (None, value):
            raise ModelError(f"{path}: {option} = {raw[option]!r} is not supported, only {value!r}")


def _rope_theta(raw: Mapping[str, Any], path: Path) -> float:
    """`rope_theta` as written before transformers 5, or inside `rope_parameters` as written since."""
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise ModelError(f"{path}: rope_parameters is {rope!r}, not an object")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ModelError(f"{path}: rope type {kind!r} is not supported, only 'default'")
    return _Fields({**raw, **rope}, path).real("rope_theta", 10000.0)


def _stored(raw: Mapping[str, Any], path: Path) -> Precision | None:
    """Quantised by this package, or not at all."""
    scheme = raw.get("quantization_config")
    if scheme is None:
        return None
    method = scheme.get("quant_method") if isinstance(scheme, dict) else scheme
    if method != "tandem":
        raise ModelError(f"{path}: quantization_config: quant_method {method!r} is not supported, only 'tandem'")
    if scheme.get("precision") not in (Precision.INT8, Precision.INT4):
        raise ModelError(f"{path}: quantization_config: precision {scheme.get('precision')!r}, not 'int8' or 'int4'")
    return Precision(scheme["precision"])


def _stops(raw: Mapping[str, Any], folder: Path) -> frozenset[int]:
    path = folder / "generation_config.json"
    if path.exists() and (generation := read_object(path)).get("eos_token_id") is not None:
        return frozenset(_ids(generation, "eos_token_id", path))
    return frozenset(_ids(raw, "eos_token_id", folder / "config.json"))


def _ids(raw: Mapping[str, Any], name: str, path: Path) -> list[int]:
    """Token ids written as one number, as a list, or not at all."""
    value = raw.get(name)
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(not isinstance(one, int) or isinstance(one, bool) or one < 0 for one in ids):
        raise ModelError(f"{path}: {name} is {value!r}, not token ids")
    return ids
