"""Resident memory and start time of both programs, each a process of its own, as a user would start it.

    python benchmarks/footprint.py [--rounds 3]

Start time is from the process's birth to the first 200 of `/ready`. Memory is read then, and after fifteen answers.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import tempfile
from dataclasses import astuple, dataclass
from pathlib import Path

import httpx
import psutil
import torch
from rich.console import Console
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "deploy"))
from demo import FULL, QUESTIONS, Place, agent, cloud, make_keys, wait_ready

AIMS = {"edge agent": "under 450 MB, under 5 s", "cloud server": ""}


@dataclass(frozen=True, slots=True)
class Footprint:
    """Seconds to readiness, and resident megabytes then and after the answers."""

    start_s: float
    ready_mb: float
    after_mb: float


def resident_mb(pid: int) -> float:
    """Of the program and of the process that renders its templates."""
    program = psutil.Process(pid)
    return sum(one.memory_info().rss for one in (program, *program.children(recursive=True))) / 1e6


def measure_once(place: Place) -> dict[str, Footprint]:
    """Starts both, asks five questions on each route, and reads both processes."""
    with cloud(place) as server:
        cloud_start = wait_ready(server, place.https_url, place.ca, place.log("cloud_server"))
        cloud_ready = resident_mb(server.pid)
        with agent(place) as phone:
            start = wait_ready(phone, place.url, None, place.log("edge_agent"))
            ready = resident_mb(phone.pid)
            for route in ("local", "cloud", "split"):
                for question in (*QUESTIONS, *QUESTIONS[:2]):
                    body = {"model": "tandem", "messages": [{"role": "user", "content": question}], "max_tokens": 40,
                            "plan": {"route": route, "quality": "fast"}}  # fmt: skip
                    httpx.post(f"{place.url}/v1/chat/completions", json=body, timeout=60).raise_for_status()
            return {
                "edge agent": Footprint(start, ready, resident_mb(phone.pid)),
                "cloud server": Footprint(cloud_start, cloud_ready, resident_mb(server.pid)),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description="Memory and start time of the agent and the server.")
    parser.add_argument("--rounds", type=int, default=3)
    rounds = []
    for _ in range(parser.parse_args().rounds):
        with tempfile.TemporaryDirectory(prefix="tandem-footprint-") as name:
            place = Place.in_folder(Path(name))
            make_keys(place)
            rounds.append(measure_once(place))
    table = Table(title=f"Footprint with the built-in pair ({FULL} in the cloud, both on the phone)")
    for column in ("program", "start, s", "resident when ready, MB", "after 15 answers, MB", "aim"):
        table.add_column(column)
    for program, aim in AIMS.items():
        seen = [one[program] for one in rounds]
        start, ready, after = (statistics.median(values) for values in zip(*map(astuple, seen), strict=True))
        table.add_row(program, f"{start:.1f}", f"{ready:.0f}", f"{after:.0f}", aim)
    Console(width=110).print(table)
    print(f"medians of {len(rounds)}; {platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}")


if __name__ == "__main__":
    main()
