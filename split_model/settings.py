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


class Precision(StrEnum):
    """How weights are held; hidden states, keys and values are bfloat16, with FP32 float32."""

    FP32 = "fp32"
    BF16 = "bf16"
