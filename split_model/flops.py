"""How much arithmetic a model takes: the unit in which the cost model counts computation."""

from __future__ import annotations

from split_model.config import ModelConfig

SPARSE_FROM, SPARSE_KEYS, SPARSE_AFTER = 3072, 768, 1  # position, keys read, layers that read all: of sparse.BUDGET


def layer_flops(config: ModelConfig, start: int, count: int) -> float:
    """FLOPs of one layer for positions `[start, start + count)`: two per weight and position, four per key and channel.

    The count of Kaplan et al. 2020 (arXiv 2001.08361, table 1), with grouped-query projections and three MLP matrices;
    beyond a sliding window, a position reads as many keys as the window has.
    """
    projections = config.width * config.head_dim * (2 * config.heads + 2 * config.kv_heads)
    weights = projections + 3 * config.width * config.inner
    near = count if config.window is None else max(0, min(start + count, config.window) - start)
    keys = near * start + near * (near + 1) / 2 + (count - near) * (config.window or 0)
    return 2.0 * weights * count + 4.0 * config.heads * config.head_dim * keys


def layers_flops(config: ModelConfig, layers: range, start: int, count: int, sparse: bool = False) -> float:
    """FLOPs of these layers; `sparse`: as in Span, for positions that choose what they read."""
    whole = len(layers) * layer_flops(config, start, count)
    first = max(start, SPARSE_FROM)
    late, choosing = start + count - first, layers.stop - max(layers.start, SPARSE_AFTER)
    if not sparse or config.window is not None or late <= 0 or choosing <= 0:
        return whole
    unread = late * first + late * (late + 1) / 2 - late * SPARSE_KEYS
    return whole - choosing * 4.0 * config.heads * config.head_dim * unread


def head_flops(config: ModelConfig) -> float:
    """FLOPs of the final norm and head for one position."""
    return 2.0 * config.width * config.vocabulary
