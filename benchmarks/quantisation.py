"""Ways to hold weights, side by side: bytes stored and resident, speed of one stream, and what the answers lose.

    python benchmarks/quantisation.py [--data FOLDER] [--texts 200] [--threads 2] [--rounds 5] [--models 135m ...]

The built-in pair, and the SmolLM2-135M shape with random weights, which has no perplexity. Each way is stored with
`pack` and loaded from there by a process of its own. Resident is what loading adds to a process that has done the like
with the smallest model before; the peak is the most that was resident on the way. Decoding is greedy, 100 tokens
behind 50; the processes take turns. Perplexity is that of assistant turns of dev dialogues (`--data`), each read in
one pass.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

from split_model.attention import Span
from split_model.compute import release_heap
from split_model.model import Model
from split_model.pack import pack
from split_model.settings import Precision
from split_model.source import find_model

BUILT_IN, SHAPE = ("assistant-2m", "assistant-20m"), "135m"
LONG = 512
AIMS = "aims of int8: 75 % smaller than fp32, 1.5 to 3 times its decoding, perplexity within 1 %"


@dataclass(slots=True)
class Way:
    """One model held in one way, in a process of its own."""

    precision: Precision
    stored: int  # bytes
    process: subprocess.Popen[str]
    loaded: dict[str, float] = field(default_factory=dict)
    decode: list[float] = field(default_factory=list)  # tokens a second
    prefill: list[float] = field(default_factory=list)
    perplexity: float | None = None

    def ask(self, **wanted: object) -> dict[str, float]:
        """Raises SystemExit when the process has ended."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(wanted) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"{self.precision} ended early")
        answer: dict[str, float] = json.loads(line)
        return answer

    def round(self) -> None:
        found = self.ask(what="speed")
        self.decode.append(found["decode"])
        self.prefill.append(found["prefill"])


def work(folder: Path, precision: Precision, threads: int) -> None:
    """A process of its own: loads, and does what is asked of it in lines of JSON."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    from local_engines import Ours, bandwidth, run_once

    torch.set_num_threads(threads)
    run_once(Ours(find_model(BUILT_IN[0]), precision), 50, 2)  # what libraries take for themselves is no weight
    release_heap()
    this = psutil.Process()
    before = this.memory_info().rss
    engine = Ours(folder, precision)
    release_heap()
    loaded = {"resident": this.memory_info().rss - before, "peak": _peak() - before}
    run_once(engine, LONG, 16)
    for line in sys.stdin:
        wanted = json.loads(line)
        if wanted["what"] == "loaded":
            print(json.dumps(loaded), flush=True)
        elif wanted["what"] == "speed":
            step, first = run_once(engine, 50, 100)["next_s"], run_once(engine, LONG, 1)["first_s"]
            print(json.dumps({"decode": 1 / step, "prefill": LONG / first}), flush=True)
        elif wanted["what"] == "bandwidth":
            print(json.dumps({"bandwidth": bandwidth()}), flush=True)
        else:
            print(json.dumps({"perplexity": perplexity(folder, precision, Path(wanted["texts"]))}), flush=True)


def _peak() -> int:
    """The most bytes that were resident at a time (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


@torch.inference_mode()
def perplexity(folder: Path, precision: Precision, path: Path) -> float:
    """Per token, over the tokens marked."""
    model, total, count = Model.load(folder, precision=precision, check=False), 0.0, 0
    cache = model.new_cache(1)
    for text in json.loads(path.read_text()):
        ids, scored = torch.tensor(text["ids"]), torch.tensor(text["scored"])
        tiles = model.tiles([Span(0, 0, len(ids) - 1)])
        x = model.run(model.embed(ids[:-1]), 0, model.stop, cache, tiles)
        losses = F.cross_entropy(model.logits(x), ids[1:], reduction="none")[scored[1:]]
        total, count = total + float(losses.double().sum()), count + len(losses)
    return math.exp(total / count)


def dialogues(source: Path, tokenizer_folder: Path, most: int, path: Path) -> None:
    """Writes dev dialogues as ids, with the words of assistant turns marked."""
    from tokenizers import Tokenizer

    from training import data

    tokenizer = Tokenizer.from_file(str(tokenizer_folder / "tokenizer.json"))
    whole = data.encode(tokenizer, data.read(source, "dev"))
    marks = data.special_id(tokenizer, data.ASSISTANT), data.special_id(tokenizer, data.END)
    some = [ids[:1000] for ids in random.Random(7).sample(whole, min(most, len(whole)))]
    path.write_text(json.dumps([{"ids": ids, "scored": data.assistant_mask(ids, *marks)} for ids in some]))


def checkpoint(name: str, place: Path) -> Path:
    """A built-in model, or a shape with random weights and a tokenizer that nobody reads."""
    if name != SHAPE:
        return find_model(name)
    import random_models

    folder = place / "SmolLM2-135M-shape"
    random_models.save(name, folder)
    for path in find_model(BUILT_IN[0]).glob("tokenizer*.json"):
        shutil.copy(path, folder)
    return folder


def start(folder: Path, precision: Precision, threads: int, place: Path, stack: ExitStack) -> Way:
    """Stores the checkpoint and has a process load it."""
    kind = Precision.INT8 if precision is Precision.INT8_FAST else precision
    stored = place / f"{folder.name}-{kind}"
    if not stored.exists():
        pack(folder, stored, None, kind)
    size = sum(path.stat().st_size for path in stored.glob("*.safetensors"))
    command = [sys.executable, __file__, "--work", str(stored), "--precision", precision, "--threads", str(threads)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    stack.callback(process.wait)
    stack.callback(process.kill)
    way = Way(precision, size, process)
    way.loaded = way.ask(what="loaded")
    return way


def compare(name: str, given: argparse.Namespace) -> float:
    """Prints one model's table; returns the bandwidth of a streaming read, in bytes a second."""
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="tandem-quantisation-")))
        folder = checkpoint(name, place)
        ways = [start(folder, precision, given.threads, place, stack) for precision in Precision]
        for _ in range(given.rounds):
            for way in ways:
                way.round()
        if given.data and name != SHAPE:
            dialogues(given.data, folder, given.texts, place / "texts.json")
            for way in ways:
                way.perplexity = way.ask(what="perplexity", texts=str(place / "texts.json"))["perplexity"]
        report(name if name != SHAPE else "SmolLM2-135M shape, random weights", ways)
        return ways[0].ask(what="bandwidth")["bandwidth"]


