"""Both programs as processes, as a user starts them."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}
PATIENCE_S = 60.0  # of tests, on a busy machine


@dataclass(frozen=True, slots=True)
class Program:
    """A running program, the line it printed when it was up, and its log."""

    process: subprocess.Popen[str]
    line: str
    log: Path

    def found(self, pattern: str) -> str:
        """The first group of the pattern in the line."""
        match = re.search(pattern, self.line)
        assert match, f"{self.line!r}; {self.log.read_text()}"
        return match[1]

    @property
    def url(self) -> str:
        """Of the agent's endpoint, without a path."""
        return self.found(r"(http://\S+)/v1")

    @property
    def wire(self) -> str:
        """Where the cloud server takes sessions."""
        return self.found(r"on (\S+) \(QUIC")

    @property
    def https(self) -> str:
        return "https://" + self.found(r"and (\S+) \(HTTPS")

    def end(self, *signals: signal.Signals) -> int:
        """Sends the signals, and returns the exit status."""
        for number in signals or (signal.SIGTERM,):
            self.process.send_signal(number)
        return self.process.wait(PATIENCE_S)

    def wait_for(self, text: str) -> None:
        """Until the log has the text."""
        until(lambda: text in self.log.read_text(), f"{text!r} in {self.log}")


def until(true: Callable[[], object], what: str, limit_s: float = PATIENCE_S) -> None:
    """Waits for something outside this process."""
    deadline = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < deadline, f"waited {limit_s:.0f} s for {what}"
        time.sleep(0.02)


@contextlib.contextmanager
def started(folder: Path, name: str, *arguments: object, inside: Sequence[str] = ()) -> Iterator[Program]:
    """A program in a process group of its own that is not up yet: its `line` is empty. `inside` goes before it."""
    command = [*inside, sys.executable, "-m", name, *map(str, arguments)]
    log = folder / f"{name}-{time.monotonic_ns()}.log"
    with (
        log.open("w") as out,
        subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=out, text=True, env=ENVIRONMENT, start_new_session=True
        ) as process,
    ):
        try:
            yield Program(process, "", log)
        finally:
            process.kill()


@contextlib.contextmanager
def program(folder: Path, name: str, *arguments: object, inside: Sequence[str] = ()) -> Iterator[Program]:
    """A running program; its log goes to the folder."""
    with started(folder, name, *arguments, inside=inside) as begun:
        assert begun.process.stdout is not None
        yield Program(begun.process, begun.process.stdout.readline(), begun.log)


def finished(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """A command that ends by itself."""
    command = [sys.executable, "-m", name, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, env=ENVIRONMENT)


def make_keys(folder: Path, *scopes: str) -> tuple[Path, Path]:
    """A key folder for loopback and a file with a token of device `phone`, made by the commands."""
    keys, token = folder / "keys", folder / "token"
    assert (
        finished("cloud_server", "keys", "--keys", keys, "--name", "localhost", "--name", "127.0.0.1").returncode == 0
    )
    wanted = [part for scope in scopes for part in ("--scope", scope)]
    done = finished("cloud_server", "token", "--keys", keys, "--device", "phone", "--out", token, *wanted)
    assert done.returncode == 0, done.stderr
    return keys, token


def cloud_arguments(model: Path, keys: Path, *more: object) -> tuple[object, ...]:
    return ("serve", "--model", model, "--keys", keys, "--host", "127.0.0.1", "--port", 0, "--http-port", 0, *more)


def agent_arguments(tiny: Path, full: Path, state: Path, *more: object) -> tuple[object, ...]:
    return ("serve", "--tiny", tiny, "--full", full, "--state", state, "--port", 0, *more)
