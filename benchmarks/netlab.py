"""A link of deploy/netem with the project's programs at its ends, for the scripts that measure networks. Needs root.

The script itself lives in the namespace of the phone. Whatever it starts ends with it, also after a kill -9; the link
that is left then goes when the next script starts.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import platform
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from phones import GENEROUS, Target, issue

from protocol.transport.base import Address, Trust
from split_model.source import find_model

NETEM = Path(__file__).resolve().parent.parent / "deploy" / "netem"
sys.path[:0] = [str(NETEM), str(NETEM.parent)]
import events  # noqa: E402
from demo import FULL  # noqa: E402
from demo import QUESTIONS as QUESTIONS  # noqa: E402
from place import ROOT, LinkError, Place  # noqa: E402
from profiles import load  # noqa: E402

LINK = NETEM / "link"
TINY = "assistant-2m"
CLOUD, WIRE, HTTPS = "10.77.2.1", 4433, 8000  # replica n listens n ports further
MINE = "bench-"
CLONE_NEWNET = 0x40000000
END_S = 15.0
PROFILES = load()


@dataclass(frozen=True, slots=True)
class Program:
    """A program in a namespace, and where its log goes."""

    process: subprocess.Popen[str]
    log: Path

    def wait_up(self) -> None:
        """Until it says on stdout that it is up. Raises SystemExit with the end of its log."""
        assert self.process.stdout is not None
        if not self.process.stdout.readline():
            raise SystemExit(f"{self.log.name} did not come up:\n{self.log.read_text()[-2000:]}")

    def end(self, *, kill: bool = False) -> None:
        self.process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        try:
            self.process.wait(END_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Lab:
    """One link, keys for the cloud's address, and what was started at either end."""

    def __init__(self, name: str, folder: Path):
        self.folder, self.words = folder, ""
        self._place, self._programs = Place(name), list[Program]()

    def link(self, verb: str, *words: object) -> str:
        """What `link` says. Raises SystemExit with its words where it refuses."""
        done = subprocess.run(
            [LINK, verb, "--name", self._place.name, *map(str, words)], capture_output=True, text=True
        )
        if done.returncode:
            raise SystemExit(done.stderr.strip())
        return done.stdout.strip()

    def event(self, *words: str) -> None:
        """An event of `link event`, without the time that a new process takes; it has happened when this returns."""
        parser, shared = argparse.ArgumentParser(), argparse.ArgumentParser(add_help=False)
        events.add_flags(parser, shared)
        with self._place.locked():
            events.happen(self._place, parser.parse_args(words))

    def start(self, role: str, name: str, *arguments: object) -> Program:
        """Python with these arguments, in `edge` or `cloud`; its log has the name."""
        log = self.folder / f"{name}.log"
        command = ["ip", "netns", "exec", self._place.namespace(role), "setpriv", "--pdeathsig", "KILL",
                   sys.executable, *map(str, arguments)]  # fmt: skip
        with log.open("a") as out:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=out, text=True, start_new_session=True)
        self._programs.append(Program(process, log))
        return self._programs[-1]

    def cloud(self, number: int = 0, *more: object, model: object = FULL) -> Program:
        """A replica, not yet up."""
        return self.start(
            "cloud", f"cloud-{number}", "-m", "cloud_server", "serve", "--model", model, "--keys", self.folder / "keys",
            "--host", CLOUD, "--port", WIRE + number, "--http-port", HTTPS + number, "--threads", 1, *GENEROUS, *more,
        )  # fmt: skip

    def agent(self, state: str, *more: object, replicas: int = 1) -> tuple[Program, Path]:
        """An agent, not yet up, that remembers things in a folder of this name, and its socket."""
        socket = self.folder / f"{state}.socket"
        clouds = [word for number in range(replicas) for word in ("--cloud", f"{CLOUD}:{WIRE + number}")]
        trust = ("--ca", self.folder / "keys" / "ca.pem", "--token-file", self.folder / "agent")
        started = self.start("edge", state, "-m", "edge_agent", "serve", *clouds, *trust, "--state",
                             self.folder / f"{state}.state", "--unix", socket, "--threads", 1, *more)  # fmt: skip
        return started, socket

    def target(self, number: int = 0) -> Target:
        trust = Trust((self.folder / "keys" / "ca.pem").read_bytes())
        token = (self.folder / "phone").read_text().strip()
        return Target(Address(CLOUD, WIRE + number), f"https://{CLOUD}:{HTTPS + number}", trust, token)

    def close(self) -> None:
        for program in self._programs:
            if program.process.poll() is None:
                program.process.terminate()
        for program in self._programs:
            program.end()
        self.link("down")
        (ROOT / f"{self._place.name}.lock").unlink()


