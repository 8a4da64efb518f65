"""One transformer block: RMSNorm, rotary grouped-query attention, SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from split_model.attention import Tiles
from split_model.cache import Bound
from split_model.config import ModelConfig
from split_model.linear import Linear, linear
from split_model.quantised import DTYPES, Matrix, cat, rows
from split_model.settings import Precision
from split_model.weights import Checkpoint

GRAIN = 1 << 15  # numbers from which on ATen spreads an elementwise operation over threads


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one block."""

    input_norm: Tensor
    qkv: Linear
    out: Linear
    inner_norm: Tensor
    gate_up: Linear
    down: Linear
    eps: float

    def __call__(self, x: Tensor, tiles: Tiles, bound: Bound, index: int) -> Tensor:
        """`[n, width]` to `[n, width]`; `index` is the layer's place in the KV memory."""
        x = x + self.out(self._attend(x, tiles, bound, index))
        gate, up = self.gate_up(rms_norm(x, self.inner_norm, self.eps)).chunk(2, 1)
        return x + self.down(silu_(gate).mul_(up))

    def _attend(self, x: Tensor, tiles: Tiles, bound: Bound, index: int) -> Tensor:
        shape = tiles.geometry
        mixed = self.qkv(rms_norm(x, self.input_norm, self.eps)).float().view(len(x), -1, shape.head_dim // 2, 2)
        torch.view_as_complex(mixed)[:, : -shape.kv_heads].mul_(tiles.turns)
        mixed = mixed.to(x.dtype).view(len(x), -1, shape.head_dim)
        bound.write(index, mixed[:, shape.heads :])
        return attend(mixed[:, : shape.heads], tiles, bound, index)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Zhang and Sennrich, "Root mean square layer normalization", 2019."""
    return F.rms_norm(x, weight.shape, weight, eps)


def silu_(x: Tensor) -> Tensor:
    """In place, in pieces that give every thread whole rows: the last numbers of a share are computed otherwise."""
    threads, at = torch.get_num_threads(), 0
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


def attend(queries: Tensor, tiles: Tiles, bound: Bound, index: int) -> Tensor:
    """`[n, heads, head_dim]` against the memory of layer `index`: `[n, heads * head_dim]`."""
    shape, found, first = tiles.geometry, [], 0
    if tiles.sources is not None:
        queries = queries.index_select(0, tiles.sources)
    for number, part in enumerate(tiles.parts):
        stop = first + len(part.slots) * part.width
        by_head = (-1, part.width, shape.kv_heads, shape.group, shape.head_dim)
        own = queries[first:stop].view(by_head).transpose(1, 2)
        keys, values = bound.read(index, number)
        scores = torch.bmm(own.reshape(-1, part.width * shape.group, shape.head_dim), keys.transpose(1, 2))
        weights = torch.add(part.mask, scores, alpha=shape.scale).softmax(-1)
        mixed = torch.bmm(weights, values).view(own.shape).transpose(1, 2)
        found.append(mixed.reshape(stop - first, -1))
        first = stop
    whole = found[0] if len(found) == 1 else torch.cat(found)
    return whole if tiles.places is None else whole.index_select(0, tiles.places)


def read_layer(checkpoint: Checkpoint, config: ModelConfig, index: int, precision: Precision) -> Layer:
    """Reads and rearranges the tensors of layer `index`. Raises ModelError."""
    c, prefix = config, f"model.layers.{index}."
    q_width, kv_width = c.heads * c.head_dim, c.kv_heads * c.head_dim

    def norm(name: str) -> Tensor:
        return checkpoint.tensor(f"{prefix}{name}.weight", (c.width,), DTYPES[precision])

    def read(name: str, out: int, columns: int) -> Matrix:
        return checkpoint.matrix(f"{prefix}{name}.weight", (out, columns), precision)

    query = rows(read("self_attn.q_proj", q_width, c.width), _paired(c.heads, c.head_dim))
    key = rows(read("self_attn.k_proj", kv_width, c.width), _paired(c.kv_heads, c.head_dim))
    value = read("self_attn.v_proj", kv_width, c.width)
    gate_up = cat([read("mlp.gate_proj", c.inner, c.width), read("mlp.up_proj", c.inner, c.width)])
    return Layer(
        input_norm=norm("input_layernorm"),
        qkv=linear(cat([query, key, value])),
        out=linear(read("self_attn.o_proj", c.width, q_width)),
        inner_norm=norm("post_attention_layernorm"),
        gate_up=linear(gate_up),
        down=linear(read("mlp.down_proj", c.width, c.inner)),
        eps=c.norm_eps,
    )


def _paired(heads: int, head_dim: int) -> Tensor:
    """The order of rows with the two halves of each head in turn, so that a pair to rotate is one complex number."""
    return torch.arange(heads * head_dim).view(heads, 2, head_dim // 2).transpose(1, 2).flatten()
