"""Hidden states of the positions in a KV memory's slots: what a split sends again when a conversation goes on."""

from __future__ import annotations

import torch
from torch import Tensor

from split_model.cache import zeros


class States:
    """`[slots, context, width]`, pages of it taken when they are written."""

    def __init__(self, slots: int, context: int, width: int, dtype: torch.dtype = torch.bfloat16):
        self._memory = zeros((slots, context, width), dtype, "hidden states")
        self._tops = [0] * slots

    def write(self, slot: int, start: int, x: Tensor) -> None:
        """`[n, width]` from position `start` on."""
        stop = start + len(x)
        self._memory[slot, start:stop] = x
        self._tops[slot] = max(self._tops[slot], stop)

    def read(self, slot: int, start: int, count: int) -> Tensor:
        """A copy of what was written, `[count, width]`."""
        return self._memory[slot, start : start + count].clone()

    def copy(self, source: int, target: int, count: int) -> None:
        """Positions `[0, count)` of one slot into another."""
        self.write(target, 0, self._memory[source, :count])

    def clear(self, slot: int) -> None:
        """Zeroes what the slot holds."""
        self._memory[slot, : self._tops[slot]] = 0
        self._tops[slot] = 0
