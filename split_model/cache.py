"""KV memory by slots."""

from __future__ import annotations

import heapq

import torch
from torch import Tensor

from split_model.attention import Part, Span, Tiles, reach
from split_model.config import ModelConfig


class OutOfSlots(Exception):
    """Every slot of the KV memory is taken."""


class Cache:
    """KV memory of `slots` sessions for layers `[first, stop)`.

    A mask hides keys but does not stop NaN, so the memory is zeroed at the start, and a slot again, up to its
    highest written position, when it is freed. Going back needs nothing: later writes cover what was there.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        first: int = 0,
        stop: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        context: int | None = None,
    ):
        stop = config.layers if stop is None else stop
        self.first, self.slots = first, slots
        self.context = min(config.context, context or config.context)
        capacity = reach(self.context - 1)
        with torch.inference_mode():
            shape = (stop - first, slots, 2, config.kv_heads, capacity, config.head_dim)
            self._memory = torch.zeros(shape, dtype=dtype)
        self._free = list(range(slots))
        self._tops = [0] * slots
        self._bound: Bound | None = None

    @property
    def free_slots(self) -> int:
        return len(self._free)

    def take(self) -> int:
        """The lowest free slot. Raises OutOfSlots."""
        if not self._free:
            raise OutOfSlots(f"all {self.slots} slots are taken")
        return heapq.heappop(self._free)

    def free(self, slot: int) -> None:
        """Gives the slot back, zeroed. Raises ValueError when it is not taken."""
        if not 0 <= slot < self.slots or slot in self._free:
            raise ValueError(f"slot {slot} is not taken")
        with torch.inference_mode():
            self._memory[:, slot, :, :, : self._tops[slot]] = 0
        self._tops[slot] = 0
        self._bound = None
        heapq.heappush(self._free, slot)

    def bind(self, tiles: Tiles) -> Bound:
        """The views through which every layer of one step reads and writes; kept until the next step."""
        if self._bound is None or self._bound.tiles is not tiles:
            for span in tiles.spans:
                if span.start + span.count > self.context:
                    raise ValueError(f"position {span.start + span.count - 1}, KV memory for {self.context}")
                self._tops[span.slot] = max(self._tops[span.slot], span.start + span.count)
            self._bound = Bound(self._memory, tiles)
        return self._bound


class Bound:
    """One step's way into the KV memory, by layer."""

    def __init__(self, memory: Tensor, tiles: Tiles):
        self.tiles = tiles
        self._writes = [(_rows(tiles, i), memory[:, s.slot, :, :, s.start : s.start + s.count].unbind(0))
                        for i, s in enumerate(tiles.spans)]  # fmt: skip
        self._memory = memory

    def write(self, layer: int, kv: Tensor) -> None:
        """Stores `[n, 2, kv_heads, head_dim]`; `layer` counts from the first layer of the memory."""
        for rows, targets in self._writes:
            targets[layer].copy_(kv[rows].permute(1, 2, 0, 3))

    def read(self, layer: int, part: Part) -> tuple[Tensor, Tensor]:
        """Keys and values `[tiles, kv_heads, reach, head_dim]` of one part."""
        held = self._memory[layer, :, :, :, : part.reach]
        if len(set(part.slots)) == 1:
            one = held[part.slots[0]].unsqueeze(0).expand(len(part.slots), -1, -1, -1, -1)
        else:
            one = held[list(part.slots)]
        return one[:, 0], one[:, 1]


def _rows(tiles: Tiles, index: int) -> slice:
    before = sum(span.count for span in tiles.spans[:index])
    return slice(before, before + tiles.spans[index].count)


__all__ = ["Bound", "Cache", "OutOfSlots", "Span"]
