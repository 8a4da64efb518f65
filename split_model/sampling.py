"""The next token, as a function of the logits, the seed and the position alone.

Noise comes from a counter generator over `(seed, position, token id)`, so a draw does not depend on the other rows
of a batch, on what was drawn before, or on which machine draws: two models that agree on the logits agree on the
token, and a session can go on anywhere from its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from split_model.settings import Sampling as Sampling

Words = npt.NDArray[np.uint64]  # 32-bit words, kept in 64 for their products
Reals = npt.NDArray[np.float64]
Ids = npt.NDArray[np.int64]

# Multipliers and key steps of Philox4x32: Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011.
MULTIPLY_0, MULTIPLY_1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
STEP_0, STEP_1 = np.uint64(0x9E3779B9), np.uint64(0xBB67AE85)
ROUNDS = 10
LOW, HALF = np.uint64(0xFFFFFFFF), np.uint64(32)
# Noise of 32 bits lies in (-3.14, 22.88): a token this far below the best one cannot be drawn.
HOPELESS = 26.1
SLICE = 1 << 16  # ids at a time, to stay in the processor's cache


def sample(logits: Tensor, positions: Sequence[int], samplings: Sequence[Sampling]) -> list[int]:
    """One token id for each row of float32 `[n, vocabulary]`; `positions[i]` is where the new token will stand.

    Temperature, then top-k, then top-p, then Gumbel-max over the ids that are left. Of equals the smallest id wins.
    """
    chosen: list[int] = torch.argmax(logits, dim=-1).tolist()
    drawn = [row for row, how in enumerate(samplings) if how.temperature > 0]
    if not drawn:
        return chosen
    with np.errstate(all="ignore"):  # a poisoned row may draw anything, but must not warn or fail
        left = [_left(logits[row].numpy(), samplings[row]) for row in drawn]
        sizes = [len(ids) for ids, _ in left]
        keys = np.array([samplings[row].seed & (1 << 64) - 1 for row in drawn], dtype=np.uint64)
        places = np.array([positions[row] for row in drawn], dtype=np.uint64)
        noise = gumbel(np.concatenate([ids for ids, _ in left]), np.repeat(np.arange(len(drawn)), sizes), places, keys)
    for row, (ids, scores), own in zip(drawn, left, np.split(noise, np.cumsum(sizes[:-1])), strict=True):
        chosen[row] = int(ids[np.argmax(scores + own)])
    return chosen


def gumbel(ids: Ids, rows: Ids, positions: Words, seeds: Words) -> Reals:
    """Standard Gumbel noise for each id, which belongs to row `rows[i]` and so to that row's position and seed.

    It is `-log(-log(u))`, with u from word `id % 4` of the Philox block `(id // 4, position)` under the seed.
    """
    noise = np.empty(len(ids))
    for at in range(0, len(ids), SLICE):
        own, row = ids[at : at + SLICE], rows[at : at + SLICE]
        block = own >> 2
        new = np.ones(len(own), dtype=bool)
        new[1:] = (block[1:] != block[:-1]) | (row[1:] != row[:-1])
        counter, line = block[new].astype(np.uint64), row[new]
        zero, key = np.zeros_like(counter), seeds[line]
        words = np.stack(philox((counter, positions[line], zero, zero), (key & LOW, key >> HALF)))
        word = words[own & 3, np.cumsum(new) - 1]
        noise[at : at + SLICE] = -np.log(-np.log((word.astype(np.float64) + 0.5) * 2.0**-32))
    return noise


def philox(counter: tuple[Words, Words, Words, Words], key: tuple[Words, Words]) -> tuple[Words, Words, Words, Words]:
    """Philox4x32-10 of each counter under its key."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(ROUNDS):
        p0, p1 = c0 * MULTIPLY_0, c2 * MULTIPLY_1
        c0, c1, c2, c3 = (p1 >> HALF) ^ c1 ^ k0, p1 & LOW, (p0 >> HALF) ^ c3 ^ k1, p0 & LOW
        k0, k1 = k0 + STEP_0 & LOW, k1 + STEP_1 & LOW
    return c0, c1, c2, c3


def _left(row: npt.NDArray[np.float32], how: Sampling) -> tuple[Ids, Reals]:
    """Ids that may be drawn, ascending and never none, and their scores, of which the best is 0."""
    scores = row.astype(np.float64)
    scores = (scores - scores.max()) / how.temperature
    ids = np.flatnonzero(~(scores < -HOPELESS))
    if 0 < how.top_k < len(ids):
        least = np.partition(scores[ids], -how.top_k)[-how.top_k]
        ids = _best_first(ids[~(scores[ids] < least)], scores)[: how.top_k]
    if how.top_p < 1:
        ids = _nucleus(ids, scores, how.top_p)
    ids = np.sort(ids)
    return ids, scores[ids]


def _nucleus(ids: Ids, scores: Reals, top_p: float) -> Ids:
    """The fewest ids, likeliest first, whose probabilities add up to `top_p`; at least one."""
    weights = np.exp(scores[ids])
    total = weights.sum()
    ids = _best_first(ids[~(weights < total * (1 - top_p) / len(ids))], scores)  # all others add up to less than 1 - p
    before = np.concatenate([[0.0], np.cumsum(np.exp(scores[ids[:-1]]))])
    return ids[: max(1, int(np.count_nonzero(before < top_p * total)))]


def _best_first(ids: Ids, scores: Reals) -> Ids:
    """Ascending ids by falling score; of equals the smaller id comes first."""
    return ids[np.argsort(-scores[ids], kind="stable")]
