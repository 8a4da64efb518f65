"""The selector against every plan it could have taken, cell by cell of the simulation."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from netlab import PROFILES
from speeds import Site, Speeds
from traces import Trace
from virtual_session import Answer, Cell, Course, Known, Took
from virtual_view import HELD, Lessons, View, job

from edge_agent.cost import Pair, Score
from edge_agent.job import Quality, Route
from edge_agent.plan import choose

SAME = 1.02  # times as long as the best: as good
FIXED = 5  # tokens of a draft, for those who do not choose
MIDDLE = HELD // 2
FLOOR = 0.8  # predicted agreement from which a threshold router answers on the phone
CLOUD, LOCAL = Course("cloud"), Course("local")
EXACT = (CLOUD, Course("cloud", 0, 0), *(Course("split", split) for split in range(1, HELD + 1)),
         *(Course("speculative", split, 0) for split in range(HELD + 1)), Course("speculative", 0, FIXED))  # fmt: skip
POLICIES = ("auto", "always cloud", "always cloud, drafts there", "always split", "drafts of 5 on the phone")


@dataclass(frozen=True, slots=True)
class Row:
    """A cell with or without a tiny model in its cloud: mean seconds an answer by policy, and what was best.

    `oracle_s`: of the plan that was best in one half of the runs, in the other half; `hindsight_s`: of the best plan in
    the runs that it is scored on; each prompt by itself. `errors`: predicted / simulated - 1 by route, at the answer's
    true length. `wins`, `chosen`: prompts by kind of plan, of the oracle and of auto. `any_s`: the same, where the tiny
    model's text will do; `agreed`: share of the full model's own tokens.
    """

    cell: str
    profile: str
    slower: float
    others: int
    pace_s: float
    drafts_in_cloud: bool
    policies: dict[str, float]
    oracle_s: float
    hindsight_s: float
    errors: dict[str, list[float]]
    wins: dict[str, int]
    chosen: dict[str, int]
    any_s: dict[str, float]
    agreed: dict[str, float]


def cells(profiles: Sequence[str], paces: Sequence[float], slower: Sequence[float],
          others: Sequence[int]) -> Iterator[Cell]:  # fmt: skip
    for profile in profiles:
        for pace_s in paces:
            for slow in slower:
                for more in others:
                    yield Cell(profile, slow, more, pace_s)


class Runs:
    """Seconds of every plan for every prompt in one cell, several times each."""

    def __init__(self, cell: Cell, speeds: Speeds, pair: Pair, lessons: Lessons, traces: Sequence[Trace],
                 earlier: Sequence[Trace], runs: int, seed: int):  # fmt: skip
        self.cell, self.pair, self.traces, self._lessons = cell, pair, traces, lessons
        order = random.Random(f"{seed} {cell}")
        sites = Site(speeds, cell.slower, cell.pace_s), Site(speeds, 1.0, cell.pace_s, cell.others)
        self._sites, self._cold = sites, replace(cell, cold=True)
        self.views = {cold: View(replace(cell, cold=cold), sites, pair, lessons, order) for cold in (False, True)}
        for drafts in (False, True):
            for trace in earlier:
                self._live(trace, drafts, order)
        self.took: list[dict[Course, list[float]]] = []
        for number, trace in enumerate(traces):
            row: dict[Course, list[float]] = {LOCAL: []}
            for course in EXACT:
                known = self.views[False].known(trace, course.split, course.route == "cloud")
                row[course] = [
                    self._answer(
                        course, trace, known, random.Random(f"{seed} {cell} {number} {run}"), self.cold(number)
                    ).total_s
                    for run in range(runs)
                ]
            phone = sites[0]
            for run in range(runs):
                fresh = random.Random(f"{seed} {number} {run}")
                tokens = sum(phone.tiny_s(1, fresh) for _ in trace.ids[1:])
                row[LOCAL].append(phone.tiny_s(len(trace.prompt), fresh) + tokens)
            self.took.append(row)

    def cold(self, number: int) -> bool:
        """Every fourth answer comes on a new connection, with a ticket."""
        return number % 4 == 3

    def _live(self, trace: Trace, drafts_in_cloud: bool, order: random.Random) -> None:
        """An answer of the time before, from which the agent learns what its predictions miss here."""
        view, asked = self.views[False], job(trace, Quality.BEST, 64)
        now = view.conditions(trace, drafts_in_cloud)
        plan = choose(asked, self.pair, now)
        course = course_of(plan.score)
        took = self._answer(course, trace, view.known(trace, course.split, course.route == "cloud"), order, False)
        for one in self.views.values():
            one.learn(asked, plan, now, took, drafts_in_cloud)

    def _answer(self, course: Course, trace: Trace, known: Known, order: random.Random, cold: bool) -> Took:
        cell = self._cold if cold else self.cell
        return Answer(cell, PROFILES[cell.profile], course, trace, self._sites, known, order).run()

    def row(self, drafts_in_cloud: bool) -> Row:
        courses = [one for one in EXACT if drafts_in_cloud or one != Course("cloud", 0, 0)]
        policies: dict[str, list[float]] = {name: [] for name in POLICIES}
        oracle, hindsight, wins, chosen = list[float](), list[float](), dict[str, int](), dict[str, int]()
        errors: dict[str, list[float]] = {}
        any_s: dict[str, list[float]] = {name: [] for name in ("auto", "router", "local", "always cloud")}
        agreed: dict[str, list[float]] = {name: [] for name in any_s}
        for number, (trace, took) in enumerate(zip(self.traces, self.took, strict=True)):
            view, means = self.views[self.cold(number)], {one: statistics.fmean(times) for one, times in took.items()}
            plan = choose(job(trace, Quality.BEST, 64), self.pair, view.conditions(trace, drafts_in_cloud))
            auto = course_of(plan.score)
            fair, best = crossed([took[one] for one in courses])
            oracle.append(fair)
            hindsight.append(min(means[one] for one in courses))
            split = Course("split", MIDDLE)
            drafts = Course("cloud", 0, 0) if drafts_in_cloud else CLOUD
            for name, one in zip(POLICIES, (auto, CLOUD, drafts, split, Course("speculative", 0, FIXED)), strict=True):
                policies[name].append(means[one])
            for counts, one in ((wins, courses[best]), (chosen, auto)):
                counts[kind(one)] = counts.get(kind(one), 0) + 1
            exact = choose(job(trace, Quality.FAST, 64), self.pair,
                           view.conditions(trace, drafts_in_cloud, len(trace.ids)))  # fmt: skip
            for candidate in exact.candidates:
                one = course_of(candidate.score)
                error = candidate.score.total_s / means[one] - 1
                errors.setdefault(kind(one), []).append(round(error, 4))
                if one == auto:
                    errors.setdefault("what auto chose", []).append(round(error, 4))
            for name, seconds, share in self._any(trace, means, view, drafts_in_cloud):
                any_s[name].append(seconds)
                agreed[name].append(share)
        cell, mean = self.cell, statistics.fmean
        return Row(
            str(cell), cell.profile, cell.slower, cell.others, cell.pace_s, drafts_in_cloud,
            {name: mean(times) for name, times in policies.items()}, mean(oracle), mean(hindsight), errors, wins,
            chosen, {name: mean(times) for name, times in any_s.items()},
            {name: mean(shares) for name, shares in agreed.items()},
        )  # fmt: skip

    def _any(self, trace: Trace, means: dict[Course, float], view: View,
             drafts_in_cloud: bool) -> Iterator[tuple[str, float, float]]:  # fmt: skip
        """Where 0.8 of predicted agreement will do: by auto, by a router's threshold, on the phone, in the cloud."""
        share = sum(trace.right) / len(trace.right)
        asking_s = view.reading_s(trace)
        asked = job(trace, Quality.BALANCED, 64)
        now = view.conditions(trace, drafts_in_cloud, asked=True)
        plan = choose(asked, self.pair, now)
        chosen = course_of(plan.score)
        worth = view.worth_asking(asked, trace, drafts_in_cloud)
        if not worth:
            chosen = course_of(choose(asked, self.pair, view.conditions(trace, drafts_in_cloud)).score)
        reading_s = asking_s if worth and chosen != LOCAL else 0.0
        yield "auto", means[chosen] + reading_s, share if chosen == LOCAL else 1.0
        routed = LOCAL if now.agreement >= FLOOR else CLOUD
        yield "router", means[routed] + (asking_s if routed == CLOUD else 0.0), share if routed == LOCAL else 1.0
        yield "local", means[LOCAL], share
        yield "always cloud", means[CLOUD], 1.0


