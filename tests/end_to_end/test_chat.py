"""`edge-agent chat` in a terminal of its own, with a real agent."""

from __future__ import annotations

import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
import pytest

from split_model.sampling import Sampling
from support.edge import checkpoints
from support.phone import runner
from support.programs import ENVIRONMENT, PATIENCE_S, Program, agent_arguments, program

LINES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]|\r")


class Terminal:
    """A program at a terminal: what it prints, and keys for it."""

    def __init__(self, *command: str):
        master, slave = pty.openpty()
        environment = ENVIRONMENT | {"TERM": "xterm", "COLUMNS": "120"}
        self.process = subprocess.Popen(
            command,
            stdin=slave,
            stdout=slave,
            stderr=slave,
            env=environment,
            preexec_fn=lambda: _own(slave),
            close_fds=True,
        )
        os.close(slave)
        self._master, self._read, self._raw = master, 0, b""

    @property
    def text(self) -> str:
        """All that was printed, without colours."""
        return LINES.sub("", self._raw.decode(errors="replace"))

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def say(self, line: str) -> None:
        """Types a line when the prompt is there."""
        self.until("> ")
        self.press(line + "\n")
        self.until(line)

    def until(self, words: str) -> str:
        """Waits for what is printed next to have these words, and returns what was before them."""
        deadline = time.monotonic() + PATIENCE_S
        while (at := self.text.find(words, self._read)) < 0:
            assert time.monotonic() < deadline, f"waited for {words!r} in {self.text[self._read :]!r}"
            self._take(0.1)
        found = self.text[self._read : at]
        self._read = at + len(words)
        return found

    def ended(self) -> int:
        """The exit code; what was printed until then is kept."""
        while self.process.poll() is None:
            self._take(0.1)
        self._take(0.0)
        return self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self._master)

    def _take(self, limit_s: float) -> None:
        if select.select([self._master], [], [], limit_s)[0]:
            with suppress(OSError):  # the other end is closed
                self._raw += os.read(self._master, 65536)


def _own(terminal: int) -> None:
    """Makes it the controlling terminal, so that Ctrl-C is a signal."""
    os.setsid()
    import fcntl
    import termios

    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)


@pytest.fixture(scope="module")
def agent(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Program]:
    folder, (tiny, full) = tmp_path_factory.mktemp("chat"), checkpoints()
    arguments = agent_arguments(tiny, full, folder / "state", "--no-cloud", "--edge-layers", 5)
    with program(folder, "edge_agent", *arguments) as running:
        yield running


@contextmanager
def chat(agent: Program, *more: str) -> Iterator[Terminal]:
    terminal = Terminal(sys.executable, "-m", "edge_agent", "chat", "--url", agent.url, *more)
    try:
        yield terminal
    finally:
        terminal.close()


def answers(*questions: str, limit: int) -> list[str]:
    """What one process says in a conversation."""
    said: list[str] = []
    messages: list[dict[str, str]] = []
    for question in questions:
        messages.append({"role": "user", "content": question})
        said.append(runner(checkpoints()[1]).generate(messages, max_tokens=limit, sampling=Sampling()).text)
        messages.append({"role": "assistant", "content": said[-1]})
    return said


def shown(text: str) -> str:
    return "".join(one for one in text if one in "\n\t" or not (one < " " or "\x7f" <= one < "\xa0"))


def test_a_conversation_with_its_commands(agent: Program, tmp_path: Path) -> None:
    kept = tmp_path / "talk.json"
    first, second = answers("hello there", "and more", limit=12)
    with chat(agent, "--max-tokens", "12") as terminal:
        terminal.say("hello there")
        assert shown(first) in terminal.until("local by big-1 · first token ")
        terminal.say("and more")
        terminal.until(" tokens/s")
        terminal.say(f"/save {kept}")
        terminal.until("4 messages in")
        terminal.say("/plan")
        terminal.until("local by big-1: ")
        terminal.until("small-1")
        terminal.say("/plan what if")
        terminal.until("refused")
        terminal.say("/quality fast")
        terminal.until("quality fast")
        terminal.say("hello there")
        terminal.until("tokens/s")
        terminal.say("/route split 2")
        terminal.until("route split 2")
        terminal.say("hello there")
        terminal.until("no plan may run")
        terminal.say("/route pigeon")
        terminal.until("route 'pigeon' is none of auto, local, cloud, split, speculative")
        terminal.say("/route auto")
        terminal.until("route auto")
        terminal.say("/clear")
        terminal.until("forgotten")
        terminal.say("/nothing")
        terminal.until("leave, as the end of input does")
        terminal.say("/exit")
        assert terminal.ended() == 0
    messages = json.loads(kept.read_text())["messages"]
    assert [one["role"] for one in messages] == ["user", "assistant"] * 2
    assert [one["content"] for one in messages[::2]] == ["hello there", "and more"]
    assert [one["content"] for one in messages[1::2]] == [first, second]  # the history is kept


def test_ctrl_c_stops_the_answer_and_not_the_program_and_the_end_of_input_ends_it(agent: Program) -> None:
    with chat(agent, "--max-tokens", "900", "--quality", "best") as terminal:
        terminal.say("tell me all")
        while len(terminal.text) < terminal._read + 20:  # it is on its way
            terminal._take(0.1)
        terminal.press("\x03")
        terminal.until("(stopped)")
        decided = httpx.get(f"{agent.url}/v1/decisions", params={"limit": 1}).json()["data"]
        deadline = time.monotonic() + PATIENCE_S
        while not decided or decided[0]["measured"]["finish"] != "cancelled":
            assert time.monotonic() < deadline
            decided = httpx.get(f"{agent.url}/v1/decisions", params={"limit": 1}).json()["data"]
        terminal.until("> ")
        terminal.press("\x03")  # at the prompt it forgets the line
        terminal.say("/quality")
        terminal.until("quality best")
        terminal.until("> ")
        terminal.press("\x04")
        assert terminal.ended() == 0


def test_without_an_agent_it_says_so_and_ends(tmp_path: Path) -> None:
    terminal = Terminal(sys.executable, "-m", "edge_agent", "chat", "--url", "http://127.0.0.1:9")
    try:
        assert terminal.ended() == 2
        assert "no agent answers at http://127.0.0.1:9" in terminal.text
    finally:
        terminal.close()


def test_an_agent_that_goes_ends_the_turn_and_not_the_conversation(tmp_path: Path) -> None:
    tiny, full = checkpoints()
    arguments = agent_arguments(tiny, full, tmp_path / "state", "--no-cloud", "--edge-layers", 5)
    with program(tmp_path, "edge_agent", *arguments) as running, chat(running) as terminal:
        terminal.until("> ")
        running.end(signal.SIGKILL)
        terminal.press("hello\n")
        terminal.until("no agent answers at")
        terminal.say("/exit")
        assert terminal.ended() == 0
