"""The link of deploy/netem, and the project's programs at its two ends."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import torch

from split_model.sampling import Sampling
from support.checkpoints import save_model, save_tokenizer
from support.phone import runner
from support.programs import PATIENCE_S, Program, agent_arguments, finished, program

LINK = Path(__file__).resolve().parents[2] / "deploy" / "netem" / "link"
CLOUD, WIRE = "10.77.2.1", 4433
CONTEXT = 32_768
TESTS = Path(__file__).resolve().parents[1]
_made: list[tempfile.TemporaryDirectory[str]] = []


class NoLink(Exception):
    """Why there is none here."""


class Link:
    """One link with a name of its own. Raises NoLink when it cannot be made."""

    def __init__(self, profile: str = "wifi"):
        self.name = f"test{os.getpid()}"
        self._now, self._troubled = (profile,), False
        self._call("up", profile)

    def use(self, *profile: str) -> None:
        """The link as `link set` takes it, with no event on it."""
        if self._troubled:
            self._call("event", "restore")
            self._troubled = False
        if self._now != profile:
            self._call("set", *profile)
            self._now = profile

    def event(self, *event: str) -> str:
        """Returns when it was applied."""
        self._troubled = True
        return self._call("event", *event)

    def inside(self, role: str) -> tuple[str, ...]:
        """How a command gets into `edge` or `cloud`."""
        return ("ip", "netns", "exec", f"{role}-{self.name}")

    def run(self, role: str, *command: str) -> str:
        """The output of a command in `edge` or `cloud`, whatever its status."""
        return subprocess.run([*self.inside(role), *command], capture_output=True, text=True, timeout=PATIENCE_S).stdout

    def down(self) -> None:
        self._call("down")

    def _call(self, verb: str, *arguments: str) -> str:
        at = 2 if verb == "event" else 1
        command = [LINK, *[verb, *arguments][:at], "--name", self.name, *[verb, *arguments][at:]]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise NoLink(done.stderr.strip())
        return done.stdout.strip()


@cache
def pair() -> tuple[Path, Path]:
    """A tiny and a full random model of 2 and 5 layers, whose answers are mostly printable and long."""
    _made.append(tempfile.TemporaryDirectory(prefix="netem-pair-"))
    small, big = (Path(_made[-1].name) / name for name in ("small-1", "big-1"))
    for folder, shape in ((small, {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 64}), (big, {})):
        folder.mkdir()
        tokenizer = save_tokenizer(folder)
        model = save_model(folder, max_position_embeddings=CONTEXT, **shape)
        with torch.no_grad():
            for token, piece in ((number, tokenizer.id_to_token(number)) for number in range(512)):
                if piece is None or not piece.replace("Ġ", " ").isascii() or piece.startswith("<|"):
                    model.lm_head.weight[token] = 0
        model.save_pretrained(folder)
    chance = {"bins": [{"entropy_below": None, "agreement": 1 / 64, "tokens": 1000}]}  # they have nothing in common
    (small / "agreement.json").write_text(json.dumps(chance))
    return small, big


@dataclass(frozen=True, slots=True)
class Said:
    """An answer as an app sees it: the text, how many tokens, why it ended, and the agent's own report."""

    text: str
    tokens: int
    finish: str
    plan: dict[str, Any]

    @property
    def gist(self) -> tuple[str, int, str]:
        return self.text, self.tokens, self.finish


def expected(question: str, sampling: Sampling, max_tokens: int, model: Path | None = None) -> tuple[str, int, str]:
    """The gist of the answer of one process, with the full model if not told."""
    made = runner(model or pair()[1]).generate(
        [{"role": "user", "content": question}], max_tokens=max_tokens, sampling=sampling
    )
    return made.text, len(made.ids), made.finish_reason


@dataclass(frozen=True, slots=True)
class Agent:
    """An agent in `edge`, and a client for its socket."""

    program: Program
    client: httpx.Client

    def ask(self, question: str, plan: dict[str, Any], sampling: Sampling = Sampling(), max_tokens: int = 12,  # noqa: B008 - frozen
            on_first: Callable[[], object] = lambda: None) -> Said:  # fmt: skip
        """A whole streamed answer of the full model; `on_first` is called when its text begins."""
        body = {
            "model": "tandem", "messages": [{"role": "user", "content": question}], "max_tokens": max_tokens,
            "stream": True, "stream_options": {"include_usage": True}, "plan": {"quality": "best"} | plan,
            "temperature": sampling.temperature, "top_p": sampling.top_p, "seed": sampling.seed,
        }  # fmt: skip
        text, tokens, finish, report = "", 0, "", {}
        with self.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            assert answer.status_code == 200, answer.read()
            for line in answer.iter_lines():
                if not line.startswith("data: ") or line == "data: [DONE]":
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk["error"]
                report = chunk.get("plan", report)
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
                for choice in chunk["choices"]:
                    new = choice["delta"].get("content", "")
                    if new and not text:
                        on_first()
                    text += new
                    finish = choice["finish_reason"] or finish
        return Said(text, tokens, finish, report)


@dataclass(frozen=True, slots=True)
class Ends:
    """What both ends need: a link, the models, and keys for the cloud's address."""

    link: Link
    keys: Path
    token: Path
    folder: Path

    @classmethod
    def on(cls, link: Link, folder: Path) -> Ends:
        keys, token = folder / "keys", folder / "token"
        for command in (
            ("keys", "--keys", keys, "--name", CLOUD),
            ("token", "--keys", keys, "--device", "phone", "--ttl", 7200, "--out", token),
        ):
            done = finished("cloud_server", *command)
            assert done.returncode == 0, done.stderr
        return cls(link, keys, token, folder)

    @contextlib.contextmanager
    def cloud(self, *more: object, port: int = WIRE, layer_ms: int = 0) -> Iterator[Program]:
        """A cloud server in `cloud`; its limits let tests through. Its layers take `layer_ms` each at least."""
        limits = ("--requests-per-minute", 6000, "--prompt-tokens-per-minute", 0, "--output-tokens-per-minute", 0)
        command = ("serve", "--model", pair()[1], "--keys", self.keys, "--host", CLOUD, "--port", port,
                   "--http-port", port + 4000, "--threads", 1, *limits, *more)  # fmt: skip
        inside, name = self.link.inside("cloud"), "cloud_server"
        if layer_ms:
            inside, name = (*inside, "env", f"PYTHONPATH={TESTS}"), "support.slow_cloud"
            command = (layer_ms, *command)
        with program(self.folder, name, *command, inside=inside) as running:
            assert CLOUD in running.line, running.log.read_text()
            yield running

    @contextlib.contextmanager
    def agent(self, state: Path, *more: object, port: int = WIRE) -> Iterator[Agent]:
        """An agent in `edge` that holds three layers of the full model."""
        tiny, full = pair()
        with contextlib.ExitStack() as stack:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="agent-"))) / "socket"
            trust = ("--cloud", f"{CLOUD}:{port}", "--ca", self.keys / "ca.pem", "--token-file", self.token)
            command = agent_arguments(tiny, full, state, "--unix", place, *trust, "--edge-layers", 3, *more)
            running = stack.enter_context(program(self.folder, "edge_agent", *command, inside=self.link.inside("edge")))
            assert running.line, running.log.read_text()
            transport = httpx.HTTPTransport(uds=str(place))
            client = stack.enter_context(
                httpx.Client(transport=transport, base_url="http://localhost", timeout=PATIENCE_S)
            )
            yield Agent(running, client)
