"""Products with a weight, by the way it is held."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

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
    multiply = _bf16(weight, bias)
    if weight.shape[1] <= BLOCK:
        return multiply
    return lambda x: multiply(x) if len(x) > 1 else multiply(torch.cat((x, x)))[:1]


def _bf16(weight: Tensor, bias: Tensor | None) -> Linear:
    """Lays bf16 weights out once as oneDNN wants them, where it does the work: the same bits, sooner."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, packed, bias, "none", [], "")
