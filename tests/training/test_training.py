"""Training: what is read, what a loss is, that a run resumes, and that its product loads everywhere."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from edge_agent.learned import Agreement
from split_model.runner import Runner
from split_model.tokenizer import ChatTokenizer
from training import data, evaluate, train
from training.train import Learner, Recipe, distillation_loss, export, fit, new_model, perplexity

LINE = {"id": "1", "services": ["Hotels_1"], "turns": [{"role": "user", "content": "a hotel in Paris please "},
        {"role": "assistant", "content": "the hotel in Paris is nice"}]}  # fmt: skip
PUBLISHED = {"dialogue_id": "2", "services": [], "turns": [{"speaker": "USER", "utterance": "a table"},
             {"speaker": "SYSTEM", "utterance": "which place?"}]}  # fmt: skip


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "corpus"
    (folder / "train").mkdir(parents=True)
    for name in ("x-train.jsonl.gz", "x-dev.jsonl.gz"):
        lines = (json.dumps(LINE | {"id": f"{name}{i}"}) for i in range(40))
        (folder / name).write_bytes(gzip.compress("\n".join(lines).encode()))
    (folder / "train" / "dialogues_001.json").write_text(json.dumps([PUBLISHED]))
    return folder


@pytest.fixture
def tokenizer(corpus: Path, tmp_path: Path) -> Tokenizer:
    return train.prepare(corpus, tmp_path / "tokenizer")[0]


def test_both_layouts_are_read_and_splits_stay_apart(corpus: Path) -> None:
    dialogues = data.read(corpus, "train")
    assert len(dialogues) == 41
    assert dialogues[-1].text() == "<|bos|><|user|>a table<|end|><|assistant|>which place?<|end|>"
    assert all("dev" in one.id for one in data.read(corpus, "dev"))
    with pytest.raises(FileNotFoundError, match="no dev dialogues"):
        data.read(corpus / "train", "dev")


def test_the_chat_template_writes_what_training_reads(corpus: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    turns = data.read(corpus, "train")[0].turns
    messages = [{"role": turn.role, "content": turn.content} for turn in turns]
    ours = ChatTokenizer.load(tmp_path / "tokenizer").chat(messages[:-1])
    theirs = AutoTokenizer.from_pretrained(tmp_path / "tokenizer").apply_chat_template(
        messages[:-1], add_generation_prompt=True, return_dict=False
    )
    whole = tokenizer.encode(data.read(corpus, "train")[0].text()).ids
    assert ours == theirs == whole[: len(ours)]


def test_only_what_the_assistant_says_is_scored(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("<|bos|><|user|>a<|end|><|assistant|>the hotel<|end|><|user|>a<|end|>").ids
    assistant, end = data.special_id(tokenizer, data.ASSISTANT), data.special_id(tokenizer, data.END)
    mask = data.assistant_mask(ids, assistant, end)
    scored = tokenizer.decode([i for i, m in zip(ids, mask, strict=True) if m], skip_special_tokens=False)
    assert scored == "the hotel<|end|>"


def test_distillation_is_kl_times_the_square_of_the_temperature() -> None:
    student, teacher = torch.randn(5, 7), torch.randn(5, 7)
    p, q = F.softmax(teacher / 3, -1), F.softmax(student / 3, -1)
    expected = 9 * (p * (p / q).log()).sum(-1).mean()
    assert torch.allclose(distillation_loss(student, teacher, 3.0), expected, atol=1e-5)
    assert float(distillation_loss(teacher, teacher, 5.0)) == pytest.approx(0, abs=1e-5)


def small_recipe(tokens: int) -> Recipe:
    return Recipe(tokens, minutes=60, batch_tokens=64, short_block=32, short_part=1.0)


def test_a_run_learns_resumes_and_exports_what_everyone_loads(corpus: Path, tmp_path: Path) -> None:
    tokenizer, documents, dev = train.prepare(corpus, tmp_path / "tokenizer")

    def run(tokens: int, folder: Path) -> Learner:
        learner = Learner("tiny", new_model("assistant-2m", tokenizer, 1), small_recipe(tokens))
        fit([learner], None, documents, dev, tokenizer, small_recipe(tokens), folder)
        return learner

    before = perplexity(new_model("assistant-2m", tokenizer, 1), dev, tokenizer)
    whole = run(640, tmp_path / "whole")
    assert perplexity(whole.model, dev, tokenizer) < before / 2
    # a run that has finished resumes from its checkpoint, and has nothing left to do
    again = run(640, tmp_path / "whole")
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    export(whole.model, tokenizer, tmp_path / "out")
    text = AutoTokenizer.from_pretrained(tmp_path / "out").decode(Runner(tmp_path / "out").generate("a hotel").ids)
    assert text
    assert isinstance(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), LlamaForCausalLM)


def test_a_model_agrees_with_its_own_answers(corpus: Path, tmp_path: Path) -> None:
    tokenizer, _, dev = train.prepare(corpus, tmp_path / "tokenizer")
    model = new_model("assistant-2m", tokenizer, 1).eval()
    found = evaluate.agreement(model, evaluate.answers(model, dev, tokenizer, 8))
    assert found.share > 0.95
    rows = found.bins(found.entropy)
    assert rows[-1]["entropy_below"] is None
    assert sum(int(row["tokens"] or 0) for row in rows) == len(found.agreed)


def test_bins_without_tokens_promise_no_more_than_the_others(tmp_path: Path) -> None:
    entropy = torch.tensor([0.2] * 40 + [2.5] * 60)
    found = evaluate.Agreement(entropy, torch.tensor([True] * 40 + [True, False] * 30), entropy)
    rows = found.bins(entropy)
    assert [row["entropy_below"] for row in rows] == [*evaluate.EDGES, None]
    assert {row["agreement"] for row in rows if not row["tokens"]} == {0.7}
    (tmp_path / "agreement.json").write_text(json.dumps({"bins": rows}))
    table = Agreement.read(tmp_path)
    assert [table.at(entropy) for entropy in (0.0, 0.2, 2.5, 9.0)] == [1.0, 1.0, 0.5, 0.5]


def test_the_corpus_on_disk(request: pytest.FixtureRequest) -> None:
    folder = request.config.getoption("--data")
    if folder is None:
        pytest.skip("needs --data: a folder of dialogues")
    dialogues = data.read(folder, "dev")
    assert all(turn.content for one in dialogues for turn in one.turns)
