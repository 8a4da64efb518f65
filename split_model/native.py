"""What `native.c` computes, where it was built with the package and this processor runs it.

That takes fewer calls and copies than torch's operations do, with the same bits, but for int4, which torch multiplies
in another way. The machine needs a C compiler when the package is installed; without one, torch computes alone.
"""

from __future__ import annotations

import ctypes
import importlib.util
import logging
import math
from ctypes import c_int64, c_void_p
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from split_model.quantised import Matrix, Quantised, unpacked

NAME, LAYOUT = "split_model._native", 6  # the latter as in native.c
log = logging.getLogger(__name__)
TILE = 16  # rows of a weight, and numbers in a register
HEADS = range(32, 257, 32)  # channels of a key


class _Matrix(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("values", "scale", "scales", "bias")),
        *((name, c_int64) for name in ("rows", "columns", "group")),
    ]


class _Reading(ctypes.Structure):
    _fields_ = [
        *((name, c_void_p) for name in ("slots", "starts", "stops")),
        *((name, c_int64) for name in ("count", "heads", "rows", "width", "keys", "head_dim")),
        *((name, c_int64) for name in ("slot_stride", "head_stride", "most", "page")),
    ]


@cache
def library() -> ctypes.CDLL | None:
    """None where it was not built, not from this version, or does not suit the processor."""
    found = importlib.util.find_spec(NAME)
    own = None if found is None or found.origin is None else _loaded(found.origin)
    log.info("computing with compiled code" if own else "computing by torch alone: no compiled code that runs here")
    return own


def _loaded(path: str) -> ctypes.CDLL | None:
    try:
        own = ctypes.CDLL(path)  # after torch, whose OpenMP it uses
        if own.tandem_layout() != LAYOUT:
            return None
    except (OSError, AttributeError):
        return None
    for product in (own.tandem_int8, own.tandem_int4, own.tandem_bf16):
        product.argtypes = (c_void_p, c_void_p, c_int64, c_void_p, c_void_p)
    for step in (own.tandem_scores, own.tandem_mix):
        step.argtypes, step.restype = (c_void_p,) * 5, None
    own.tandem_lookup.argtypes = (c_void_p, c_void_p, c_int64, c_int64, c_void_p, c_int64, c_void_p)
    own.tandem_turn.argtypes, own.tandem_turn.restype = (c_void_p,) * 4 + (c_int64,) * 4, None
    return own


def uneven(*shape: int) -> Tensor:
    """bfloat16 numbers of many magnitudes.

    With their negatives they add up to what rounding leaves, so that another order of sums shows in every bit.
    """
    return torch.arange(float(math.prod(shape))).mul_(12.9898).sin_().pow_(9).bfloat16().view(shape)


def fits(weight: Matrix) -> bool:
    """Whether there is a product for weights of this shape here; floats are bfloat16."""
    (rows, columns), step = weight.shape, TILE
    if isinstance(weight, Quantised):
        step = 32 if weight.scale.ndim == 2 else TILE
        if weight.group % step:
            return False
    return rows % TILE == 0 and columns % step == 0 and library() is not None


