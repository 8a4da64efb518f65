"""`edge-agent replay`: what recorded requests would have been decided under other conditions. Needs no agent."""

from __future__ import annotations

import argparse
import json
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any, NoReturn

from pydantic import AfterValidator, Field, TypeAdapter, ValidationError
from rich.table import Table
from rich.text import Text

from edge_agent.client import place, show
from edge_agent.conditions import Conditions, Rates
from edge_agent.cost import Pair
from edge_agent.decisions import describe
from edge_agent.job import Job, Wish
from edge_agent.plan import NoPlan, Plan, choose
from split_model.settings import Sampling

MBIT = 125_000  # bytes
LONGEST = 1_000_000  # tokens of a prompt, bytes of a stop string
Kind = tuple[str, int, bool, str]  # of a plan: route, split, drafts or not, model


def _with(*names: str) -> AfterValidator:
    """An object that has these keys."""

    def check(value: dict[str, Any]) -> dict[str, Any]:
        if missing := [name for name in names if name not in value]:
            raise ValueError(f"there is no {missing[0]!r}")
        return value

    return AfterValidator(check)


@dataclass(frozen=True, slots=True)
class Record:
    """One line of an export: a decision with all that its scores depended on."""

    id: Annotated[str, Field(pattern="^([0-9a-f]{2})+$")]
    prompt_tokens: Annotated[int, Field(ge=1, le=LONGEST)]
    max_tokens: Annotated[int, Field(ge=1)]
    greedy: bool
    stop_bytes: list[Annotated[int, Field(ge=0, le=LONGEST)]]
    wish: Wish
    pair: Pair
    conditions: Conditions
    plan: Annotated[dict[str, Any], _with("route", "split", "draft", "model", "predicted")]
    measured: Annotated[dict[str, Any], _with("finish", "legs", "total_ms")]

    @property
    def job(self) -> Job:
        """As long as the one that was asked; what it said nobody kept."""
        stops = tuple("." * size for size in self.stop_bytes)
        sampling = Sampling(0.0 if self.greedy else 1.0)
        return Job(bytes.fromhex(self.id), (0,) * self.prompt_tokens, self.max_tokens, sampling, stops, self.wish)


@dataclass(frozen=True, slots=True)
class Changes:
    """Other conditions than those recorded; None leaves a number as it was."""

    rtt_ms: float | None = None
    up_mbit: float | None = None
    down_mbit: float | None = None
    cloud_wait_s: float | None = None
    edge_rate_factor: float | None = None
    cloud_rate_factor: float | None = None
    governor: float | None = None
    alpha: float | None = None
    price_per_mb: float | None = None
    any_route: bool = False  # also where one was asked for by name

    @classmethod
    def read(cls, given: argparse.Namespace) -> Changes:
        """From the command line. Raises ValueError that names the flag, the value and the limit."""
        changes = cls(**{name: getattr(given, name) for name in cls.__slots__})
        for name in cls.__slots__:
            value, flag = getattr(changes, name), "--" + name.replace("_", "-")
            if isinstance(value, bool) or value is None:
                continue
            least = 0.0 if name in ("rtt_ms", "cloud_wait_s", "alpha", "price_per_mb") else 1e-9
            share = name in ("alpha", "governor")
            if not least <= value < math.inf or (share and value > 1):
                limit = ("0" if not least else "more than 0") + (" to 1" if share else " or more" if not least else "")
                raise ValueError(f"{flag} {value:g}, must be {limit}")
        return changes

    def to(self, now: Conditions) -> Conditions:
        """The conditions, changed."""
        phone, factor = now.phone, self.edge_rate_factor or 1.0
        power = phone.power if self.governor is None else replace(phone.power, share=self.governor)
        phone = replace(
            phone, tiny=_times(phone.tiny, factor), full=_times(phone.full, factor), power=power,
            drafts=phone.drafts and _times(phone.drafts, factor), front=phone.front and _times(phone.front, factor),
        )  # fmt: skip
        cloud = now.cloud
        if cloud is not None:
            given = {
                "rtt_s": None if self.rtt_ms is None else self.rtt_ms / 1000,
                "up": self.up_mbit and self.up_mbit * MBIT,
                "down": self.down_mbit and self.down_mbit * MBIT,
                "wait_s": self.cloud_wait_s,
                "price_s_per_mb": self.price_per_mb,
                "rates": self.cloud_rate_factor and _times(cloud.rates, self.cloud_rate_factor),
                "draft_rate": self.cloud_rate_factor and cloud.draft_rate * self.cloud_rate_factor,
            }
            cloud = replace(cloud, **{name: value for name, value in given.items() if value is not None})  # type: ignore[arg-type]
        return replace(now, phone=phone, cloud=cloud, alpha=now.alpha if self.alpha is None else self.alpha)

    def of(self, wish: Wish) -> Wish:
        """The wish, freed of its route if that is wanted."""
        return replace(wish, route=None, split=None, draft=None) if self.any_route else wish


