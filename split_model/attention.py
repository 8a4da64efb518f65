"""Attention in tiles whose shapes depend on positions alone, so that a row's bits do not depend on its neighbours.

Queries stand in tiles of 8, aligned to their positions. A tile reads keys `[0, reach)`, where `reach` is a fixed
function of its place, and a mask hides what lies behind each query. Query heads that share a key head lie beside
each other in the tile, so keys and values are read as they are stored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from split_model.config import ModelConfig

TILE = 8


@dataclass(frozen=True, slots=True)
class Span:
    """`count` consecutive positions of one session, from `start` on."""

    slot: int
    start: int
    count: int


def reach(position: int) -> int:
    """Keys read by the tile of `position`: its end, rounded up to a multiple of 64 up to 256, of 256 beyond."""
    end = position // TILE * TILE + TILE
    step = 64 if end <= 256 else 256
    return -(-end // step) * step


class Geometry:
    """What the tiles of one model share: the head layout, the rotary table and the mask every tile is cut from."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype):
        self.kv_heads, self.head_dim, self.context = config.kv_heads, config.head_dim, config.context
        self.group = config.heads // config.kv_heads
        self.dtype = dtype
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        frequency = 1.0 / (config.rope_theta**exponent)
        angle = torch.outer(torch.arange(config.context).float(), frequency)
        self.turns = torch.polar(torch.ones_like(angle), angle).unsqueeze(1)
        self._offset = reach(config.context - 1)
        row = torch.arange(TILE).repeat_interleave(self.group).unsqueeze(1)
        hidden = torch.arange(2 * self._offset) > row + self._offset
        self._mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))

    def mask(self, tile: int) -> Tensor:
        """`[8 * group, reach]`, added to the scores: 0 up to each query's own position, minus infinity behind it."""
        start = self._offset - tile * TILE
        return self._mask[:, start : start + reach(tile * TILE)]


@dataclass(frozen=True, slots=True)
class Part:
    """Tiles `[first, stop)` of a step, which share one attention call: their keys' slots, reach and mask."""

    first: int
    stop: int
    slots: tuple[int, ...]
    reach: int
    mask: Tensor


class Tiles:
    """How the attention of one step is cut; built once for its spans and used by every layer. `len` = positions."""

    def __init__(self, spans: Sequence[Span], geometry: Geometry):
        self.spans = tuple(spans)
        self.geometry = geometry
        self._length = sum(span.count for span in spans)
        cut = sorted(
            (reach(tile * TILE), span.slot, tile)
            for span in _checked(spans, geometry.context)
            for tile in range(span.start // TILE, (span.start + span.count - 1) // TILE + 1)
        )
        place = {(slot, tile): index for index, (_, slot, tile) in enumerate(cut)}
        self.rows = [
            place[span.slot, position // TILE] * TILE + position % TILE
            for span in spans
            for position in range(span.start, span.start + span.count)
        ]
        self.parts = tuple(_parts(cut, geometry))
        positions = [position for span in spans for position in range(span.start, span.start + span.count)]
        self.turns = geometry.turns[positions]
        self.queries = torch.zeros(len(cut) * TILE, geometry.group * geometry.kv_heads * geometry.head_dim)
        self.queries = self.queries.to(geometry.dtype)
        self.row_index = torch.tensor(self.rows, dtype=torch.int64)

    def __len__(self) -> int:
        return self._length


def _checked(spans: Sequence[Span], context: int) -> Sequence[Span]:
    for span in spans:
        if span.count < 1 or span.start < 0 or span.start + span.count > context:
            raise ValueError(f"positions [{span.start}, {span.start + span.count}) outside the context of {context}")
    if len({span.slot for span in spans}) != len(spans):
        raise ValueError("two spans of one step share a slot")
    return spans


def _parts(cut: list[tuple[int, int, int]], geometry: Geometry) -> list[Part]:
    found, first = [], 0
    for length, members in groupby(cut, key=lambda item: item[0]):
        group = list(members)
        mask = torch.stack([geometry.mask(tile) for _, _, tile in group]).unsqueeze(1)
        slots = tuple(slot for _, slot, _ in group)
        found.append(Part(first, first + len(group), slots, length, mask))
        first += len(group)
    return found
