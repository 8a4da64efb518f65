"""What an agent knows in a cell of the simulation: smoothed measurements, and what earlier answers taught."""

from __future__ import annotations

import copy
import random
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from netlab import PROFILES
from speeds import Site
from traces import Trace
from virtual_link import FRAME_S
from virtual_session import TOKEN_BYTES, Cell, Known, Parts, Took

from edge_agent.conditions import Cloud, Conditions, Phone, Rates
from edge_agent.cost import Pair
from edge_agent.decisions import Decision, Outcome
from edge_agent.job import Job, Quality, Route, Wish
from edge_agent.learned import Agreement, Lengths
from edge_agent.misses import Surprises
from edge_agent.plan import Plan, choose
from split_model.config import ModelConfig
from split_model.drafting import Acceptance
from split_model.flops import head_flops, layer_flops

SEEN = 24  # passes and round trips that a running average is made of
HELD = 6  # layers of the full model on the phone
AT = 150  # positions in KV where decoding is measured


@dataclass(frozen=True, slots=True)
class Lessons:
    """What earlier answers taught an agent, greedy and sampled apart."""

    agreement: Agreement
    lengths: Lengths
    acceptance: tuple[Acceptance, Acceptance]

    @classmethod
    def of(cls, folder: Path, earlier: Sequence[Trace]) -> Lessons:
        """Of answers before those that are measured, and the table in the tiny model's folder."""
        agreement = Agreement.read(folder)
        made = cls(agreement, Lengths(), tuple(Acceptance(prior=agreement.mean(kind)) for kind in (False, True)))  # type: ignore[arg-type]
        for trace in earlier:
            kind, entropy, right = sampled(trace), trace.entropies[0], trace.right
            agreement.seen(entropy, kind, sum(right), len(right))
            agreement.seen_tokens(kind, zip(trace.entropies, right, strict=True))
            made.lengths.seen(entropy, kind, len(trace.ids))
            for drafted, accepted in trace.rounds(4):
                made.acceptance[kind].seen(drafted, accepted)
        return made


def sampled(trace: Trace) -> bool:
    return trace.sampling.temperature > 0


