"""A megabyte upward over a link with losses, by congestion control, and how a flow shares the link with another.

    sudo .venv/bin/python benchmarks/bulk.py [--rounds 3] [--plot docs/plots/bulk.png]

12 Mbit/s, 70 ms, netem's queue of two bandwidth-delay products. A transfer runs on a new connection that has answered
once; QUIC and gRPC go through this project's transports and TLS, TCP is plain. Shares are those of the last 15 of 20 s.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bulk_ends import SIZE, WARM_S
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
LINK = (sys.executable, str(ROOT / "deploy/netem/link"))
NAME, CLOUD = "bulk", "10.77.2.1"
MBIT, RTT_MS = 12, 70
WAYS = ("QUIC, this", "QUIC, cubic", "QUIC, reno", "gRPC", "TCP bbr", "TCP cubic")
PAIRS = (("QUIC, this", "TCP cubic"), ("QUIC, this", "QUIC, this"), ("QUIC, this",), ("TCP bbr", "TCP cubic"),
         ("TCP cubic",))  # fmt: skip
SECONDS = 20
KERNEL = Path("/proc/sys/net/ipv4")


@dataclass(frozen=True, slots=True)
class Case:
    """Percent each way, and ms both ways together."""

    loss: float
    jitter: float

    def __str__(self) -> str:
        return f"{self.loss:g} %" + (f", ±{self.jitter:g} ms" if self.jitter else "")


CASES = (Case(0, 0), Case(1, 0), Case(2, 0), Case(5, 0), Case(1, 10), Case(1, 20))


def link(*words: str) -> None:
    subprocess.run([*LINK, *words, "--name", NAME], check=True, stdout=subprocess.DEVNULL)


def shape(case: Case) -> list[str]:
    numbers = {"rtt": RTT_MS, "jitter": case.jitter, "loss": case.loss, "down": MBIT, "up": MBIT}
    return [word for flag, value in numbers.items() for word in (f"--{flag}", f"{value:g}")]


def inside(role: str, *words: str) -> list[str]:
    return ["ip", "netns", "exec", f"{role}-{NAME}", *words]


def end(role: str, what: str, folder: Path, *words: str) -> subprocess.Popen[str]:
    command = inside(role, sys.executable, str(Path(__file__).with_name("bulk_ends.py")), what, str(folder), CLOUD)
    return subprocess.Popen([*command, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


@contextmanager
def served() -> Iterator[Path]:
    """The link and a server at its end; the folder has the server's CA."""
    link("up", "lte", *shape(CASES[0]))
    try:
        with tempfile.TemporaryDirectory(prefix="tandem-bulk-") as name:
            server = end("cloud", "serve", Path(name))
            try:
                assert server.stdout
                if server.stdout.readline().strip() != "ready":
                    raise SystemExit("the server did not start")
                yield Path(name)
            finally:
                server.communicate()
    finally:
        link("down")


def once(folder: Path, way: str, rounds: int) -> list[float]:
    """Seconds of each transfer."""
    output, _ = end("edge", "once", folder, way, str(rounds)).communicate()
    return [float(line) for line in output.split()]


def together(folder: Path, ways: tuple[str, ...]) -> tuple[list[float], float]:
    """Mbit/s of flows that run at the same time, and the median round trip beside them in ms."""
    flows = [end("edge", "flow", folder, way, str(SECONDS)) for way in ways]
    ping = inside("edge", "ping", "-i", "0.2", "-w", str(SECONDS), CLOUD)
    said = subprocess.run(ping, stdout=subprocess.PIPE, text=True).stdout
    trips = [float(found) for found in re.findall(r"time=([\d.]+)", said)][round(WARM_S / 0.2) :]
    return [8e-6 * float(flow.communicate()[0]) for flow in flows], statistics.median(trips)


def plot(found: dict[str, list[list[float]]], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    width = 0.8 / len(WAYS)
    for number, way in enumerate(WAYS):
        at = [place + (number - len(WAYS) / 2 + 0.5) * width for place in range(len(CASES))]
        axis.bar(at, [statistics.median(times) for times in found[way]], width, label=way)
    axis.set_xticks(range(len(CASES)), [str(case) for case in CASES])
    axis.set_xlabel("loss each way, jitter")
    axis.set_ylabel(f"seconds for 1 MB up, {MBIT} Mbit/s, {RTT_MS} ms")
    axis.set_yscale("log")
    axis.legend()
    figure.savefig(file, dpi=110)


def show_times(found: dict[str, list[list[float]]]) -> None:
    bound = SIZE * 8e-6 / MBIT + RTT_MS / 1e3
    table = Table(title=f"seconds for 1 MB up, median (worst); size/rate + RTT is {bound:.2f}")
    table.add_column("loss each way")
    for way in WAYS:
        table.add_column(way, justify="right")
    for number, case in enumerate(CASES):
        cells = [found[way][number] for way in WAYS]
        table.add_row(str(case), *(f"{statistics.median(times):.2f} ({max(times):.2f})" for times in cells))
    Console(width=120).print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description="Bulk on lossy links, by congestion control. Needs root.")
    parser.add_argument("--rounds", type=int, default=3, help="of each transfer")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="needs matplotlib")
    given = parser.parse_args()
    if "bbr" not in (KERNEL / "tcp_available_congestion_control").read_text().split():
        raise SystemExit("this kernel has no bbr to compare with: modprobe tcp_bbr")
    found: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    with served() as folder:
        for case in tqdm(CASES):
            link("set", "lte", *shape(case))
            for way in WAYS:
                found[way].append(once(folder, way, given.rounds))
        show_times(found)
        link("set", "lte", *shape(CASES[0]))
        table = Table("flows at the same time", "Mbit/s", "round trip, ms", title="sharing, no other loss")
        for ways in PAIRS:
            rates, trip = together(folder, ways)
            table.add_row(" + ".join(ways), " : ".join(f"{rate:.1f}" for rate in rates), f"{trip:.0f}")
        Console(width=120).print(table)
    default = (KERNEL / "tcp_congestion_control").read_text().strip()  # that gRPC has
    print(f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}, gRPC's TCP is {default}")
    if given.plot:
        plot(found, given.plot)


if __name__ == "__main__":
    main()
