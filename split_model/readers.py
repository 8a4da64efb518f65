"""Ways in which the queries of one part of a step read the KV memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from split_model.native import Reading
from split_model.sparse import Pages

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]  # as native.Reading's


class Near(NamedTuple):
    """Views of some positions of one layer: `[slots, 2, kv_heads, positions, head_dim]`, and its two halves."""

    both: Tensor
    keys: Tensor
    values: Tensor


class Reader(Protocol):
    """Keys and values of one part for its queries `[slots * kv_heads, rows, head_dim]`.

    With a mask they are `[slots * kv_heads, n, head_dim]`, and copies: a batched product wants its operands dense, and
    reads what was copied sooner than memory. Otherwise they are what the attention takes.
    """

    def __call__(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor, Tensor | Attention]: ...


@dataclass(frozen=True, slots=True, eq=False)
class InPlace:
    """Of any slots."""

    near: tuple[Near, ...]
    reading: Reading

    def __call__(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor, Tensor | Attention]:
        near = self.near[layer]
        return near.keys, near.values, self.reading


@dataclass(frozen=True, slots=True, eq=False)
class Together:
    """Of several slots."""

    near: tuple[Near, ...]
    index: Tensor
    mask: Tensor

    def __call__(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor, Tensor | Attention]:
        near = self.near[layer]
        keys, values = near.keys.index_select(0, self.index), near.values.index_select(0, self.index)
        return keys.flatten(0, 1), values.flatten(0, 1), self.mask


@dataclass(frozen=True, slots=True, eq=False)
class Alone:
    """Of one slot; views where they are `few` no longer, to be copied a piece at a time."""

    near: tuple[Near, ...]
    slot: int
    mask: Tensor
    few: bool

    def __call__(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor, Tensor | Attention]:
        both = self.near[layer].both[self.slot]
        keys, values = (both.contiguous() if self.few else both).unbind(0)
        return keys, values, self.mask


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """What the pages of one slot may score, `[kv_heads, group, pages]`, by `bounds` of all slots: see `sparse`.

    `hidden`: added to it, minus infinity for pages that are not to choose from; or who does both in place.
    """

    slot: int
    bounds: tuple[Tensor, ...]
    hidden: Tensor | Reading

    def __call__(self, layer: int, queries: Tensor) -> Tensor:
        both, bounds = torch.cat([queries, queries.abs()], 2), self.bounds[layer]
        if isinstance(self.hidden, Reading):
            return self.hidden.scores(both, bounds)
        return torch.bmm(both, bounds[self.slot].contiguous().transpose(1, 2)).add_(self.hidden)


@dataclass(frozen=True, slots=True, eq=False)
class Choosing:
    """Of the pages of one slot that the queries choose by what they may score, but of the first `layers` all."""

    pages: Pages
    scores: Scored
    group: int
    whole: Reader
    layers: int
    chosen: ChosenInPlace | ChosenCopied

    def __call__(self, layer: int, queries: Tensor) -> tuple[Tensor, Tensor, Tensor | Attention]:
        if layer < self.layers:
            return self.whole(layer, queries)
        return self.chosen(layer, self.pages.chosen(self.scores(layer, queries[:, : self.group])))


@dataclass(frozen=True, slots=True, eq=False)
class ChosenInPlace:
    """Pages `[kv_heads, n]` of what is `near`, from its beginning on."""

    near: tuple[Near, ...]
    reading: Reading

    def __call__(self, layer: int, chosen: Tensor) -> tuple[Tensor, Tensor, Attention]:
        near = self.near[layer]
        return near.keys, near.values, partial(self.reading, pages=chosen)


@dataclass(frozen=True, slots=True, eq=False)
class ChosenCopied:
    """The same of the memory by pages, where those of the slot's keys and values begin with `rows`."""

    paged: tuple[Tensor, ...]
    rows: Tensor
    head_dim: int
    mask: Tensor

    def __call__(self, layer: int, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = self.paged[layer].index_select(0, (self.rows + chosen).flatten())
        keys, values = found.view(2, len(chosen), -1, self.head_dim).unbind(0)
        return keys, values, self.mask
