"""Faults in the middle of answers: what they cost in time, and whether a token is ever lost, repeated or changed.

One agent, two replicas, a whole-model answer and a split one under way at any time, sampled, by a model that knows no
end. Each is compared token for token with the undisturbed answer. The gap is the longest wait for a token from the
fault on; detection is when the phone, seen from outside, begins to send on another socket or to the other replica
(silent rebinding: at all, after silence). Killed and drained replicas are started again, before the next fault.

    python benchmarks/faults.py [--profile lte] [--faults 200] [--kind kill move …] [--seed 1] [--plot FILE]
"""

from __future__ import annotations

import argparse
import asyncio
import random
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from answers import unix_client
from app import PLANS, SPLIT, App, Verdict
from netlab import FULL, PROFILES, TINY, WIRE, Lab, add_flags, at, endless, kept, lab, machine, ms
from rich.console import Console
from rich.table import Table
from watch import Watch

HELD = SPLIT  # layers of the full model on the phone, which cannot finish an answer by itself
DRAIN_S = 1.0  # that a drained replica's sessions have
KINDS = {  # what `link event` is told, and how long to look at least, s
    "kill": ((), 0.8),
    "drain": ((), DRAIN_S + 0.8),
    "blackhole": (("blackhole", "--seconds", "2"), 2.8),
    "rebind": (("rebind",), 0.6),
    "silent-rebind": (("silent-rebind",), 0.8),
    "move": (("move",), 0.8),
}
ENDS = ("kill", "drain")
FLOWS_S, LOOK_S, LONGEST_S = 0.3, 0.05, 20.0


@dataclass(frozen=True, slots=True)
class Hit:
    """One answer that met a fault; seconds. `after` is from the detection to the end of the wait."""

    kind: str
    route: str
    gap_s: float
    detected_s: float | None
    after_s: float | None


class Bench:
    """Both replicas, the agent and its apps."""

    def __init__(self, lab: Lab, profile: str, seed: int):
        self._lab, self._rtt_s = lab, PROFILES[profile].rtt_ms / 1e3
        self._tiny, self._full = (endless(model, lab.folder) for model in (TINY, FULL))
        self._random = random.Random(seed)
        self._replicas = [self._start(number) for number in range(2)]
        self.hits: list[Hit] = []

    def _start(self, number: int) -> Any:
        return self._lab.cloud(number, "--drain", DRAIN_S, model=self._full)

    async def run(self, kinds: list[str]) -> list[Hit | Verdict]:
        for replica in self._replicas:
            replica.wait_up()
        models = ("--tiny", self._tiny, "--full", self._full, "--edge-layers", HELD)
        agent, socket = self._lab.agent("agent", *models, replicas=2)
        agent.wait_up()
        async with unix_client(socket) as client:
            apps = [App(client, route, random.Random(self._random.random())) for route in PLANS]
            for app in apps:
                await app.prepare()
            watch = Watch()
            running = [asyncio.create_task(app.go_on()) for app in apps]
            try:
                for number, kind in enumerate(kinds):
                    hits = await self._strike(kind, apps, watch)
                    self.hits += hits
                    told = ", ".join(f"{hit.route} {ms(hit.gap_s)} ms" for hit in hits)
                    print(f"{time.monotonic():.2f} {number + 1}/{len(kinds)} {kind}: {told}", file=sys.stderr)
                for app in apps:
                    app.stopping = True
                async with asyncio.timeout(60):
                    await asyncio.gather(*running)
            finally:
                watch.close()
                for task in running:
                    task.cancel()
                await asyncio.gather(*running, return_exceptions=True)
        print(f"refused to begin: {sum(app.refused for app in apps)}", file=sys.stderr)
        return [*self.hits, *(one for app in apps for one in app.verdicts)]

    async def _strike(self, kind: str, apps: list[App], watch: Watch) -> list[Hit]:
        """One fault, and what became of the answers that were in their middle."""
        met = []
        while not met:
            await asyncio.sleep(0.3 * self._random.random())
            met = [(app, app.times) for app in apps if app.in_the_middle]
        port = watch.busiest(range(WIRE, WIRE + 2))
        began = time.monotonic()
        await self._do(kind, port - WIRE)
        await self._settled(began, KINDS[kind][1], met)
        noticed = self._noticed(kind, began, port, watch)
        hits = [hit for app, times in met if (hit := seen(kind, app.route, times, began, noticed))]
        if kind in ENDS:
            await self._again(port - WIRE)
        return hits

    async def _do(self, kind: str, number: int) -> None:
        if kind in ENDS:
            self._replicas[number].process.send_signal(9 if kind == "kill" else 15)
        else:
            await asyncio.to_thread(self._lab.event, *KINDS[kind][0])

    async def _settled(self, began: float, look_s: float, met: list[tuple[App, list[float]]]) -> None:
        """Until tokens flow again."""
        await asyncio.sleep(look_s)
        flows_s = FLOWS_S + 2 * self._rtt_s
        while (now := time.monotonic()) < began + LONGEST_S:
            if all(app.times is not times or now - times[-1] < flows_s for app, times in met):
                return
            await asyncio.sleep(LOOK_S)

    def _noticed(self, kind: str, began: float, port: int, watch: Watch) -> float | None:
        if kind == "rebind":
            return None  # there is nothing to notice
        ports = {WIRE, WIRE + 1} - ({port} if kind in ENDS else set())
        return watch.began(began, ports, new=kind in ("blackhole", "move"))

    async def _again(self, number: int) -> None:
        await asyncio.to_thread(self._replicas[number].end)
        self._replicas[number] = self._start(number)
        await asyncio.to_thread(self._replicas[number].wait_up)


