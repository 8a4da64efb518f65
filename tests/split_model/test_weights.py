"""Checkpoint directories: what loads, what is refused and with which words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from split_model.attention import Span
from split_model.config import ModelConfig, ModelError
from split_model.model import Model
from split_model.rope import Rope
from split_model.settings import Precision
from support.checkpoints import change, checkpoint, rewrite, save_model
from support.phone import logits


def test_the_config_is_read() -> None:
    config = ModelConfig.read(checkpoint())
    assert (config.vocabulary, config.width, config.layers, config.heads, config.kv_heads) == (512, 64, 5, 4, 2)
    assert (config.head_dim, config.inner, config.context, config.rope) == (16, 160, 1024, Rope(10000.0))
    assert (config.tied, config.bos, config.stops, config.name) == (False, 0, frozenset({1}), "tiny-llama")


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        ({"rope_parameters": "absent", "rope_theta": 7.0}, 7.0),
        ({"rope_parameters": "absent", "rope_theta": "absent"}, 10000.0),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 8.0}}, 8.0),
        ({"rope_parameters": "absent", "rope_theta": 9.0, "rope_scaling": None}, 9.0),
    ],
)
def test_rope_theta_of_old_and_new_configs(folder: Path, entries: dict[str, Any], expected: float) -> None:
    assert ModelConfig.read(change(folder, **entries)).rope == Rope(expected)


def test_what_may_be_left_out(folder: Path) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    change(folder, head_dim="absent", num_key_value_heads="absent", tie_word_embeddings="absent", eos_token_id=[4, 5])
    config = ModelConfig.read(folder)
    assert (config.head_dim, config.kv_heads, config.tied, config.stops) == (16, 4, False, frozenset({4, 5}))


def test_stops_come_from_the_generation_config_first(folder: Path) -> None:
    (folder / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert ModelConfig.read(folder).stops == {7, 8}


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel"),
        ({"architectures": None}, "architectures = None"),
        ({"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ({"attention_bias": True}, "attention_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"rope_parameters": {"rope_type": "llama3", "rope_theta": 5.0}}, "factor is None"),
        ({"rope_parameters": "absent", "rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_scaling.*'dynamic'"),
        ({"rope_parameters": [1]}, "rope_parameters"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"num_hidden_layers": -1}, "num_hidden_layers is -1"),
        ({"hidden_size": "64"}, "hidden_size is '64'"),
        ({"vocab_size": "absent"}, "vocab_size is None"),
        ({"num_key_value_heads": 3}, "3 key heads"),
        ({"eos_token_id": "</s>"}, "eos_token_id"),
        ({"bos_token_id": 1.5}, "bos_token_id"),
    ],
)
def test_an_unsupported_config_is_refused_by_name(folder: Path, entries: dict[str, Any], words: str) -> None:
    (folder / "generation_config.json").unlink(missing_ok=True)
    with pytest.raises(ModelError, match=words) as refusal:
        ModelConfig.read(change(folder, **entries))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["", "[]", "{", "\xff\xfe"])
def test_a_config_that_is_no_object_is_refused(folder: Path, text: str) -> None:
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(ModelError, match=r"config\.json"):
        Model.load(folder)


def test_a_missing_directory_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="nowhere"):
        Model.load(tmp_path / "nowhere")


def test_layers_outside_the_model_are_refused() -> None:
    for first, stop in ((-1, 3), (3, 2), (0, 6)):
        with pytest.raises(ValueError, match="layers"):
            Model.load(checkpoint(), first, stop)


def test_shards_load_as_one_file(tmp_path: Path) -> None:
    save_model(tmp_path, shard="200KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    sharded, single = Model.load(tmp_path), Model.load(checkpoint())
    assert torch.equal(logits(sharded), logits(single))
    assert sharded.weights_digest == single.weights_digest


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_types_are_converted(folder: Path, dtype: torch.dtype) -> None:
    whole = load_file(folder / "model.safetensors")
    save_file({name: tensor.to(dtype) for name, tensor in whole.items()}, folder / "model.safetensors")
    assert Model.load(folder, precision=Precision.FP32).dtype == torch.float32


def test_the_digest_is_the_same_for_any_part_and_other_for_other_weights(folder: Path) -> None:
    whole = Model.load(folder).weights_digest
    assert len(whole) == 16
    assert Model.load(folder, 2, 4, embedding=False, head=False).weights_digest == whole
    rewrite(folder, model__layers__4__mlp__up_proj__weight=torch.zeros(160, 64))
    assert Model.load(folder).weights_digest != whole


def test_the_digest_covers_what_the_config_changes(folder: Path) -> None:
    whole = Model.load(folder).weights_digest
    change(folder, rms_norm_eps=0.01)
    assert Model.load(folder).weights_digest != whole


def test_a_large_tensor_is_digested_by_sample(tmp_path: Path) -> None:
    save_model(tmp_path, num_hidden_layers=1, vocab_size=9000)
    whole = Model.load(tmp_path).weights_digest
    table = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(tmp_path, model__embed_tokens__weight=table * 1.01)
    assert Model.load(tmp_path).weights_digest != whole


def test_a_part_without_embedding_or_head_says_so() -> None:
    middle = Model.load(checkpoint(), 1, 3, embedding=False, head=False)
    with pytest.raises(ValueError, match="no embedding"):
        middle.embed(torch.tensor([1]))
    with pytest.raises(ValueError, match="no head"):
        middle.logits(torch.zeros(1, 64, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match=r"layers \[0, 2\), held are \[1, 3\)"):
        middle.run(torch.zeros(1, 64), 0, 2, middle.new_cache(1), middle.tiles([Span(0, 0, 1)]))


def test_a_file_replaced_later_changes_nothing(folder: Path) -> None:
    model = Model.load(folder)
    before = logits(model)
    (folder / "model.safetensors").write_bytes(b"")
    assert torch.equal(logits(model), before)
