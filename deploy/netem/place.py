"""Where one link keeps what it needs to be taken down again, also by another process."""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path("/run/tandem-netem")
PATIENCE_S = 30.0


class LinkError(Exception):
    """What a person is told."""


def call(*command: str | Path, given: str = "") -> str:
    """The output of a command. Raises LinkError with what it said."""
    done = subprocess.run(command, input=given, capture_output=True, text=True)
    if done.returncode:
        raise LinkError(f"{' '.join(map(str, command))}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def started(pid: int) -> str:
    """When a process began, in the kernel's ticks; empty when there is none, or only a zombie."""
    with contextlib.suppress(OSError):
        state, *rest = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if state == "Z" else rest[18]
    return ""


@dataclass(frozen=True, slots=True)
class Place:
    """One link's names. Links with different names do not meet."""

    name: str

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[a-z0-9][a-z0-9-]{0,19}|", self.name):
            raise LinkError(f"--name {self.name!r}, must be 1 to 20 small letters, digits and dashes")

    @property
    def folder(self) -> Path:
        return ROOT / (self.name or "_")

    def namespace(self, role: str) -> str:
        return f"{role}-{self.name}" if self.name else role

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """One command at a time."""
        ROOT.mkdir(mode=0o755, exist_ok=True)
        with (ROOT / f"{self.name or '_'}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def remember(self, pid: int, kind: str) -> None:
        """This process ends with the link."""
        with (self.folder / f"{kind}.pids").open("a") as file:
            file.write(f"{pid} {started(pid)}\n")

    def alive(self, kind: str) -> bool:
        """Whether all remembered processes of a kind are."""
        return all(since and started(pid) == since for pid, since in self._remembered(kind))

    def end(self, kind: str) -> None:
        """Kills the remembered processes of a kind that still are what they were, and waits until they are gone."""
        for pid, since in self._remembered(kind):
            _end(pid, since)
        (self.folder / f"{kind}.pids").unlink(missing_ok=True)

    def _remembered(self, kind: str) -> list[tuple[int, str]]:
        with contextlib.suppress(FileNotFoundError):
            lines = (self.folder / f"{kind}.pids").read_text().splitlines()
            return [(int(pid), since) for pid, _, since in (line.partition(" ") for line in lines)]
        return []

    def clear(self) -> bool:
        """Ends and removes all that this link ever had; says whether there was something."""
        if not self.folder.exists():
            return False
        self.end("jobs")
        self.end("router")
        if Path("/run/netns", self.namespace("router")).exists():  # nobody else's processes are in there
            for pid in call("ip", "netns", "pids", self.namespace("router")).split():
                _end(int(pid), started(int(pid)))
        for role in ("edge", "cloud", "router"):
            if Path("/run/netns", self.namespace(role)).exists():
                call("ip", "netns", "del", self.namespace(role))
        shutil.rmtree(self.folder)
        return True


def _end(pid: int, since: str) -> None:
    deadline = time.monotonic() + PATIENCE_S
    if since and started(pid) == since:
        os.kill(pid, signal.SIGKILL)
    while since and started(pid) == since:
        if time.monotonic() > deadline:
            raise LinkError(f"process {pid} does not end")
        time.sleep(0.01)
