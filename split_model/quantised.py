"""Weights held as integers: int8 with a scale for each row, int4 with one for each group of columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from split_model.config import ModelError
from split_model.settings import Precision

GROUPS = (32, 64, 128, 256)  # that the kernels take
DTYPES = {one: torch.float32 if one is Precision.FP32 else torch.bfloat16 for one in Precision}  # of hidden states, KV
QUANTISED = frozenset({Precision.INT8, Precision.INT8_FAST, Precision.INT4})
GROUP = 32  # columns that share a scale in int4: docs/models.md has others
ROWS = 4096  # quantised at a time, so that a large embedding takes no second float copy


@dataclass(frozen=True, slots=True, eq=False)
class Quantised:
    """A matrix `[out, in]`; `precision` says how products with it are taken.

    int8: `values` int8 `[out, in]`, `scale` float32 `[out]`, a weight is `value * scale`. int4: `values` uint8
    `[out, in / 2]`, the even column in the low half of a byte, `scale` bfloat16 `[out, in / group]`, a weight is
    `(value - 8) * scale`.
    """

    values: Tensor
    scale: Tensor
    precision: Precision

    @property
    def shape(self) -> tuple[int, int]:
        rows, stored = self.values.shape
        return rows, stored if self.values.dtype == torch.int8 else 2 * stored

    @property
    def group(self) -> int:
        """Columns that share a scale."""
        return self.shape[1] if self.scale.ndim == 1 else self.shape[1] // self.scale.shape[1]

    def problem(self, shape: tuple[int, ...]) -> str | None:
        """What speaks against tensors from a file being a matrix of this shape."""
        int4 = self.values.dtype == torch.uint8
        if self.values.dtype not in (torch.int8, torch.uint8) or self.values.ndim != 2 or self.shape != shape:
            return f"{self.values.dtype} of shape {tuple(self.values.shape)} for integers of {shape}"
        wanted = (2, torch.bfloat16) if int4 else (1, torch.float32)
        fits = (self.scale.ndim, self.scale.dtype) == wanted and len(self.scale) == shape[0] and self.scale.numel()
        if not fits or (int4 and (self.group not in GROUPS or self.group * self.scale.shape[1] != shape[1])):
            return f"a scale of {self.scale.dtype} of shape {tuple(self.scale.shape)} for integers of {shape}"
        return None if self.scale.isfinite().all() else "a scale that is not finite"

    def rows(self, index: Tensor) -> Quantised:
        """The rows `index` (int64), in that order."""
        values, scale = self.values.index_select(0, index), self.scale.index_select(0, index)
        return replace(self, values=values, scale=scale)

    def lookup(self, index: Tensor, dtype: torch.dtype) -> Tensor:
        """The weights of the rows `index`, in `dtype`. Raises IndexError."""
        return self.rows(index).float().to(dtype)

    def float(self) -> Tensor:
        """The weights that the integers stand for, in float32."""
        if self.scale.ndim == 1:
            return self.values.float() * self.scale.unsqueeze(1)
        grouped = unpacked(self.values).float().sub_(8).view(*self.scale.shape, -1)
        return grouped.mul_(self.scale.unsqueeze(2)).flatten(1)


Matrix = Tensor | Quantised


def rows(weight: Matrix, index: Tensor) -> Matrix:
    return weight.rows(index) if isinstance(weight, Quantised) else weight.index_select(0, index)


def cat(weights: Sequence[Matrix]) -> Matrix:
    """One below the other: all of one kind, with equally many columns."""
    held = [weight for weight in weights if isinstance(weight, Quantised)]
    if not held:
        return torch.cat([weight for weight in weights if isinstance(weight, Tensor)])
    assert len(held) == len(weights), "quantised and float weights in one product"
    if len({one.group for one in held}) > 1:
        raise ModelError(f"groups of {sorted({one.group for one in held})} columns in one product, must be alike")
    values, scale = torch.cat([one.values for one in held]), torch.cat([one.scale for one in held])
    return replace(held[0], values=values, scale=scale)


def lookup(table: Matrix, index: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of an embedding, in `dtype`."""
    return table.lookup(index, dtype) if isinstance(table, Quantised) else F.embedding(index, table)


def quantise(weight: Tensor, precision: Precision, group: int = GROUP) -> Quantised:
    """From float `[out, in]`. Raises ModelError where `group` does not divide `in` (int4)."""
    if precision is Precision.INT4 and weight.shape[1] % group:
        raise ModelError(f"int4 wants a width that {group} divides, not {weight.shape[1]}")
    pieces = [_int4(piece.float(), group) if precision is Precision.INT4 else _int8(piece.float())
              for piece in weight.split(ROWS)]  # fmt: skip
    values, scale = (torch.cat(parts) for parts in zip(*pieces, strict=True))
    return Quantised(values, scale, precision)


def tensors(name: str, weight: Quantised) -> dict[str, Tensor]:
    """As they are stored, under the name of the float tensor (`….weight`): read again by `Checkpoint.matrix`."""
    return {name: weight.values.contiguous(), f"{name}_scale": weight.scale.contiguous()}


def description(precision: Precision, group: int = GROUP) -> dict[str, object]:
    """`quantization_config` for the config.json of a folder that holds `tensors`."""
    if precision is Precision.INT4:
        return {"quant_method": "tandem", "precision": "int4", "group": group}
    return {"quant_method": "tandem", "precision": "int8"}


def _int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    scale = (weight.abs().amax(1) / 127).clamp_(min=torch.finfo(torch.float32).tiny)
    return (weight / scale.unsqueeze(1)).round_().to(torch.int8), scale


def _int4(weight: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """The largest of a group becomes -8, as in llama.cpp's Q4_0; the kernels want scales in bfloat16."""
    grouped = weight.view(len(weight), -1, group)
    largest = grouped.gather(2, grouped.abs().argmax(2, keepdim=True))
    scale = (largest / -8).bfloat16()
    values = (grouped / scale.float()).nan_to_num_(0.0).round_().add_(8).clamp_(0, 15).to(torch.uint8).flatten(1)
    return values[:, ::2] | values[:, 1::2] << 4, scale.squeeze(2)


def unpacked(values: Tensor) -> Tensor:
    """Two of a byte side by side."""
    return torch.stack([values & 15, values >> 4], 2).flatten(1)
