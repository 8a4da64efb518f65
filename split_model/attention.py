"""Attention cut so that a row's bits do not depend on its neighbours.

Positions are cut into blocks. A query reads keys from the block that holds the first key that its own block sees to
the end of its own block, and a mask hides what it must not see. Queries of one block go together: several of one
session, or one each of several sessions. Two batched products with a softmax between them give a row the same bits
whatever else is in the call, within the limits named below:
measured with torch 2.13 on x86-64 with AVX-512 BF16; the self-check at load proves it on the machine at hand.
Where native.Reading gives the same bits it takes their place, and keys behind the last that is seen are not read.
`scaled_dot_product_attention` needs tiles of at least 4 rows for that and takes 2 to 3 times as long on many sessions
or a long span; its scores are fp32 where these are bf16, which moved the loss of the built-in model by less than 1e-5.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

from split_model.config import ModelConfig
from split_model.sparse import Budget, Pages
from split_model.turns import Turns

# What a product must keep to for a row's bits not to depend on the others (found by measuring, see above).
ROWS = 4  # fp32: the number of rows is a multiple of this
BLOCK = 1024  # bf16: a sum over more than this is cut into blocks, but not for a single row
LEAST = 16**3  # bf16: with no more multiplications than this, ATen does not hand the product to oneDNN
# What one call takes, so that memory does not grow with the context.
SCORES = 1 << 21  # the most scores of one session
COPIED = 1 << 20  # numbers of one session's keys, and as many of values
TOGETHER = 4  # times as many of several sessions'
LONGEST = 256  # block


@dataclass(frozen=True, slots=True)
class Span:
    """`count` consecutive positions of one session, from `start` on.

    `sparse`: where they are few, each of them reads only the most relevant pages of a long context.
    """

    slot: int
    start: int
    count: int
    sparse: bool = False

    @property
    def stop(self) -> int:
        return self.start + self.count


def block(position: int) -> range:
    """The positions of its block: 128 up to 512, 256 beyond.

    A call costs as much as a thousand keys of one session, so that few lengths matter more than short ones.
    """
    step = 128 if position < 512 else 256
    start = position // step * step
    return range(start, start + step)


def reach(position: int) -> int:
    """Where the keys end that are read from `position`."""
    return block(position).stop


class Geometry:
    """What every step of one model shares: how its heads lie and turn.

    `in_place`: queries read keys and values where they lie, by native.Reading, with the bits of two batched products.
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, budget: Budget):
        self.kv_heads, self.head_dim, self.context = config.kv_heads, config.head_dim, config.context
        self.group = config.heads // config.kv_heads
        self.heads, self.scale = config.heads, config.head_dim**-0.5
        self.dtype, self.window, self.budget = dtype, config.window, budget
        self.fold = self._fold(dtype)
        self.in_place = False
        self.keys = max(BLOCK, _floor(COPIED // (config.kv_heads * config.head_dim)))  # in a call
        self._turns = Turns(config.rope, config.rotary, config.head_dim)
        self._lengths = torch.ones(self.heads + 2 * self.kv_heads, 1)
        self._lengths[: self.heads] = self.scale
        self._line = torch.zeros(2 * LONGEST, dtype=dtype)
        self._line[LONGEST:] = float("-inf")

    def turns(self, positions: Tensor) -> Tensor:
        """The factors of queries, keys and values, complex `[n, (heads + 2 * kv_heads) * head_dim / 2]`.

        Queries turn and are scaled, keys turn, values stay.
        """
        turned = self._turns(positions) * self._lengths
        turned[:, self.heads + self.kv_heads :] = 1
        return turned.flatten(1)

    def _fold(self, dtype: torch.dtype) -> int:
        """Positions in a call come in multiples of this, so that every call takes the same kernel."""
        if dtype == torch.float32:
            return ROWS // gcd(ROWS, self.group)
        least = LEAST // (self.heads * self.head_dim * reach(0)) + 1
        return max(least, 2) if self.group == 1 and self.context > BLOCK else least

    def rows(self, keys: int) -> int:
        """Of each key head against so many keys in a call."""
        step = self.group * self.fold
        return _floor(max(1, SCORES // (self.kv_heads * keys * step))) * step

    def first(self, position: int) -> int:
        """Where the keys begin that are read from `position`."""
        return 0 if self.window is None else block(max(0, block(position).start - self.window + 1)).start

    def sparse(self, span: Span) -> int:
        """From which position on its queries choose pages: where few of them decode a context that is long enough."""
        few = span.sparse and span.count <= self.budget.together and self.window is None
        return max(span.start, self.budget.least) if few else span.stop

    def at_once(self, position: int) -> int:
        """Positions of one session from `position` on that may share a call."""
        if not self.in_place:  # `attend` cuts the call in pieces
            return LONGEST
        return max(1, self.rows(reach(position) - self.first(position)) // self.group)

    def sees(self, seen: Tensor, keys: range) -> Sees:
        """What queries at positions `seen`, `[slots, width]`, see of `keys`."""
        stops = seen.flatten() + 1 - keys.start
        starts = torch.zeros_like(stops) if self.window is None else (stops - self.window).clamp_(min=0)
        return Sees(starts, stops)

    def mask(self, seen: Tensor, keys: range) -> Tensor:
        """`Part.mask` of `keys` for queries at positions `seen`, `[slots, width]`: 0, or minus infinity if hidden."""
        slots, width = seen.shape
        if seen.numel() == 1 and self.window is None and len(keys) <= LONGEST:
            first = LONGEST - 1 - (int(seen) - keys.start)
            return self._line[first : first + len(keys)].view(1, 1, -1)
        here, seen = torch.arange(keys.start, keys.stop), seen.view(slots, 1, width, 1, 1)
        hidden = here > seen
        if self.window is not None:
            hidden |= here <= seen - self.window
        mask = torch.zeros(hidden.shape, dtype=self.dtype).masked_fill_(hidden, float("-inf"))
        mask = mask.expand(-1, self.kv_heads if slots > 1 else 1, -1, self.group if width > 1 else 1, -1)
        return mask.flatten(2, 3).flatten(0, 1)


def _floor(number: int) -> int:
    """The next 2 ** n or 3 * 2 ** n below: oneDNN compiles each shape anew, and keeps half a megabyte for it."""
    return number & (3 << max(0, number.bit_length() - 2))


class Sees(NamedTuple):
    """Which keys each query position sees, `[starts, stops)`, int64 `[slots * width]`."""

    starts: Tensor
    stops: Tensor


@dataclass(frozen=True, slots=True)
class Part:
    """Queries that share one attention call: `width` positions each of `slots`.

    `rows[i]` is the row of the step behind query `i`; a query that only fills up a part repeats a row of its own span.
    """

    slots: tuple[int, ...]
    index: Tensor  # the same, int64
    width: int
    keys: range
    rows: tuple[int, ...]
    # What they see if they read in place; else `[slots * kv_heads, width * group, last]`, or 1 long but for keys, to be
    # added to scores of the last keys.
    mask: Tensor | Sees
    pages: Pages | None = None  # of the keys, where the query chooses

    def head(self, length: int) -> Part | None:
        """What is left of it when the step has only its first `length` rows."""
        slots = bisect_left(self.rows, length) // self.width
        if slots == len(self.slots):
            return self
        if slots == 0:
            return None
        kept, mask = slots * self.width, self.mask
        if isinstance(mask, Sees):
            mask = Sees(mask.starts[:kept], mask.stops[:kept])
        else:
            mask = mask[: slots * (len(mask) // len(self.slots))]
        return Part(self.slots[:slots], self.index[:slots], self.width, self.keys, self.rows[:kept], mask, self.pages)


@dataclass(frozen=True, slots=True, eq=False)
class Tiles:
    """How the attention of one step is cut; built once for its spans and used by every layer. `len` = positions.

    `sources[i]` is the row behind query `i` of the parts, `places[row]` the query that gives the row's result; None
    where both are the step's own order.
    """

    spans: tuple[Span, ...]
    geometry: Geometry
    slots: Tensor  # of every row
    positions: Tensor  # of every row
    turns: Tensor  # of every row, see Geometry
    parts: tuple[Part, ...]
    sources: Tensor | None
    places: Tensor | None

    @classmethod
    def cut(cls, spans: Sequence[Span], geometry: Geometry) -> Tiles:
        """Raises ValueError for positions outside the context and for two spans of one slot."""
        pieces = list(_cut(spans, geometry))
        seen = [position for span in spans for position in range(span.start, span.stop)]
        parts = []
        for alike in _together(pieces, geometry.keys):
            rows: list[int] = []
            for piece in alike:
                rows += range(piece.row, piece.row + piece.count)
                rows += [piece.row + piece.count - 1] * (-piece.count % geometry.fold)
            own, one = torch.tensor([seen[row] for row in rows]).view(len(alike), -1), seen[rows[0]]
            slots, keys = tuple(piece.slot for piece in alike), range(geometry.first(one), reach(one))
            pages = geometry.budget.pages(one) if alike[0].sparse else None
            if geometry.in_place:
                mask: Tensor | Sees = geometry.sees(own, keys)
            else:  # only the last keys may be hidden without a window
                mask = geometry.mask(own, block(one) if geometry.window is None else keys)
            parts.append(Part(slots, torch.tensor(slots), own.shape[1], keys, tuple(rows), mask, pages))
        positions = torch.tensor(seen)
        slots_of = torch.tensor([span.slot for span in spans for _ in range(span.count)])
        order = _order(parts, len(seen))
        return cls(tuple(spans), geometry, slots_of, positions, geometry.turns(positions),
                   tuple(parts), *order)  # fmt: skip

    def head(self, length: int) -> Tiles:
        """The same for the first `length` rows, where a span must end, without cutting anew."""
        if length == len(self):
            return self
        kept, rows = [], 0
        for span in self.spans:
            if rows == length:
                break
            kept.append(span)
            rows += span.count
        assert rows == length, "a step is cut between two spans"
        parts = tuple(part for whole in self.parts if (part := whole.head(length)) is not None)
        order = (None, None) if self.sources is None else _order(parts, length)
        return Tiles(tuple(kept), self.geometry, self.slots[:length], self.positions[:length], self.turns[:length],
                     parts, *order)  # fmt: skip

    def __len__(self) -> int:
        return len(self.positions)


def _order(parts: Sequence[Part], length: int) -> tuple[Tensor | None, Tensor | None]:
    """`Tiles.sources` and `Tiles.places`."""
    sources = [row for part in parts for row in part.rows]
    if sources == list(range(length)):
        return None, None
    places = [0] * length
    for place, row in enumerate(sources):
        places[row] = place
    return torch.tensor(sources), torch.tensor(places)


@dataclass(frozen=True, slots=True)
class _Piece:
    """Positions of one span in one block, or one that chooses pages; `row` is the first one's row in the step."""

    reach: int
    slot: int
    row: int
    count: int
    sparse: bool


def _cut(spans: Sequence[Span], geometry: Geometry) -> Iterator[_Piece]:
    if len({span.slot for span in spans}) != len(spans):
        raise ValueError("two spans of one step share a slot")
    row = 0
    for span in spans:
        if span.count < 1 or span.start < 0 or span.stop > geometry.context:
            raise ValueError(f"positions [{span.start}, {span.stop}) outside the context of {geometry.context}")
        start, sparse = span.start, geometry.sparse(span)
        while start < span.stop:
            dense = min(reach(start), span.stop, start + geometry.at_once(start), sparse)
            stop = dense if start < sparse else start + 1
            yield _Piece(reach(start), span.slot, row, stop - start, start >= sparse)
            row, start = row + stop - start, stop


def _together(pieces: Iterable[_Piece], keys: int) -> Iterator[list[_Piece]]:
    """Single positions of one reach share a call, as far as it takes `keys`; any other piece has one of its own."""
    singles: dict[int, list[_Piece]] = defaultdict(list)
    for piece in pieces:
        if piece.count == 1 and not piece.sparse:
            singles[piece.reach].append(piece)
        else:
            yield [piece]
    for length, alike in singles.items():
        most = max(1, TOGETHER * keys // length)
        yield from (alike[at : at + most] for at in range(0, len(alike), most))
