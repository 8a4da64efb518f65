"""A whole model in one process: text, ids, stopping and streaming."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from split_model.config import ModelError
from split_model.runner import Runner
from split_model.sampling import Sampling
from split_model.source import find_model
from support.checkpoints import checkpoint, save_model

RUNNER = Runner(checkpoint())
MESSAGES = [{"role": "user", "content": "a table for two"}]
WARM = Sampling(0.8, top_p=0.95, seed=4)


def test_text_is_one_user_message() -> None:
    assert RUNNER.prompt_ids("a table for two") == RUNNER.tokenizer.chat(MESSAGES)
    assert RUNNER.generate("a table for two", max_tokens=5) == RUNNER.generate(MESSAGES, max_tokens=5)


@pytest.mark.parametrize("sampling", [Sampling(), WARM])
def test_a_stream_is_the_whole_answer_in_pieces(sampling: Sampling) -> None:
    whole = RUNNER.generate("hello", max_tokens=40, sampling=sampling)
    pieces = list(RUNNER.stream("hello", max_tokens=40, sampling=sampling))
    assert "".join(pieces) == whole.text
    assert len(pieces) > 1
    assert len(whole.ids) == 40
    assert whole.finish_reason == "length"


@pytest.mark.parametrize("sampling", [Sampling(), WARM])
@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_any_chunk_gives_the_same_answer(chunk: int, sampling: Sampling) -> None:
    answer = Runner(checkpoint(), chunk=chunk).generate(MESSAGES, max_tokens=30, sampling=sampling)
    assert answer == RUNNER.generate(MESSAGES, max_tokens=30, sampling=sampling)


@pytest.mark.parametrize("at", [1, 7, 19])
def test_an_answer_can_be_resumed_from_its_ids(at: int) -> None:
    prompt = RUNNER.prompt_ids(MESSAGES)
    whole = list(RUNNER.tokens(prompt, max_tokens=20, sampling=WARM, stops=()))
    so_far = prompt + whole[:at]
    assert list(RUNNER.tokens(so_far, max_tokens=20 - at, sampling=WARM, stops=())) == whole[at:]


def test_a_stop_id_ends_the_answer() -> None:
    ids = RUNNER.generate(MESSAGES, max_tokens=20).ids
    stop = ids[9]
    found = list(RUNNER.tokens(RUNNER.prompt_ids(MESSAGES), max_tokens=20, stops={stop}))
    assert found == list(ids[: ids.index(stop) + 1])


def test_the_models_own_end_is_not_text(tmp_path: Path) -> None:
    model = save_model(tmp_path, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight[1:2] = model.lm_head.weight.sum(0) * 100
    model.save_pretrained(tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((checkpoint() / name).read_bytes())
    answers = [Runner(tmp_path).generate(f"{number}", max_tokens=3) for number in range(8)]
    ended = [answer for answer in answers if answer.ids == (1,)]
    assert ended
    assert {(answer.text, answer.finish_reason) for answer in ended} == {("", "stop")}


def test_a_stop_string_cuts_the_text() -> None:
    whole = RUNNER.generate(MESSAGES, max_tokens=40, sampling=WARM)
    stop = whole.text[5:7]
    cut = RUNNER.generate(MESSAGES, max_tokens=40, sampling=WARM, stop=[stop])
    assert cut.text == whole.text[: whole.text.index(stop)]
    assert cut.finish_reason == "stop"
    assert "".join(RUNNER.stream(MESSAGES, max_tokens=40, sampling=WARM, stop=[stop])) == cut.text


def test_answers_may_be_made_side_by_side_and_left_unfinished() -> None:
    wanted = {text: RUNNER.generate(text, max_tokens=30, sampling=WARM).text for text in ("one", "two")}
    streams = {text: RUNNER.stream(text, max_tokens=30, sampling=WARM) for text in wanted}
    abandoned = RUNNER.stream("three", max_tokens=30)
    next(abandoned)
    found = dict.fromkeys(wanted, "")
    for _ in range(3):
        for text, stream in streams.items():
            found[text] += next(stream)
    assert {text: found[text] + "".join(stream) for text, stream in streams.items()} == wanted


def test_the_context_bounds_prompt_and_answer() -> None:
    context = RUNNER.model.config.context
    assert len(list(RUNNER.tokens([9] * (context - 3), max_tokens=50, stops=()))) == 3
    for length in (0, context, context + 1):
        with pytest.raises(ValueError, match=f"a prompt of {length} tokens, limit {context - 1}"):
            next(RUNNER.tokens([9] * length, max_tokens=1))


def test_a_name_that_is_no_model_is_refused() -> None:
    with pytest.raises(ModelError, match="no-such-model: neither a directory nor a built-in model"):
        find_model("no-such-model")
    assert find_model(checkpoint()) == checkpoint()
