"""Products with a weight, by the way it is held."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from split_model.attention import BLOCK, ROWS

Linear = Callable[[Tensor], Tensor]


def linear(weight: Tensor) -> Linear:
    """`x -> x @ weight.T`, with the same bits for a row whatever the other rows are."""
    if weight.dtype == torch.float32:
        return lambda x: F.linear(F.pad(x, (0, 0, 0, -len(x) % ROWS)), weight)[: len(x)]
    product = _product(weight)
    if weight.shape[1] <= BLOCK:
        return product
    return lambda x: product(x) if len(x) > 1 else product(x.repeat(2, 1))[:1]


def _product(weight: Tensor) -> Linear:
    """Lays bf16 weights out once as oneDNN wants them, where it does the work: the same bits, sooner."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return lambda x: F.linear(x, weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, packed, None, "none", [], "")