def report(title: str, ways: list[Way]) -> None:
    table = Table(title=title)
    for column in ("", "stored, MB", "of fp32", "resident, MB", "peak, MB", "decode, tokens/s", "to fp32",
                   f"prefill of {LONG}, tokens/s", "perplexity", "change"):  # fmt: skip
        table.add_column(column, justify="left" if not column else "right")
    whole = ways[0]
    speed = statistics.median(whole.decode)
    for way in ways:
        decode, lost = statistics.median(way.decode), ("", "")
        if way.perplexity is not None and whole.perplexity is not None:
            lost = f"{way.perplexity:.3f}", f"{100 * (way.perplexity / whole.perplexity - 1):+.2f} %"
        table.add_row(way.precision, f"{way.stored / 1e6:.1f}", f"{100 * way.stored / whole.stored:.0f} %",
                      f"{way.loaded['resident'] / 1e6:.1f}", f"{way.loaded['peak'] / 1e6:.1f}", f"{decode:.1f}",
                      f"{decode / speed:.2f} x", f"{statistics.median(way.prefill):.0f}", *lost)  # fmt: skip
    Console(width=130).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Ways to hold weights, side by side.")
    parser.add_argument("--data", type=Path, metavar="FOLDER", help="of dialogues, whose dev split is read")
    parser.add_argument("--texts", type=int, default=200, help="of the data")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--models", nargs="+", choices=[*BUILT_IN, SHAPE], default=[*BUILT_IN, SHAPE])
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--precision", type=Precision, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.work:
        work(given.work, given.precision, given.threads)
        return
    bandwidth = [compare(name, given) for name in given.models]
    machine = f"{platform.machine()}, {os.cpu_count()} processors, {torch.backends.cpu.get_cpu_capability()}"
    print(AIMS)
    print(f"medians of {given.rounds} rounds, {given.threads} threads; streaming read {max(bandwidth) / 1e9:.1f} GB/s; "
          f"{machine}, torch {torch.__version__}")  # fmt: skip


if __name__ == "__main__":
    main()
