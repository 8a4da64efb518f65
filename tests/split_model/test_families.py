"""Every family against transformers' own in fp32: the same logits and greedy text, whole and cut in the middle."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from split_model.attention import Span
from split_model.cache import Cache
from split_model.config import ModelConfig, ModelError
from split_model.model import Model
from split_model.rope import Rope
from split_model.settings import Precision
from split_model.turns import Turns
from support.checkpoints import save_model

ROWS, PROMPT, ANSWER = 4, 40, 32
ROUGH = {"blur": 0.5, "initializer_range": 0.1}
LLAMA3 = {"rope_type": "llama3", "rope_theta": 10000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}  # fmt: skip
LINEAR = {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0}
YARN = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 256}
FAMILIES: dict[str, dict[str, Any]] = {
    "Llama, llama3": {"family": "Llama", "rope_parameters": LLAMA3},
    "Llama, linear": {"family": "Llama", "rope_parameters": LINEAR},
    "Mistral": {"family": "Mistral", "head_dim": 32},
    "Mistral, window": {"family": "Mistral", "sliding_window": 24},
    "Qwen2": {"family": "Qwen2", "tie_word_embeddings": True},
    "Qwen2, yarn": {"family": "Qwen2", "rope_parameters": YARN},
    "Qwen3": {"family": "Qwen3", "head_dim": 32},
    "Glm": {"family": "Glm"},
    "Glm4": {"family": "Glm4", "rms_norm_eps": 1e-5},
    "Glm4, no biases": {"family": "Glm4", "attention_bias": False},
}


class Case(NamedTuple):
    folder: Path
    reference: Any
    answers: torch.Tensor  # `[ROWS, PROMPT + ANSWER]`: prompts and their greedy answers


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    folder = tmp_path_factory.mktemp("family")
    reference = save_model(folder, num_hidden_layers=3, **ROUGH, **FAMILIES[request.param])
    ids = torch.randint(6, 512, (ROWS, PROMPT), generator=torch.Generator().manual_seed(5))
    answers = reference.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=ANSWER, do_sample=False,
                                 eos_token_id=None)  # fmt: skip
    return Case(folder, reference, answers)


def forward(models: list[Model], caches: list[Cache], spans: list[Span], ids: torch.Tensor) -> torch.Tensor:
    x = models[0].embed(ids)
    for model, cache in zip(models, caches, strict=True):
        x = model.run(x, model.first, model.stop, cache, model.tiles(spans))
    return models[-1].logits(x)


@pytest.mark.parametrize("cut", [None, 1], ids=["whole", "cut"])
def test_the_same_logits_and_greedy_text(case: Case, cut: int | None) -> None:
    if cut is None:
        models = [Model.load(case.folder, precision=Precision.FP32, check=False)]
    else:
        front = Model.load(case.folder, 0, cut, head=False, precision=Precision.FP32, check=False)
        models = [front, Model.load(case.folder, cut, embedding=False, precision=Precision.FP32, check=False)]
    caches = [model.new_cache(ROWS) for model in models]
    with torch.inference_mode():
        expected = case.reference(case.answers).logits
    prompts = [Span(row, 0, PROMPT) for row in range(ROWS)]
    found = [forward(models, caches, prompts, case.answers[:, :PROMPT].flatten()).view(ROWS, PROMPT, -1)]
    for position in range(PROMPT, PROMPT + ANSWER):
        ids = found[-1][:, -1].argmax(-1)
        assert torch.equal(ids, case.answers[:, position])
        found.append(forward(models, caches, [Span(row, position, 1) for row in range(ROWS)], ids).unsqueeze(1))
    assert (torch.cat(found, 1) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["Mistral, window", "Qwen2", "Qwen3", "Glm4"])
def test_bits_are_the_same_alone_in_chunks_and_among_strangers(name: str, tmp_path: Path) -> None:
    reference = save_model(tmp_path, num_hidden_layers=2, **ROUGH, **FAMILIES[name])
    model = Model.load(tmp_path)
    assert model.exact
    prompts = [torch.randint(6, 512, (length,), generator=torch.Generator().manual_seed(length))
               for length in (3, 150, 33, 131, 70)]  # fmt: skip
    cache = model.new_cache(len(prompts))
    together = [Span(row, 0, len(ids) - 1) for row, ids in enumerate(prompts)]
    forward([model], [cache], together, torch.cat([ids[:-1] for ids in prompts]))
    last = [Span(row, len(ids) - 1, 1) for row, ids in enumerate(prompts)]
    rows = forward([model], [cache], last, torch.cat([ids[-1:] for ids in prompts]))
    for ids, row in zip(prompts, rows, strict=True):
        own, found, at = model.new_cache(1), [], 0
        for count in (1, 2, 30, 37, 61, 19):
            piece = ids[at : at + count]
            found += [forward([model], [own], [Span(0, at, len(piece))], piece)] if len(piece) else []
            at += len(piece)
        whole = forward([model], [model.new_cache(1)], [Span(0, 0, len(ids))], ids)
        assert torch.equal(torch.cat(found), whole)
        assert torch.equal(row, whole[-1])
        with torch.inference_mode():
            expected = reference(ids[None]).logits[0].log_softmax(-1)
        assert (expected.exp() * (expected - whole.log_softmax(-1))).sum(-1).mean() <= 1e-3  # 3e-4 was seen


def test_a_window_shorter_than_the_prompt(tmp_path: Path) -> None:
    reference = save_model(tmp_path, family="Mistral", num_hidden_layers=2, **ROUGH, sliding_window=150)
    ids = torch.randint(6, 512, (700,), generator=torch.Generator().manual_seed(2))
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
    model = Model.load(tmp_path, precision=Precision.FP32)
    assert model.exact
    cache, found, at = model.new_cache(1), [], 0
    for count in (128, 300, 1, 1, 270):
        found.append(forward([model], [cache], [Span(0, at, count)], ids[at : at + count]))
        at += count
    assert (torch.cat(found) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_config_from_before_transformers_5_says_the_same(case: Case) -> None:
    path = case.folder / "config.json"
    text, expected = path.read_text(), ModelConfig.read(case.folder)
    raw = json.loads(text)
    rope = raw.pop("rope_parameters")
    raw |= {name: rope.pop(name) for name in ("rope_theta", "partial_rotary_factor") if name in rope}
    raw["rope_scaling"] = rope if rope["rope_type"] == "llama3" else {"type": rope.pop("rope_type"), **rope}
    try:
        path.write_text(json.dumps(raw))
        assert ModelConfig.read(case.folder) == expected
    finally:
        path.write_text(text)


# In the form of the config.json files that are published under these names.
PUBLISHED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "Llama-2-7b-hf": (
        {"architectures": ["LlamaForCausalLM"], "hidden_size": 4096, "intermediate_size": 11008, "vocab_size": 32000,
         "max_position_embeddings": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "pretraining_tp": 1,
         "rms_norm_eps": 1e-05, "rope_scaling": None, "tie_word_embeddings": False},
        {"rope": Rope(10000.0), "head_dim": 128, "rotary": 128, "kv_heads": 32, "window": None},
    ),
    "Llama-3.2-1B": (
        {"architectures": ["LlamaForCausalLM"], "attention_bias": False, "head_dim": 64, "hidden_size": 2048,
         "intermediate_size": 8192, "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
         "num_hidden_layers": 16, "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 500000.0,
         "rope_scaling": {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "rope_type": "llama3",
                          "original_max_position_embeddings": 8192}, "vocab_size": 128256},
        {"rope": Rope(500000.0, "llama3", 32.0, 8192, 1.0, 4.0)},
    ),
    "SmolLM2-135M": (
        {"architectures": ["LlamaForCausalLM"], "hidden_size": 576, "intermediate_size": 1536, "is_llama_config": True,
         "max_position_embeddings": 8192, "num_attention_heads": 9, "num_hidden_layers": 30, "num_key_value_heads": 3,
         "rope_interleaved": False, "rope_scaling": None, "rope_theta": 100000, "vocab_size": 49152},
        {"rope": Rope(100000.0), "head_dim": 64},
    ),
    "Mistral-7B-v0.1": (
        {"architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32000,
         "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "rope_theta": 10000.0,
         "num_key_value_heads": 8, "sliding_window": 4096},
        {"window": 4096},
    ),
    "Mistral-7B-v0.3": (
        {"architectures": ["MistralForCausalLM"], "hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 32768,
         "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "rope_theta": 1e6,
         "num_key_value_heads": 8, "sliding_window": None},
        {"window": None},
    ),
    "Qwen2.5-0.5B": (
        {"architectures": ["Qwen2ForCausalLM"], "hidden_size": 896, "intermediate_size": 4864, "vocab_size": 151936,
         "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24,
         "num_key_value_heads": 2, "rope_theta": 1e6, "sliding_window": 32768, "use_mrope": False,
         "use_sliding_window": False, "tie_word_embeddings": True},
        {"window": None, "qkv_bias": True, "tied": True, "head_dim": 64},
    ),
    "Qwen3-0.6B": (
        {"architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_size": 1024,
         "intermediate_size": 3072, "max_position_embeddings": 40960, "max_window_layers": 28,
         "num_attention_heads": 16, "num_hidden_layers": 28, "num_key_value_heads": 8, "tie_word_embeddings": True,
         "rope_theta": 1000000, "rope_scaling": None, "sliding_window": None, "use_sliding_window": False,
         "vocab_size": 151936},
        {"qk_norm": True, "qkv_bias": False, "rotary": 128},
    ),
    "glm-4-9b-chat-hf": (
        {"architectures": ["GlmForCausalLM"], "attention_bias": True, "head_dim": 128, "hidden_size": 4096,
         "intermediate_size": 13696, "max_position_embeddings": 131072, "num_attention_heads": 32,
         "num_hidden_layers": 40, "num_key_value_heads": 2, "rms_norm_eps": 1.5625e-07, "rope_theta": 10000.0,
         "partial_rotary_factor": 0.5, "vocab_size": 151552, "eos_token_id": [151329, 151336, 151338]},
        {"qkv_bias": True, "rotary": 64, "interleaved": True, "fused_gate_up": True, "post_norms": False,
         "stops": frozenset({151329, 151336, 151338})},
    ),
    "GLM-4-9B-0414": (
        {"architectures": ["Glm4ForCausalLM"], "attention_bias": False, "head_dim": 128, "hidden_size": 4096,
         "intermediate_size": 13696, "max_position_embeddings": 32768, "num_attention_heads": 32,
         "num_hidden_layers": 40, "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "rope_theta": 10000.0,
         "partial_rotary_factor": 0.5, "vocab_size": 151552},
        {"qkv_bias": False, "rotary": 64, "interleaved": True, "fused_gate_up": True, "post_norms": True},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name: str, tmp_path: Path) -> None:
    raw, expected = PUBLISHED[name]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    config = ModelConfig.read(tmp_path)
    assert {field: getattr(config, field) for field in expected} == expected


def test_rotation_may_be_said_twice_in_the_same_words(tmp_path: Path) -> None:
    raw, expected = PUBLISHED["Llama-3.2-1B"]
    again = {**raw["rope_scaling"], "rope_theta": raw["rope_theta"], "factor": 32}
    (tmp_path / "config.json").write_text(json.dumps(raw | {"rope_parameters": again}))
    assert ModelConfig.read(tmp_path).rope == expected["rope"]
    split = {"rope_scaling": {"rope_type": "llama3"}, "rope_parameters": again, "rope_theta": None}
    (tmp_path / "config.json").write_text(json.dumps(raw | split))
    assert ModelConfig.read(tmp_path).rope == expected["rope"]  # each may say a part


@pytest.mark.parametrize(
    ("name", "entries", "words"),
    [
        ("Qwen2.5-0.5B", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 20},
         r"sliding_window = 4096 .*in 4 of 24"),
        ("Qwen2.5-0.5B", {"use_sliding_window": 1}, "use_sliding_window is 1"),
        ("Qwen2.5-0.5B", {"use_mrope": True}, "use_mrope = True"),
        ("Qwen3-0.6B", {"attention_bias": True}, "attention_bias = True"),
        ("Qwen3-0.6B", {"layer_types": ["full_attention", "linear_attention"]}, "layer_types"),
        ("Llama-2-7b-hf", {"sliding_window": 512}, "sliding_window = 512"),
        ("Llama-2-7b-hf", {"partial_rotary_factor": 0.5}, r"partial_rotary_factor = 0\.5"),
        ("glm-4-9b-chat-hf", {"partial_rotary_factor": 0.01}, r"partial_rotary_factor = 0\.01"),
        ("Llama-2-7b-hf", {"rope_theta": float("nan")}, "rope_theta is nan"),
        ("Llama-2-7b-hf", {"rope_theta": 10**400}, "rope_theta is 1000"),
        ("Llama-2-7b-hf", {"max_position_embeddings": 10**20}, "max_position_embeddings is 1000"),
        ("Llama-2-7b-hf", {"head_dim": 63}, "head_dim 63"),
        ("Llama-2-7b-hf", {"num_attention_heads": 8192}, "head_dim is 0"),
        ("Llama-2-7b-hf", {"rope_scaling": {"type": "longrope"}}, r"rope_scaling\.rope_type = 'longrope'"),
        ("Llama-2-7b-hf", {"rope_scaling": {"type": ["yarn"]}}, r"rope_scaling\.rope_type = \['yarn'\]"),
        ("Llama-2-7b-hf", {"rope_scaling": {"type": "linear"}}, "factor is None"),
        ("Llama-2-7b-hf", {"rope_scaling": {"type": "linear", "factor": 0}}, "factor is 0"),
        ("Llama-2-7b-hf", {"rope_scaling": {"type": "yarn", "factor": 4.0, "mscale": 0.7}}, "mscale = 0.7"),
        ("Llama-3.2-1B", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0,
                                           "high_freq_factor": 4.0}}, "rope_scaling makes no sense"),
        ("Llama-2-7b-hf", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "full_attention"),
        ("Llama-3.2-1B", {"rope_parameters": {"rope_type": "default"}},
         r"rope_scaling\.rope_type is 'llama3', but rope_parameters\.rope_type is 'default'"),
        ("Llama-3.2-1B", {"rope_parameters": LLAMA3}, r"factor is 32\.0, but rope_parameters\.factor is 8"),
        ("Llama-3.2-1B", {"rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4}},
         r"rope_parameters\.rope_theta is 10000\.0, but rope_theta is 500000\.0"),
        ("glm-4-9b-chat-hf", {"rope_scaling": {"type": "default", "partial_rotary_factor": 1.0}},
         r"rope_scaling\.partial_rotary_factor is 1\.0, but partial_rotary_factor is 0\.5"),
        ("Llama-2-7b-hf", {"architectures": {"0": "LlamaForCausalLM"}}, "architecture"),
        ("Llama-2-7b-hf", {"architectures": ["Gemma2ForCausalLM"]}, "architectures = 'Gemma2ForCausalLM'"),
        *[("Llama-2-7b-hf", {"quantization_config": {"quant_method": method, "bits": 4}}, f"quant_method = '{method}'")
          for method in ("gptq", "awq", "bitsandbytes")],
    ],
)  # fmt: skip
def test_what_is_not_supported_is_refused_by_name(
    name: str, entries: dict[str, Any], words: str, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(PUBLISHED[name][0] | entries))
    with pytest.raises(ModelError, match=words) as refusal:
        ModelConfig.read(tmp_path)
    assert str(tmp_path / "config.json") in str(refusal.value)


@pytest.mark.parametrize("entries", [{"layer_types": ["sliding_attention"] * 24}, {"max_window_layers": 0}])
def test_a_window_in_every_layer_is_a_window(entries: dict[str, Any], tmp_path: Path) -> None:
    raw = PUBLISHED["Qwen2.5-0.5B"][0] | {"use_sliding_window": True, "sliding_window": 512} | entries
    (tmp_path / "config.json").write_text(json.dumps(raw))
    assert ModelConfig.read(tmp_path).window == 512


def test_the_arithmetic_names_what_the_weights_do_not_show(tmp_path: Path) -> None:
    changes: list[dict[str, Any]] = [{}, {"sliding_window": 512}, {"rope_theta": 2.0}]
    changes += [{"rope_scaling": said, "rope_theta": None} for said in (LINEAR, LLAMA3)]
    seen = set()
    for entries in changes:
        (tmp_path / "config.json").write_text(json.dumps(PUBLISHED["Mistral-7B-v0.3"][0] | entries))
        seen.add(ModelConfig.read(tmp_path).arithmetic)
    assert len(seen) == len(changes)


def test_a_position_turns_by_the_same_bits_in_every_step() -> None:
    turns = Turns(Rope(10000.0, "yarn", 4.0, 8192, 1.0, 32.0, 1.1), 64, 128)
    positions = torch.cat([torch.arange(300), torch.tensor([4095, 8191, 65535, 131071])])
    whole = turns(positions)
    assert torch.equal(torch.cat([turns(positions[row : row + 1]) for row in range(len(positions))]), whole)
    assert torch.equal(torch.cat([turns(piece) for piece in positions.split(7)]), whole)
    assert torch.equal(whole[:, 0, 32:], torch.ones(len(positions), 32, dtype=torch.complex64))
