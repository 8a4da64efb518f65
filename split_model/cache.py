"""KV memory by slots."""

from __future__ import annotations

import heapq
from dataclasses import dataclass
from typing import NamedTuple

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
        self._flat = self.memory.flatten(1, 4).unbind(0)
        self._strides = torch.arange(2 * config.kv_heads) * capacity
        self._nears: dict[int, tuple[_Near, ...]] = {}

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
        self.clear(slot)
        heapq.heappush(self._free, slot)

    def clear(self, slot: int) -> None:
        """Zeroes what the slot holds; it stays taken."""
        with torch.inference_mode():
            self.memory[:, slot, :, :, : self._tops[slot]] = 0
        self._tops[slot] = 0

    def copy(self, source: int, target: int, count: int) -> None:
        """Positions `[0, count)` of one taken slot into another. Raises ValueError for more than `source` holds."""
        if not 0 <= source < self.slots or not 0 <= target < self.slots:
            raise ValueError(f"slots {source} and {target} of {self.slots}")
        if not 0 <= count <= self._tops[source]:
            raise ValueError(f"{count} positions, slot {source} holds {self._tops[source]}")
        with torch.inference_mode():
            self.memory[:, target, :, :, :count] = self.memory[:, source, :, :, :count]
        self._tops[target] = max(self._tops[target], count)

    def bind(self, tiles: Tiles) -> Bound:
        """One step's way into the memory, for every layer. Raises ValueError."""
        for span in tiles.spans:
            if not 0 <= span.slot < self.slots:
                raise ValueError(f"slot {span.slot} of {self.slots}")
            if span.stop > self.context:
                raise ValueError(f"positions up to {span.stop}, the KV memory holds {self.context}")
            self._tops[span.slot] = max(self._tops[span.slot], span.stop)
        _, _, two, heads, capacity, _ = self.memory.shape
        first = tiles.slots * (two * heads * capacity) + tiles.positions
        rows = (first.unsqueeze(1) + self._strides).flatten()
        return Bound(rows, self._flat, [self._near(part.reach) for part in tiles.parts], tiles.parts)

    def _near(self, reach: int) -> tuple[_Near, ...]:
        """The first `reach` positions of every layer."""
        if reach not in self._nears:
            layers = self.memory[..., :reach, :].unbind(0)
            self._nears[reach] = tuple(_Near(layer, *layer.unbind(1)) for layer in layers)
        return self._nears[reach]


class _Near(NamedTuple):
    """Views of one layer's memory up to some position: `[slots, 2, kv_heads, reach, head_dim]`, and its two halves."""

    both: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """Where the rows of one step stand in the KV memory."""

    rows: Tensor
    flat: tuple[Tensor, ...]
    nears: list[tuple[_Near, ...]]
    parts: tuple[Part, ...]

    def write(self, layer: int, kv: Tensor) -> None:
        """Stores keys and values `[n, 2 * kv_heads, head_dim]`; `layer` counts from the memory's first."""
        self.flat[layer].index_copy_(0, self.rows, kv.flatten(0, 1))

    def read(self, layer: int, part: int) -> tuple[Tensor, ...]:
        """Copies keys and values of one part, each `[slots * kv_heads, reach, head_dim]`.

        A batched product wants its operands dense, and would copy keys the slow way round.
        """
        near, own = self.nears[part][layer], self.parts[part]
        if len(own.slots) == 1:
            return near.both[own.slots[0]].contiguous().unbind(0)
        keys, values = near.keys.index_select(0, own.index), near.values.index_select(0, own.index)
        return keys.flatten(0, 1), values.flatten(0, 1)