@contextlib.contextmanager
def lab(*shape: object, logs: Path | None = None) -> Iterator[Lab]:
    """A link of this shape (as for `link up`), and this script in its `edge`; the programs' logs go to a folder.

    Raises SystemExit without root.
    """
    if os.geteuid() != 0:
        raise SystemExit("network namespaces need root")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    _clear_left()
    with tempfile.TemporaryDirectory(prefix="tandem-net-") as name:
        made = Lab(f"{MINE}{os.getpid()}", Path(name))
        try:
            made.words = made.link("up", *shape).rpartition("; ")[2]
            make = [sys.executable, "-m", "cloud_server", "keys", "--keys", made.folder / "keys", "--name", CLOUD]
            subprocess.run(make, check=True, stdout=subprocess.DEVNULL)
            for device in ("phone", "agent"):
                issue(made.folder, device)
            with _inside(made._place.namespace("edge")):
                yield made
        finally:
            made.close()
            if logs is not None:
                logs.mkdir(parents=True, exist_ok=True)
                for log in made.folder.glob("*.log"):
                    shutil.copy(log, logs)


def _clear_left() -> None:
    """Removes links of scripts that are no more."""
    for folder in ROOT.glob(f"{MINE}*"):
        if folder.is_dir() and not Path("/proc", folder.name.removeprefix(MINE)).exists():
            with contextlib.suppress(LinkError), Place(folder.name).locked():
                Place(folder.name).clear()


@contextlib.contextmanager
def _inside(namespace: str) -> Iterator[None]:
    """This thread, and those that it starts, in a network namespace."""
    with open("/proc/thread-self/ns/net") as before, open(f"/run/netns/{namespace}") as there:
        _enter(there.fileno())
        try:
            yield
        finally:
            _enter(before.fileno())


def _enter(namespace: int) -> None:
    if ctypes.CDLL(None, use_errno=True).setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns")


def endless(model: str, folder: Path) -> Path:
    """A copy of a built-in model that knows no end, so that all answers are as long as they may be.

    And whose every token has a text, so that each is seen as it comes.
    """
    here, copy = find_model(model), folder / "endless" / model
    copy.mkdir(parents=True)
    config, tokenizer = (json.loads((here / name).read_text()) for name in ("config.json", "tokenizer.json"))
    del config["eos_token_id"]
    for token in tokenizer["added_tokens"]:
        token["special"] = False
    (copy / "config.json").write_text(json.dumps(config))
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer))
    for file in here.iterdir():
        if file.name not in ("config.json", "tokenizer.json", "generation_config.json"):
            (copy / file.name).symlink_to(file)
    return copy


def carried() -> tuple[int, int]:
    """Bytes that the phone's interfaces have sent and received, with all headers."""
    up = down = 0
    for line in Path("/proc/thread-self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip().startswith("net"):
            down, up = down + int(numbers.split()[0]), up + int(numbers.split()[8])
    return up, down


def at(values: Sequence[float], share: float) -> float:
    """A quantile, NaN of nothing."""
    if len(values) < 2:
        return values[0] if values else float("nan")
    return statistics.quantiles(values, n=1000, method="inclusive")[round(1000 * share) - 1]


def ms(seconds: float) -> str:
    return "–" if seconds != seconds else f"{1e3 * seconds:.0f}"


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that all have."""
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, metavar="FILE", help="add what is measured to FILE, and show all in it")
    parser.add_argument("--logs", type=Path, metavar="DIR", help="where the programs' logs are kept")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="needs matplotlib")


def kept(file: Path | None, new: Sequence[Any]) -> list[dict[str, Any]]:
    """The fields of these records, behind those that a file has, to which they are added."""
    lines = [json.dumps(asdict(one)) for one in new]
    if file is not None:
        with file.open("a") as out:
            out.writelines(f"{line}\n" for line in lines)
        lines = file.read_text().splitlines()
    return [json.loads(line) for line in lines]


def machine(where: str) -> str:
    """What the figures were seen on; `where` is what Lab.words says of the router."""
    return f"{platform.machine()}, {os.cpu_count()} cores for everything, Linux {platform.release()}, {where}, " \
           f"torch {torch.__version__}"  # fmt: skip
