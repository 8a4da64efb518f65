"""Rotary positions: by how much each pair of a head turns from one position to the next (arXiv 2104.09864)."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

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

    def frequencies(self, dims: int) -> Tensor:
        """Radians per position, float32 `[dims / 2]`."""
        own = 1.0 / self.theta ** (torch.arange(0, dims, 2, dtype=torch.int64).float() / dims)
        if self.kind == "default":
            return own
        stretched = own / self.factor
        if self.kind == "linear":
            return stretched
        if self.kind == "llama3":
            kept = (self.original / (2 * math.pi / own) - self.low) / (self.high - self.low)
        else:
            first, last = self._dimension(self.high, dims), self._dimension(self.low, dims)
            if self.truncate:
                first, last = math.floor(first), math.ceil(last)
            first, last = max(first, 0), min(last, dims - 1)
            kept = 1 - (torch.arange(dims // 2).float() - first) / max(last - first, 0.001)
        kept = kept.clamp(0, 1)
        return stretched * (1 - kept) + own * kept

    def _dimension(self, turns: float, dims: int) -> float:
        """Which one makes so many turns within the original positions."""
        return dims * math.log(self.original / (turns * 2 * math.pi)) / (2 * math.log(self.theta))


def read_rope(field: Fields, context: int) -> tuple[Rope, Fields]:
    """What a config says on rotation, in `rope_parameters` (transformers 5) or around `rope_scaling` (before).

    Also gives the fields as if they all stood side by side. Raises ModelError.
    """
    name = "rope_scaling" if field.raw.get("rope_scaling") else "rope_parameters"
    own = field.raw.get(name) or {}
    if not isinstance(own, dict):
        raise field.wrong(name, own, "an object")
    kind = own.get("rope_type") or own.get("type") or "default"
    if not isinstance(kind, str) or kind not in KINDS:
        raise field.unsupported(f"{name}.rope_type", kind, ", ".join(KINDS))
    known = ("rope_theta", "rope_type", "type", "partial_rotary_factor", *KINDS[kind])
    for option, value in own.items():
        if value is not None and option not in known:
            raise field.unsupported(f"{name}.{option}", value, f"{', '.join(known)} with {kind}")
    every = Fields({**field.raw, **own}, field.path)
    rope = _read(kind, every, context)
    if rope.theta <= 1.0 or (kind in ("llama3", "yarn") and rope.low >= rope.high):
        raise ModelError(f"{field.path}: {name} makes no sense: {rope}")
    return rope, every


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


class Turns:
    """Rotations by position, computed when asked for: a table for 128k positions would take 64 MiB.

    Pairs that do not turn have frequency 0, so that a partly rotary head takes the same path.
    """

    def __init__(self, rope: Rope, rotary: int, head_dim: int):
        still = torch.zeros((head_dim - rotary) // 2)
        self._frequencies = torch.cat([rope.frequencies(rotary), still])
        self._lengths = torch.cat([torch.full((rotary // 2,), rope.length), still + 1])

    def __call__(self, positions: Tensor) -> Tensor:
        """int64 `[n]` to complex64 `[n, 1, head_dim / 2]`; the bits for a position depend on nothing else."""
        return torch.polar(self._lengths, positions.view(-1, 1, 1) * self._frequencies)
