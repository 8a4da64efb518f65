"""Checkpoints that cannot be used: one line that names file and tensor, from the headers where they tell."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from split_model.config import ModelError
from split_model.model import Model
from split_model.tokenizer import ChatTokenizer
from support.checkpoints import change, rewrite, save_model

WEIGHTS = r"model\.safetensors: "


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save_model(tmp_path, shard="200KB")
    return tmp_path


def test_missing_weights_are_named(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: no such file"):
        Model.load(folder)


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_a_truncated_file_is_refused(folder: Path, keep: int) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        Model.load(folder)


def test_a_file_of_garbage_is_refused(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(bytes(range(256)) * 64)
    with pytest.raises(ModelError, match="not a whole safetensors file"):
        Model.load(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    rewrite(folder, model__layers__2__mlp__up_proj__weight=None)
    with pytest.raises(ModelError, match=r"model\.layers\.2\.mlp\.up_proj\.weight is missing"):
        Model.load(folder)
    assert Model.load(folder, 3).first == 3  # layers that were not asked for need not be there


def test_a_wrong_shape_is_named(folder: Path) -> None:
    rewrite(folder, model__norm__weight=torch.ones(65))
    with pytest.raises(ModelError, match=r"model\.norm\.weight has shape \(65,\), the config says \(64,\)"):
        Model.load(folder)


def test_a_scale_beside_a_norm_hides_nothing(folder: Path) -> None:
    rewrite(folder, model__norm__weight=torch.ones(65), model__norm__weight_scale=torch.ones(65))
    with pytest.raises(ModelError, match=r"model\.norm\.weight"):
        Model.load(folder)


def test_half_a_surrogate_pair_is_no_text(folder: Path) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"bos_token": "\ud800"}))
    with pytest.raises(ModelError, match=r"tokenizer_config\.json: not readable as JSON"):
        ChatTokenizer.load(folder)


def test_a_wrong_type_is_named(folder: Path) -> None:
    rewrite(folder, model__norm__weight=torch.ones(64, dtype=torch.int32))
    with pytest.raises(ModelError, match=r"model\.norm\.weight is I32"):
        Model.load(folder)


def test_layers_without_end_are_missed_at_once(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.layers\.5\.\S+ is missing"):
        Model.load(change(folder, num_hidden_layers=10**12))


@pytest.mark.parametrize(
    "name",
    ["model.layers.5.mlp.up_proj.weight", "model.layers.0.self_attn.q_proj.bias",
     "model.layers.0.self_attn.q_norm.weight", "model.layers.-1.input_layernorm.weight",
     "model.layers.0.mlp.experts.0.up_proj.weight", "model.layers.00.mlp.up_proj.weight",
     "model.vision_tower.weight", "score.weight"],
)  # fmt: skip
def test_an_unknown_tensor_is_named(folder: Path, name: str) -> None:
    rewrite(folder, **{name: torch.ones(64)})
    with pytest.raises(ModelError, match=f"{WEIGHTS}tensor {name} is not one of a LlamaForCausalLM of 5 layers"):
        Model.load(folder, 1, 2, embedding=False, head=False)


def test_what_published_checkpoints_carry_besides_is_let_be(folder: Path) -> None:
    change(folder, tie_word_embeddings=True)  # with a head of its own in the file
    names = ("model.rotary_emb.inv_freq", "model.layers.0.self_attn.rotary_emb.inv_freq")
    rewrite(folder, **{name: torch.ones(8) for name in names})
    assert Model.load(folder, check=False).has_head


def test_headers_are_looked_at_before_any_weight(folder: Path) -> None:
    """An embedding full of NaN is read first; the last layer's shape is found wrong before."""
    rewrite(folder, model__embed_tokens__weight=torch.full((512, 64), torch.nan),
            model__layers__4__mlp__down_proj__weight=torch.ones(64, 161))  # fmt: skip
    with pytest.raises(ModelError, match=r"model\.layers\.4\.mlp\.down_proj\.weight has shape \(64, 161\)"):
        Model.load(folder)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("number", [torch.nan, torch.inf, -torch.inf])
def test_a_number_that_is_not_finite_is_named(folder: Path, dtype: torch.dtype, number: float) -> None:
    name = "model.layers.3.mlp.up_proj.weight"
    weight = load_file(folder / "model.safetensors")[name].to(dtype)
    weight[-1, -1] = number
    rewrite(folder, **{name: weight})
    with pytest.raises(ModelError, match=f"{WEIGHTS}{name} holds a number that is not finite"):
        Model.load(folder)
    assert Model.load(folder, 0, 3, head=False, check=False).stop == 3


@pytest.mark.parametrize(
    ("weight_map", "words"),
    [
        ("absent", "index.json: no weight_map"),
        ([], "index.json: no weight_map"),
        ({}, "index.json: no weight_map"),
        ({"a": "../outside.safetensors"}, "a is in '../outside.safetensors', not a plain file name"),
        ({"a": 5}, "a is in 5, not a plain file name"),
        ({"a": ".."}, "not a plain file name"),
        ({"a": "gone.safetensors"}, "gone.safetensors: no such file"),
        ({"model.norm.bias": "model.safetensors"}, "index.json: model.norm.bias is not in model.safetensors"),
    ],
)
def test_a_bad_index_is_refused(folder: Path, weight_map: Any, words: str) -> None:
    text = json.dumps({} if weight_map == "absent" else {"weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ModelError, match=words):
        Model.load(folder)


def test_a_missing_and_a_truncated_shard_are_named(sharded: Path) -> None:
    last = sorted(sharded.glob("*.safetensors"))[-1]
    last.write_bytes(last.read_bytes()[:-7])
    with pytest.raises(ModelError, match=f"{last.name}: not a whole safetensors file"):
        Model.load(sharded)
    last.unlink()
    with pytest.raises(ModelError, match=f"{last.name}: no such file"):
        Model.load(sharded)


def test_a_bias_that_the_family_wants_is_missed_by_name(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"model\.layers\.0\.self_attn\.q_proj\.bias is missing"):
        Model.load(change(folder, architectures=["Qwen2ForCausalLM"]))
