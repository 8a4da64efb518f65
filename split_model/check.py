"""What has to hold for two sites to get the same text: proved on this machine, and named in a digest."""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from split_model.attention import Span
from split_model.cache import Cache
from split_model.linear import linear
from split_model.quantised import DTYPES, QUANTISED, quantise
from split_model.settings import Precision

if TYPE_CHECKING:
    from split_model.model import Model

SCHEME = "products-2"  # to be changed with every change of the order of arithmetic in this package
ROWS = 24  # of which the first 12 lie before a change of reach


@torch.inference_mode()
def is_exact(model: Model) -> bool:
    """Whether rows of the first layer and of the head have the same bits alone, in chunks and among strangers."""
    x = _noise(ROWS, model.config.width).to(model.dtype)
    if model.has_head:
        whole = model.logits(x)
        if any(not torch.equal(model.logits(x[row : row + 1])[0], whole[row]) for row in range(ROWS)):
            return False
    if model.first == model.stop:
        return True
    last = model.config.context - ROWS
    starts = (116, 1060, model.tiles([Span(0, 0, 1)]).geometry.keys + 116)  # sums over 1,024, and keys in two calls
    return all(_layer_is_exact(model, x, start) for start in dict.fromkeys(min(last, start) for start in starts))


def _layer_is_exact(model: Model, x: Tensor, start: int) -> bool:
    """Compares one pass over positions from `start` on with one row at a time, pieces, and three sessions at once."""
    cache = Cache(model.config, 3, model.first, model.first + 1, model.dtype, start + ROWS)
    size = cache.memory.numel()
    cache.memory.copy_(_noise(1, min(size, 9973)).repeat(1, -(-size // 9973))[0, :size].view(cache.memory.shape))

    def run(rows: slice, slots: tuple[int, ...] = (0,)) -> Tensor:
        spans = [Span(slot, start + rows.start, rows.stop - rows.start) for slot in slots]
        own = x[rows].repeat(len(slots), 1)
        return model.run(own, model.first, model.first + 1, cache, model.tiles(spans))

    cache.memory[:, 1:] = cache.memory[:, :1]
    whole = run(slice(0, ROWS))
    pieces = [slice(at, min(at + 5, ROWS)) for at in range(0, ROWS, 5)]
    singles = [slice(row, row + 1) for row in range(ROWS)]
    if not torch.equal(torch.cat([run(piece) for piece in pieces]), whole):
        return False
    if not torch.equal(torch.cat([run(one) for one in singles]), whole):
        return False
    together = [run(one, (0, 1, 2)) for one in singles]
    return all(torch.equal(torch.stack([rows[slot] for rows in together]), whole) for slot in range(3))


def numerics(precision: Precision) -> bytes:
    """16 bytes that are equal where the same inputs give the same bits.

    They cover the library, the instruction set, this package's order of arithmetic, and the bits of a fixed sample
    of every kind of operation.
    """
    names = (torch.__version__, torch.backends.cpu.get_cpu_capability(), SCHEME, str(precision))
    total = hashlib.sha256("\0".join(names).encode())
    with torch.inference_mode():
        for result in _sample_operations(precision):
            total.update(result.contiguous().view(torch.uint8).numpy().tobytes())
    return total.digest()[:16]


def _sample_operations(precision: Precision) -> list[Tensor]:
    dtype = DTYPES[precision]
    x, weight = _noise(8, 1536).to(dtype), _noise(96, 1536).to(dtype)
    matrix = quantise(weight, precision) if precision in QUANTISED else weight
    product, biased = linear(matrix), linear(matrix, weight[0, :96])
    head = linear(quantise(weight, Precision.INT8), shared=True) if precision in QUANTISED else product
    square = x.view(4, 48, 64)
    turned = torch.view_as_complex(x.float().view(8, -1, 2)) * torch.polar(torch.ones(768), _noise(1, 768)[0])
    scores = torch.bmm(square, square.transpose(1, 2))
    return [
        product(x),
        product(x[:1]),
        biased(x),
        head(x),
        scores,
        scores.softmax(-1),
        F.silu(x),
        F.rms_norm(x, (1536,), weight[0], 1e-5),
        F.rms_norm(square.float(), (64,), None, 1e-5),
        torch.view_as_real(turned),
    ]


def _noise(rows: int, columns: int) -> Tensor:
    """Numbers in [-1, 1) without a generator, so that every machine has the same: a multiplicative hash (Knuth)."""
    index = torch.arange(rows * columns, dtype=torch.int64)
    return ((index * 2654435761 + 12345) % 65536).float().div_(32768).sub_(1).view(rows, columns)
