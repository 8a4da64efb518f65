"""What is compiled computes what torch's operations do, bit for bit, and rows of int4 do not look at one another."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from split_model import native
from split_model.attend import reads_alike
from split_model.attention import Geometry, Span
from split_model.config import ModelConfig
from split_model.integers import _int8, product
from split_model.linear import _bf16
from split_model.model import Model
from split_model.quantised import Quantised, quantise
from split_model.settings import Precision
from split_model.sparse import BUDGET, Budget
from support.checkpoints import checkpoint

needs_native = pytest.mark.skipif(
    native.library() is None, reason="the compiled part was not built, or does not suit this processor"
)
SHAPES = {
    "groups of 3": {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 32, "num_hidden_layers": 2,
                    "hidden_size": 96, "max_position_embeddings": 2560},
    "no groups": {"num_key_value_heads": 4, "head_dim": 64, "num_hidden_layers": 2, "max_position_embeddings": 2560},
    "window": {"family": "Mistral", "sliding_window": 150, "head_dim": 32, "num_hidden_layers": 2},
    "heads normalised": {"family": "Qwen3", "head_dim": 96, "num_hidden_layers": 2, "max_position_embeddings": 2560},
}  # fmt: skip


@pytest.fixture
def plain(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As where nothing was compiled."""
    with monkeypatch.context() as patch:
        patch.setattr(native, "NAME", "split_model._absent")
        native.library.cache_clear()
        yield
    native.library.cache_clear()


@pytest.fixture(scope="module", params=list(SHAPES))
def model(request: pytest.FixtureRequest) -> Model:
    return Model.load(
        checkpoint(**SHAPES[request.param]), precision=Precision.BF16, budget=Budget(page=16, best=8, least=400)
    )


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def weight(rows: int, columns: int, precision: Precision, group: int = 32) -> Quantised:
    return quantise(noise(rows, columns), precision, group)


@needs_native
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (48, 96), (960, 576), (128, 4864)])
def test_int8_has_the_bits_of_torchs_product(rows: int, columns: int, biased: bool) -> None:
    held, x = weight(rows, columns, Precision.INT8), noise(131, columns, seed=1).bfloat16()
    x[3], x[5], x[7] = 0, x[5] * 1e6, x[7] * 1e-6
    bias = noise(rows).bfloat16() if biased else None
    own, expected = native.int8(native.tiled(held), bias), _int8(held, bias, shared=False)(x)
    for count in (1, 2, 5, 8, 9, 131):
        assert torch.equal(own(x[:count]), expected[:count])


@needs_native
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(16, 16), (48, 96), (960, 576), (112, 1536), (128, 4864)])
def test_bf16_has_the_bits_of_torchs_product(rows: int, columns: int, biased: bool) -> None:
    held, x = noise(rows, columns).bfloat16(), noise(131, columns, seed=1).bfloat16()
    bias = noise(rows).bfloat16() if biased else None
    x[3], x[5] = 0, x[5] * 1e-38
    own, expected = native.bf16(held, bias), _bf16(held, bias)(x)
    for count in (1, 2, 5, 8, 9, 20, 131):
        assert torch.equal(own(x[:count]), expected[:count])


@needs_native
def test_a_table_is_looked_up_as_it_is_multiplied() -> None:
    held, index = weight(64, 96, Precision.INT8), torch.tensor([0, 17, 63, 17])
    found = native.tiled(held).rows(index)
    assert native.tiled(held).shape == held.shape
    assert torch.equal(found.values, held.values[index])
    assert torch.equal(found.scale, held.scale[index])
    assert torch.equal(native.tiled(held).float(), held.float())
    assert torch.equal(native.tiled(held).lookup(index, torch.bfloat16), held.lookup(index, torch.bfloat16))
    for beyond in (64, -1):
        with pytest.raises(IndexError):
            native.tiled(held).lookup(torch.tensor([0, beyond]), torch.bfloat16)


@needs_native
@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_rows_have_the_same_bits_in_any_company(group: int) -> None:
    held, x = weight(320, 640, Precision.INT4, group), noise(37, 640, seed=1).bfloat16()
    bias = noise(320).bfloat16()
    run = native.int4(held, bias)
    assert torch.equal(torch.cat([run(row) for row in x.split(1)]), run(x))
    wanted = x.float() @ held.float().T + bias.float()
    assert (run(x).float() - wanted).norm() / wanted.norm() < 0.01
    assert torch.equal(run(torch.zeros_like(x)), bias.expand(37, -1))


