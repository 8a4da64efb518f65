"""The link itself, with wide tolerances: it must be like its profile, and its events must happen."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from support.netem import CLOUD, LINK, Link

ECHO = str(Path(__file__).resolve().parents[1] / "support" / "echo.py")
WHOLE = pytest.mark.whole_netem
CALM = ("wifi", "--jitter", "0", "--loss", "0")


@pytest.fixture(scope="module", autouse=True)
def echo(link: Link) -> Iterator[None]:
    command = [*link.inside("cloud"), sys.executable, ECHO, "serve", CLOUD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        try:
            yield
        finally:
            process.kill()


def ask(link: Link, count: int = 10, every_s: float = 0.05) -> dict[str, Any]:
    heard: dict[str, Any] = json.loads(link.run("edge", sys.executable, ECHO, "ask", CLOUD, str(count), str(every_s)))
    return heard


def sources(link: Link, count: int = 10, every_s: float = 0.05) -> list[str]:
    """Our address as the cloud saw it, for each answer."""
    return [source for _, _, source in ask(link, count, every_s)["heard"]]


@pytest.mark.parametrize(("profile", "rtt_ms"), [("wifi", 20), pytest.param("3g_lossy", 300, marks=WHOLE)])
def test_a_round_trip_takes_the_profile_s_time(profile: str, rtt_ms: float, link: Link) -> None:
    link.use(profile)
    trips = [ms for _, ms, _ in ask(link)["heard"]]
    assert 0.8 * rtt_ms < statistics.median(trips) < 1.5 * rtt_ms + 30


def test_bytes_take_the_profile_s_rate(link: Link) -> None:
    link.use(*CALM, "--up", "4")
    done = json.loads(link.run("edge", sys.executable, ECHO, "push", CLOUD, "1000000"))
    assert 1 < 8e-6 * done["bytes"] / done["seconds"] < 4.5


def test_the_profile_s_share_is_lost(link: Link) -> None:
    link.use(*CALM, "--loss", "20")
    assert 0.4 < len(ask(link, 200, 0.005)["heard"]) / 200 < 0.85  # 0.64 come back


@WHOLE
def test_jitter_reorders_nothing(link: Link) -> None:
    link.use(*CALM, "--jitter", "40")
    numbers = [number for number, _, _ in ask(link, 100, 0.005)["heard"]]
    assert numbers == sorted(numbers)


@WHOLE
def test_a_trace_gives_the_rate(link: Link, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    trace.write_text("".join(f"{at}\n" for at in range(0, 1000, 10)))  # 1.2 Mbit/s
    link.use(*CALM, "--trace", str(trace), "--trace-up", str(trace))
    done = json.loads(link.run("edge", sys.executable, ECHO, "push", CLOUD, "250000"))
    assert 0.4 < 8e-6 * done["bytes"] / done["seconds"] < 1.5


def test_a_blackhole_swallows_all_and_ends(link: Link) -> None:
    link.use(*CALM)
    link.event("blackhole", "--seconds", "60")
    assert ask(link) == {"heard": [], "errors": []}
    link.event("restore")
    assert link.event("blackhole", "--seconds", "0.5") == "blackhole for 0.5 s"
    assert ask(link, 20, 0.1)["heard"][-1][0] == 19


@WHOLE
def test_rebinding_gives_other_ports_of_the_same_address(link: Link) -> None:
    link.use(*CALM)
    link.event("rebind", "--every", "1", "--times", "4", "--at", "0.5")
    seen = sources(link, 60, 0.1)
    assert len(seen) == 60
    assert len(set(seen)) >= 3
    assert {one.partition(":")[0] for one in seen} == {"10.77.2.254"}


@WHOLE
@pytest.mark.parametrize("before", [(), ("rebind",)], ids=["first", "again"])
def test_silent_rebinding_loses_what_is_under_way_and_another_does_not(before: tuple[str, ...], link: Link) -> None:
    link.use(*CALM, "--rtt", "400")
    for event in filter(None, before):
        link.event(event)
    link.event("silent-rebind", "--at", "0.7")
    heard = ask(link, 60, 0.05)["heard"]
    assert 2 <= 60 - len(heard) <= 25  # those of half a round trip, and of some time to change it
    assert len({source for _, _, source in heard}) == 2
    link.event("rebind", "--at", "0.7")
    assert len(ask(link, 60, 0.05)["heard"]) == 60


def test_moving_gives_another_address_and_back(link: Link) -> None:
    link.use(*CALM)
    assert {one.partition(":")[0] for one in sources(link)} == {"10.77.2.254"}
    link.event("move")
    assert {one.partition(":")[0] for one in sources(link)} == {"10.77.2.253"}
    link.event("move")
    assert {one.partition(":")[0] for one in sources(link)} == {"10.77.2.254"}


def test_udp_is_blocked_and_tcp_is_not(link: Link) -> None:
    link.use(*CALM)
    link.event("block-udp")
    assert ask(link) == {"heard": [], "errors": []}
    assert json.loads(link.run("edge", sys.executable, ECHO, "push", CLOUD, "1000"))["bytes"] == 1000
    link.event("block-udp", "--icmp")
    assert ask(link) == {"heard": [], "errors": ["OSError 113"]}
    link.event("block-udp", "--after", "5")
    assert len(ask(link)["heard"]) == 2  # 3 datagrams there and 2 back
    link.event("unblock")
    assert len(ask(link)["heard"]) == 10


@WHOLE
def test_udp_is_throttled_and_tcp_is_not(link: Link) -> None:
    link.use(*CALM)
    link.event("throttle-udp", "16kbit")
    assert len(ask(link, 400, 0.004)["heard"]) < 200
    done = json.loads(link.run("edge", sys.executable, ECHO, "push", CLOUD, "500000"))
    assert 8e-3 * done["bytes"] / done["seconds"] > 160


@WHOLE
def test_a_smaller_mtu_is_told(link: Link) -> None:
    link.use(*CALM)
    link.event("mtu", "1280")
    assert json.loads(link.run("edge", sys.executable, ECHO, "push", CLOUD, "100000"))["bytes"] == 100_000
    assert "mtu 1280" in link.run("edge", "ip", "route", "get", CLOUD)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["up", "6g"], "no profile '6g'; there are wifi, 5g, "),
        (["up", "lte", "--loss", "101"], "loss 101, must be 0 to 100"),
        (["event", "throttle-udp", "fast"], "rate 'fast', must be like 256kbit or 1mbit"),
        (["event", "mtu", "60"], "mtu 60, must be 576 to 1500"),
        (["show", "--name", "nobody"], "there is no link nobody: link up PROFILE"),
        (["down", "--name", "No!"], "--name 'No!', must be 1 to 20 small letters, digits and dashes"),
    ],
)
def test_a_mistake_is_one_clear_line(arguments: list[str], message: str) -> None:
    done = subprocess.run([LINK, *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr


@WHOLE
def test_a_link_that_was_killed_is_replaced_and_removed(link: Link) -> None:
    name = f"{link.name}-2"
    for _ in range(2):
        with subprocess.Popen([LINK, "up", "lte", "--name", name], stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.read(1)  # it is up; and its owner is gone without a word
            process.kill()
    done = subprocess.run([LINK, "down", "--name", name], capture_output=True, text=True, check=True)
    assert done.stdout == "down\n"
    left = subprocess.run(["ip", "netns"], capture_output=True, text=True, check=True).stdout
    assert name not in left
    assert link.name in left