class View:
    """One cell as its agent sees it."""

    def __init__(self, cell: Cell, sites: tuple[Site, Site], pair: Pair, lessons: Lessons, order: random.Random):
        self.cell, self.pair, self._sites, self._lessons, self._order = cell, pair, sites, lessons, order
        profile = PROFILES[cell.profile]
        self._rtt_s = self._mean(lambda: _ping(cell, order))
        self._up, self._down = (rate * 1e6 / 8 * order.uniform(0.9, 1) for rate in (profile.up_mbit, profile.down_mbit))
        phone, cloud = sites
        tiny, full = pair.tiny, pair.full
        self._phone = Phone(self._rates(tiny, tiny.layers, True, phone.tiny_s),
                            self._rates(full, HELD, False, lambda n, o: phone.full_s(HELD, n, 0, o)))  # fmt: skip
        self._rates_cloud = self._cloud_rates(cloud)
        self.surprises = {drafts: Surprises(pair) for drafts in (False, True)}  # of an agent of each kind of cloud
        self._draft_rate = _flops(tiny, tiny.layers, True, AT, 1) / self._mean(lambda: cloud.tiny_s(1, order))

    def conditions(self, trace: Trace, drafts_in_cloud: bool, answer: int | None = None,
                   asked: bool = False) -> Conditions:  # fmt: skip
        """Before an answer; `answer`: its length, if it is known; `asked`: the tiny model has read the prompt."""
        lessons, kind, profile = self._lessons, sampled(trace), PROFILES[self.cell.profile]
        entropy = trace.entropies[0] if asked else None
        agreement = lessons.agreement.at(entropy, kind)
        seen = lessons.acceptance[kind]
        level = agreement / seen.mean
        cloud = Cloud(
            profile.__class__.__name__, self._rtt_s, self._up, self._down, self._rates_cloud, cold=self.cell.cold,
            token_bytes=TOKEN_BYTES, draft_rate=self._draft_rate if drafts_in_cloud else 0.0,
        )  # fmt: skip
        return Conditions(
            self._phone, cloud, answer_tokens=answer or lessons.lengths.expected(entropy, kind), agreement=agreement,
            places=tuple(min(1.0, level * share) for share in seen.shares(16)), entropy=entropy,
            held_tiny=len(trace.prompt) if asked else 0, missed=self.surprises[drafts_in_cloud].misses,
        )  # fmt: skip

    def learn(self, asked: Job, plan: Plan, now: Conditions, took: Took, drafts_in_cloud: bool) -> None:
        """What an answer teaches about predictions."""
        times = (took.tokens, took.first_s, took.total_s)
        outcome = Outcome(plan.route, plan.split, plan.model, "stop", *times, True, False, "", attempts=1,
                          drafted=took.drafted, accepted=took.accepted)  # fmt: skip
        self.surprises[drafts_in_cloud].finished(Decision(asked, plan, now, outcome))

    def reading_s(self, trace: Trace) -> float:
        """Of the prompt, by the tiny model on the phone."""
        return self._sites[0].tiny_s(len(trace.prompt), self._order)

    def worth_asking(self, asked: Job, trace: Trace, drafts_in_cloud: bool) -> bool:
        """Whether the tiny model's entropy could change the plan, as the agent judges it."""
        now = self.conditions(trace, drafts_in_cloud)
        least, most = self._lessons.agreement.span(sampled(trace))
        worst, best = (choose(asked, self.pair, replace(now, agreement=one)) for one in (least, most))
        return best.route is Route.LOCAL and worst.route is not Route.LOCAL

    def known(self, trace: Trace, split: int, in_cloud: bool) -> Known:
        """What the drafting end has measured of a round."""
        (phone, cloud), order, kind = self._sites, self._order, sampled(trace)
        layers = self.pair.full.layers - split
        first_s = self._mean(lambda: cloud.full_s(layers, 1, 1, order))
        many_s = self._mean(lambda: cloud.full_s(layers, 64, 1, order))
        front_s = self._mean(lambda: phone.full_s(split, 1, 0, order)) if split else 0.0
        fronts_s = self._mean(lambda: phone.full_s(split, 16, 0, order)) / 16 if split else 0.0
        draft_s = self._mean(lambda: (cloud if in_cloud else phone).tiny_s(1, order))
        away_s = self._rtt_s + front_s
        parts = Parts(draft_s + fronts_s, away_s, first_s, max(0.0, many_s - first_s) / 63,
                      first_s + (away_s if split else 0.0))  # fmt: skip
        lessons = self._lessons
        acceptance = copy.deepcopy(lessons.acceptance[kind])
        return Known(parts, acceptance, lambda entropy: lessons.agreement.token(entropy, kind))

    def _mean(self, sample: Callable[[], float]) -> float:
        return statistics.fmean(sample() for _ in range(SEEN))

    def _rates(self, config: ModelConfig, layers: int, head: bool,
               pass_s: Callable[[int, random.Random], float]) -> Rates:  # fmt: skip
        many, one = (self._mean(lambda n=n: pass_s(n, self._order)) for n in (64, 1))
        return Rates(_flops(config, layers, head, 0, 64) / many, _flops(config, layers, head, AT, 1) / one)

    def _cloud_rates(self, site: Site) -> Rates:
        """As the worker measures them: a prompt's step with all that others compute in it, a row's share of a step."""
        config, others = self.pair.full, site.others
        many = self._mean(lambda: site.full_s(config.layers, 96, 1, self._order))
        one = self._mean(lambda: site.full_s(config.layers, 1, 1, self._order))
        row = _flops(config, config.layers, True, AT, 1)
        return Rates((_flops(config, config.layers, True, 0, 96) + others * row) / many, row / one)


def job(trace: Trace, quality: Quality, most: int) -> Job:
    return Job(bytes(16), trace.prompt, most, trace.sampling, (), Wish(quality=quality))


def _ping(cell: Cell, order: random.Random) -> float:
    profile = PROFILES[cell.profile]
    trips = profile.rtt_ms / 1e3 + sum(order.uniform(-1, 1) * profile.jitter_ms / 2e3 for _ in range(2))
    return max(0.0, trips) + 2 * FRAME_S + 100 * 8e-6 * (1 / profile.up_mbit + 1 / profile.down_mbit)


def _flops(config: ModelConfig, layers: int, head: bool, start: int, count: int) -> float:
    return layers * layer_flops(config, start, count) + (head_flops(config) if head else 0.0)