@needs_native
@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4])
def test_what_is_not_a_number_stays_in_its_row(precision: Precision) -> None:
    run, x = product(weight(32, 64, precision)), noise(3, 64).bfloat16()
    clean = run(x)
    x[1, 5] = float("nan")
    found = run(x)
    assert found[1].isnan().all()
    assert torch.equal(found[::2], clean[::2])


@needs_native
def test_reading_in_place_has_the_bits_of_torchs_products(model: Model) -> None:
    spans = [[Span(slot, start, 1) for slot in range(3)] + [Span(3, start, 9)] for start in (40, 120, 505, 700)]
    if model.config.window is None:
        spans += [
            [Span(0, start, 1, sparse=True), Span(1, start, 4), Span(2, start, 1)] for start in (1000, 1530, 2300)
        ]
    for together in spans:
        assert torch.equal(*(_passed(model, together, in_place) for in_place in (True, False)))


def _passed(model: Model, spans: list[Span], in_place: bool) -> torch.Tensor:
    """A step on a memory full of noise."""
    cache, shape = model.new_cache(4), model._geometry
    cache.memory.copy_(noise(*cache.memory.shape))
    before, shape.in_place = shape.in_place, in_place
    assert before
    try:
        x = noise(sum(span.count for span in spans), model.config.width, seed=2).to(model.dtype)
        return model.run(x, 0, model.stop, cache, model.tiles(spans))
    finally:
        shape.in_place = before


@needs_native
def test_another_order_of_sums_does_not_go_unseen(model: Model) -> None:
    shape = Geometry(model.config, torch.bfloat16, BUDGET)
    assert reads_alike(shape)
    queries = noise(1, 4, 32).bfloat16()
    half = noise(1, 1024, 32).pow_(9).bfloat16()  # of many magnitudes
    values, none, every = torch.cat([half, -half], 1), torch.zeros(1, dtype=torch.int64), torch.tensor([2048])
    found = [native.Reading(none, none, every, values.unsqueeze(0), 4, most)(queries * 0, values, values)
             for most in (640, 2048)]  # fmt: skip
    assert (found[0] != found[1]).float().mean() > 0.9


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("precision", [Precision.BF16, Precision.INT8, Precision.INT4])
def test_without_it_a_model_is_exact_too(precision: Precision) -> None:
    model = Model.load(checkpoint(**SHAPES["groups of 3"]), precision=precision)
    assert model.exact
    assert not model._geometry.in_place


@needs_native
def test_one_key_head_may_have_more_queries_than_a_block_has_keys() -> None:
    shape = {"num_attention_heads": 64, "num_key_value_heads": 1, "head_dim": 32, "num_hidden_layers": 1}
    model = Model.load(checkpoint(**shape), precision=Precision.BF16)
    assert model.exact
    assert model._geometry.in_place


@needs_native
def test_threads_change_no_bits(model: Model) -> None:
    held, x = weight(960, 576, Precision.INT8), noise(40, 576).bfloat16()
    own, spans, before, found = native.int8(native.tiled(held), None), [Span(0, 300, 90)], torch.get_num_threads(), []
    floats = native.bf16(noise(960, 576).bfloat16(), None)
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(torch.cat([own(x).flatten(), floats(x).flatten(), _passed(model, spans, True).flatten()]))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_native
def test_a_library_of_another_version_is_left_out(plain: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "NAME", "split_model._native")
    monkeypatch.setattr(native, "LAYOUT", 0x7FFF)
    assert native.library() is None


@pytest.mark.usefixtures("plain")
def test_it_can_be_left_out() -> None:
    assert native.library() is None
    assert not native.fits(weight(32, 64, Precision.INT8))


@needs_native
def test_groups_that_do_not_fit_are_left_to_torch() -> None:
    assert not native.fits(weight(32, 64, Precision.INT4, group=16))


def test_heads_that_do_not_fit_are_read_otherwise() -> None:
    model = Model.load(checkpoint(), precision=Precision.BF16)  # 16 channels
    assert not model._geometry.in_place
    config: ModelConfig = replace(model.config, head_dim=32)
    assert not reads_alike(Geometry(config, torch.float32, BUDGET))
