"""What a checkpoint says of how to draw its answers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from split_model.config import ModelConfig, ModelError
from split_model.settings import Sampling
from support.checkpoints import checkpoint


def said(tmp_path: Path, **entries: object) -> ModelConfig:
    folder = Path(shutil.copytree(checkpoint(), tmp_path / "copy"))
    (folder / "generation_config.json").write_text(json.dumps(entries))
    return ModelConfig.read(folder)


@pytest.mark.parametrize(
    ("entries", "usual"),
    [
        ({}, Sampling(1.0)),
        ({"temperature": 0.7, "top_p": 0.8, "top_k": 20, "do_sample": True}, Sampling(0.7, 0.8, 20)),
        ({"temperature": 0, "top_k": None, "repetition_penalty": 1.05}, Sampling(0.0)),
    ],
)
def test_how_to_draw_where_a_request_does_not_say(tmp_path: Path, entries: dict[str, object], usual: Sampling) -> None:
    config = said(tmp_path, **entries)
    assert config.usual == usual
    assert config.stops == frozenset({1})  # as config.json has it
    assert config.usual.asked(None, None, None, 5) == Sampling(usual.temperature, usual.top_p, usual.top_k, 5)
    assert config.usual.asked(0.5, 0.6, -1, 5) == Sampling(0.5, 0.6, 0, 5)


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"temperature": -1}, "temperature is -1, not"),
        ({"temperature": "hot"}, "temperature is 'hot', not"),
        ({"temperature": 1000}, "temperature is 1000.0, not from 0 to 100"),
        ({"top_p": 1.5}, "top_p is 1.5, not over 0 and up to 1"),
        ({"top_k": 0.5}, "top_k is 0.5, not an integer"),
        ({"eos_token_id": "</s>"}, "eos_token_id is '</s>', not token ids"),
    ],
)
def test_what_cannot_be_is_named(tmp_path: Path, entries: dict[str, object], words: str) -> None:
    with pytest.raises(ModelError, match=rf"generation_config\.json: {words}"):
        said(tmp_path, **entries)
