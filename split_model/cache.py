"""KV memory by slots."""

from __future__ import annotations

import heapq
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from split_model.attention import Part, Tiles, reach
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
        shape = (stop - first, slots, 2, config.kv_heads, capacity, config.head_dim)
        # numpy takes zeroed pages from the system, which count only once they are written; torch.zeros writes them all
        self.memory = torch.from_numpy(np.zeros(shape, f"i{dtype.itemsize}")).view(dtype)
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
            self.memory[:, slot, :, :, : self._tops[slot]] = 0
        self._tops[slot] = 0
        self._bound = None
        heapq.heappush(self._free, slot)

    def bind(self, tiles: Tiles) -> Bound:
        """One step's way into the memory, for every layer; kept until the next step. Raises ValueError."""
        if self._bound is None or self._bound.tiles is not tiles:
            for span in tiles.spans:
                if not 0 <= span.slot < self.slots:
                    raise ValueError(f"slot {span.slot} of {self.slots}")
                if span.stop > self.context:
                    raise ValueError(f"positions up to {span.stop}, the KV memory holds {self.context}")
                self._tops[span.slot] = max(self._tops[span.slot], span.stop)
            self._bound = Bound(self.memory, tiles)
        return self._bound


class Bound:
    """Where the rows of one step stand in the KV memory."""

    def __init__(self, memory: Tensor, tiles: Tiles):
        self.tiles = tiles
        _, _, two, heads, capacity, _ = memory.shape
        slots = torch.tensor([span.slot for span in tiles.spans for _ in range(span.count)])
        first = slots * (two * heads * capacity) + tiles.positions
        self._rows = (first.unsqueeze(1) + torch.arange(two * heads) * capacity).flatten()
        self._flat = memory.flatten(1, 4).unbind(0)
        self._reads = [_reader(memory, part) for part in tiles.parts]

    def write(self, layer: int, kv: Tensor) -> None:
        """Stores keys and values `[n, 2 * kv_heads, head_dim]`; `layer` counts from the memory's first."""
        self._flat[layer].index_copy_(0, self._rows, kv.flatten(0, 1))

    def read(self, layer: int, part: int) -> tuple[Tensor, ...]:
        """Keys and values of one part, each `[slots * kv_heads, reach, head_dim]`."""
        return self._reads[part](layer)


def _reader(memory: Tensor, part: Part) -> Callable[[int], tuple[Tensor, ...]]:
    """Copies what a part reads: a batched product wants its operands dense, and would copy keys the slow way round."""
    near = memory[..., : part.reach, :]
    if len(part.slots) == 1:
        own = near[:, part.slots[0]].unbind(0)
        return lambda layer: own[layer].contiguous().unbind(0)
    slots = torch.tensor(part.slots)
    all_keys, all_values = (both.unbind(0) for both in near.unbind(2))

    def gather(layer: int) -> tuple[Tensor, ...]:
        keys, values = all_keys[layer].index_select(0, slots), all_values[layer].index_select(0, slots)
        return keys.flatten(0, 1), values.flatten(0, 1)

    return gather
