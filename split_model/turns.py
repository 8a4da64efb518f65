"""Rotary positions: by how much each pair of a head turns from one position to the next."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from split_model.rope import Rope


class Turns:
    """Rotations by position, computed when asked for: a table for 128k positions would take 64 MiB.

    Pairs that do not turn have frequency 0, so that a partly rotary head takes the same path.
    """

    def __init__(self, rope: Rope, rotary: int, head_dim: int):
        still = torch.zeros((head_dim - rotary) // 2)
        self._frequencies = torch.cat([frequencies(rope, rotary), still])
        self._lengths = torch.cat([torch.full((rotary // 2,), rope.length), still + 1])

    def __call__(self, positions: Tensor) -> Tensor:
        """int64 `[n]` to complex64 `[n, 1, head_dim / 2]`; the bits for a position depend on nothing else."""
        return torch.polar(self._lengths, positions.view(-1, 1, 1) * self._frequencies)


def frequencies(rope: Rope, dims: int) -> Tensor:
    """Radians per position, float32 `[dims / 2]`."""
    own = 1.0 / rope.theta ** (torch.arange(0, dims, 2, dtype=torch.int64).float() / dims)
    if rope.kind == "default":
        return own
    stretched = own / rope.factor
    if rope.kind == "linear":
        return stretched
    if rope.kind == "llama3":
        kept = (rope.original / (2 * math.pi / own) - rope.low) / (rope.high - rope.low)
    else:
        first, last = _dimension(rope, rope.high, dims), _dimension(rope, rope.low, dims)
        if rope.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, dims - 1)
        kept = 1 - (torch.arange(dims // 2).float() - first) / max(last - first, 0.001)
    kept = kept.clamp(0, 1)
    return stretched * (1 - kept) + own * kept


def _dimension(rope: Rope, turns: float, dims: int) -> float:
    """Which one makes so many turns within the original positions."""
    return dims * math.log(rope.original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))
