"""Hours in minutes: mixed sessions, cancels and reconnects, and what both programs hold while they go on.

An agent and a server run as processes of their own. Apps ask the agent on every route and hang up now and then; other
phones come over fresh QUIC and gRPC connections and leave in mid-answer. Every two seconds resident memory, file
descriptors, rows and asyncio tasks are read.

    python benchmarks/soak.py --minutes 20 [--plot FILE.png]
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import os
import platform
import random
import re
import ssl
import statistics
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import httpx
import psutil
import torch
from phones import GENEROUS, Phones, issue, target_in
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from protocol.errors import WireError
from protocol.transport.grpc import connect_grpc
from protocol.transport.quic import connect_quic

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "deploy"))
from demo import FULL, QUESTIONS, Place, agent, cloud, make_keys, wait_ready

EVERY_S = 2.0
WARM = 0.2  # of the run, which the comparison leaves out
GAUGES = {"rows": "vllm:num_requests_running", "tasks": "tandem_tasks"}


@dataclass(frozen=True, slots=True)
class Sample:
    """One reading: seconds since the start, MB, descriptors; of the server also rows and tasks."""

    at: float
    cloud_mb: float
    cloud_files: int
    cloud_rows: float
    cloud_tasks: float
    edge_mb: float
    edge_files: int


class Soak:
    """The load on both programs, counted by kind and outcome."""

    def __init__(self, place: Place):
        self.place, self.outcomes = place, Counter[str]()
        self.random = random.Random(1)
        self.target = target_in(place.folder, place.wire, place.https, "soak")
        self.phones = Phones(FULL, self.target.token)

    async def app(self, client: httpx.AsyncClient) -> None:
        """One request to the agent on some route; every fourth is hung up on."""
        route = self.random.choice(["local", "cloud", "split", "auto"])
        plan: dict[str, object] = {"route": route, "quality": "fast"}
        if route == "split":
            plan["split"] = self.random.randrange(1, 13)
        body = {"model": "tandem", "messages": [{"role": "user", "content": self.random.choice(QUESTIONS)}],
                "max_tokens": self.random.randrange(4, 80), "stream": True, "plan": plan}  # fmt: skip
        leave = self.random.random() < 0.25
        async with client.stream("POST", "/v1/chat/completions", json=body) as response:
            if response.status_code != 200:
                await response.aread()
                self.outcomes[f"app {route}: {response.status_code}"] += 1
                return
            async for line in response.aiter_lines():
                if leave and line.startswith("data:") and self.random.random() < 0.2:
                    self.outcomes[f"app {route}: hung up"] += 1
                    return
        self.outcomes[f"app {route}: answered"] += 1

    async def phone(self) -> None:
        """A phone with a new connection, that leaves in mid-answer half the time."""
        connect, name = self.random.choice([(connect_quic, "quic"), (connect_grpc, "grpc")])
        prompt = self.phones.prompt(self.random.choice(QUESTIONS))
        leave = self.random.randrange(1, 20) if self.random.random() < 0.5 else None
        connection = await connect(self.target.wire, self.target.trust)
        try:
            await self.phones.visit(connection, prompt, 40, leave)
        finally:
            await connection.aclose()
        self.outcomes[f"phone {name}: {'left' if leave else 'answered'}"] += 1

    async def go_on(self, until: float) -> None:
        """One after the other, apps and phones in turn."""
        async with httpx.AsyncClient(base_url=self.place.url, timeout=60) as client:
            while time.monotonic() < until:
                kind = "app" if self.random.random() < 0.6 else "phone"
                try:
                    async with asyncio.timeout(60):
                        await (self.app(client) if kind == "app" else self.phone())
                except (WireError, httpx.HTTPError, TimeoutError) as error:
                    self.outcomes[f"{kind}: {type(error).__name__} {error}"[:90]] += 1


async def read(place: Place, client: httpx.AsyncClient, server: psutil.Process, phone: psutil.Process,
               began: float) -> Sample:  # fmt: skip
    gc.collect()  # grpc's closed channels keep their sockets until then, and the server would seem to hold them
    text = (await client.get("/metrics")).text
    found = {name: re.search(rf"^{gauge}(?:\{{.*\}})? (\S+)$", text, re.M) for name, gauge in GAUGES.items()}
    rows, tasks = (float(match[1]) if match else float("nan") for match in found.values())
    return Sample(time.monotonic() - began, server.memory_info().rss / 1e6, server.num_fds(), rows, tasks,
                  phone.memory_info().rss / 1e6, phone.num_fds())  # fmt: skip


async def soak(place: Place, server: int, phone: int, minutes: float, crowd: int) -> tuple[list[Sample], Counter[str]]:
    load, began = Soak(place), time.monotonic()
    until = began + 60 * minutes
    samples: list[Sample] = []
    pids = psutil.Process(server), psutil.Process(phone)
    trust = ssl.create_default_context(cadata=load.target.trust.ca.decode())
    async with httpx.AsyncClient(base_url=place.https_url, verify=trust, timeout=30,
                                 headers={"authorization": f"Bearer {load.target.token}"}) as client:  # fmt: skip
        workers = [asyncio.create_task(load.go_on(until)) for _ in range(crowd)]
        with tqdm(total=round(60 * minutes), unit="s") as bar:
            while time.monotonic() < until:
                await asyncio.sleep(EVERY_S)
                samples.append(await read(place, client, *pids, began))
                bar.update(round(samples[-1].at) - bar.n)
        await asyncio.gather(*workers)
        await asyncio.sleep(3 * EVERY_S)
        samples.append(await read(place, client, *pids, began))  # all sessions have ended
    return samples, load.outcomes


def plot(samples: list[Sample], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    minutes = [one.at / 60 for one in samples]
    panels = (("resident, MB", ("cloud_mb", "edge_mb")), ("file descriptors", ("cloud_files", "edge_files")),
              ("in the cloud", ("cloud_rows", "cloud_tasks")))  # fmt: skip
    for axis, (label, names) in zip(axes, panels, strict=True):
        for name in names:
            axis.plot(minutes, [getattr(one, name) for one in samples], label=name.replace("_", " "), linewidth=1)
        axis.set_ylabel(label)
        axis.set_ylim(bottom=0)
        axis.legend(loc="lower right")
    axes[-1].set_xlabel("minutes")
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description="Mixed load for a long time; what both programs hold meanwhile.")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--crowd", type=int, default=6, help="apps and phones at a time")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="needs matplotlib")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="tandem-soak-") as name:
        place = Place.in_folder(Path(name))
        make_keys(place)
        issue(place.folder, "soak")
        with cloud(place, *GENEROUS) as server:
            wait_ready(server, place.https_url, place.ca, place.log("cloud_server"))
            with agent(place) as phone:
                wait_ready(phone, place.url, None, place.log("edge_agent"))
                samples, outcomes = asyncio.run(soak(place, server.pid, phone.pid, given.minutes, given.crowd))
    console = Console(width=110)
    for outcome, times in sorted(outcomes.items()):
        console.print(f"{times:6} {outcome}", highlight=False)
    warm = [one for one in samples if one.at >= WARM * samples[-1].at]
    tenth = max(1, len(warm) // 10)
    table = Table(title=f"{given.minutes:g} minutes, {sum(outcomes.values())} requests")
    for column in ("", "after warm-up", "last tenth", "change", "at rest"):
        table.add_column(column, justify="right" if column else "left")
    for field in ("cloud_mb", "cloud_files", "cloud_rows", "cloud_tasks", "edge_mb", "edge_files"):
        first, last = (
            statistics.mean(getattr(s, field) for s in part) for part in (warm[:tenth], warm[-tenth - 1 : -1])
        )
        rest = getattr(samples[-1], field)
        table.add_row(field.replace("_", " "), f"{first:.0f}", f"{last:.0f}", f"{last - first:+.1f}", f"{rest:.0f}")
    console.print(table)
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")
    if given.plot:
        plot(samples, given.plot)


if __name__ == "__main__":
    main()
