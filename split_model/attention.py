"""Attention in tiles whose shapes depend on positions alone, so that a row's bits do not depend on its neighbours.

Queries stand in tiles aligned to their positions. A tile reads keys `[0, reach)`, where `reach` is a fixed function
of its place, and a mask hides what lies behind each query. Query heads that share a key head lie beside each other in
the tile, so keys and values are read as they are stored. Measured with torch 2.13 on x86-64: a bf16 or fp32 attention
row has the same bits in every tile of at least 4 rows, heads counted; with 1, 2 or 3 rows it has not. Long spans
therefore take wide tiles, single tokens narrow ones, and the self-check proves it on the machine at hand.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from split_model.config import ModelConfig

TILE = 8
MOST_ROWS = 32  # a tile of 64 rows and more may be packed or not, which depends on the batch
LEAST_ROWS = 4


@dataclass(frozen=True, slots=True)
class Span:
    """`count` consecutive positions of one session, from `start` on."""

    slot: int
    start: int
    count: int

    @property
    def stop(self) -> int:
        return self.start + self.count


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
        self.wide = next(width for width in (8, 4, 2, 1) if width * self.group <= MOST_ROWS or width == 1)
        self.narrow = next(width for width in (1, 2, 4) if width * self.group >= LEAST_ROWS)
        exponent = torch.arange(0, config.head_dim, 2, dtype=torch.int64).float() / config.head_dim
        angle = torch.outer(torch.arange(config.context).float(), 1.0 / config.rope_theta**exponent)
        self.turns = torch.polar(torch.ones_like(angle), angle).unsqueeze(1)
        self._middle = reach(config.context - 1)
        row = torch.arange(TILE).repeat_interleave(self.group).unsqueeze(1)
        hidden = torch.arange(2 * self._middle) > row + self._middle
        self._mask = torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))

    def mask(self, start: int, width: int) -> Tensor:
        """`[width * group, reach]`, added to the scores: 0 up to each query's own position, minus infinity behind."""
        first = self._middle - start
        return self._mask[: width * self.group, first : first + reach(start)]


@dataclass(frozen=True, slots=True)
class Part:
    """Tiles that share one attention call: several of one slot, or one each of several slots."""

    slots: tuple[int, ...]
    reach: int
    width: int
    mask: Tensor


class Tiles:
    """How the attention of one step is cut; built once for its spans and used by every layer. `len` = positions.

    `sources[i]` is the row behind query `i` of the tiles, where a place that no span fills repeats a row of its own
    session; `places[row]` is where the row's result stands.
    """

    def __init__(self, spans: Sequence[Span], geometry: Geometry):
        self.spans, self.geometry = tuple(spans), geometry
        self._length = sum(span.count for span in spans)
        sources: list[int] = []
        places = [0] * self._length
        parts = []
        for tiles in _together(_cut(spans, geometry)):
            for tile in tiles:
                for row, real in tile.queries():
                    if real:
                        places[row] = len(sources)
                    sources.append(row)
            masks = [geometry.mask(tile.start, tile.width) for tile in tiles]
            slots = tuple(tile.span.slot for tile in tiles)
            parts.append(Part(slots, tiles[0].reach, tiles[0].width, torch.stack(masks).unsqueeze(1)))
        self.parts = tuple(parts)
        self.positions = torch.tensor([position for span in spans for position in range(span.start, span.stop)])
        self.turns = geometry.turns.index_select(0, self.positions)
        self.sources, self.places = torch.tensor(sources), torch.tensor(places)

    def __len__(self) -> int:
        return self._length


@dataclass(frozen=True, slots=True)
class _Tile:
    """`width` queries of `span` from position `start` on; `row` is the span's first row in the step."""

    reach: int
    width: int
    start: int
    span: Span
    row: int

    def queries(self) -> Iterator[tuple[int, bool]]:
        """The row behind each query, and whether it is that query's own."""
        for position in range(self.start, self.start + self.width):
            inside = min(max(position, self.span.start), self.span.stop - 1)
            yield self.row + inside - self.span.start, inside == position


def _cut(spans: Sequence[Span], geometry: Geometry) -> Iterator[_Tile]:
    if len({span.slot for span in spans}) != len(spans):
        raise ValueError("two spans of one step share a slot")
    row = 0
    for span in spans:
        if span.count < 1 or span.start < 0 or span.stop > geometry.context:
            raise ValueError(f"positions [{span.start}, {span.stop}) outside the context of {geometry.context}")
        width = geometry.narrow if span.count <= geometry.narrow else geometry.wide
        for start in range(span.start // width * width, span.stop, width):
            yield _Tile(reach(start), width, start, span, row)
        row += span.count


def _together(tiles: Iterable[_Tile]) -> Iterator[list[_Tile]]:
    """Tiles of one shape that can share a call: a slot's own, where it has several, and all that stand alone."""
    alike: dict[tuple[int, int, int], list[_Tile]] = defaultdict(list)
    for tile in tiles:
        alike[tile.reach, tile.width, tile.span.slot].append(tile)
    alone: dict[tuple[int, int], list[_Tile]] = defaultdict(list)
    for (length, width, _), own in alike.items():
        if len(own) == 1:
            alone[length, width] += own
        else:
            yield own
    yield from alone.values()