def bf16(weight: Tensor, bias: Tensor | None) -> Product:
    """`x -> x @ weight.T + bias` for bfloat16 `x`, with oneDNN's bits."""
    rows, columns = weight.shape
    values = weight.reshape(rows // TILE, TILE, columns // 2, 2).transpose(1, 2).contiguous()
    return Product("tandem_bf16", (rows, columns), bias, values=values)


@dataclass(frozen=True, slots=True, eq=False)
class Tiled(Quantised):
    """int8 as the product takes it: `values` uint8, 128 more, `[out / 16, in / 4, 16, 4]`; a table can be held so."""

    @property
    def shape(self) -> tuple[int, int]:
        tiles, quarters, tile, four = self.values.shape
        return tiles * tile, quarters * four

    def rows(self, index: Tensor) -> Quantised:
        quarters = self.values.view(torch.int32).flatten(2).index_select(0, index // TILE)
        place = (index % TILE).view(-1, 1, 1).expand(-1, quarters.shape[1], 1)
        values = quarters.gather(2, place).flatten(1).view(torch.uint8)
        return Quantised((values ^ 128).view(torch.int8), self.scale.index_select(0, index), self.precision)

    def lookup(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        own, (rows, columns) = library(), self.shape
        assert own is not None
        found, index = torch.empty(len(index), columns, dtype=torch.bfloat16), index.contiguous()
        if own.tandem_lookup(self.values.data_ptr(), self.scale.data_ptr(), rows, columns, index.data_ptr(), len(index),
                             found.data_ptr()):  # fmt: skip
            raise IndexError(f"a token beyond the {rows} of the table")
        return found.to(dtype)

    def float(self) -> Tensor:
        return self.rows(torch.arange(self.shape[0])).float()


def tiled(weight: Quantised) -> Tiled:
    rows, columns = weight.shape
    values = (weight.values.view(torch.uint8) ^ 128).view(rows // TILE, TILE, columns // 4, 4)
    return Tiled(values.transpose(1, 2).contiguous(), weight.scale, weight.precision)


def int8(weight: Tiled, bias: Tensor | None) -> Product:
    """`x -> x @ weight.T + bias` for bfloat16 `x`: the bits of `integers`' other two."""
    scale = weight.scale * torch.tensor(1 / 127)
    return Product("tandem_int8", weight.shape, bias, values=weight.values, scale=scale)


def int4(weight: Quantised, bias: Tensor | None) -> Product:
    """The same with activations in int8 by their largest, sums of a group exact, groups added in float32 in order."""
    (rows, columns), group = weight.shape, weight.group
    parts = unpacked(weight.values).view(rows // TILE, TILE, columns // 32, 2, 4, 4).permute(3, 0, 2, 4, 1, 5)
    scales = weight.scale.view(rows // TILE, TILE, -1).transpose(1, 2).contiguous()
    values = (parts[0] | parts[1] << 4).contiguous()
    return Product("tandem_int4", weight.shape, bias, group, values=values, scales=scales)


class Product:
    """`x -> x @ weight.T + bias` for bfloat16 `[n, in]`; `tensors` as in native.c."""

    def __init__(self, name: str, shape: tuple[int, int], bias: Tensor | None, group: int = 0, **tensors: Tensor):
        own = library()
        assert own is not None
        if bias is not None:
            tensors["bias"] = bias.float()
        (self._rows, columns), places = shape, {name: tensor.data_ptr() for name, tensor in tensors.items()}
        self._held = (_Matrix(**places, rows=self._rows, columns=columns, group=group), tensors)
        self._at, self._function = ctypes.addressof(self._held[0]), getattr(own, name)

    def __call__(self, x: Tensor) -> Tensor:
        return self._run(x, None, x.new_empty(len(x), self._rows))

    def added(self, both: Tensor, x: Tensor) -> Tensor:
        """`[n, 2 * out]`: the product and the first half of `both`, which is like it, added; and its negative."""
        return self._run(x, both.data_ptr(), torch.empty_like(both))

    def _run(self, x: Tensor, before: int | None, found: Tensor) -> Tensor:
        x = x.contiguous()
        if self._function(self._at, x.data_ptr(), len(x), before, found.data_ptr()):
            raise MemoryError(f"{len(x)} rows of a product with {self._rows}")
        return found


def turn(mixed: Tensor, turns: Tensor, places: Tensor, memory: Tensor, queries: int) -> None:
    """Turns bfloat16 `mixed` `[n, width]` by complex `turns` `[n, width / 2]`.

    The first `queries` columns stay where they are, others go to rows `places` (int64) of `memory` `[.., head_dim]`.
    """
    own, (rows, width) = library(), mixed.shape
    assert own is not None
    own.tandem_turn(mixed.data_ptr(), turns.data_ptr(), places.data_ptr(), memory.data_ptr(), rows, width, queries,
                    memory.shape[1])  # fmt: skip


class Reading:
    """Attention on keys and values where they lie, for the layers of one step; bfloat16.

    `slots` (int64) of a memory like `memory`, `[slots, heads, keys, head_dim]` with dense positions, each with `rows`
    queries for each of its heads; its query positions see keys `[starts, stops)`, int64 `[len(slots) * positions]`.
    Sums are rounded every `most` keys. Of a longer memory only some pages of `page` keys may be read, given with each
    call, int64 `[len(slots) * heads, keys / page]`: these are the keys of which there are so many then.
    """

    def __init__(self, slots: Tensor, starts: Tensor, stops: Tensor, memory: Tensor, rows: int, most: int,
                 page: int = 0):  # fmt: skip
        own = library()
        assert own is not None
        assert memory.stride(2) == memory.shape[3]
        count, (_, heads, keys, head_dim) = len(slots), memory.shape
        self._queries, self._found = (count * heads, rows, head_dim), (count * heads, rows, keys)
        self._held = (slots, starts, stops)
        self._reading = _Reading(*(one.data_ptr() for one in self._held), count, heads, rows, len(stops) // count, keys,
                                 head_dim, memory.stride(0), memory.stride(1), most, page)  # fmt: skip
        self._at = ctypes.addressof(self._reading)
        self._scores, self._mix = own.tandem_scores, own.tandem_mix

    def __call__(self, queries: Tensor, keys: Tensor, values: Tensor, pages: Tensor | None = None) -> Tensor:
        """Softmax attention of `[count * heads, rows, head_dim]`, scaled already, to the same shape."""
        weights, found = self.scores(queries, keys, pages).softmax(-1), torch.empty_like(queries)
        self._mix(self._at, weights.data_ptr(), values.data_ptr(), _place(pages), found.data_ptr())
        return found

    def scores(self, queries: Tensor, keys: Tensor, pages: Tensor | None = None) -> Tensor:
        """`[count * heads, rows, keys]`: minus infinity where a key is hidden."""
        assert queries.shape == self._queries
        assert queries.is_contiguous()
        found = queries.new_empty(self._found)
        self._scores(self._at, queries.data_ptr(), keys.data_ptr(), _place(pages), found.data_ptr())
        return found


def _place(pages: Tensor | None) -> int | None:
    return None if pages is None else pages.data_ptr()
