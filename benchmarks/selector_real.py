"""Real cells, to check the simulated ones: both programs over netem, a core and a thread each, all plans in turn.

Needs root. The pair knows no end, so that all answers are as long as they may be; every text of a prompt must be the
same by all plans. The programs are paced and slowed down as benchmarks/paced.py says. The best plan is picked on one
half of the rounds and scored on the other, both ways; "the oracle's own" is what that loses against the best plan of
the rounds that it is scored on, and so the noise that a regret is to be read with.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from answers import ask, unix_client
from netlab import CLOUD, FULL, GENEROUS, HTTPS, TINY, WIRE, Lab, Program, endless, kept, lab, machine
from rich.console import Console
from rich.table import Table
from traces import conversations, how

PACED = Path(__file__).with_name("paced.py")
HELD, TOKENS, OTHERS = 6, 24, 8
EDGE_CORE, CLOUD_CORE = 0, 1
# profile, phone slower by, other answers in the batch, pace of the full model in ms, a tiny model in the cloud
CELLS = (
    ("wifi", 1, 0, 0, False), ("wifi", 1, 0, 50, False), ("wifi", 1, 0, 100, True), ("wifi", 4, 8, 50, False),
    ("wifi", 1, 8, 20, True), ("5g", 1, 0, 50, False), ("5g", 4, 0, 20, True), ("lte", 1, 0, 100, False),
    ("lte", 1, 8, 0, True), ("lte", 4, 0, 50, False), ("lte_lossy", 1, 0, 50, False), ("4g_slow", 1, 0, 100, True),
    ("3g_lossy", 1, 0, 50, False), ("leo", 1, 8, 100, False),
)  # fmt: skip
PLANS: dict[str, dict[str, object]] = {
    "cloud": {"route": "cloud", "draft": 0},
    "cloud, drafts there": {"route": "cloud", "draft": 16},
    "split 3": {"route": "split", "split": 3},
    "speculative": {"route": "speculative", "split": 0},
    "speculative over split 3": {"route": "speculative", "split": 3},
    "drafts of 5": {"route": "speculative", "split": 0, "draft": 5},
    "auto": {},
}
BASE = "cloud"


@dataclass(frozen=True, slots=True)
class Seen:
    """One answer in a cell, by a plan; `ran` is what auto became; seconds measured and predicted."""

    cell: str
    drafts_in_cloud: bool
    way: str
    round: int
    ran: str
    total_s: float
    predicted_s: float
    text: str


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--real", action="store_true", help="real cells over netem, as root, instead of the grid")
    parser.add_argument("--cell", nargs="+", type=int, metavar="N", help=f"which of the {len(CELLS)} real ones, from 0")


def name(cell: tuple[str, int, int, int, bool]) -> str:
    profile, slower, others, pace, tiny = cell
    return f"{profile}, phone {'full' if slower == 1 else f'1/{slower}'}, cloud {'loaded' if others else 'idle'}" \
           f"{' with a tiny model' if tiny else ''}, model {f'{pace} ms' if pace else 'as it is'}"  # fmt: skip


class Bench:
    """Starts both programs anew for every cell."""

    def __init__(self, made: Lab, given: argparse.Namespace):
        self._lab, self._given = made, given
        self._tiny, self._full = (endless(model, made.folder) for model in (TINY, FULL))
        self._asked = conversations(given.data, given.runs + 1)

    async def run(self, number: int) -> list[Seen]:
        cell = CELLS[number]
        profile, slower, others, pace, tiny = cell
        self._lab.link("set", profile)
        cloud = self._started("cloud", f"cloud-{number}", CLOUD_CORE, 1, pace, others, *self._serve(tiny))
        cloud.wait_up()
        socket = self._lab.folder / f"agent-{number}.socket"
        edge = self._started("edge", f"agent-{number}", EDGE_CORE, slower, pace, 0, *self._agent(number, socket))
        try:
            edge.wait_up()
            async with unix_client(socket) as client:
                return [seen async for seen in self._answers(client, cell)]
        finally:
            edge.end()
            cloud.end()

    async def _answers(self, client: Any, cell: tuple[str, int, int, int, bool]) -> Any:
        """All plans in some order, again and again; the first round is not counted."""
        order, ways = random.Random(self._given.seed), [one for one in PLANS if cell[4] or one != "cloud, drafts there"]
        for turn in range(self._given.runs + 1):
            asked, texts = self._asked[turn % len(self._asked)], dict[str, str]()
            sampling = how(turn)
            for way in order.sample(ways, len(ways)) if turn else ways:  # the first tells the agent what the cloud has
                body = {"model": "tandem", "messages": asked, "max_tokens": TOKENS, "temperature": sampling.temperature,
                        "seed": sampling.seed, "plan": {"quality": "best", **PLANS[way]}}  # fmt: skip
                said = await ask(client, body)
                plan = said.plan
                texts[way] = said.text
                if turn:
                    yield Seen(name(cell), cell[4], way, turn, _ran(plan),
                               said.times[-1] - said.asked, plan["predicted"]["total_ms"] / 1e3, said.text)  # fmt: skip
                await asyncio.sleep(0.1)
            if len(set(texts.values())) > 1:
                raise SystemExit(f"{name(cell)}: one prompt, several texts: {json.dumps(texts, indent=1)}")

    def _started(self, role: str, called: str, core: int, slower: int, pace: int, rows: int,
                 *words: object) -> Program:  # fmt: skip
        machine = ("--pace", pace, "--slower", slower, "--rows", rows)
        program = self._lab.start(role, called, PACED, *machine, role, "serve", "--threads", 1, *words)
        os.sched_setaffinity(program.process.pid, {core})
        return program

    def _serve(self, tiny: bool) -> Iterator[object]:
        yield from ("--model", self._full, "--keys", self._lab.folder / "keys", "--host", CLOUD, "--port", WIRE)
        yield from ("--http-port", HTTPS, *GENEROUS)
        if tiny:
            yield from ("--tiny", self._tiny)

    def _agent(self, number: int, socket: Path) -> Iterator[object]:
        yield from ("--cloud", f"{CLOUD}:{WIRE}", "--ca", self._lab.folder / "keys" / "ca.pem")
        yield from ("--token-file", self._lab.folder / "agent", "--unix", socket, "--edge-layers", HELD)
        yield from ("--state", self._lab.folder / f"state-{number}", "--tiny", self._tiny, "--full", self._full)


def _ran(plan: dict[str, Any]) -> str:
    words = (plan["route"], str(plan["split"] or ""), "drafts" if plan["draft"] and plan["route"] == "cloud" else "")
    return " ".join(filter(None, words))


@dataclass(frozen=True, slots=True)
class Verdict:
    """A cell: mean seconds by plan, of the oracle picked on the other half, and of the best plan by hindsight."""

    means: dict[str, float]
    oracle_s: float
    hindsight_s: float
    best: str
    errors: list[float]

    @property
    def regret(self) -> float:
        return self.means["auto"] / self.oracle_s - 1

    @property
    def noise(self) -> float:
        return self.oracle_s / self.hindsight_s - 1


def verdict(seen: Sequence[Seen]) -> Verdict:
    by_way = {way: sorted((one for one in seen if one.way == way), key=lambda one: one.round) for way in PLANS}
    times = {way: [one.total_s for one in some] for way, some in by_way.items() if some}
    halves = [{way: statistics.fmean(one[half::2]) for way, one in times.items()} for half in (0, 1)]
    plans = [way for way in times if way != "auto"]
    picked = [min(plans, key=half.__getitem__) for half in halves]
    means = {way: statistics.fmean(one) for way, one in times.items()}
    scored = (halves[1][picked[0]] + halves[0][picked[1]]) / 2
    hindsight = sum(min(half[way] for way in plans) for half in halves) / 2
    errors = [abs(one.predicted_s / one.total_s - 1) for one in seen]
    return Verdict(means, scored, hindsight, min(plans, key=means.__getitem__), errors)


def table(seen: Sequence[Seen]) -> Table:
    made = Table(title=f"Real cells: mean ms an answer of {TOKENS} tokens, the same text by every plan")
    for column in ("cell", "n", *PLANS, "auto ran", "best", "regret", "oracle's own", "error"):
        made.add_column(column, justify="left" if column in ("cell", "auto ran", "best") else "right")
    for cell in dict.fromkeys(one.cell for one in seen):
        some = [one for one in seen if one.cell == cell]
        found = verdict(some)
        ran = [one.ran for one in some if one.way == "auto"]
        made.add_row(
            cell, str(len(ran)), *(f"{1e3 * found.means[way]:.0f}" if way in found.means else "–" for way in PLANS),
            max(ran, key=ran.count), found.best, f"{found.regret:.1%}", f"{found.noise:.1%}",
            f"{statistics.median(found.errors):.0%}",
        )  # fmt: skip
    return made


def summary(seen: Sequence[Seen]) -> Iterator[str]:
    cells = [verdict([one for one in seen if one.cell == cell]) for cell in dict.fromkeys(one.cell for one in seen)]
    mean = statistics.fmean
    yield (f"{len(cells)} cells: mean regret of auto {mean(one.regret for one in cells):.1%}, the oracle's own "
           f"{mean(one.noise for one in cells):.1%}")  # fmt: skip
    for way in (one for one in PLANS if one != "auto"):
        lost = [one.means[way] / one.oracle_s - 1 for one in cells if way in one.means]
        yield f"regret of {way}: {mean(lost):.0%} ({len(lost)} cells)" if lost else f"{way}: in no cell"
    worst = max(one.means["auto"] / one.means[BASE] - 1 for one in cells)
    yield f"auto against always cloud at worst {worst:+.1%}"
    much = [one.means[BASE] / one.means["auto"] for one in cells if one.means[BASE] / one.hindsight_s >= 1.2]
    yield (f"where another plan is 1.2x as fast as the cloud or more ({len(much)} cells), auto is at least "
           f"{min(much, default=1):.2f}x as fast")  # fmt: skip
    for way in PLANS:
        errors = [abs(one.predicted_s / one.total_s - 1) for one in seen if one.way == way]
        if errors:
            yield f"prediction of {way}: median error {statistics.median(errors):.1%} of {len(errors)}"


async def measured(made: Lab, given: argparse.Namespace) -> list[Seen]:
    bench, found = Bench(made, given), []
    for number in given.cell or range(len(CELLS)):
        began = time.monotonic()
        seen = await bench.run(number)
        kept(given.keep, seen)
        found += seen
        print(f"{number}: {name(CELLS[number])}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    return found


def main(given: argparse.Namespace) -> None:
    given.runs = given.runs or 6
    os.sched_setaffinity(0, {EDGE_CORE})
    with lab("wifi", logs=given.logs) as made:
        new = asyncio.run(measured(made, given))
    found = [Seen(**one) for one in kept(given.keep, ())] if given.keep else new
    Console(width=200).print(table(found))
    print(*summary(found), machine(made.words), sep="\n")
