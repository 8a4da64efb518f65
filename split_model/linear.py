"""Products with a weight, by the way it is held."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from split_model.attention import BLOCK, ROWS
from split_model.quantised import Matrix, Quantised, unpacked
from split_model.settings import Precision

Linear = Callable[[Tensor], Tensor]


def linear(weight: Matrix, bias: Tensor | None = None) -> Linear:
    """`x -> x @ weight.T + bias`, with the same bits for a row whatever the other rows are."""
    if isinstance(weight, Quantised):
        multiplied = _quantised(weight)
        return multiplied if bias is None else lambda x: multiplied(x).add_(bias)
    if weight.dtype == torch.float32:
        return lambda x: F.linear(F.pad(x, (0, 0, 0, -len(x) % ROWS)), weight, bias)[: len(x)]
    product = _product(weight, bias)
    if weight.shape[1] <= BLOCK:
        return product
    return lambda x: product(x) if len(x) > 1 else product(x.repeat(2, 1))[:1]


def _product(weight: Tensor, bias: Tensor | None) -> Linear:
    """Lays bf16 weights out once as oneDNN wants them, where it does the work: the same bits, sooner."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return lambda x: F.linear(x, weight, bias)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    multiply = torch.ops.mkldnn._linear_pointwise.default
    return lambda x: multiply(x, packed, bias, "none", [], "")


def _quantised(weight: Quantised) -> Linear:
    if weight.precision is Precision.INT4:
        return _int4(weight)
    return _int8(weight) if weight.precision is Precision.INT8 else _int8_fast(weight)


def _int8(weight: Quantised) -> Linear:
    """Integer products; a row is divided by its largest value, so that one fixed step of 1/127 fits every batch."""
    packed = _fbgemm(weight)
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default

    def product(x: Tensor) -> Tensor:
        largest = torch.linalg.vector_norm(x, float("inf"), 1, True, dtype=torch.float32)
        found: Tensor = multiply(x / largest, 1 / 127, 128, packed)
        return found.mul_(largest).to(x.dtype)

    return product


def _int8_fast(weight: Quantised) -> Linear:
    packed, multiply = _fbgemm(weight), torch.ops.quantized.linear_dynamic.default
    return lambda x: multiply(x.float(), packed).to(x.dtype)


def _fbgemm(weight: Quantised) -> torch.ScriptObject:
    zero = torch.zeros(len(weight.scale), dtype=torch.long)
    whole = torch._make_per_channel_quantized_tensor(weight.values, weight.scale.double(), zero, 0)
    torch.backends.quantized.engine = "fbgemm"
    packed: torch.ScriptObject = torch.ops.quantized.linear_prepack(whole, None)
    return packed


def _int4(weight: Quantised) -> Linear:
    values = unpacked(weight.values).int()
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(values, 1)
    scale, group = weight.scale.transpose(0, 1).contiguous(), weight.group
    multiply = torch.ops.aten._weight_int4pack_mm_for_cpu.default
    return lambda x: multiply(x.contiguous(), packed, group, scale)