def rows_of(cell: Cell, *, speeds: Speeds, pair: Pair, lessons: Lessons, traces: Sequence[Trace],
            earlier: Sequence[Trace], runs: int, seed: int) -> list[Row]:  # fmt: skip
    """A cell without a tiny model in its cloud, and with one."""
    made = Runs(cell, speeds, pair, lessons, traces, earlier, runs, seed)
    return [made.row(drafts) for drafts in (False, True)]


def course_of(score: Score) -> Course:
    """The plan that a score is of, as it is simulated: drafts as long as they pay."""
    if score.route is Route.LOCAL:
        return LOCAL
    return Course(score.route.value, score.split, 0 if score.draft else None)


def kind(course: Course) -> str:
    if course.route == "cloud" and course.draft is not None:
        return "cloud, drafts there"
    return f"{course.route} over a split" if course.route == "speculative" and course.split else course.route


def crossed(times: Sequence[Sequence[float]]) -> tuple[float, int]:
    """Mean seconds of what was best in one half of the runs, in the other half, both ways; and the best of all.

    The best is the first that is as good as any, so that what falls back to another plan does not win over it.
    """
    halves = [[statistics.fmean(one[half::2]) for one in times] for half in (0, 1)]
    picked = [min(range(len(times)), key=one.__getitem__) for one in halves]
    means = [statistics.fmean(one) for one in times]
    best = next(at for at, mean in enumerate(means) if mean <= SAME * min(means))
    return (halves[1][picked[0]] + halves[0][picked[1]]) / 2, best
