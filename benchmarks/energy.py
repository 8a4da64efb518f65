"""A simulated hour of one answer after the other, with the energy governor and without. A model, not a measurement.

    python benchmarks/energy.py [--minutes 60] [--pause 0.5] [--plot FILE]

The governor and the selector are the agent's own; the phone is the model of its tests (tests/support/heat.py: one mass
that warms up by what it draws and cools towards the room, a battery of 15 Wh, 6 W of work at full speed). It holds the
whole full model, at 20 tokens/s, which a cloud of the same speed 100 ms away cannot beat; answers are as predicted. The
radio draws 1 W while the cloud answers. What a phone does by itself when it is hot is left out.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from netlab import FULL, TINY
from rich.console import Console
from rich.table import Table

from edge_agent.conditions import Cloud, Conditions, Phone, Power, Rates
from edge_agent.cost import Pair, Score
from edge_agent.governor import EVERY_S, Governor
from edge_agent.job import Job, Quality, Route, Wish
from edge_agent.plan import choose
from split_model.config import ModelConfig
from split_model.flops import head_flops, layer_flops
from split_model.sampling import Sampling
from split_model.source import find_model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
from support.heat import ModelPhone

RADIO_W = 1.0
TOKEN_S, POSITION_S = 0.050, 0.002  # of the full model, here as there: a token of an answer, a position of a prompt
PROMPT, ANSWER = 150, 24
AT = 150
RTT_S = 0.100


@dataclass(frozen=True, slots=True)
class Setting:
    """With the governor or without, with a cloud or without."""

    name: str
    governed: bool
    cloud: bool


SETTINGS = (Setting("no governor", False, True), Setting("governor", True, True),
            Setting("governor, no cloud", True, False))  # fmt: skip


@dataclass(frozen=True, slots=True)
class Moment:
    """At a time in seconds: °C, share of the phone's speed, charge, watts since the reading before."""

    at: float
    celsius: float
    share: float
    charge: float
    watts: float


@dataclass(frozen=True, slots=True)
class Hour:
    """What became of it; `waits` are seconds an answer, `routes` how many were made by each."""

    setting: Setting
    moments: list[Moment]
    waits: list[float]
    routes: Counter[str]


def conditions(pair: Pair, setting: Setting, power: Power) -> Conditions:
    config = pair.full
    one, many = (config.layers * layer_flops(config, AT, count) + head_flops(config) for count in (1, 64))
    full = Rates(many / (64 * POSITION_S), one / TOKEN_S)
    phone = Phone(full, full, power=power)  # the tiny model is not asked: quality is "best"
    cloud = Cloud("", RTT_S, 1.5e6, 1.5e6, full, token_bytes=265)
    return Conditions(phone, cloud if setting.cloud else None, answer_tokens=ANSWER)


def hour(pair: Pair, setting: Setting, seconds: float, pause_s: float) -> Hour:
    body, governor, power = ModelPhone(), Governor(), Power()
    job = Job(bytes(16), (1,) * PROMPT, ANSWER, Sampling(), (), Wish(quality=Quality.BEST))
    made, next_at, at = Hour(setting, [], [], Counter()), 0.0, 0.0
    work: list[tuple[float, float]] = []  # until when, and the share of full power that is drawn until then
    while at < seconds:
        until = at + EVERY_S
        while next_at < until:
            score = choose(job, pair, conditions(pair, setting, power)).score
            made.waits.append(score.total_s)
            made.routes[score.route.value] += 1
            work += [(next_at + score.total_s, _drawn(score, body, power)), (next_at + score.total_s + pause_s, 0.0)]
            next_at += score.total_s + pause_s
        drawn = sum(share * length for share, length in _within(work, at, until)) / EVERY_S
        before = body.drawn_j
        reading = body.run(EVERY_S, drawn)
        at = until
        power = governor.seen(reading, at) if setting.governed else power
        made.moments.append(Moment(at, body.celsius, power.share, body.charge, (body.drawn_j - before) / EVERY_S))
    return made


def _drawn(score: Score, body: ModelPhone, power: Power) -> float:
    """Share of the power at full speed: of work here as much of the time as the governor leaves, else of the radio."""
    return power.share if score.route is Route.LOCAL else RADIO_W / body.work_w


def _within(work: list[tuple[float, float]], start: float, end: float) -> Iterator[tuple[float, float]]:
    """Shares and seconds of the pieces between two times; those before are dropped."""
    at = start
    while work and at < end:
        until, share = work[0]
        yield share, max(0.0, min(until, end) - at)
        at = max(at, min(until, end))
        if until > end:
            return
        work.pop(0)


def table(hours: Sequence[Hour]) -> Table:
    made = Table(title="A simulated hour, one answer after the other (a model)")
    columns = (
        "",
        "warmest, °C",
        "at the end",
        "mean W",
        "last 10 min W",
        "charge left",
        "answers",
        "s an answer",
        "by",
    )
    for column in columns:
        made.add_column(column, justify="right" if column else "left")
    for one in hours:
        moments = one.moments
        last = [moment.watts for moment in moments[-len(moments) // 6 :]]
        routes = ", ".join(f"{name} {100 * count / len(one.waits):.0f} %" for name, count in one.routes.most_common())
        made.add_row(
            one.setting.name, f"{max(moment.celsius for moment in moments):.1f}", f"{moments[-1].celsius:.1f}",
            f"{sum(moment.watts for moment in moments) / len(moments):.1f}", f"{sum(last) / len(last):.1f}",
            f"{moments[-1].charge:.0%}", str(len(one.waits)), f"{sum(one.waits) / len(one.waits):.2f}", routes,
        )  # fmt: skip
    return made


def plot(hours: Sequence[Hour], file: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True)
    for one in hours:
        minutes = [moment.at / 60 for moment in one.moments]
        style = "-" if one.setting.cloud else "--"
        upper.plot(minutes, [moment.celsius for moment in one.moments], style, label=one.setting.name)
        lower.plot(minutes, [100 * moment.charge for moment in one.moments], style)
    upper.axhline(45, color="black", linewidth=0.8, linestyle=":")
    upper.set(ylabel="°C", title="A simulated hour of one answer after the other: a model, not a measurement")
    upper.legend(fontsize="small")
    lower.set(ylabel="charge, %", xlabel="minutes", ylim=(50, 100))
    figure.savefig(file, dpi=100)


def main() -> None:
    parser = argparse.ArgumentParser(description="A simulated hour with the energy governor and without.")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--pause", type=float, default=0.5, metavar="S", help="between an answer and the next question")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="needs matplotlib")
    given = parser.parse_args()
    tiny, full = (ModelConfig.read(find_model(model)) for model in (TINY, FULL))
    pair = Pair(tiny, full, full.layers)
    hours = [hour(pair, setting, 60 * given.minutes, given.pause) for setting in SETTINGS]
    Console(width=140).print(table(hours))
    print(f"a model: {ModelPhone().work_w:g} W of work at full speed, {PROMPT} tokens in and {ANSWER} out, "
          f"{1e3 * TOKEN_S:g} ms a token here and {1e3 * RTT_S:g} ms away")  # fmt: skip
    if given.plot:
        plot(hours, given.plot)


if __name__ == "__main__":
    main()
