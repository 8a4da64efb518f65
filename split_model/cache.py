"""KV memory by slots."""

from __future__ import annotations

import heapq
import math
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from split_model.attention import Geometry, Part, Tiles, reach
from split_model.config import ModelConfig, ModelError
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
        self._nears: dict[range, tuple[_Near, ...]] = {}

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

    def _near(self, keys: range) -> tuple[_Near, ...]:
        """Some positions of every layer."""
        if keys not in self._nears:
            if len(self._nears) == NEARS:
                del self._nears[next(iter(self._nears))]
            layers = self.memory[..., keys.start : keys.stop, :].unbind(0)
            self._nears[keys] = tuple(_Near(layer, *layer.unbind(1)) for layer in layers)
        return self._nears[keys]

    def _reader(self, part: Part, shape: Geometry) -> _Reader:
        near = self._near(part.keys)
        if len(part.slots) > 1:
            return _Together(near, part.index, part.mask)
        whole = _Alone(near, part.slots[0], part.mask, len(part.keys) <= shape.keys)
        return whole if part.pages is None else self._choosing(part, part.pages, whole, shape)

    def _choosing(self, part: Part, pages: Pages, whole: _Alone, shape: Geometry) -> _Choosing:
        """Has the bounds of pages that were written in earlier steps."""
        (slot,), page = part.slots, self.budget.page
        start, stop, count = self._bounded[slot], pages.recent, part.keys.stop // page
        if start < stop:
            for layer, bounds in zip(self.memory, self.bounds, strict=True):
                keys = layer[slot, 0, :, start * page : stop * page].unflatten(1, (-1, page))
                bounds_of(keys, bounds[slot, :, start:stop])
            self._bounded[slot] = stop
        _, _, _, heads, capacity, _ = self.memory.shape
        rows = (torch.arange(2 * heads) + slot * 2 * heads) * (capacity // page)
        bounds, hidden = self.bounds[:, slot, :, :count].unbind(0), pages.hidden(count, self.memory.dtype)
        own = pages.stop * page - part.keys.stop + part.mask.shape[2]  # where the mask of the query's page ends
        mask = part.mask[..., own - page : own]
        return _Choosing(pages, bounds, self._paged, rows.view(2, heads, 1), hidden, mask, shape, whole,
                         max(0, self.budget.whole - self.first))  # fmt: skip


def zeros(shape: tuple[int, ...], dtype: torch.dtype, name: str) -> Tensor:
    """From the system, whose zeroed pages count only once they are written; torch.zeros writes them all.

    Raises ModelError where there is not so much, for the model `name`.
    """
    try:
        return torch.from_numpy(np.zeros(shape, f"i{dtype.itemsize}")).view(dtype)
    except (MemoryError, ValueError):
        size = f"{math.prod(shape) * dtype.itemsize / 1e9:.0f} GB"
        raise ModelError(f"{name}: no {size} of memory for its sessions: shorten --context, or have fewer") from None


class _Near(NamedTuple):
    """Views of some positions of one layer: `[slots, 2, kv_heads, positions, head_dim]`, and its two halves."""

    both: Tensor
    keys: Tensor
    values: Tensor


class _Reader(Protocol):
    """Keys and values of one part, each `[slots * kv_heads, n, head_dim]`, for its queries `[.., rows, head_dim]`.

    They are copies: a batched product wants its operands dense, and reads what was copied sooner than memory. With the
    mask of the last keys, as in Part.
    """

    def __call__(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


@dataclass(frozen=True, slots=True, eq=False)
class _Together:
    """Of several slots."""

    near: tuple[_Near, ...]
    index: Tensor
    mask: Tensor

    def __call__(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        near = self.near[layer]
        keys, values = near.keys.index_select(0, self.index), near.values.index_select(0, self.index)
        return keys.flatten(0, 1), values.flatten(0, 1), self.mask


@dataclass(frozen=True, slots=True, eq=False)
class _Alone:
    """Of one slot; views where they are `few` no longer, to be copied a piece at a time."""

    near: tuple[_Near, ...]
    slot: int
    mask: Tensor
    few: bool

    def __call__(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        both = self.near[layer].both[self.slot]
        keys, values = (both.contiguous() if self.few else both).unbind(0)
        return keys, values, self.mask


@dataclass(frozen=True, slots=True, eq=False)
class _Choosing:
    """Of the pages of one slot that the queries choose, but of the first `layers` all.

    `rows` are those of its first page in a layer's memory, `hidden` and `mask` hide pages and keys of the last one.
    """

    pages: Pages
    bounds: tuple[Tensor, ...]
    paged: tuple[Tensor, ...]
    rows: Tensor
    hidden: Tensor
    mask: Tensor
    shape: Geometry
    whole: _Alone
    layers: int

    def __call__(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if layer < self.layers:
            return self.whole(layer, queries)
        chosen = self.pages.chosen(queries[:, : self.shape.group], self.bounds[layer].contiguous(), self.hidden)
        found = self.paged[layer].index_select(0, (self.rows + chosen).flatten())
        keys, values = found.view(2, len(chosen), -1, self.shape.head_dim).unbind(0)
        return keys, values, self.mask


@dataclass(frozen=True, slots=True, eq=False)
class Bound:
    """Where the rows of one step stand in the KV memory; `readers` of its parts."""

    rows: Tensor
    flat: tuple[Tensor, ...]
    readers: list[_Reader]

    def write(self, layer: int, kv: Tensor) -> None:
        """Stores keys and values `[n, 2 * kv_heads, head_dim]`; `layer` counts from the memory's first."""
        self.flat[layer].index_copy_(0, self.rows, kv.flatten(0, 1))
