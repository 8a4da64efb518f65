"""One transformer block: RMSNorm, rotary grouped-query attention, SwiGLU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from split_model.attend import attend, turned
from split_model.attention import Tiles
from split_model.cache import Bound
from split_model.config import ModelConfig
from split_model.layout import PROJECTIONS, layer_name, layer_shapes
from split_model.linear import Linear, linear
from split_model.native import Product
from split_model.quantised import DTYPES, Matrix, cat, rows
from split_model.settings import Precision
from split_model.weights import Checkpoint

Added = Callable[[Tensor, Tensor], Tensor]
GRAIN = 1 << 15  # numbers from which on ATen spreads an elementwise operation over threads


@dataclass(frozen=True, slots=True)
class Layer:
    """One block, made at load of what its family has: a step asks no questions."""

    input_norm: Linear
    qkv: Linear
    out: Added
    inner_norm: Linear
    gate_up: Linear
    down: Added

    def __call__(self, both: Tensor, tiles: Tiles, bound: Bound, index: int) -> Tensor:
        """`[n, 2 * width]`, see `beside_negative`, to the same; `index` is the place in the KV memory."""
        both = self.out(both, self._attend(both, tiles, bound, index))
        gate, up = self.gate_up(self.inner_norm(both)).chunk(2, 1)
        return self.down(both, silu_(gate).mul_(up))

    def _attend(self, x: Tensor, tiles: Tiles, bound: Bound, index: int) -> Tensor:
        return attend(turned(self.qkv(self.input_norm(x)), tiles, bound, index), tiles, bound, index)


def beside_negative(x: Tensor) -> Tensor:
    """`[n, width]` to `[n, 2 * width]`, for `norm_of_both`."""
    return torch.cat((x, -x), 1)


def norm_of_both(weight: Tensor, eps: float) -> Linear:
    """`[n, 2 * width]`, rows beside their negatives, to the norm of the rows `[n, width]`.

    Zhang and Sennrich, "Root mean square layer normalization", 2019. A row beside its negative has mean 0, so that the
    layer norm of both is it: one operation, where torch's takes nine to do it on a processor.
    """
    width, both = len(weight), torch.cat((weight, weight))
    return lambda x: torch.layer_norm(x, (2 * width,), both, None, eps)[:, :width]


def rms_norm(weight: Tensor, eps: float) -> Linear:
    """The same of the rows alone."""
    norm = norm_of_both(weight, eps)
    return lambda x: norm(beside_negative(x))


def added(product: Linear) -> Added:
    """`both, x` to the sum of `product(x)` and the first half of `both`, beside its negative."""
    if isinstance(product, Product):
        return product.added

    def add(both: Tensor, x: Tensor) -> Tensor:
        return beside_negative(both[:, : both.shape[1] // 2] + product(x))

    return add


def silu_(x: Tensor) -> Tensor:
    """In place, in pieces that give every thread whole rows: the last numbers of a share are computed otherwise."""
    threads, at = torch.get_num_threads(), 0
    if len(x) == 1:
        return F.silu(x, inplace=True)
    while at < len(x):
        rows = _even_rows(len(x) - at, x.shape[1], threads)
        F.silu(x[at : at + rows], inplace=True)
        at += rows
    return x


def _even_rows(rows: int, width: int, threads: int) -> int:
    """The most of `rows` that ATen deals out evenly (parallel_for in ATen/Parallel-inl.h)."""
    while rows > 1 and rows * width >= GRAIN and rows % min(threads, -(-rows * width // GRAIN)):
        rows -= 1
    return rows


def read_layer(checkpoint: Checkpoint, config: ModelConfig, index: int, precision: Precision) -> Layer:
    """Reads and rearranges the tensors of layer `index`. Raises ModelError."""
    c, shapes, order = config, layer_shapes(config), _order(config)

    def vector(name: str) -> Tensor:
        return checkpoint.tensor(layer_name(index, name), shapes[name], DTYPES[precision])

    def matrix(*names: str) -> Matrix:
        whole = [f"{name}.weight" for name in names]
        return cat([checkpoint.matrix(layer_name(index, name), shapes[name], precision) for name in whole])

    bias = torch.cat([vector(f"{name}.bias") for name in PROJECTIONS])[order] if c.qkv_bias else None
    qkv = linear(rows(matrix(*PROJECTIONS), order), bias)
    if c.qk_norm:
        norms = [vector("self_attn.q_norm.weight")] * c.heads + [vector("self_attn.k_norm.weight")] * c.kv_heads
        qkv = _head_normed(qkv, torch.cat(norms)[order[: len(norms) * c.head_dim]].view(len(norms), -1), c.norm_eps)
    out, down = linear(matrix("self_attn.o_proj")), linear(matrix("mlp.down_proj"))
    if c.post_norms:
        out = _normed(out, vector("post_self_attn_layernorm.weight"), c.norm_eps)
        down = _normed(down, vector("post_mlp_layernorm.weight"), c.norm_eps)
    return Layer(
        input_norm=norm_of_both(vector("input_layernorm.weight"), c.norm_eps),
        qkv=qkv,
        out=added(out),
        inner_norm=norm_of_both(vector("post_attention_layernorm.weight"), c.norm_eps),
        gate_up=linear(matrix("mlp.gate_up_proj") if c.fused_gate_up else matrix("mlp.gate_proj", "mlp.up_proj")),
        down=added(down),
    )


def _order(config: ModelConfig) -> Tensor:
    """The rows of queries, keys and values with the pairs that turn side by side: each is one complex number then."""
    turned, heads = config.heads + config.kv_heads, config.heads + 2 * config.kv_heads
    rows = torch.arange(heads * config.head_dim).view(heads, -1)
    if not config.interleaved:
        halves = rows[:turned, : config.rotary].view(turned, 2, -1)
        rows[:turned, : config.rotary] = halves.transpose(1, 2).flatten(1)
    return rows.flatten()


def _normed(product: Linear, weight: Tensor, eps: float) -> Linear:
    norm = rms_norm(weight, eps)
    return lambda x: norm(product(x))


def _head_normed(product: Linear, weights: Tensor, eps: float) -> Linear:
    """Normalises queries and keys head by head in float32; `weights` `[heads + kv_heads, head_dim]`."""
    count, head_dim, weights = *weights.shape, weights.float()

    def normed(x: Tensor) -> Tensor:
        mixed = product(x).float()
        heads = mixed.view(len(x), -1, head_dim)[:, :count]
        heads.copy_(F.rms_norm(heads, (head_dim,), None, eps).mul_(weights))
        return mixed

    return normed
