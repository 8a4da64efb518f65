"""Where drafts on the phone begin to pay: by two formulas, by the selector, and as measured; tables and plot of it."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from netlab import FULL, TINY
from rich.table import Table

from edge_agent.conditions import Cloud, Conditions, Phone, Rates
from edge_agent.cost import Pair
from edge_agent.job import Job, Quality, Route, Wish
from edge_agent.plan import choose
from split_model.config import ModelConfig
from split_model.drafting import tokens_per_round
from split_model.flops import head_flops, layer_flops
from split_model.sampling import Sampling
from split_model.source import find_model

DRAFT_S = 0.010  # a drafted token
FIXED = 5  # tokens of a draft for which DESIGN section 4 draws its line
LONGEST = 16
AT = 150  # positions before the one that a rate is given for
PROMPT = 150
COLOURS = {"pair": "#228833", "0.5": "#4477aa", "0.7": "#ccbb44", "0.9": "#ee6677"}


@dataclass(frozen=True, slots=True)
class Seen:
    """One answer: of `tokens` tokens in `total_s`, the first after `first_s`, with `sessions` at once.

    `draft` None: the cloud alone; 0: as many as pay; else always so many. `share` of the drafts are right, whichever
    are looked at. What the phone knew: `rtt_s` and the server's rates, FLOP/s.
    """

    part: str
    pace_ms: float
    rtt_ms: float
    acceptance: str
    draft: int | None
    sessions: int
    share: float
    total_s: float
    first_s: float
    tokens: int
    rounds: int
    drafted: int
    accepted: int
    rtt_s: float
    prefill: float
    decode: float

    @property
    def token_s(self) -> float:
        return (self.total_s - self.first_s) / (self.tokens - 1)


def line(alone_s: float, share: float, draft: int) -> float:
    """DESIGN section 4: the round trip in seconds below which rounds that wait for each other pay."""
    return alone_s * share * (1 - share**draft) / (1 - share) - draft * DRAFT_S


def pipelined(alone_s: float, verify_s: float, share: float, draft: int) -> float:
    """The same where drafts are sent ahead, so that only a rejection waits for the way back."""
    whole = share**draft
    return alone_s / (1 - share) - draft * DRAFT_S - verify_s - whole / (1 - whole) * max(draft * DRAFT_S, verify_s)


class Flips:
    """The greatest round trip, in seconds, at which drafts are worth it, at one pace and acceptance."""

    def __init__(self, seen: Sequence[Seen]):
        self.pace_ms, self.name = seen[0].pace_ms, seen[0].acceptance
        self.share = statistics.fmean(one.share for one in seen)
        self.rates = Rates(*(statistics.median(getattr(one, rate) for one in seen) for rate in ("prefill", "decode")))
        self._pair = Pair(*(ModelConfig.read(find_model(model)) for model in (TINY, FULL)), 0)
        config = self._pair.full
        flops = config.layers * layer_flops(config, AT, 1) + head_flops(config)
        self.alone_s, self._more_s = flops / self.rates.decode, flops / self.rates.prefill

    @property
    def in_turn(self) -> float:
        return line(self.alone_s, self.share, FIXED)

    def ahead(self, draft: int) -> float:
        return pipelined(self.alone_s, self.alone_s + draft * self._more_s, self.share, draft)

    @property
    def best(self) -> float:
        """By the pipelined formula, with the draft that pays longest."""
        return max(self.ahead(draft) for draft in range(1, LONGEST + 1))

    def chosen(self, tokens: int) -> float:
        """By the selector, to a millisecond."""
        below, above = 0.0, 2.0
        while above - below > 0.001:
            middle = (below + above) / 2
            below, above = (middle, above) if self._chooses(middle, tokens) else (below, middle)
        return below

    def _chooses(self, rtt_s: float, tokens: int) -> bool:
        tiny = self._pair.tiny
        flops = tiny.layers * layer_flops(tiny, AT, 1) + head_flops(tiny)
        phone = Phone(Rates(32 * flops / DRAFT_S, flops / DRAFT_S), self.rates)
        cloud = Cloud("", rtt_s, 6e6, 6e6, self.rates, token_bytes=265)
        now = Conditions(phone, cloud, answer_tokens=tokens, agreement=self.share)
        job = Job(bytes(16), (1,) * PROMPT, tokens, Sampling(), (), Wish(quality=Quality.BEST))
        return choose(job, self._pair, now).route is Route.SPECULATIVE


def gain(seen: Sequence[Seen], plain: Sequence[Seen], of: Callable[[Seen], float]) -> float:
    return statistics.fmean(map(of, plain)) / statistics.fmean(map(of, seen))


def by_rtt(seen: Sequence[Seen], name: str, draft: int, of: Callable[[Seen], float]) -> dict[float, float]:
    """Times as fast as the cloud alone."""
    made = {}
    for rtt in sorted({one.rtt_ms for one in seen}):
        here = [one for one in seen if one.rtt_ms == rtt]
        some = [one for one in here if (one.acceptance, one.draft) == (name, draft)]
        made[rtt] = gain(some, [one for one in here if one.draft is None], of)
    return made


def crossing(gains: dict[float, float]) -> str:
    """The round trip at which a gain falls below 1, in ms, between the measured ones."""
    pairs = list(gains.items())
    if pairs[0][1] < 1:
        return f"< {pairs[0][0]:g}"
    for (rtt, over), (further, under) in pairwise(pairs):
        if under < 1:
            return f"{rtt + (further - rtt) * (over - 1) / (over - under):.0f}"
    return f"> {pairs[-1][0]:g}"


def tables(found: Sequence[Seen]) -> Iterator[Table]:
    for part, shown in (("speed", speed_tables), ("rounds", rounds_table), ("sessions", sessions_table)):
        some = [one for one in found if one.part == part]
        if some:
            yield from shown(some)


def speed_tables(seen: Sequence[Seen]) -> Iterator[Table]:
    rtts = sorted({one.rtt_ms for one in seen})
    gains = Table(title="Times as fast as the cloud alone, by round trip in ms; whole answers, as many drafts as pay")
    flips = Table(
        title=f"Round trip in ms below which drafts pay; t is a plain token, a draft takes {1e3 * DRAFT_S:g} ms"
    )
    for column in ("pace", "accepted", *(f"{rtt:g}" for rtt in rtts)):
        gains.add_column(column, justify="right")
    for column in ("pace", "t", "accepted", "in turn, 5", "ahead, 5", "measured, 5", "ahead, best", "the selector"):
        flips.add_column(column, justify="right")
    for pace, name in dict.fromkeys((one.pace_ms, one.acceptance) for one in seen):
        here = [one for one in seen if one.pace_ms == pace]
        some = Flips([one for one in here if one.acceptance == name])
        accepted = f"{some.share:.2f}{' (the pair)' if name == 'pair' else ''}"
        adaptive = by_rtt(here, name, 0, lambda one: one.total_s)
        gains.add_row(f"{pace:g} ms", accepted, *(f"{one:.2f}" for one in adaptive.values()))
        fixed = by_rtt(here, name, FIXED, lambda one: one.token_s)
        numbers = (some.in_turn, some.ahead(FIXED))
        flips.add_row(
            f"{pace:g} ms", f"{1e3 * some.alone_s:.0f}", accepted, *(ms(number) for number in numbers), crossing(fixed),
            ms(some.best), ms(some.chosen(seen[0].tokens)),
        )  # fmt: skip
    yield gains
    yield flips


def ms(seconds: float) -> str:
    return f"{1e3 * seconds:.0f}" if seconds > 0.001 else "never"


def rounds_table(seen: Sequence[Seen]) -> Iterator[Table]:
    made = Table(
        title=f"Tokens a round by the length of drafts, at {seen[0].pace_ms:g} ms and {seen[0].rtt_ms:g} ms away"
    )
    for column in (
        "drafts of",
        "tokens a round",
        "as independent ones would be",
        "accepted of all verified",
        "ms a token",
    ):
        made.add_column(column, justify="right")
    for draft in sorted({one.draft or 0 for one in seen}):
        some = [one for one in seen if one.draft == draft]
        tokens, rounds, drafted, accepted = (sum(getattr(one, name) for one in some)
                                             for name in ("tokens", "rounds", "drafted", "accepted"))  # fmt: skip
        share = statistics.fmean(one.share for one in some)
        made.add_row(
            f"{draft}", f"{tokens / rounds:.2f}", f"{tokens_per_round([share] * draft):.2f}",
            f"{accepted / drafted:.2f}",
            f"{1e3 * statistics.fmean(one.token_s for one in some):.0f}",
        )  # fmt: skip
    yield made


def sessions_table(seen: Sequence[Seen]) -> Iterator[Table]:
    made = Table(title=f"Sessions at once, full model at {seen[0].pace_ms:g} ms a pass, {seen[0].rtt_ms:g} ms away: "
                       "ms from token to token, median session")  # fmt: skip
    for column in ("sessions", "no drafts", "drafts", "times as fast", "tokens/s, no drafts", "drafts"):
        made.add_column(column, justify="right")
    for count in sorted({one.sessions for one in seen}):
        plain, drafts = ([one for one in seen if one.sessions == count and one.draft == draft] for draft in (None, 0))
        both = [statistics.median(one.token_s for one in some) for some in (plain, drafts)]
        rates = [count / statistics.fmean(one.token_s for one in some) for some in (plain, drafts)]
        made.add_row(str(count), *(f"{1e3 * one:.0f}" for one in both), f"{both[0] / both[1]:.2f}",
                     *(f"{rate:.0f}" for rate in rates))  # fmt: skip
    made.caption = served(seen)
    yield made


def served(seen: Sequence[Seen], base: int = 16) -> str:
    """How many sessions with drafts are as fast as so many without."""

    def median(count: int, draft: int | None) -> float:
        return statistics.median(one.token_s for one in seen if (one.sessions, one.draft) == (count, draft))

    counts = sorted({one.sessions for one in seen})
    if base not in counts:
        return ""
    limit = median(base, None)
    most = max((count for count in counts if median(count, 0) <= limit), default=0)
    bound = " or more" if most == counts[-1] else ""
    return (f"as fast as {base} sessions without drafts ({1e3 * limit:.0f} ms a token): {most}{bound} with drafts, "
            f"{most / base:.1f} times as many")  # fmt: skip


def plot(seen: Sequence[Seen], file: Path) -> None:
    """Speed by round trip, a panel for each pace, with the lines; and what many sessions see."""
    from matplotlib.figure import Figure

    speed, sessions = ([one for one in seen if one.part == part] for part in ("speed", "sessions"))
    paces = sorted({one.pace_ms for one in speed})
    figure = Figure(figsize=(4.5 * (len(paces) + bool(sessions)), 4.2), layout="constrained")
    axes = list(figure.subplots(1, len(paces) + bool(sessions), squeeze=False)[0])
    for axis, pace in zip(axes, paces, strict=False):
        here = [one for one in speed if one.pace_ms == pace]
        for name in dict.fromkeys(one.acceptance for one in here):
            some, colour = Flips([one for one in here if one.acceptance == name]), COLOURS.get(name, "black")
            adaptive = by_rtt(here, name, 0, lambda one: one.total_s)
            fixed = by_rtt(here, name, FIXED, lambda one: one.total_s)
            label = f"{some.share:.2f} accepted" + (" (the pair)" if name == "pair" else "")
            axis.plot(list(adaptive), list(adaptive.values()), "o-", color=colour, markersize=4, label=label)
            axis.plot(list(fixed), list(fixed.values()), ":", color=colour)
            axis.axvline(1e3 * some.chosen(here[0].tokens), color=colour, linewidth=1, alpha=0.6)
            axis.axvline(1e3 * some.in_turn, color=colour, linestyle="--", linewidth=1, alpha=0.6)
        axis.axhline(1, color="black", linewidth=0.8)
        axis.set(title=f"full model paced to {pace:g} ms", xlabel="round trip, ms", xlim=(0, 160))
        axis.legend(fontsize="small")
    if paces:
        axes[0].set_ylabel("times as fast as the cloud alone")
        figure.supxlabel("points: as many drafts as pay; dotted: always 5; upright lines: the selector says no (full), "
                         "rounds in turn would not pay (dashed)", fontsize="small")  # fmt: skip
    if sessions:
        counts = sorted({one.sessions for one in sessions})
        for draft, label in ((None, "no drafts"), (0, "drafts on the phones")):
            kind = [one for one in sessions if one.draft == draft]
            medians = [1e3 * statistics.median(one.token_s for one in kind if one.sessions == n) for n in counts]
            axes[-1].plot(counts, medians, "o-", label=label)
        axes[-1].set(title=f"sessions at {sessions[0].pace_ms:g} ms a pass", xlabel="sessions at once", ylim=(0, None),
                     ylabel="ms from token to token")  # fmt: skip
        axes[-1].legend(fontsize="small")
    figure.savefig(file, dpi=100)