def seen(kind: str, route: str, times: list[float], began: float, noticed: float | None) -> Hit | None:
    """None of an answer that had no token after the fault, since it was over."""
    waits = [(later - earlier, later) for earlier, later in pairwise(times) if later > began]
    if not waits:
        return None
    gap, end = max(waits)
    if noticed is None or noticed > end:  # what came later is not the end of this wait
        return Hit(kind, route, gap, None, None)
    return Hit(kind, route, gap, noticed - began, end - noticed)


def aim(hit: Hit, profile: str) -> tuple[float, float] | None:
    """What it took and what it should, for the kinds that have an aim on this link."""
    rtt_s = PROFILES[profile].rtt_ms / 1e3
    if hit.kind == "kill" and profile == "lte":
        return hit.gap_s, 1.5
    if hit.kind == "move" and hit.after_s is not None:
        return hit.after_s, 3 * rtt_s
    return (hit.gap_s, 0.25 + 2 * rtt_s) if hit.kind == "silent-rebind" else None


def table(hits: list[Hit], profile: str) -> Table:
    made = Table(title=f"Answers that met a fault on {profile}, ms (p50 / p99)")
    for column in ("fault", "answers", "detected after", "gap", "from detection on", "aim", "within"):
        made.add_column(column, justify="left" if column == "fault" else "right")

    def pair(values: list[float]) -> str:
        return f"{ms(at(values, 0.5))} / {ms(at(values, 0.99))}" if values else "–"

    for kind in KINDS:
        some = [hit for hit in hits if hit.kind == kind]
        if not some:
            continue
        aims = [one for one in (aim(hit, profile) for hit in some) if one]
        which = "after detection" if kind == "move" else "gap"
        verdict = (f"{which} {ms(aims[0][1])}", f"{sum(a <= b for a, b in aims)} of {len(aims)}") if aims else ("", "")
        detected = [hit.detected_s for hit in some if hit.detected_s is not None]
        after = [hit.after_s for hit in some if hit.after_s is not None]
        made.add_row(kind, str(len(some)), pair(detected), pair([hit.gap_s for hit in some]), pair(after), *verdict)
    return made


def plot(hits: list[Hit], profile: str, file: Path) -> None:
    from matplotlib.figure import Figure

    kinds = [kind for kind in KINDS if any(hit.kind == kind for hit in hits)]
    figure = Figure(figsize=(8, 1 + 0.8 * len(kinds)), layout="constrained")
    axis, spread = figure.subplots(), random.Random(0)
    for route, colour in zip(PLANS, ("C0", "C1"), strict=True):
        some = [hit for hit in hits if hit.route == route]
        heights = [kinds.index(hit.kind) + 0.5 * spread.random() - 0.25 for hit in some]
        axis.scatter([1e3 * hit.gap_s for hit in some], heights, s=8, color=colour, label=route)
    for row, kind in enumerate(kinds):
        aims = [one for one in (aim(hit, profile) for hit in hits if hit.kind == kind) if one]
        if aims and kind != "move":
            axis.plot([1e3 * aims[0][1]] * 2, [row - 0.4, row + 0.4], "k:", linewidth=1)
    axis.set(
        xscale="log", xlabel=f"longest wait for a token, ms; dotted: the aim ({profile})", yticks=range(len(kinds))
    )
    axis.set_yticklabels(kinds)
    axis.invert_yaxis()
    axis.legend()
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Faults in the middle of answers.")
    parser.add_argument("--profile", choices=PROFILES, default="lte")
    parser.add_argument("--faults", type=int, default=200)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    add_flags(parser)
    given = parser.parse_args()
    kinds = [given.kind[number % len(given.kind)] for number in range(given.faults)]
    random.Random(given.seed).shuffle(kinds)
    with lab(given.profile, logs=given.logs) as made, suppress(KeyboardInterrupt):
        bench = Bench(made, given.profile, given.seed)
        new = asyncio.run(bench.run(kinds))
    records = kept(given.keep, new)
    hits = [Hit(**one) for one in records if "kind" in one]
    verdicts = [Verdict(**one) for one in records if "tokens" in one]
    Console(width=120).print(table(hits, given.profile))
    lost, repeated, changed = (sum(getattr(one, name) for one in verdicts) for name in ("lost", "repeated", "changed"))
    print(f"{len(verdicts)} answers, {sum(one.tokens for one in verdicts)} tokens: {lost} lost, {repeated} repeated, "
          f"{changed} changed; {sum(bool(one.failed) for one in verdicts)} answers failed")  # fmt: skip
    print(machine(made.words))
    if given.plot:
        plot(hits, given.profile, given.plot)
    if lost or repeated or changed:
        sys.exit(1)


if __name__ == "__main__":
    main()
