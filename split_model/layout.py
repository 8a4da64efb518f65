"""Which tensors a checkpoint has: names and shapes, as the config gives them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from split_model.config import ModelConfig

Shape = tuple[int, ...]
EMBEDDING, NORM, HEAD = "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"
PROJECTIONS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
# What published checkpoints carry and nothing needs: rotations, which follow from the config.
UNUSED = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.(inv_freq|cos_cached|sin_cached)")
OF_A_LAYER = re.compile(r"model\.layers\.(0|[1-9]\d{0,5})\.(.+)")


def layer_name(index: int, name: str) -> str:
    """The full name of a layer's tensor."""
    return f"model.layers.{index}.{name}"


def layer_shapes(config: ModelConfig) -> dict[str, Shape]:
    """Of one layer, by name within it."""
    c = config
    wide = (c.heads * c.head_dim, c.kv_heads * c.head_dim, c.kv_heads * c.head_dim)
    shapes: dict[str, Shape] = {f"{name}.weight": (rows, c.width) for name, rows in zip(PROJECTIONS, wide, strict=True)}
    if c.qkv_bias:
        shapes |= {f"{name}.bias": (rows,) for name, rows in zip(PROJECTIONS, wide, strict=True)}
    if c.qk_norm:
        shapes |= dict.fromkeys(("self_attn.q_norm.weight", "self_attn.k_norm.weight"), (c.head_dim,))
    if c.fused_gate_up:
        shapes["mlp.gate_up_proj.weight"] = (2 * c.inner, c.width)
    else:
        shapes |= dict.fromkeys(("mlp.gate_proj.weight", "mlp.up_proj.weight"), (c.inner, c.width))
    norms = ["input_layernorm.weight", "post_attention_layernorm.weight"]
    norms += ["post_self_attn_layernorm.weight", "post_mlp_layernorm.weight"] if c.post_norms else []
    shapes |= dict.fromkeys(norms, (c.width,))
    return shapes | {"self_attn.o_proj.weight": (c.width, wide[0]), "mlp.down_proj.weight": (c.width, c.inner)}


def needed(config: ModelConfig, first: int, stop: int, embedding: bool, head: bool) -> Iterator[tuple[str, Shape]]:
    """Those of layers `[first, stop)`, and of the embedding and the head where asked for."""
    table = (config.vocabulary, config.width)
    if embedding or (head and config.tied):
        yield EMBEDDING, table
    if head:
        yield NORM, (config.width,)
    if head and not config.tied:
        yield HEAD, table
    shapes = layer_shapes(config)
    for index in range(first, stop):
        for name, shape in shapes.items():
            yield layer_name(index, name), shape


def strange(config: ModelConfig, names: Iterable[str]) -> Iterator[str]:
    """Those that are no tensors of such a model, not even unused ones."""
    shapes = layer_shapes(config)
    for name in names:
        plain = name.removesuffix("_scale")  # of a quantised matrix, beside it
        own = OF_A_LAYER.fullmatch(plain)
        known = own is not None and int(own[1]) < config.layers and own[2] in shapes
        if not known and plain not in (EMBEDDING, NORM, HEAD) and not UNUSED.fullmatch(name):
            yield name
