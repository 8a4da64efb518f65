"""One transformer block: RMSNorm, rotary grouped-query attention, SwiGLU."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from split_model.attention import TILE, Geometry, Tiles
from split_model.cache import Bound
from split_model.config import ModelConfig
from split_model.weights import Checkpoint

ROWS = 4  # an fp32 product gives a row the same bits only when the number of rows is a multiple of this


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """`x @ weight.T` with the same bits for a row whatever the other rows are."""
    if x.dtype != torch.float32 or len(x) % ROWS == 0:
        return F.linear(x, weight)
    padded = F.pad(x, (0, 0, 0, -len(x) % ROWS))
    return F.linear(padded, weight)[: len(x)]


@dataclass(frozen=True, slots=True)
class Layer:
    """Weights of one block; query heads are ordered so that those of one key head lie apart by `kv_heads`."""

    input_norm: Tensor
    qkv: Tensor
    out: Tensor
    inner_norm: Tensor
    gate_up: Tensor
    down: Tensor
    eps: float

    def __call__(self, x: Tensor, tiles: Tiles, bound: Bound, index: int) -> Tensor:
        """`[n, width]` to `[n, width]`; `index` is the layer's place in the KV memory."""
        x = x + linear(self._attend(x, tiles, bound, index), self.out)
        gate, up = linear(self._norm(x, self.inner_norm), self.gate_up).chunk(2, dim=1)
        return x + linear(F.silu(gate) * up, self.down)

    def _norm(self, x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, weight.shape, weight, self.eps)

    def _attend(self, x: Tensor, tiles: Tiles, bound: Bound, index: int) -> Tensor:
        shape = tiles.geometry
        mixed = linear(self._norm(x, self.input_norm), self.qkv).float().view(len(x), -1, shape.head_dim)
        turned = torch.view_as_complex(mixed[:, : -shape.kv_heads].unflatten(2, (-1, 2)))
        turned.mul_(tiles.turns)
        split = shape.group * shape.kv_heads
        bound.write(index, mixed[:, split:].view(len(x), 2, shape.kv_heads, shape.head_dim))
        tiles.queries[tiles.row_index] = mixed[:, :split].flatten(1).to(tiles.queries.dtype)
        return attend(tiles, bound, index)


def attend(tiles: Tiles, bound: Bound, index: int) -> Tensor:
    """Attention of the queries in `tiles`: `[n, heads * head_dim]`."""
    shape = tiles.geometry
    found = []
    for part in tiles.parts:
        count = part.stop - part.first
        queries = tiles.queries[part.first * TILE : part.stop * TILE]
        queries = queries.view(count, TILE * shape.group, shape.kv_heads, shape.head_dim).transpose(1, 2)
        keys, values = bound.read(index, part)
        mixed = F.scaled_dot_product_attention(queries, keys, values, part.mask)
        found.append(mixed.transpose(1, 2).reshape(count * TILE, -1))
    whole = found[0] if len(found) == 1 else torch.cat(found)
    return whole[tiles.row_index]


def read_layer(checkpoint: Checkpoint, config: ModelConfig, index: int, dtype: torch.dtype) -> Layer:
    """Reads and rearranges the tensors of layer `index`. Raises ModelError."""
    c, prefix = config, f"model.layers.{index}."
    q_width, kv_width = c.heads * c.head_dim, c.kv_heads * c.head_dim

    def read(name: str, *shape: int) -> Tensor:
        return checkpoint.tensor(f"{prefix}{name}.weight", shape, dtype)

    query = _interleaved(read("self_attn.q_proj", q_width, c.width), c)
    key = _interleaved(read("self_attn.k_proj", kv_width, c.width), c)
    value = read("self_attn.v_proj", kv_width, c.width)
    out = read("self_attn.o_proj", c.width, q_width)
    by_group = (c.kv_heads, c.heads // c.kv_heads, c.head_dim)
    query = query.unflatten(0, by_group).transpose(0, 1).reshape(q_width, c.width)
    out = out.unflatten(1, by_group).transpose(1, 2).reshape(c.width, q_width)
    return Layer(
        input_norm=read("input_layernorm", c.width),
        qkv=torch.cat([query, key, value]),
        out=out,
        inner_norm=read("post_attention_layernorm", c.width),
        gate_up=torch.cat([read("mlp.gate_proj", c.inner, c.width), read("mlp.up_proj", c.inner, c.width)]),
        down=read("mlp.down_proj", c.width, c.inner),
        eps=c.norm_eps,
    )


def _interleaved(weight: Tensor, config: ModelConfig) -> Tensor:
    """Puts the two halves of each head's rows in turn, so that a pair to rotate is one complex number."""
    return weight.unflatten(0, (-1, 2, config.head_dim // 2)).transpose(1, 2).reshape(weight.shape)


__all__ = ["Geometry", "Layer", "attend", "linear", "read_layer"]
