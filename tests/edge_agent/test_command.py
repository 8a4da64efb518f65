"""The command: one clear line for what cannot be, an answer or a table for what can."""

from __future__ import annotations

import asyncio
import shutil
import socket
from pathlib import Path
from typing import Any

import pytest

from edge_agent.__main__ import _config, _parser, main
from edge_agent.client import body
from edge_agent.config import AgentConfig
from edge_agent.server import serving
from split_model.sampling import Sampling
from split_model.tokenizer import ChatTokenizer
from support.edge import checkpoints
from support.phone import expected


@pytest.fixture(scope="module", autouse=True)
def made() -> None:
    """Both checkpoints, before what is printed is listened to: making them prints too."""
    checkpoints()


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([str(one) for one in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("edge-agent: ")
    assert said.count("\n") == 1
    return said


def configured(*more: str) -> AgentConfig:
    tiny, full = checkpoints()
    return _config(_parser().parse_args(["serve", "--no-cloud", "--tiny", str(tiny), "--full", str(full), *more]))


def test_what_a_megabyte_is_worth_is_part_of_the_score() -> None:
    assert configured("--price-per-mb", "2.5").price_s_per_mb == 2.5
    assert configured("--context", "512").context == 512


def test_hidden_states_are_exact_if_nothing_else_is_said() -> None:
    assert configured().hidden_bits == 16
    assert configured("--hidden-bits", "8").hidden_bits == 8
    asked = _parser().parse_args(["plan", "hello", "--hidden-bits", "8", "--split", "2", "--route", "split"])
    assert body(asked)["plan"].items() >= {"hidden_bits": 8, "split": 2}.items()
    assert not {"hidden_bits", "split", "sparse"} & body(_parser().parse_args(["plan", "hello"]))["plan"].keys()
    assert body(_parser().parse_args(["ask", "hello", "--sparse"]))["plan"]["sparse"] is True


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--no-cloud", "--tiny", "nowhere"), "nowhere: neither a directory nor a built-in model"),
        (("--cloud", "here:1"), "--cloud needs --ca or --fingerprint"),
        (("--cloud", "here", "--ca", "CA"), "'here' is not HOST:PORT"),
        (("--cloud", "here:1", "--ca", "/nowhere/ca.pem"), "/nowhere/ca.pem"),
        (("--cloud", "here:1", "--ca", "TEXT"), "holds no PEM certificate"),
        (("--cloud", "here:1", "--ca", "CA"), "the CA does not read: "),
        (("--cloud", "here:1", "--ca", "CA", "--fingerprint", "ab"), "and not both"),
        (("--cloud", "here:1", "--fingerprint", "ab"), "--fingerprint 'ab', must be the 64 hex digits"),
        (("--cloud", "127.0.0.1:9", "--token-url", "https://127.0.0.1:9", "--fingerprint", "ab" * 32), "/ca.pem: "),
        (("--cloud", "here:1", "--ca", "CA", "--token-url", "http://here"), "--token-url 'http://here', must be https"),
        (("--no-cloud", "--token-file", "/nowhere/token"), "/nowhere/token"),
        (("--no-cloud", "--token-file", "TEXT"), "has mode 0644, and others may read the token"),
        (("--no-cloud", "--edge-layers", "99"), "99 layers of"),
        (("--no-cloud", "--alpha", "2"), "--alpha 2.0, must be 0 to 1"),
        (("--no-cloud", "--context", "8"), "--context 8, must be 16 positions or more"),
        (("--no-cloud", "--price-per-mb", "-1"), "--price-per-mb -1, must be 0 or more seconds"),
        (("--no-cloud", "--price-per-mb", "nan"), "--price-per-mb nan, must be 0 or more seconds"),
        (("--no-cloud", "--tiny", "FULL"), "have the same name"),
        (("--no-cloud", "--tiny", "CUT"), "model.safetensors: not a whole safetensors file"),
        (("--no-cloud", "--drain", "-1"), "--drain -1, must be 0 to"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_agent_that_cannot_start_says_why_in_one_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, arguments: tuple[str, ...], words: str
) -> None:
    tiny, full = checkpoints()
    (tmp_path / "ca.pem").write_text("-----BEGIN CERTIFICATE-----\n")
    (tmp_path / "text").write_text("hello")
    (tmp_path / "text").chmod(0o644)
    cut = Path(shutil.copytree(tiny, tmp_path / "cut")) / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    stands = {"CUT": cut.parent, "CA": tmp_path / "ca.pem", "TEXT": tmp_path / "text", "FULL": full}
    given = [stands.get(one, one) for one in arguments]
    usual = ("--tiny", tiny, "--full", full, "--state", tmp_path, "--port", 0)
    assert words in refused(capsys, "serve", *usual, *given)


def test_a_port_in_use_is_told_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tiny, full = checkpoints()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        usual = ("--tiny", tiny, "--full", full, "--state", tmp_path, "--port", port)
        assert f"cannot listen on 127.0.0.1:{port}: Address already in use" in refused(
            capsys, "serve", "--no-cloud", *usual
        )


def test_models_of_different_tokenizers_are_no_pair(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    tiny, full = checkpoints()
    other = tmp_path / "other"
    other.mkdir()
    for path in tiny.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "tokenizer_config.json").write_text("{}")
    said = refused(capsys, "serve", "--no-cloud", "--tiny", other, "--full", full, "--state", tmp_path, "--port", 0)
    assert "have different tokenizers" in said


@pytest.mark.parametrize("command", [("ask", "hello"), ("plan", "hello"), ("decisions",), ("chat",)], ids=str)
def test_without_an_agent_there_is_one_line(capsys: pytest.CaptureFixture[str], command: tuple[str, ...]) -> None:
    assert "no agent answers at http://127.0.0.1:9" in refused(capsys, *command, "--url", "http://127.0.0.1:9")


@pytest.mark.anyio
async def test_ask_prints_the_answer_and_its_plan_and_plan_prints_the_scores(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    tiny, full = checkpoints()
    tokenizer = ChatTokenizer.load(tiny)
    answer = expected(tiny, tokenizer.chat([{"role": "user", "content": "hello"}]), Sampling(), 6)
    async with serving(AgentConfig(tiny, full, port=0, state=tmp_path, edge_layers=0, threads=1)) as server:

        async def run(*arguments: Any) -> int:
            return await asyncio.to_thread(main, [*arguments, "--url", f"http://{server.address}"])

        assert await run("ask", "hello", "--max-tokens", "6") == 0
        said = capsys.readouterr()
        assert said.out == tokenizer.decode(answer) + "\n"
        assert said.err.startswith("[local by small-1 · first token ")
        assert "degraded" in said.err
        assert await run("plan", "hello") == 0
        table = capsys.readouterr().out
        assert "local by small-1" in table
        assert await run("ask", "hello", "--quality", "best") == 2
        assert "edge-agent: no plan may run: local: agrees" in capsys.readouterr().err
        assert await run("decisions") == 0
        table = capsys.readouterr().out
        assert "1 decisions" in table
        assert "local small-1" in table
        assert await run("decisions", "--jsonl", "--limit", "1") == 0
        file = tmp_path / "decisions.jsonl"
        file.write_text(capsys.readouterr().out)
        assert await asyncio.to_thread(main, ["replay", str(file)]) == 0
        assert "1 of 1 with exactly the recorded scores" in capsys.readouterr().out
        assert await run("decisions", "--limit", "0") == 2
        assert "limit" in capsys.readouterr().err
