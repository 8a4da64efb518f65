"""KV memory by slots."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from split_model.attention import Geometry, Part, Sees, Tiles, reach
from split_model.config import ModelConfig, ModelError
from split_model.native import Reading
from split_model.readers import Alone, Choosing, ChosenCopied, ChosenInPlace, InPlace, Near, Reader, Scored, Together
from split_model.sparse import BUDGET, Budget, Pages, bounds_of

NEARS = 32  # lengths of which views are kept


class OutOfSlots(Exception):
    """Every slot of the KV memory is taken."""


class Cache:
    """KV memory of `slots` sessions for layers `[first, stop)`.

    A mask hides keys but does not stop NaN, so the memory is zeroed at the start, and a slot again, up to its
    highest written position, when it is freed. Going back needs nothing: later writes cover what was there. Bounds of
    pages are computed when a sparse span first needs them, and again after going back.
    """

    def __init__(
        self,
        config: ModelConfig,
        slots: int,
        first: int = 0,
        stop: int | None = None,
        dtype: torch.dtype = torch.bfloat16,
        context: int | None = None,
        budget: Budget = BUDGET,
    ):
        stop = config.layers if stop is None else stop
        self.first, self.slots = first, slots
        self.context = min(config.context, context or config.context)
        capacity = reach(self.context - 1)
        shape = (stop - first, slots, 2, config.kv_heads, capacity, config.head_dim)
        self.memory, self.budget = zeros(shape, dtype, config.name), budget
        pages = (stop - first, slots, config.kv_heads, capacity // budget.page, 2 * config.head_dim)
        self.bounds = zeros(pages, dtype, config.name)  # see sparse
        self._bounded = [0] * slots  # pages whose bounds are right
        rows = slots * 2 * config.kv_heads * (capacity // budget.page)
        self._paged = self.memory.view(stop - first, rows, budget.page * config.head_dim).unbind(0)
        self._free = list(range(slots))
        self._tops = [0] * slots
        self._flat = self.memory.flatten(1, 4).unbind(0)
        self._strides = torch.arange(2 * config.kv_heads) * capacity
        self._nears: dict[range, tuple[Near, ...]] = {}

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
            self.bounds[:, slot, :, : -(-self._tops[slot] // self.budget.page)] = 0
        self._tops[slot] = self._bounded[slot] = 0

    def copy(self, source: int, target: int, count: int) -> None:
        """Positions `[0, count)` of one taken slot into another. Raises ValueError for more than `source` holds."""
        if not 0 <= source < self.slots or not 0 <= target < self.slots:
            raise ValueError(f"slots {source} and {target} of {self.slots}")
        if not 0 <= count <= self._tops[source]:
            raise ValueError(f"{count} positions, slot {source} holds {self._tops[source]}")
        with torch.inference_mode():
            self.memory[:, target, :, :, :count] = self.memory[:, source, :, :, :count]
        self._tops[target] = max(self._tops[target], count)
        self._bounded[target] = 0

    def bind(self, tiles: Tiles) -> Bound:
        """One step's way into the memory, for every layer. Raises ValueError."""
        for span in tiles.spans:
            if not 0 <= span.slot < self.slots:
                raise ValueError(f"slot {span.slot} of {self.slots}")
            if span.stop > self.context:
                raise ValueError(f"positions up to {span.stop}, the KV memory holds {self.context}")
            self._tops[span.slot] = max(self._tops[span.slot], span.stop)
            self._bounded[span.slot] = min(self._bounded[span.slot], span.start // self.budget.page)
        _, _, two, heads, capacity, _ = self.memory.shape
        first = tiles.slots * (two * heads * capacity) + tiles.positions
        rows = (first.unsqueeze(1) + self._strides).flatten()
        return Bound(rows, self._flat, [self._reader(part, tiles.geometry) for part in tiles.parts])

    def _near(self, keys: range) -> tuple[Near, ...]:
        """Some positions of every layer."""
        if keys not in self._nears:
            if len(self._nears) == NEARS:
                del self._nears[next(iter(self._nears))]
            layers = self.memory[..., keys.start : keys.stop, :].unbind(0)
            self._nears[keys] = tuple(Near(layer, *layer.unbind(1)) for layer in layers)
        return self._nears[keys]

    def _reader(self, part: Part, shape: Geometry) -> Reader:
        near, rows = self._near(part.keys), part.width * shape.group
        if isinstance(part.mask, Sees):
            reading = Reading(part.index, *part.mask, near[0].keys, rows, shape.keys)
            whole: Reader = InPlace(near, reading)
        elif len(part.slots) > 1:
            return Together(near, part.index, part.mask)
        else:
            whole = Alone(near, part.slots[0], part.mask, len(part.keys) <= shape.keys)
        return whole if part.pages is None else self._choosing(part, part.pages, whole, shape)

    def _choosing(self, part: Part, pages: Pages, whole: Reader, shape: Geometry) -> Choosing:
        """Has the bounds of pages that were written in earlier steps."""
        (slot,), page, count = part.slots, self.budget.page, part.keys.stop // self.budget.page
        self._bound(slot, pages.recent)
        bounds, whole_layers = self.bounds[:, :, :, :count].unbind(0), max(0, self.budget.whole - self.first)
        if isinstance(part.mask, Sees):
            near, first, last = self._near(part.keys), torch.tensor([self.budget.first]), torch.tensor([pages.recent])
            scored = Scored(slot, bounds, Reading(part.index, first, last, bounds[0], shape.group, shape.keys))
            stops = part.mask.stops + (self.budget.read - pages.stop * page)
            reading = Reading(part.index, part.mask.starts, stops, near[0].keys[:, :, : self.budget.read],
                              part.width * shape.group, shape.keys, page)  # fmt: skip
            return Choosing(pages, scored, shape.group, whole, whole_layers, ChosenInPlace(near, reading))
        _, _, _, heads, capacity, head_dim = self.memory.shape
        rows = (torch.arange(2 * heads) + slot * 2 * heads) * (capacity // page)
        scored = Scored(slot, bounds, pages.hidden(count, self.memory.dtype))
        last_page = pages.stop * page - part.keys.stop + part.mask.shape[2]  # where the mask of the query's page ends
        mask = part.mask[..., last_page - page : last_page]
        copied = ChosenCopied(self._paged, rows.view(2, heads, 1), head_dim, mask)
        return Choosing(pages, scored, shape.group, whole, whole_layers, copied)

    def _bound(self, slot: int, stop: int) -> None:
        """Computes bounds of its first `stop` pages, where they are not right."""
        start, page = self._bounded[slot], self.budget.page
        if start >= stop:
            return
        for layer, bounds in zip(self.memory, self.bounds, strict=True):
            keys = layer[slot, 0, :, start * page : stop * page].unflatten(1, (-1, page))
            bounds_of(keys, bounds[slot, :, start:stop])
        self._bounded[slot] = stop


def zeros(shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
    """From the system, whose zeroed pages count only once they are written; torch.zeros writes them all.

    Raises ModelError where there is not so much, for the model `name`.
    """
    try:
        return torch.from_numpy(np.zeros(shape, f"i{dtype.itemsize}")).view(dtype)
    except (MemoryError, ValueError):
        size = f"{math.prod(shape) * dtype.itemsize / 1e9:.0f} GB"
        raise ModelError(f"{name}: no {size} of memory for its sessions: shorten --context, or have fewer") from None


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """Where the rows of one step stand in the KV memory; `readers` of its parts."""

    rows: Tensor
    flat: tuple[Tensor, ...]
    readers: list[Reader]

    def write(self, layer: int, kv: Tensor) -> None:
        """Stores keys and values `[n, 2 * kv_heads, head_dim]`; `layer` counts from the memory's first."""
        self.flat[layer].index_copy_(0, self.rows, kv.flatten(0, 1))
