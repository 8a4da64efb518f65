"""Checkpoints of published shapes with random weights: for Hugging Face's readers, and as GGUF for llama.cpp's."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PretrainedConfig, Qwen2Config

COMMON = {"max_position_embeddings": 2048, "tie_word_embeddings": True, "bos_token_id": 0, "eos_token_id": 0,
          "dtype": "bfloat16"}  # fmt: skip
SHAPES: dict[str, tuple[str, PretrainedConfig]] = {
    "135m": ("SmolLM2-135M", LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, rope_theta=100000.0, rms_norm_eps=1e-5, **COMMON)),
    "0.5b": ("Qwen2.5-0.5B", Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, rope_theta=1000000.0, rms_norm_eps=1e-6, **COMMON)),
}  # fmt: skip
NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
PRODUCTS = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
            "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
            "mlp.down_proj": "ffn_down"}  # fmt: skip


def save(shape: str, folder: Path) -> None:
    """In bfloat16; random weights take the same time as trained ones."""
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(SHAPES[shape][1]).to(torch.bfloat16).save_pretrained(folder)


def save_gguf(folder: Path, path: Path) -> None:
    """The same checkpoint as GGUF in float16, without a tokenizer. Needs the package `gguf`."""
    import gguf

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config, tensors = model.config, model.state_dict()
    out = gguf.GGUFWriter(path, config.model_type)
    out.add_context_length(config.max_position_embeddings)
    out.add_embedding_length(config.hidden_size)
    out.add_block_count(config.num_hidden_layers)
    out.add_feed_forward_length(config.intermediate_size)
    out.add_head_count(config.num_attention_heads)
    out.add_head_count_kv(config.num_key_value_heads)
    out.add_layer_norm_rms_eps(config.rms_norm_eps)
    out.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    out.add_rope_freq_base(config.rope_parameters["rope_theta"])
    out.add_vocab_size(config.vocab_size)
    out.add_tokenizer_model("no_vocab")
    out.add_tensor("token_embd.weight", tensors["model.embed_tokens.weight"].numpy().astype(np.float16))
    out.add_tensor("output_norm.weight", tensors["model.norm.weight"].numpy())
    for index in range(config.num_hidden_layers):
        layer, block = f"model.layers.{index}.", f"blk.{index}."
        for name, theirs in NORMS.items():
            out.add_tensor(f"{block}{theirs}.weight", tensors[f"{layer}{name}.weight"].numpy())
        for name, theirs in PRODUCTS.items():
            out.add_tensor(f"{block}{theirs}.weight", tensors[f"{layer}{name}.weight"].numpy().astype(np.float16))
            if f"{layer}{name}.bias" in tensors:
                out.add_tensor(f"{block}{theirs}.bias", tensors[f"{layer}{name}.bias"].numpy())
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()


def quantise(source: Path, target: Path, kind: str) -> None:
    """By llama.cpp's own rules for `Q8_0` or `Q4_0` (which keeps a tied head in 8 bits). Raises SystemExit."""
    import llama_cpp

    wanted = llama_cpp.llama_model_quantize_default_params()
    wanted.ftype = {"Q8_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, "Q4_0": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0}[kind]
    if llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(wanted)):
        raise SystemExit(f"llama.cpp did not quantise {source} to {kind}")
