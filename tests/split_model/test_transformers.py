"""The same numbers as transformers, in fp32: 64 prompts, 64 tokens each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from split_model.attention import Span
from split_model.model import Model
from split_model.settings import Precision
from support.checkpoints import checkpoint, save_model

PROMPTS, PROMPT, ANSWER = 64, 24, 64


class Chain:
    """Models that each hold some of the layers, with a memory each."""

    def __init__(self, models: Sequence[Model]):
        self.models = models
        self.caches = [model.new_cache(PROMPTS) for model in models]

    def __call__(self, spans: Sequence[Span], ids: torch.Tensor) -> torch.Tensor:
        x = self.models[0].embed(ids)
        for model, cache in zip(self.models, self.caches, strict=True):
            x = model.run(x, model.first, model.stop, cache, model.tiles(spans))
        return self.models[-1].logits(x)


@pytest.fixture(scope="module")
def reference() -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32)


@pytest.fixture(scope="module")
def answers(reference: LlamaForCausalLM) -> torch.Tensor:
    """Prompts and their greedy answers: `[64, 88]`."""
    prompts = torch.randint(6, 512, (PROMPTS, PROMPT), generator=torch.Generator().manual_seed(5))
    return reference.generate(
        prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=ANSWER, do_sample=False, eos_token_id=None
    )


@pytest.fixture(params=[None, 2], ids=["whole", "cut"])
def chain(request: pytest.FixtureRequest) -> Chain:
    folder, cut = checkpoint(), request.param
    if cut is None:
        return Chain([Model.load(folder, precision=Precision.FP32)])
    front = Model.load(folder, 0, cut, head=False, precision=Precision.FP32)
    return Chain([front, Model.load(folder, cut, embedding=False, precision=Precision.FP32)])


def test_logits(chain: Chain, reference: LlamaForCausalLM, answers: torch.Tensor) -> None:
    with torch.inference_mode():
        expected = reference(answers).logits
    length = answers.shape[1]
    found = [chain([Span(row, 0, length)], ids) for row, ids in enumerate(answers)]
    assert (torch.stack(found) - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_greedy_text(chain: Chain, answers: torch.Tensor) -> None:
    prompts = answers[:, :PROMPT]
    logits = chain([Span(row, 0, PROMPT) for row in range(PROMPTS)], prompts.flatten()).view(PROMPTS, PROMPT, -1)[:, -1]
    found = []
    for position in range(PROMPT, PROMPT + ANSWER):
        found.append(logits.argmax(-1))
        logits = chain([Span(row, position, 1) for row in range(PROMPTS)], found[-1])
    assert torch.equal(torch.stack(found, 1), answers[:, PROMPT:])


@pytest.mark.parametrize(
    "shape",
    [{"num_key_value_heads": 1}, {"num_key_value_heads": 4}, {"tie_word_embeddings": True}, {"rms_norm_eps": 1e-3},
     {"head_dim": 32}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}],
    ids=lambda shape: next(iter(shape)),
)  # fmt: skip
def test_other_shapes(shape: dict[str, Any], tmp_path: Path) -> None:
    reference = save_model(tmp_path, num_hidden_layers=2, **shape)
    ids = torch.randint(6, 512, (200,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        expected = reference(ids[None]).logits[0]
    found = Chain([Model.load(tmp_path, precision=Precision.FP32)])([Span(0, 0, 200)], ids)
    assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_bf16_stays_near(reference: LlamaForCausalLM, answers: torch.Tensor) -> None:
    with torch.inference_mode():
        expected = reference(answers[:8]).logits.log_softmax(-1)
        rough = LlamaForCausalLM.from_pretrained(checkpoint(), dtype=torch.bfloat16)(answers[:8]).logits.float()
    chain = Chain([Model.load(checkpoint())])
    found = torch.stack([chain([Span(row, 0, len(ids))], ids) for row, ids in enumerate(answers[:8])])

    def divergence(logits: torch.Tensor) -> torch.Tensor:
        return (expected.exp() * (expected - logits.log_softmax(-1))).sum(-1).mean()

    assert divergence(found) <= 1.5 * divergence(rough)
