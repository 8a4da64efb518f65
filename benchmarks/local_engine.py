"""One stream on this machine: this engine beside transformers and llama.cpp, on published shapes with random weights.

    pip install llama-cpp-python gguf          # optional: without them llama.cpp is left out
    python benchmarks/local_engine.py [--shape 135m] [--threads 2] [--rounds 5] [--engines bf16 int8 ...]

Each engine has a process of its own with the model in it; they take turns, one answer each a round, so that what else
the machine does meets all of them. 50 tokens in and 100 out, and 512 in; greedy. The bound is what a token would take
if its weights were read at the bandwidth of a streaming read, measured in each round, and nothing else were done.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import random_models
import torch
from rich.console import Console
from rich.table import Table

from split_model.settings import Precision

PROMPT, ANSWER, LONG = 50, 100, 512
PAUSE_S = 0.2
QUANTS = ("Q8_0", "Q4_0")
PEERS = {"int8": "Q8_0", "int4": "Q4_0"}  # whose speed is the aim
DECODE, PREFILL, TRANSFORMERS, BOUND = 1.0, 2.0, 3.5, 0.8  # the aims, as ratios


@dataclass(slots=True)
class Engine:
    """One process, and what it took: seconds to the first token behind 50 and 512, and for each further token."""

    name: str
    process: subprocess.Popen[str]
    weights: int = 0
    short: list[float] = field(default_factory=list)
    long: list[float] = field(default_factory=list)
    step: list[float] = field(default_factory=list)

    def ask(self, **wanted: int) -> dict[str, float]:
        """Raises SystemExit when the process has ended."""
        assert self.process.stdin is not None
        if wanted:
            self.process.stdin.write(json.dumps(wanted) + "\n")
            self.process.stdin.flush()
        return self.answer()

    def answer(self) -> dict[str, float]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.name} ended early")
        found: dict[str, float] = json.loads(line)
        return found

    def measure(self, threads: int) -> None:
        """One round, when threads of the one before have stopped waiting for more work."""
        time.sleep(PAUSE_S)
        once = self.ask(prompt=PROMPT, answer=ANSWER, threads=threads)
        self.short.append(once["first_s"])
        self.step.append(once["next_s"])
        self.long.append(self.ask(prompt=LONG, answer=1, threads=threads)["first_s"])


def start(name: str, stack: ExitStack, *arguments: object, path: Sequence[Path] = ()) -> Engine:
    """Begins to load; `answer` waits for it."""
    root = Path(__file__).resolve().parent
    places = os.pathsep.join([str(root.parent), *map(str, path), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(root / "local_engines.py"), *map(str, arguments)]
    around = {**os.environ, "PYTHONPATH": places}
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=around)
    stack.callback(process.wait)
    stack.callback(process.kill)
    return Engine(name, process)


def start_all(shape: str, wanted: Sequence[str], folder: Path, peer: Sequence[Path], stack: ExitStack) -> list[Engine]:
    """Loads one after the other."""
    random_models.save(shape, folder / "model")
    engines = []
    for name in wanted:
        if name in QUANTS:
            if not (folder / "f16.gguf").exists():
                random_models.save_gguf(folder / "model", folder / "f16.gguf")
            random_models.quantise(folder / "f16.gguf", folder / f"{name}.gguf", name)
            arguments = ("llama.cpp", "--model", folder / f"{name}.gguf")
        elif name == "transformers":
            arguments = ("transformers", "--model", folder / "model")
        else:
            arguments = ("ours", "--kind", name, "--model", folder / "model")
        engines.append(start(name, stack, *arguments, path=peer))
        engines[-1].weights = int(engines[-1].answer()["weights"])
    return engines


def run(shape: str, wanted: Sequence[str], threads: int, rounds: int, peer: Sequence[Path]) -> None:
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-engines-")))
        reader = start("read", stack, "read")
        reader.answer()
        engines = start_all(shape, wanted, folder, peer, stack)
        for engine in engines:
            engine.ask(prompt=LONG, answer=2, threads=threads)
            engine.ask(prompt=PROMPT, answer=8, threads=threads)
        bandwidth = []
        for _ in range(rounds):
            bandwidth.append(reader.ask(threads=threads)["bandwidth"])
            for engine in engines:
                engine.measure(threads)
        report(shape, threads, rounds, statistics.median(bandwidth), {engine.name: engine for engine in engines})


def report(shape: str, threads: int, rounds: int, bandwidth: float, engines: Mapping[str, Engine]) -> None:
    table = Table(title=f"{random_models.SHAPES[shape][0]} shape, random weights, {threads} threads")
    for column in ("engine", "weights, MB", f"first token of {PROMPT}, ms", f"of {LONG}, ms", "decode, tokens/s",
                   "bound, tokens/s", "of it"):  # fmt: skip
        table.add_column(column, justify="left" if column == "engine" else "right")
    for engine in engines.values():
        short, long, step = map(statistics.median, (engine.short, engine.long, engine.step))
        bound = bandwidth / engine.weights
        name = f"llama.cpp {engine.name}" if engine.name in QUANTS else engine.name
        table.add_row(name, f"{engine.weights / 1e6:.0f}", f"{1e3 * short:.1f}", f"{1e3 * long:.0f}",
                      f"{1 / step:.1f}", f"{bound:.0f}", f"{100 / step / bound:.0f} %")  # fmt: skip
    Console(width=110).print(table)
    for line in aims(shape, bandwidth, engines):
        print(line)
    machine = f"{platform.machine()}, {os.cpu_count()} processors, {torch.backends.cpu.get_cpu_capability()}"
    print(f"streaming read {bandwidth / 1e9:.1f} GB/s; medians of {rounds}; {machine}, torch {torch.__version__}")


def aims(shape: str, bandwidth: float, engines: Mapping[str, Engine]) -> list[str]:
    """A line for each ratio that is aimed at."""

    def ratio(what: str, one: str, other: str) -> float:
        seconds = [statistics.median(getattr(engines[name], what)) for name in (one, other)]
        return seconds[1] / seconds[0]

    lines = []
    for own, peer in PEERS.items():
        if own in engines and peer in engines:
            lines.append(_line(f"decode, {own} to llama.cpp {peer}", ratio("step", own, peer), DECODE))
            for what, tokens in (("short", PROMPT), ("long", LONG)):
                lines.append(_line(f"prefill of {tokens}, {own} to llama.cpp {peer}", ratio(what, own, peer), PREFILL))
    for own in (one for one in Precision if one in engines and "transformers" in engines):
        lines.append(_line(f"decode, {own} to transformers", ratio("step", own, "transformers"), TRANSFORMERS))
    if "int8" in engines and shape == "0.5b":
        step = statistics.median(engines["int8"].step)
        lines.append(_line("decode, int8 to the bound", engines["int8"].weights / bandwidth / step, BOUND))
    return lines


def _line(what: str, found: float, aim: float) -> str:
    verdict = "met" if found >= aim else f"missed by {100 * (1 - found / aim):.0f} %"
    return f"{what}: {found:.2f} (aim {aim:.1f}, {verdict})"


def main() -> None:
    parser = argparse.ArgumentParser(description="One stream of this engine beside transformers and llama.cpp.")
    parser.add_argument("--shape", choices=random_models.SHAPES, default="135m")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--peer-path", type=Path, help="where llama_cpp and gguf were installed with pip --target")
    everything = [*(one.value for one in Precision if one is not Precision.FP32), "transformers", *QUANTS]
    parser.add_argument("--engines", nargs="+", choices=everything, default=everything)
    given = parser.parse_args()
    peer = [given.peer_path.resolve()] if given.peer_path else []
    sys.path += map(str, peer)
    wanted = given.engines
    if set(wanted) & set(QUANTS) and not (find_spec("llama_cpp") and find_spec("gguf")):
        print("llama-cpp-python and gguf are not installed: llama.cpp is left out")
        wanted = [name for name in wanted if name not in QUANTS]
    run(given.shape, wanted, given.threads, given.rounds, peer)


if __name__ == "__main__":
    main()
