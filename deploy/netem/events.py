"""What may happen to a link, as the router's commands."""

from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from pathlib import Path

import network
import router
from place import LinkError, Place

LINK = Path(__file__).with_name("link")
UNITS = {"kbit": 1, "mbit": 1000}
MOST_S, MOST_TIMES = 3600.0, 10_000


def add_flags(parser: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
    """Sets `say`: a function from the arguments to the line that is printed."""
    events = parser.add_subparsers(required=True, metavar="EVENT")

    def event(name: str, text: str, *flags: argparse.ArgumentParser) -> argparse.ArgumentParser:
        made = events.add_parser(name, help=text, description=text, parents=[shared, *flags])
        made.set_defaults(event=name)
        return made

    timed = argparse.ArgumentParser(add_help=False)
    timed.add_argument("--at", type=float, default=0, metavar="S", help="so many seconds from now")
    again = argparse.ArgumentParser(add_help=False)
    again.add_argument("--every", type=float, default=1, metavar="S")
    again.add_argument("--times", type=int, default=1, metavar="N")

    one = event("blackhole", "nothing gets through, both ways", timed)
    one.add_argument("--seconds", type=float, default=2)
    event("rebind", "UDP comes from another port from now on; what comes to the old one arrives still", timed, again)
    event("silent-rebind", "the same, and what comes to the old port is dropped", timed, again)
    event("move", "the other interface of edge comes up, this one goes down", timed)
    one = event("block-udp", "no UDP, both ways", timed)
    one.add_argument("--icmp", action="store_true", help="and the edge is told: administratively prohibited")
    one.add_argument("--after", type=int, default=0, metavar="N", help="let N datagrams of every flow pass first")
    one = event("throttle-udp", "UDP above a rate is dropped, each way", timed)
    one.add_argument("rate", help="256kbit, 1mbit, …")
    one = event("mtu", "larger packets get an ICMP message instead", timed)
    one.add_argument("bytes", type=int)
    for name in ("restore", "unblock"):
        event(name, "undoes all events, scheduled ones too, and goes back to the first interface")


def happen(place: Place, given: argparse.Namespace) -> str:
    """Applies an event, or schedules it, and says so in a line."""
    if given.event in ("restore", "unblock"):
        return restore(place)
    _check("--at", given.at, 0, MOST_S)
    if given.event == "move":
        return _move(place, given.at)
    text, lines = _lines(given)
    router.tell(place, " && ".join(lines))
    return f"{text} in {given.at:g} s" if given.at else text


def restore(place: Place) -> str:
    place.end("jobs")
    router.tell(place, "restore")
    network.move(place, "net0")
    network.forget(place)
    return "restored: nothing is blocked, delayed by a schedule or moved"


def _check(name: str, value: float, least: float, most: float) -> None:
    if not least <= value <= most:
        raise LinkError(f"{name} {value:g}, must be {least:g} to {most:g}")


def _seconds(value: float) -> str:
    """As the router reads them; it takes 0 for now."""
    return f"{value:.3f}" if value >= 0.001 else "0"


def _lines(given: argparse.Namespace) -> tuple[str, list[str]]:
    """What it is, in words, and what the router does."""
    at = f"schedule {_seconds(given.at)}"
    match given.event:
        case "blackhole":
            _check("--seconds", given.seconds, 0.01, MOST_S)
            lines = [f"{at} 0 1 forward 0", f"schedule {_seconds(given.at + given.seconds)} 0 1 forward 1"]
            return f"blackhole for {given.seconds:g} s", lines
        case "rebind" | "silent-rebind":
            _check("--every", given.every, 0.1, MOST_S)
            _check("--times", given.times, 1, MOST_TIMES)
            how = "silent" if given.event == "silent-rebind" else ""
            often = f", {given.times} times, every {given.every:g} s" if given.times > 1 else ""
            return given.event + often, [f"{at} {_seconds(given.every)} {given.times} rebind {how}"]
        case "block-udp":
            _check("--after", given.after, 0, 1_000_000)
            often = f" after {given.after} datagrams" if given.after else ""
            how = ", with ICMP" if given.icmp else ""
            return f"UDP blocked{often}{how}", [f"{at} 0 1 block_udp {given.after} {'icmp' * given.icmp}"]
        case "throttle-udp":
            return f"UDP throttled to {given.rate}", [f"{at} 0 1 throttle_udp {_bytes_a_second(given.rate)}"]
        case _:
            _check("mtu", given.bytes, 576, 1500)
            return f"MTU {given.bytes}", [f"{at} 0 1 mtu {given.bytes}"]


def _bytes_a_second(rate: str) -> int:
    match = re.fullmatch(r"(\d+)(kbit|mbit)", rate)
    if match is None:
        raise LinkError(f"rate {rate!r}, must be like 256kbit or 1mbit")
    kbit = int(match[1]) * UNITS[match[2]]
    _check("rate in kbit", kbit, 8, 1_000_000)
    return kbit * 125


def _move(place: Place, at: float) -> str:
    if not at:
        name = network.move(place)
        return f"moved to {name} (10.77.{network.SUBNETS['edge' + name[-1]]}.1)"
    again = shlex.join([sys.executable, str(LINK), "event", "move", "--name", place.name])
    job = subprocess.Popen(["bash", "-c", f"sleep {at:g}; exec {again}"], start_new_session=True,
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    place.remember(job.pid, "jobs")
    return f"move in {at:g} s"
