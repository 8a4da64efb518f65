"""Products with weights that are held as integers: by compiled code where there is some, else by kernels of torch's.

Which kernel, and what the others take: docs/models.md. What is not x86-64 was written after torch's documentation and
has not been run, but for `_int4_arm`, whose kernel has a plain version everywhere.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from split_model import native
from split_model.config import ModelError
from split_model.quantised import Matrix, Quantised, quantise, unpacked
from split_model.settings import Precision

Product = Callable[[Tensor], Tensor]


def product(weight: Quantised, bias: Tensor | None = None, shared: bool = False) -> Product:
    """`x -> x @ weight.T + bias` for bfloat16 `x`; a `shared` weight is used by others, too, and stays as it lies.

    That changes the time that several rows take, not the bits. Raises ModelError where there is no kernel here.
    """
    try:
        if weight.precision is Precision.INT4 and native.fits(weight):
            return native.int4(weight, bias)
        if weight.precision is Precision.INT4:
            return _int4_arm(weight, bias) if torch.backends.kleidiai.is_available() else _int4(weight, bias)
        if weight.precision is Precision.INT8_FAST:
            return _int8_fast(weight, bias)
        if isinstance(weight, native.Tiled) or (not shared and _natively(weight)):
            return native.int8(weight if isinstance(weight, native.Tiled) else native.tiled(weight), bias)
        return _int8(weight, bias, shared)
    except (AttributeError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        raise ModelError(f"{weight.precision}: not with torch {torch.__version__} on this machine: {reason}") from None


def _int8(weight: Quantised, bias: Tensor | None, shared: bool) -> Product:
    """Integer products. A row is divided by its largest value, so that one fixed step fits every batch."""
    packs = _has_fbgemm() and not (shared and _alike())
    multiply = _by_fbgemm(weight) if packs else _by_onednn(weight)

    def run(x: Tensor) -> Tensor:
        wide = x.float()
        largest = wide.abs().amax(1, True)
        found = multiply(wide / largest).mul_(largest)
        return (found if bias is None else found.add_(bias)).bfloat16()

    return run


def _by_fbgemm(weight: Quantised) -> Product:
    """For `x` within [-1, 1]. A copy of the weight, laid out for many rows."""
    packed, step, zero = _packed(weight), 1 / _steps(), _steps() + 1
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default._op  # its wrapper takes 2 us
    return lambda x: multiply(x, step, zero, packed)


def _by_onednn(weight: Quantised) -> Product:
    """The same bits with the weight as it lies in memory: as soon for one row and for 128, later in between."""
    if not _adds_exactly():
        raise RuntimeError("its integer product saturates")
    values, scale = weight.values.t(), weight.scale * torch.tensor(1 / 127)

    def multiply(x: Tensor) -> Tensor:
        moved = x.double().mul_(127).add_(128).float()  # which fbgemm rounds: one fused operation there
        return torch._int_mm(moved.round_().sub_(128).to(torch.int8), values).float().mul_(scale)

    return multiply


def _int8_fast(weight: Quantised, bias: Tensor | None) -> Product:
    """`quantize_dynamic`'s: one scale for all rows of `x`."""
    packed, narrow = _packed(weight), _steps() < 127
    multiply = torch.ops.quantized.linear_dynamic.default._op

    def run(x: Tensor) -> Tensor:
        found: Tensor = multiply(x.float(), packed, narrow)
        return (found if bias is None else found.add_(bias)).bfloat16()

    return run


def _packed(weight: Quantised) -> torch.ScriptObject:
    """As fbgemm wants it, or what takes its place on other processors."""
    engines, before = torch.backends.quantized.supported_engines, torch.backends.quantized.engine
    zeros = torch.zeros(len(weight.scale), dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a later torch will do without quantized tensors
        whole = torch._make_per_channel_quantized_tensor(weight.values, weight.scale.double(), zeros, 0)
    torch.backends.quantized.engine = next(one for one in ("fbgemm", "qnnpack", "onednn") if one in engines)
    try:
        packed: torch.ScriptObject = torch.ops.quantized.linear_prepack(whole, None)
    finally:
        torch.backends.quantized.engine = before
    return packed


def _int4(weight: Quantised, bias: Tensor | None) -> Product:
    """Sums in float32 of bfloat16 activations."""
    rows, group = len(weight.values), weight.group
    missing = -rows % 64  # the kernel takes so many rows at a time
    values = F.pad(unpacked(weight.values), (0, 0, 0, missing), value=8)
    packed = torch._convert_weight_to_int4pack_for_cpu(values.int(), 1)
    scale = F.pad(weight.scale, (0, 0, 0, missing)).t()
    scale = torch.stack([scale, torch.zeros_like(scale)], 2)  # with offsets, which are none here
    multiply = torch._weight_int4pack_mm_for_cpu

    def run(x: Tensor) -> Tensor:
        found: Tensor = multiply(x.contiguous(), packed, group, scale)
        found = found[:, :rows] if missing else found
        return found if bias is None else found.add_(bias)

    return run


def _int4_arm(weight: Quantised, bias: Tensor | None) -> Product:
    """KleidiAI's, which rounds activations to int8 row by row. On Arm it was not run, only its plain version here."""
    (rows, columns), group = weight.shape, weight.group
    packed = torch._dyn_quant_pack_4bit_weight(weight.values, weight.scale.flatten(), None, group, columns, rows)
    multiply = torch._dyn_quant_matmul_4bit

    def run(x: Tensor) -> Tensor:
        found: Tensor = multiply(x.float(), packed, group, columns, rows)
        return (found if bias is None else found.add_(bias)).bfloat16()

    return run


@cache
def _steps() -> int:
    """From 0 to the largest activation: fewer where pairs of products are added in 16 bits, which would overflow."""
    return 127 if torch.cpu._is_vnni_supported() else 63


@cache
def _has_fbgemm() -> bool:
    return "fbgemm" in torch.backends.quantized.supported_engines


@cache
def _alike() -> bool:
    """Both kernels of int8 give the same bits here."""
    weight, x = _sample()
    return _adds_exactly() and torch.equal(_by_fbgemm(weight)(x), _by_onednn(weight)(x))


def shared_table(weight: Matrix) -> Matrix:
    """Embedding and head in one, laid out for both where there is a way."""
    return native.tiled(weight) if isinstance(weight, Quantised) and _natively(weight) else weight


def _natively(weight: Quantised) -> bool:
    return native.fits(weight) and _natively_alike()


@cache
def _natively_alike() -> bool:
    """Our own kernel of int8 gives the bits of torch's here."""
    weight, x = _sample()
    x, bias = x.bfloat16(), x[0, :96].contiguous()
    return torch.equal(native.int8(native.tiled(weight), bias)(x), _int8(weight, bias, False)(x))


def _sample() -> tuple[Quantised, Tensor]:
    """Weights, and inputs within [-1, 1]."""
    numbers = torch.arange(128 * 576.0).mul_(12.9898).sin_().view(128, 576)
    return quantise(numbers[:96], Precision.INT8), numbers[96:]


@cache
def _adds_exactly() -> bool:
    """oneDNN's product overflows without VNNI."""
    ones = torch.full((16, 512), 127, dtype=torch.int8)
    return all(bool((torch._int_mm(ones[:rows], ones.t()) == 512 * 127**2).all()) for rows in (1, 2, 16))
