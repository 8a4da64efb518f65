"""What a config says of rotary positions (arXiv 2104.09864). No torch: shapes are read without it, too."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from split_model.fields import Fields, ModelError

# The fields of a config's rope object that each kind reads, beside `rope_theta`.
KINDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor", "beta_slow", "beta_fast", "original_max_position_embeddings", "attention_factor", "truncate"),
}


@dataclass(frozen=True, slots=True)
class Rope:
    """Frequencies `theta ** (-2i / dims)`, and how they were stretched for longer contexts.

    `linear` divides them all by `factor`. `llama3` and `yarn` (arXiv 2309.00071) divide those that make fewer than
    `low` turns within the `original` positions, leave those that make more than `high`, and blend between. `length` is
    what a turned pair is multiplied with.
    """

    theta: float
    kind: str = "default"
    factor: float = 1.0
    original: int = 0
    low: float = 0.0
    high: float = 0.0
    length: float = 1.0
    truncate: bool = True  # yarn: blend between whole dimensions


def read_rope(field: Fields, context: int) -> tuple[Rope, Fields]:
    """What a config says on rotation, in `rope_parameters` (transformers 5) or around `rope_scaling` (before), or both.

    Also gives the fields as if they all stood side by side. Raises ModelError.
    """
    given = {name: _given(field, name) for name in ("rope_scaling", "rope_parameters")}
    name = next((name for name, own in given.items() if own), "rope_parameters")
    own = {option: value for one in given.values() for option, value in one.items()}
    _agree(field, given, own)
    kind = own.get("rope_type", "default")
    if not isinstance(kind, str) or kind not in KINDS:
        raise field.unsupported(f"{name}.rope_type", kind, ", ".join(KINDS))
    known = ("rope_theta", "rope_type", "partial_rotary_factor", *KINDS[kind])
    for option, value in own.items():
        if option not in known:
            raise field.unsupported(f"{name}.{option}", value, f"{', '.join(known)} with {kind}")
    every = Fields({**field.raw, **own}, field.path)
    rope = _read(kind, every, context)
    if rope.theta <= 1.0 or (kind in ("llama3", "yarn") and rope.low >= rope.high):
        raise ModelError(f"{field.path}: {name} makes no sense: {rope}")
    return rope, every


def _given(field: Fields, name: str) -> dict[str, Any]:
    """What one rope object says; nulls count as absent, and its kind has one name."""
    own = field.raw.get(name) or {}
    if not isinstance(own, dict):
        raise field.wrong(name, own, "an object")
    given = {option: value for option, value in own.items() if value is not None and option != "type"}
    kind = own.get("rope_type") or own.get("type")
    return given | ({"rope_type": kind or "default"} if given or kind else {})


def _agree(field: Fields, given: dict[str, dict[str, Any]], own: dict[str, Any]) -> None:
    """Raises ModelError where one option has two values: readers differ in which of them they take."""
    for option in own:
        said = {f"{name}.{option}": one[option] for name, one in given.items() if option in one}
        said |= {option: field.raw[option]} if field.raw.get(option) is not None else {}
        for (first, one), (other, another) in pairwise(said.items()):
            if one != another:
                raise ModelError(f"{field.path}: {first} is {one!r}, but {other} is {another!r}")


def _read(kind: str, field: Fields, context: int) -> Rope:
    theta = field.real("rope_theta", 10000.0)
    if kind == "default":
        return Rope(theta)
    factor = field.real("factor")
    if kind == "linear":
        return Rope(theta, kind, factor)
    original = field.integer("original_max_position_embeddings", context)
    if kind == "llama3":
        return Rope(theta, kind, factor, original, field.real("low_freq_factor"), field.real("high_freq_factor"))
    length = field.real("attention_factor", 0.1 * math.log(max(factor, 1.0)) + 1.0)
    ends = field.real("beta_slow", 1.0), field.real("beta_fast", 32.0)
    return Rope(theta, kind, factor, original, *ends, length, field.flag("truncate", True))
