"""Packed parts: what is written, what is refused, and that a phone with one is a phone with the whole."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from edge_agent.__main__ import main
from split_model import pack as packing
from split_model.attention import Span
from split_model.config import ModelConfig, ModelError
from split_model.model import Model
from split_model.pack import pack
from split_model.runner import Runner
from split_model.settings import Precision
from split_model.tokenizer import ChatTokenizer
from support.checkpoints import checkpoint, save_model

BF16 = Precision.BF16
WHOLE = Model.load(checkpoint(), check=False)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint(), tmp_path / "source"))


def front(model: Model, layers: int) -> torch.Tensor:
    """What leaves the first layers."""
    x = model.embed(torch.arange(6, 40))
    return model.run(x, 0, layers, model.new_cache(1), model.tiles([Span(0, 0, 34)]))


def names(folder: Path) -> set[str]:
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            found |= set(file.keys())
    return found


@pytest.mark.parametrize("split", [1, 3])
def test_a_part_is_the_front_of_the_whole(tmp_path: Path, split: int) -> None:
    done = pack(checkpoint(), tmp_path / "part", split, BF16)
    part = Model.load(tmp_path / "part", 0, split, head=False, check=False)
    assert torch.equal(front(part, split), front(WHOLE, split))
    assert (part.weights_digest, part.numerics) == (WHOLE.weights_digest, WHOLE.numerics)
    assert part.config.name == WHOLE.config.name == "tiny-llama"
    assert ChatTokenizer.load(tmp_path / "part").digest == ChatTokenizer.load(checkpoint()).digest
    layers = {name.split(".")[2] for name in names(tmp_path / "part") if ".layers." in name}
    assert layers == {str(index) for index in range(split)}
    assert not {"lm_head.weight", "model.norm.weight"} & names(tmp_path / "part")
    assert (done.layers, done.head) == (split, False)
    assert done.before > 2 * done.after > 0


@pytest.mark.parametrize("split", [None, 5])
@pytest.mark.parametrize("tied", [False, True])
def test_all_layers_come_with_the_head(tmp_path: Path, split: int | None, tied: bool) -> None:
    folder = checkpoint(tie_word_embeddings=tied)
    assert pack(folder, tmp_path / "all", split, Precision.FP32).head
    for precision in (Precision.FP32, BF16):
        ours, theirs = Runner(tmp_path / "all", precision=precision), Runner(folder, precision=precision)
        assert ours.generate("a table", max_tokens=8) == theirs.generate("a table", max_tokens=8)


@pytest.mark.parametrize("precision", [Precision.INT8, Precision.INT4])
def test_integers_are_stored_as_they_would_be_held(tmp_path: Path, precision: Precision) -> None:
    done = pack(checkpoint(), tmp_path / "part", 3, precision)
    part = Model.load(tmp_path / "part", 0, 3, head=False, precision=precision, check=False)
    held = Model.load(checkpoint(), 0, 3, head=False, precision=precision, check=False)
    assert torch.equal(front(part, 3), front(held, 3))
    assert (part.weights_digest, part.numerics) == (WHOLE.weights_digest, held.numerics)
    plain = pack(checkpoint(), tmp_path / "plain", 3, Precision.FP32)
    assert done.after < plain.after * (0.3 if precision is Precision.INT8 else 0.22)


def test_a_part_of_no_layers_names_the_model_and_holds_none_of_it(tmp_path: Path) -> None:
    pack(checkpoint(), tmp_path / "none", 0, BF16)
    none = Model.load(tmp_path / "none", 0, 0, embedding=False, head=False)
    assert none.weights_digest == WHOLE.weights_digest
    assert names(tmp_path / "none") == set()


def test_a_large_part_is_written_in_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "SHARD", 100_000)
    pack(checkpoint(), tmp_path / "part", 3, BF16)
    assert len(list((tmp_path / "part").glob("model-*.safetensors"))) > 2
    part = Model.load(tmp_path / "part", 0, 3, head=False, check=False)
    assert torch.equal(front(part, 3), front(WHOLE, 3))


@pytest.mark.parametrize(
    ("wanted", "words"),
    [
        ((0, 4, True, False), "layers [0, 3) are packed here, without the head; asked for are layers [0, 4)"),
        ((0, 3, True, True), "without the head; asked for are layers [0, 3) and the embedding and the head"),
        ((4, 5, False, True), "layers [0, 3) are packed here"),
    ],
)
def test_what_is_not_packed_is_refused_by_name(tmp_path: Path, wanted: tuple[Any, ...], words: str) -> None:
    pack(checkpoint(), tmp_path / "part", 3, BF16)
    first, stop, embedding, head = wanted
    with pytest.raises(ModelError) as refused:
        Model.load(tmp_path / "part", first, stop, embedding=embedding, head=head)
    assert str(refused.value).startswith(f"{tmp_path / 'part' / 'tandem.json'}: ")
    assert words in str(refused.value)


def test_a_config_that_was_changed_after_packing_is_refused(tmp_path: Path) -> None:
    pack(checkpoint(), tmp_path / "part", 3, BF16)
    path = tmp_path / "part" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 0.01}))
    with pytest.raises(ModelError, match=r"tandem\.json: config\.json is not as it was packed"):
        Model.load(tmp_path / "part", 0, 3, head=False)


@pytest.mark.parametrize("text", ["{}", "[]", '{"layers": [1, 2], "weights_digest": "00", "name": 1}', "{"])
def test_a_broken_description_is_refused(tmp_path: Path, text: str) -> None:
    pack(checkpoint(), tmp_path / "part", 3, BF16)
    (tmp_path / "part" / "tandem.json").write_text(text)
    with pytest.raises(ModelError, match=r"tandem\.json: "):
        ModelConfig.read(tmp_path / "part")


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["pack", *map(str, arguments)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("edge-agent: ")
    assert said.count("\n") == 1
    return said


def test_the_command_says_what_it_did(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--model", "assistant-2m", "--precision", "int8", "--out", str(tmp_path / "new" / "tiny")]
    assert main(["pack", *arguments]) == 0
    assert "tiny: the whole model, int8; 4.7 MB before, 2.4 MB now" in capsys.readouterr().out
    assert (tmp_path / "new" / "tiny" / "agreement.json").exists()
    assert ModelConfig.read(tmp_path / "new" / "tiny").name == "assistant-2m"


def test_the_command_refuses_in_a_line_and_leaves_nothing(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, old, file = tmp_path / "out", tmp_path / "old", tmp_path / "file"
    (old / "kept").mkdir(parents=True)
    file.write_text("kept")
    assert "--split 6, tiny-llama has 5 layers" in refused(capsys, "--model", checkpoint(), "--split", 6, "--out", out)
    assert "--split -1" in refused(capsys, "--model", checkpoint(), "--split", -1, "--out", out)
    assert "something already" in refused(capsys, "--model", checkpoint(), "--out", old)
    assert "something already" in refused(capsys, "--model", checkpoint(), "--out", file)
    assert "neither a directory" in refused(capsys, "--model", "nowhere", "--out", out)
    pack(checkpoint(), tmp_path / "part", 3, BF16)
    assert "packed already" in refused(capsys, "--model", tmp_path / "part", "--split", 2, "--out", out)
    (source / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes()[:-100])
    assert "not a whole safetensors file" in refused(capsys, "--model", source, "--out", out)
    (source / "tokenizer.json").unlink()
    assert "tokenizer.json: no such file" in refused(capsys, "--model", source, "--out", out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "old", "part", "source"]


def test_an_interrupted_pack_leaves_nothing(tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        assert any(tmp_path.iterdir())
        if 2 * done > total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(checkpoint(), tmp_path / "part", 3, BF16, interrupt)
    assert not list(tmp_path.iterdir())


def test_a_nan_in_the_weights_is_found_while_packing(tmp_path: Path) -> None:
    source = tmp_path / "source"
    model = save_model(source)
    ChatTokenizer.load(checkpoint())
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint() / name, source)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 3] = float("nan")
    model.save_pretrained(source)
    with pytest.raises(ModelError, match=r"model\.layers\.1\.mlp\.up_proj\.weight holds a number that is not finite"):
        pack(source, tmp_path / "part", 3, BF16)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packing.BITS, BF16, 1 << 50)
    with pytest.raises(ModelError, match=r"part: needs [\d,]+ MB, and [\d,]+ MB are free"):
        pack(checkpoint(), tmp_path / "part", 3, BF16)
    assert not list(tmp_path.iterdir())
