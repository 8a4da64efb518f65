"""Weights as integers: what they stand for, how they are stored, and that products with them are exact."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from split_model import integers
from split_model.check import numerics
from split_model.config import ModelConfig, ModelError
from split_model.linear import linear
from split_model.model import Model
from split_model.quantised import Quantised, cat, description, lookup, quantise, rows, tensors
from split_model.settings import Precision
from support.checkpoints import checkpoint
from support.phone import logits

INT8, FAST, INT4 = Precision.INT8, Precision.INT8_FAST, Precision.INT4
SHAPES = [(96, 64), (512, 64), (320, 160), (960, 576), (576, 1536), (1152, 896)]


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def activations(count: int, width: int) -> torch.Tensor:
    """With outliers, a row of zeros and very large and very small rows, as hidden states may have."""
    x = noise(count, width, seed=1)
    x[:, 7] *= 30
    x[::5] *= 1e-6
    x[1::7] *= 1e6
    x[3::11] = 0
    return x.bfloat16()


@cache
def singly(held: Quantised, x: torch.Tensor) -> torch.Tensor:
    product = linear(held)
    return torch.cat([product(row) for row in x.split(1)])


def store(folder: Path, precision: Precision) -> Path:
    """The checkpoint with its matrices as integers, and a config that says so."""
    path = folder / "model.safetensors"
    held: dict[str, torch.Tensor] = {}
    for name, tensor in load_file(path).items():
        table = name in ("model.embed_tokens.weight", "lm_head.weight")
        own = INT8 if table else precision
        held |= tensors(name, quantise(tensor, own)) if tensor.ndim == 2 else {name: tensor.bfloat16()}
    save_file(held, path)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = description(precision)
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("shape", SHAPES)
def test_integers_stand_for_the_nearest_of_their_steps(shape: tuple[int, int]) -> None:
    weight = noise(*shape)
    weight[5] = 0
    held = quantise(weight, INT8)
    assert held.shape == shape
    assert held.values.dtype == torch.int8
    assert ((held.float() - weight).abs() <= held.scale.unsqueeze(1) * 0.5001).all()
    held = quantise(weight, INT4)
    assert (held.shape, held.group, held.values.nbytes) == (shape, 32, weight.numel() // 2)
    step = held.scale.float().abs().repeat_interleave(32, 1)
    assert ((held.float() - weight).abs() <= step * 1.05).all()  # 7 is as far as the other side goes
    assert (held.float()[5] == 0).all()


@pytest.mark.parametrize("precision", [INT8, INT4])
def test_rows_are_chosen_and_joined_as_those_of_floats(precision: Precision) -> None:
    first, second = quantise(noise(96, 64), precision), quantise(noise(32, 64, seed=2), precision)
    index = torch.randperm(96, generator=torch.Generator().manual_seed(3))
    both = cat([rows(first, index), second])
    assert isinstance(both, Quantised)
    assert torch.equal(both.float(), torch.cat([first.float()[index], second.float()]))
    assert torch.equal(lookup(first, index[:5], torch.bfloat16), first.float()[index[:5]].bfloat16())


def test_int4_wants_whole_groups() -> None:
    with pytest.raises(ModelError, match="32 divides, not 40"):
        quantise(noise(64, 40), INT4)


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_gives_a_row_the_same_bits_in_any_batch(shape: tuple[int, int]) -> None:
    """As it lies in memory, and laid out anew."""
    held, x = quantise(noise(*shape), INT8), activations(70, shape[1])
    for product in (linear(held), linear(held, shared=True)):
        for count in (*range(1, 34), 47, 64, 70):
            assert torch.equal(product(x[:count]), singly(held, x)[:count]), count
            assert torch.equal(product(x[70 - count :]), singly(held, x)[70 - count :]), count


@pytest.mark.parametrize("shared", [False, True], ids=["packed", "shared"])
def test_int8_sums_integers_without_overflow(shared: bool) -> None:
    """All of one sign and as large as can be: the sums are the largest there are."""
    weight = torch.full((64, 1536), 0.5)
    weight[1::2] = -0.5
    found = linear(quantise(weight, INT8), shared=shared)(torch.full((3, 1536), 2.0).bfloat16())
    assert torch.equal(found, (torch.full((3, 1536), 2.0) @ weight.T).bfloat16())


@pytest.mark.parametrize(("precision", "error"), [(INT8, 0.02), (FAST, 0.02), (INT4, 0.01)])
@pytest.mark.parametrize("biased", [False, True])
def test_products_are_those_of_the_weights_held(precision: Precision, error: float, biased: bool) -> None:
    """INT8 rounds activations, too."""
    held, x = quantise(noise(500, 192), precision), noise(9, 192, seed=4).bfloat16()
    bias = noise(500, seed=5).bfloat16() if biased else None
    found, wanted = linear(held, bias)(x).float(), x.float() @ held.float().T + (bias.float() if biased else 0)
    assert found.shape == wanted.shape
    assert (found - wanted).abs().max() <= error * wanted.abs().max()


def test_the_kernel_for_arm_multiplies_the_same_weights() -> None:
    held, x = quantise(noise(96, 160), INT4), noise(6, 160, seed=4).bfloat16()
    product = integers._int4_arm(held, noise(96, seed=5))
    wanted = x.float() @ held.float().T + noise(96, seed=5)
    assert (product(x).float() - wanted).abs().max() <= 0.02 * wanted.abs().max()
    assert torch.equal(product(x), torch.cat([product(row) for row in x.split(1)]))


@pytest.mark.parametrize("precision", [INT8, INT4])
def test_a_row_that_is_not_finite_stays_so_and_alone(precision: Precision) -> None:
    product, x = linear(quantise(noise(96, 64), precision)), noise(4, 64).bfloat16()
    clean = product(x)
    for poison in (float("nan"), float("inf")):
        x[2, 9] = poison
        found = product(x)
        assert not found[2].isfinite().all()
        assert torch.equal(found[[0, 1, 3]], clean[[0, 1, 3]])


def test_each_precision_has_numerics_of_its_own() -> None:
    assert len({numerics(precision) for precision in Precision}) == len(Precision)


def test_one_scale_for_a_whole_batch_is_not_exact() -> None:
    assert not Model.load(checkpoint(), precision=FAST).exact  # the others: test_exactness.py


@pytest.mark.parametrize("precision", [INT8, INT4])
def test_stored_integers_give_the_bits_of_those_made_at_load(folder: Path, precision: Precision) -> None:
    expected, before = logits(Model.load(folder, precision=precision)), (folder / "model.safetensors").stat().st_size
    store(folder, precision)
    assert ModelConfig.read(folder).stored is precision
    model = Model.load(folder)
    assert model.precision is precision
    assert torch.equal(logits(model), expected)
    assert (folder / "model.safetensors").stat().st_size < 0.3 * before  # of float32; the norms and headers weigh here


def test_stored_int8_serves_every_precision_but_int4(folder: Path) -> None:
    fast, whole = logits(Model.load(folder, precision=FAST)), logits(Model.load(folder))
    store(folder, INT8)
    assert torch.equal(logits(Model.load(folder, precision=FAST)), fast)
    assert (logits(Model.load(folder, precision=Precision.BF16)) - whole).abs().max() < 0.2 * whole.abs().max()
    with pytest.raises(ModelError, match="is stored as int8, which cannot be held as int4"):
        Model.load(folder, precision=INT4)


@pytest.mark.parametrize(
    ("name", "tensor", "words"),
    [
        ("self_attn.q_proj.weight", torch.zeros(64, 32, dtype=torch.int8), r"shape \(64, 32\) for integers of"),
        ("self_attn.q_proj.weight", torch.zeros(64, 64, dtype=torch.int16), "int16"),
        ("self_attn.q_proj.weight_scale", torch.ones(63), r"scale of torch.float32 of shape \(63,\)"),
        ("self_attn.q_proj.weight_scale", torch.ones(64).bfloat16(), r"scale of torch.bfloat16"),
        ("self_attn.q_proj.weight_scale", torch.full((64,), float("nan")), "scale that is not finite"),
    ],
)
def test_stored_tensors_that_do_not_fit_are_refused_by_name(
    folder: Path, name: str, tensor: torch.Tensor, words: str
) -> None:
    path = store(folder, INT8) / "model.safetensors"
    save_file({**load_file(path), f"model.layers.1.{name}": tensor}, path)
    with pytest.raises(ModelError, match=rf"q_proj.weight.*{words}"):
        Model.load(folder)


def test_int4_without_a_scale_or_in_unlike_groups_is_refused(folder: Path) -> None:
    path, name = store(folder, INT4) / "model.safetensors", "model.layers.1.self_attn.q_proj.weight_scale"
    whole = load_file(path)
    for groups, words in ((0, r"q_proj.weight: a scale"), (1, r"groups of \[32, 64\] columns in one product")):
        save_file({**whole, name: whole[name][:, :groups].contiguous()}, path)
        with pytest.raises(ModelError, match=words):
            Model.load(folder)


@pytest.mark.parametrize(
    ("scheme", "words"),
    [
        ({"quant_method": "gptq", "bits": 4}, "quant_method = 'gptq'"),
        ("int8", "'int8'"),
        ({"quant_method": "tandem", "precision": "int2"}, "precision = 'int2'"),
    ],
)
def test_other_schemes_are_refused_by_name(folder: Path, scheme: object, words: str) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": scheme}))
    with pytest.raises(ModelError, match=rf"config.json: quantization_config.*{words}"):
        Model.load(folder)


def test_a_machine_without_the_kernel_says_which_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(integers, "_adds_exactly", lambda: False)
    integers._alike.cache_clear()
    linear(quantise(noise(64, 64), INT8), shared=True)  # then by a copy
    integers._alike.cache_clear()
    monkeypatch.setattr(integers, "_has_fbgemm", lambda: False)
    with pytest.raises(ModelError, match=r"int8: not with torch .* saturates"):
        linear(quantise(noise(64, 64), INT8), shared=True)
