"""What is asked of a model, as records that need no torch."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose a token: greedy at temperature 0; `top_k` 0 and `top_p` 1 keep every token."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0

    def asked(self, temperature: float | None, top_p: float | None, top_k: int | None, seed: int) -> Sampling:
        """With what a request says of it; it may say `top_k` -1 for all tokens."""
        return Sampling(
            self.temperature if temperature is None else temperature,
            self.top_p if top_p is None else top_p,
            self.top_k if top_k is None else max(0, top_k),
            seed,
        )


class Precision(StrEnum):
    """How weights are held and multiplied; hidden states, keys and values are bfloat16, with FP32 float32.

    INT8: integer products with one activation scale for each position, so that its bits do not depend on the batch.
    INT8_FAST: the kernel of torch's `quantize_dynamic`, with one scale for a whole batch. INT4: groups of columns.
    """

    FP32 = "fp32"
    BF16 = "bf16"
    INT8 = "int8"
    INT8_FAST = "int8-fast"
    INT4 = "int4"


PRECISIONS = f"{', '.join(Precision)} (default: as it is stored, or bf16)"
