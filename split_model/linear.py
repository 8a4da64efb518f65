"""Products with a weight, by the way it is held."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from split_model import native
from split_model.attention import BLOCK, ROWS
from split_model.integers import product
from split_model.quantised import Matrix, Quantised

Linear = Callable[[Tensor], Tensor]


def linear(weight: Matrix, bias: Tensor | None = None, *, shared: bool = False) -> Linear:
    """`x -> x @ weight.T + bias`, with the same bits for a row whatever the other rows are (but for int8-fast).

    A `shared` weight is used elsewhere, too. Raises ModelError where this machine cannot do it.
    """
    if isinstance(weight, Quantised):
        return product(weight, bias, shared)
    if weight.dtype == torch.float32:
        return lambda x: F.linear(F.pad(x, (0, 0, 0, -len(x) % ROWS)), weight, bias)[: len(x)]
    if native.fits(weight) and _natively_alike(weight.shape[1]):
        return native.bf16(weight, bias)
    return _bf16(weight, bias)


def _bf16(weight: Tensor, bias: Tensor | None) -> Linear:
    """Lays bf16 weights out once as oneDNN wants them, where it does the work: the same bits, sooner."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return _with_two_rows(lambda x: F.linear(x, weight, bias), weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return _with_two_rows(lambda x: multiply(x, packed, bias, "none", [], ""), weight)


def _with_two_rows(multiply: Linear, weight: Tensor) -> Linear:
    if weight.shape[1] <= BLOCK:
        return multiply
    return lambda x: multiply(x) if len(x) > 1 else multiply(torch.cat((x, x)))[:1]


@cache
def _natively_alike(width: int) -> bool:
    """Our own kernel of bf16 gives the bits of oneDNN's here, for sums of so many products."""
    half = native.uneven(48, width // 2)
    weight, bias = torch.cat([half, -half], 1), half[:, 0].contiguous()
    ways = [(native.bf16(weight, one), _bf16(weight, one)) for one in (None, bias)]
    some = [weight[:rows].abs() for rows in (1, 5, 24)]
    return all(torch.equal(ours(x), theirs(x)) for ours, theirs in ways for x in some)
