"""The next token, as a function of the logits, the seed and the position alone.

Noise comes from a counter generator over `(seed, position, token id)`, so a draw does not depend on the other rows
of a batch, on what was drawn before, or on which machine draws: two models that agree on the logits agree on the
token, and a session can go on anywhere from its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

Words = npt.NDArray[np.uint64]
Reals = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

LOW = np.uint64(0xFFFFFFFF)
HALF = np.uint64(32)
# Multipliers and key steps of Philox4x32: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
MULTIPLIERS = (np.uint64(0xD2511F53), np.uint64(0xCD9E8D57))
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to choose a token: greedy at temperature 0; `top_k` 0 and `top_p` 1 keep every token."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int = 0


def philox(counter: tuple[Words, Words, Words, Words], key: int) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 of each counter (four arrays of 32-bit words, kept in 64) under one 64-bit key."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & 0xFFFFFFFF, key >> 32 & 0xFFFFFFFF
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (p1 >> HALF) ^ c1 ^ np.uint64(k0), p1 & LOW, (p0 >> HALF) ^ c3 ^ np.uint64(k1), p0 & LOW
        k0, k1 = k0 + KEY_STEPS[0] & 0xFFFFFFFF, k1 + KEY_STEPS[1] & 0xFFFFFFFF
    return c0, c1, c2, c3


def gumbel(ids: Ids, position: int, seed: int) -> Reals:
    """Standard Gumbel noise of each token id at one position: `-log(-log(u))`, u from 52 bits, never 0 or 1."""
    token = ids.astype(np.uint64)
    zero = np.zeros_like(token)
    place = np.full_like(token, position & 0xFFFFFFFF)
    high, low, _, _ = philox((token, place, zero, zero), seed & 0xFFFFFFFFFFFFFFFF)
    bits = (high << np.uint64(20)) | (low >> np.uint64(12))
    return -np.log(-np.log((bits.astype(np.float64) + 0.5) * 2.0**-52))


def sample(logits: Tensor, positions: Sequence[int], samplings: Sequence[Sampling]) -> list[int]:
    """One token id for each row of float32 `[n, vocabulary]`; `positions[i]` is where the new token will stand."""
    greedy: list[int] = torch.argmax(logits, dim=-1).tolist()
    return [
        first if how.temperature <= 0 else _draw(row.numpy(), position, how)
        for first, row, position, how in zip(greedy, logits, positions, samplings, strict=True)
    ]


def _draw(row: npt.NDArray[np.float32], position: int, how: Sampling) -> int:
    scores = row.astype(np.float64) / how.temperature
    ids = _kept(scores, how)
    noisy = scores[ids] + gumbel(ids, position, how.seed)
    return int(ids[np.argmax(noisy)])


def _kept(scores: Reals, how: Sampling) -> Ids:
    """Ids that are left after top-k and then top-p, ascending; of equal scores the smaller ids stay."""
    ids = np.arange(len(scores))
    if 0 < how.top_k < len(scores):
        least = np.partition(scores, -how.top_k)[-how.top_k]
        ids = np.flatnonzero(scores >= least)
        ids = ids[np.argsort(-scores[ids], kind="stable")][: how.top_k]
    if how.top_p < 1:
        ids = ids[np.argsort(-scores[ids], kind="stable")]
        weights = np.exp(scores[ids] - scores[ids[0]])
        before = np.cumsum(weights) - weights
        ids = ids[: max(1, int(np.count_nonzero(before < how.top_p * weights.sum())))]
    return np.sort(ids)
