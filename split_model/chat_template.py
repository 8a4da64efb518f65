"""A checkpoint's chat template, rendered where it can neither hang nor fill this program."""

from __future__ import annotations

import atexit
import json
import os
import select
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from split_model.config import ModelError

PROGRAM = Path(__file__).with_name("render.py")
WALL_S = 30.0  # for a process that the system does not let run; one that runs is stopped by its own clock long before
LARGEST = 1 << 20  # characters of a template; published ones have up to 30,000
TRIAL = ({"role": "user", "content": "Hello"},)


class TemplateError(ValueError):
    """A chat template that is missing, is broken, or refuses these messages; says why."""


class ChatTemplate:
    """`special`: what templates call `bos_token`, `eos_token` and so on."""

    def __init__(self, text: str, special: Mapping[str, str], place: str = "chat template"):
        """Tries it on one message: a bad template is a ModelError that names its `place`, before anybody asks."""
        self.text, self._special = text, dict(special)
        if len(text) > LARGEST:
            raise ModelError(f"{place}: {len(text):,} characters, limit {LARGEST:,}")
        if reason := self._ask(TRIAL).get("broken"):
            raise ModelError(f"{place}: {_line(reason)}")

    def render(self, messages: Sequence[Mapping[str, str]]) -> str:
        """The messages, and the beginning of an answer to them. Raises TemplateError."""
        answer = self._ask(messages)
        if "text" not in answer:
            raise TemplateError(f"chat template: {_line(answer.get('refused') or answer['broken'])}")
        return answer["text"]

    def _ask(self, messages: Sequence[Mapping[str, str]]) -> dict[str, str]:
        values = {**self._special, "messages": [dict(message) for message in messages], "tools": None,
                  "documents": None, "add_generation_prompt": True}  # fmt: skip
        return _renderer.ask({"template": self.text, "values": values})


class _Renderer:
    """One process for all templates, begun when it is needed, and anew after one that had to be killed."""

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """The process is another's: of the program that this one was forked from."""
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, what: Mapping[str, Any]) -> dict[str, str]:
        line = json.dumps(what).encode() + b"\n"
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                with suppress(BrokenPipeError):
                    process.stdin.write(line)
                    process.stdin.flush()
                if not _readable(process.stdout):
                    process.kill()
                answer = process.stdout.readline()
            except BaseException:  # as Ctrl-C: the answer must not be taken for that of the next
                process.kill()
                raise
            if answer.endswith(b"\n"):
                return dict(json.loads(answer))
            return {"broken": self._ended(process)}

    def close(self) -> None:
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._reap(self._process)

    def _running(self) -> subprocess.Popen[bytes]:
        if self._process is not None and self._process.poll() is not None:
            self._reap(self._process)
        if self._process is None:
            # -P: the folder of the program is not a place to import from
            command = [sys.executable, "-P", str(PROGRAM)]
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            )
        return self._process

    def _ended(self, process: subprocess.Popen[bytes]) -> str:
        code = self._reap(process)
        if code == -signal.SIGPROF:
            return "computes for more than a second: it may have no end"
        if code == -signal.SIGKILL:
            return f"no answer within {WALL_S:g} s"
        return f"ended the process that renders templates (status {code})"

    def _reap(self, process: subprocess.Popen[bytes]) -> int:
        self._process = None
        with suppress(BrokenPipeError):
            process.communicate()
        return process.wait()


def _readable(pipe: IO[bytes]) -> bool:
    """Whether an answer begins in time."""
    waiting = select.poll()
    waiting.register(pipe, select.POLLIN)
    return bool(waiting.poll(WALL_S * 1000))


def _line(reason: str) -> str:
    return " ".join(reason.split())


_renderer = _Renderer()
atexit.register(_renderer.close)
os.register_at_fork(after_in_child=_renderer.forget)
