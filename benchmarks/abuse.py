"""Honest phones beside hostile ones: token latency and the server's memory, quiet against under each kind of abuse.

The server, the honest phones and the abuser are three processes. What the honest phones get is compared with the
quiet run's token ids.

    python benchmarks/abuse.py [--seconds 10] [--only NAME …]
"""

from __future__ import annotations

import argparse
import asyncio
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch
from attacks import ATTACKS
from phones import GENEROUS, Phones, Target, Visit, issue, target_in
from rich.console import Console
from rich.table import Table

from protocol.errors import WireError
from protocol.transport.quic import connect_quic

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "deploy"))
from demo import FULL, QUESTIONS, Place, cloud, make_keys, wait_ready

HONEST, ANSWER = 4, 48
SLOTS, WARM_S = 16, 10.0
ATTACKER = Path(__file__).with_name("attacks.py")


@dataclass(frozen=True, slots=True)
class Seen:
    """What the honest phones met: waits for tokens (s), sessions and failures, the server's memory (MB) at the end."""

    gaps: tuple[float, ...]
    sessions: int
    failed: int
    resident_mb: float
    did: int = 0

    def at(self, share: float) -> float:
        return statistics.quantiles(self.gaps, n=100)[round(share * 100) - 1] if len(self.gaps) > 1 else float("nan")


class Bench:
    """One server under test and its honest phones."""

    def __init__(self, place: Place, server: int, target: Target):
        self._place, self._server, self._target = place, psutil.Process(server), target
        self._phones = Phones(FULL, target.token)
        self._prompts = [self._phones.prompt(question) for question in QUESTIONS]
        self._answers: dict[int, tuple[int, ...]] = {}

    async def honest(self, number: int, until: float, visits: list[Visit], failures: list[str]) -> None:
        """One phone that keeps its connection, asks again and again, and reconnects when it is lost."""
        prompt = self._prompts[number % len(self._prompts)]
        link = None
        while time.monotonic() < until:
            try:
                async with asyncio.timeout(10):
                    if link is None or link.closed:
                        link = await connect_quic(self._target.wire, self._target.trust)
                    visit = await self._phones.visit(link, prompt, ANSWER)
            except (WireError, TimeoutError) as error:
                failures.append(f"{type(error).__name__}: {error}")
                continue
            if self._answers.setdefault(number % len(self._prompts), visit.ids) != visit.ids:
                raise SystemExit("an honest phone got another text than in the quiet run")
            visits.append(visit)
        if link is not None:
            await link.aclose()

    async def measure(self, seconds: float, name: str | None = None, phones: int = HONEST) -> Seen:
        """All honest phones for `seconds`, with or without one kind of abuse beside them."""
        abuser = await self._abuser(name) if name else None
        visits: list[Visit] = []
        failures: list[str] = []
        until = time.monotonic() + seconds
        await asyncio.gather(*(self.honest(number, until, visits, failures) for number in range(phones)))
        memory = self._server.memory_info().rss / 1e6
        did = 0
        if abuser is not None:
            abuser.terminate()
            out, _ = await abuser.communicate()
            did = int(out)
        for text in sorted(set(failures)):
            print(f"  {name}: {failures.count(text)} x {text}", file=sys.stderr)
        return Seen(tuple(gap for visit in visits for gap in visit.gaps), len(visits), len(failures), memory, did)

    async def _abuser(self, name: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(ATTACKER), name, "--place", str(self._place.folder), "--wire",
            str(self._place.wire), "--https", str(self._place.https), stdout=subprocess.PIPE,
        )  # fmt: skip
        assert process.stdout is not None
        await process.stdout.readline()
        await asyncio.sleep(1)
        return process


async def run(names: list[str], seconds: float) -> list[tuple[str, Seen]]:
    with tempfile.TemporaryDirectory(prefix="tandem-abuse-") as name:
        place = Place.in_folder(Path(name))
        make_keys(place)
        for device in ("honest", "abuser"):
            issue(place.folder, device)
        with cloud(place, *GENEROUS) as server:
            wait_ready(server, place.https_url, place.ca, place.log("cloud_server"))
            bench = Bench(place, server.pid, target_in(place.folder, place.wire, place.https, "honest"))
            await bench.measure(WARM_S, phones=SLOTS)  # every slot is used, and shapes of every size are compiled
            seen = [("quiet", await bench.measure(seconds))]
            for attack_name in names:
                seen.append((attack_name, await bench.measure(seconds, attack_name)))
                print(f"{attack_name}: {seen[-1][1].sessions} honest answers", file=sys.stderr)
                await asyncio.sleep(2)
            seen.append(("quiet again", await bench.measure(seconds)))
            if server.poll() is not None:
                raise SystemExit("the server has ended")
    return seen


def main() -> None:
    parser = argparse.ArgumentParser(description="Honest phones beside hostile ones.")
    parser.add_argument("--seconds", type=float, default=10)
    parser.add_argument("--only", nargs="+", choices=sorted(ATTACKS), default=list(ATTACKS))
    given = parser.parse_args()
    seen = asyncio.run(run(given.only, given.seconds))
    quiet = seen[0][1]
    table = Table(title=f"{HONEST} honest phones, {ANSWER} tokens an answer, beside each kind of abuse")
    for column in ("beside", "abuse done", "answers", "failed", "p50 ms", "p99 ms", "p99 against quiet", "server MB"):
        table.add_column(column, justify="left" if column == "beside" else "right")
    for name, one in seen:
        p50, p99 = (f"{1e3 * one.at(share):.1f}" for share in (0.5, 0.99))
        table.add_row(name, str(one.did or ""), str(one.sessions), str(one.failed), p50, p99,
                      f"{one.at(0.99) / quiet.at(0.99):.1f}", f"{one.resident_mb:.0f}")  # fmt: skip
    Console(width=120).print(table)
    print(f"{platform.machine()}, {os.cpu_count()} cores for all three processes, torch {torch.__version__}")


if __name__ == "__main__":
    main()