@dataclass(frozen=True, slots=True)
class Replayed:
    """A record and what is decided now: None, with `why`, where no plan may run."""

    record: Record
    plan: Plan | None
    why: str = ""

    @property
    def same(self) -> bool:
        """Whether plan, scores and refusals are those recorded, to the last digit."""
        return self.plan is not None and json.loads(json.dumps(describe(self.plan))) == self.record.plan


def replay(file: Path, changes: Changes) -> int:
    """Prints recorded plans against replayed ones. Raises OSError, or ValueError that names the line."""
    found = [replayed(record, changes) for record in records(file)]
    if not found:
        raise ValueError(f"{file} holds no record")
    spent = measurements([one.record for one in found])
    table = Table(title=f"{len(found)} recorded decisions")
    for name in ("prompt", "max", "recorded", "predicted ms", "measured ms", "replayed", "predicted ms", "regret"):
        table.add_column(name, justify="left" if name in ("recorded", "replayed") else "right")
    for one in found:
        table.add_row(*_row(one, spent), style="bold" if _moved(one) else None)
    show(table)
    for line in summary(found, spent):
        print(line)
    return 0


def records(file: Path) -> Iterator[Record]:
    """Every line of an export. Raises ValueError that names the line and what is wrong with it."""
    reader = TypeAdapter(Record)
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                try:
                    yield reader.validate_python(json.loads(line, parse_constant=_no_number))
                except ValidationError as error:
                    first = error.errors()[0]
                    field = ".".join(map(str, first["loc"]))
                    raise ValueError(f"{file}, line {number}: {field}: {first['msg']}") from None
                except ValueError as error:
                    raise ValueError(f"{file}, line {number} is no record: {error}") from None


def replayed(record: Record, changes: Changes) -> Replayed:
    """What is decided under the changed conditions."""
    job = replace(record.job, wish=changes.of(record.wish))
    try:
        return Replayed(record, choose(job, record.pair, changes.to(record.conditions)))
    except (NoPlan, ValueError) as error:
        return Replayed(record, None, str(error))


Spent = dict[tuple[int, int, bool], dict[Kind, list[float]]]  # ms by kind of plan, for requests that are alike


def measurements(found: Sequence[Record]) -> Spent:
    """What was measured of complete answers that no move or loss took from their plan."""
    spent: Spent = defaultdict(lambda: defaultdict(list))
    for one in found:
        if one.measured["finish"] in ("stop", "length") and len(one.measured["legs"]) == 1:
            spent[_alike(one)][_kind(one.plan)].append(one.measured["total_ms"])
    return spent


def regret(one: Replayed, spent: Spent) -> float | None:
    """How much longer the replayed plan was measured to take than the best measured one, for requests like this one.

    As a share of the best; None where the replayed plan was never measured, or nothing else was.
    """
    known = spent.get(_alike(one.record), {})
    mine = known.get(_kind(describe(one.plan))) if one.plan else None
    return fmean(mine) / min(map(fmean, known.values())) - 1 if mine and len(known) > 1 else None


def summary(found: Sequence[Replayed], spent: Spent) -> Iterator[str]:
    """Lines for the end."""
    same, moved = sum(one.same for one in found), sum(map(_moved, found))
    yield f"{same} of {len(found)} with exactly the recorded scores, {moved} with another plan"
    before = [one.record.plan["predicted"]["total_ms"] for one in found if one.plan]
    now = [1000 * one.plan.score.total_s for one in found if one.plan]
    if now:
        yield f"predicted in all: recorded {sum(before) / 1000:.2f} s, replayed {sum(now) / 1000:.2f} s"
    if lost := [value for one in found if (value := regret(one, spent)) is not None]:
        yield f"regret by what was measured: {100 * fmean(lost):.1f} % on average over {len(lost)} requests"
    if stuck := [one for one in found if one.plan is None]:
        yield f"{len(stuck)} with no plan: {stuck[0].why}"


def _row(one: Replayed, spent: Spent) -> list[str | Text]:
    record, lost = one.record, regret(one, spent)
    now = describe(one.plan) if one.plan else None
    return [
        str(record.prompt_tokens), str(record.max_tokens), Text(place(record.plan)),
        f"{record.plan['predicted']['total_ms']:.0f}", f"{record.measured['total_ms']:.0f}",
        Text(place(now) if now else f"none: {one.why}"), f"{1000 * one.plan.score.total_s:.0f}" if one.plan else "",
        "" if lost is None else f"{100 * lost:.0f} %",
    ]  # fmt: skip


def _alike(record: Record) -> tuple[int, int, bool]:
    return record.prompt_tokens, record.max_tokens, record.greedy


def _kind(plan: dict[str, Any]) -> Kind:
    return plan["route"], plan["split"], plan["draft"] > 0, plan["model"]


def _moved(one: Replayed) -> bool:
    return one.plan is None or _kind(describe(one.plan)) != _kind(one.record.plan)


def _times(rates: Rates, factor: float) -> Rates:
    return Rates(rates.prefill * factor, rates.decode * factor)


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number")
