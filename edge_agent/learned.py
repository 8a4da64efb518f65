"""What answers teach: how often the tiny model's tokens are the full one's, and how long answers are."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from edge_agent.averages import Mean
from edge_agent.cost import Pair
from edge_agent.decisions import Decision
from edge_agent.misses import Surprises
from edge_agent.rounds import LONGEST_DRAFT
from edge_agent.state import State
from split_model.drafting import Acceptance
from split_model.sampling import Sampling

log = logging.getLogger(__name__)
FEW = 30  # tokens: what a bin of fewer says is chance
PRIOR = 0.7  # agreement of a tiny model with its full one where no table says
PRIOR_ANSWER = 40.0  # tokens of an answer before any was seen
EDGES = (0.05, 0.15, 0.3, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, math.inf)  # nats: bins where no table says
STEADY = 200.0  # tokens or answers' worth that a shipped number counts for, at most
TOKENS_KEPT = 2000.0  # tokens of a bin that are remembered: older ones count less and less
ANSWERS_KEPT = 30.0  # answers of a bin
ALIKE = 5.0  # answers that the mean of all counts for in a bin
PAIRS = 8  # kept on disk
Rows = Sequence[tuple[float, float, float]]  # (entropy below, agreement, tokens), ascending


class Bins:
    """Averages by entropy (nats), and over all."""

    def __init__(self, limits: Sequence[float], priors: Sequence[Mean], every: Mean):
        self.limits, self.bins, self.every = list(limits), list(priors), every

    def find(self, entropy: float | None) -> Mean | None:
        """The bin; None where the entropy is not known, or is no number."""
        found = zip(self.limits, self.bins, strict=True)
        return None if entropy is None else next((one for limit, one in found if entropy < limit), None)

    def book(self, entropy: float | None, total: float, count: float) -> None:
        self.every.book(total, count)
        if (one := self.find(entropy)) is not None:
            one.book(total, count)

    def kept(self) -> dict[str, object]:
        limits = [None if math.isinf(limit) else limit for limit in self.limits]
        return {"limits": limits, "seen": [one.kept() for one in (self.every, *self.bins)]}

    def restore(self, kept: object) -> None:
        """Takes over what `kept` gave, where the bins are the same; else begins anew."""
        match kept:
            case {"limits": limits, "seen": [*seen]} if limits == self.kept()["limits"]:
                for mean, one in zip((self.every, *self.bins), seen, strict=False):
                    mean.restore(one)


class Agreement:
    """How often the tiny model's token is the full one's: by its entropy behind the prompt, for whole answers, and by
    its entropy at the token itself; for greedy and for sampled answers.

    Begins with the table that ships with the pair, whose tokens were greedy, and learns.
    """

    def __init__(self, bins: Rows = (), mean: float = PRIOR, token_bins: Rows = ()):
        self._answers = tuple(_shares(bins, mean, sampled) for sampled in (False, True))
        self._tokens = tuple(_shares(token_bins, mean, sampled) for sampled in (False, True))

    @classmethod
    def read(cls, folder: Path) -> Agreement:
        """The table that ships with the tiny model, or the prior."""
        path = folder / "agreement.json"
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
            rows = _rows(raw["bins"])
            tokens = sum(count for _, _, count in rows)
            mean = sum(share * count for _, share, count in rows) / tokens
            return cls(rows, mean, _rows(raw.get("token_bins", ())))
        except FileNotFoundError:
            return cls()
        except (OSError, ValueError, KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
            log.warning("%s is no table of agreement, going on with %g: %r", path, PRIOR, error)
            return cls()

    def at(self, entropy: float | None, sampled: bool = False) -> float:
        """Of a whole answer's tokens; the mean where nothing is known of the entropy."""
        bins = self._answers[sampled]
        return min(1.0, (bins.find(entropy) or bins.every).value)

    def mean(self, sampled: bool = False) -> float:
        """Of the tokens of all answers."""
        return min(1.0, self._answers[sampled].every.value)

    def token(self, entropy: float, sampled: bool = False) -> float:
        """The chance that one token of the tiny model's, drawn at this entropy, is the full one's."""
        bins = self._tokens[sampled]
        return min(1.0, (bins.find(entropy) or bins.every).value)

    def span(self, sampled: bool = False) -> tuple[float, float]:
        """The least and the greatest share of any bin."""
        values = [min(1.0, one.value) for one in self._answers[sampled].bins]
        return min(values), max(values)

    def seen(self, entropy: float | None, sampled: bool, agreed: int, looked: int) -> None:
        """Of the tokens of one answer that were looked at, so many agreed; `entropy` is that behind the prompt."""
        if looked:
            self._answers[sampled].book(entropy, agreed, looked)

    def seen_tokens(self, sampled: bool, tokens: Iterable[tuple[float, bool]]) -> None:
        """Single tokens: the entropy of each, and whether it agreed."""
        for entropy, agreed in tokens:
            self._tokens[sampled].book(entropy, agreed, 1)

    def kept(self) -> list[dict[str, object]]:
        return [bins.kept() for bins in (*self._answers, *self._tokens)]

    def restore(self, kept: object) -> None:
        if isinstance(kept, list):
            for bins, one in zip((*self._answers, *self._tokens), kept, strict=False):
                bins.restore(one)


class Lengths:
    """Tokens of finished answers, by the tiny model's entropy behind the prompt, for greedy and for sampled ones."""

    def __init__(self) -> None:
        self._bins = tuple(self._prior() for _ in (False, True))

    @staticmethod
    def _prior() -> Bins:
        every = Mean(PRIOR_ANSWER, 2.0, ANSWERS_KEPT, 0.0)
        return Bins(EDGES, [Mean(0.0, 0.0, ANSWERS_KEPT, 0.0) for _ in EDGES], every)

    def expected(self, entropy: float | None, sampled: bool) -> float:
        """The mean of the bin, which is drawn to that of all answers while the bin has few."""
        bins = self._bins[sampled]
        every, one = bins.every.value, bins.find(entropy)
        if one is None:
            return max(1.0, every)
        return max(1.0, (ALIKE * every + one.total) / (ALIKE + one.count))

    def seen(self, entropy: float | None, sampled: bool, tokens: int, cut: bool = False) -> None:
        """An answer of so many tokens. One that was `cut` at its limit tells only that it might have been longer."""
        if not cut or tokens > self.expected(entropy, sampled):
            self._bins[sampled].book(entropy, tokens, 1)

    def kept(self) -> list[dict[str, object]]:
        return [bins.kept() for bins in self._bins]

    def restore(self, kept: object) -> None:
        if isinstance(kept, list):
            for bins, one in zip(self._bins, kept, strict=False):
                bins.restore(one)


class Learned:
    """All of it for one pair of models, kept on disk; `acceptance` is that of drafts by their place."""

    def __init__(self, agreement: Agreement, pair: Pair, state: State, key: str):
        self.agreement, self.lengths, self.surprises = agreement, Lengths(), Surprises(pair)
        self._state, self._key = state, key
        match state.read("agreement").get(key):
            case dict() as kept:
                for name, part in self._parts():
                    part.restore(kept.get(name))
        self._drafts = tuple(Acceptance(prior=agreement.mean(sampled)) for sampled in (False, True))

    def acceptance(self, sampling: Sampling) -> Acceptance:
        """That which every speculative answer of this kind teaches."""
        return self._drafts[sampled(sampling)]

    def chance(self, sampling: Sampling) -> Callable[[float], float]:
        """Of a drafted token to be right, by its entropy."""
        kind = sampled(sampling)
        return lambda entropy: self.agreement.token(entropy, kind)

    def places(self, sampling: Sampling, agreement: float) -> tuple[float, ...]:
        """Of drafts at each place accepted, where the tiny model agrees so well with the full one."""
        seen = self.acceptance(sampling)
        level = agreement / seen.mean if seen.mean else 1.0
        return tuple(min(1.0, level * share) for share in seen.shares(LONGEST_DRAFT))

    def finished(self, decision: Decision, rescored: bool = False) -> None:
        """Drafts teach agreement unless the tiny model is asked about every token; a complete answer its length."""
        outcome, kind = decision.outcome, sampled(decision.job.sampling)
        if outcome.drafted and not rescored:
            self.agreement.seen(decision.conditions.entropy, kind, outcome.accepted, outcome.drafted)
        if outcome.complete:
            cut = outcome.finish == "length"
            self.lengths.seen(decision.conditions.entropy, kind, outcome.tokens, cut)
        self.surprises.finished(decision)

    def save(self) -> None:
        """The latest pairs are kept."""
        others = [(key, one) for key, one in self._state.read("agreement").items() if key != self._key]
        mine = {name: part.kept() for name, part in self._parts()}
        self._state.write("agreement", dict([*others[-PAIRS + 1 :], (self._key, mine)]))

    def _parts(self) -> list[tuple[str, Agreement | Lengths | Surprises]]:
        return [("agreement", self.agreement), ("lengths", self.lengths), ("missed", self.surprises)]


def sampled(sampling: Sampling) -> bool:
    return sampling.temperature > 0


def _shares(rows: Rows, mean: float, sampled: bool) -> Bins:
    """A bin of fewer tokens than FEW is read as the nearest that has them, or as the mean."""
    measured = [(at, share) for at, (_, share, count) in enumerate(rows) if count >= FEW]
    most = FEW if sampled else STEADY  # what ships was measured greedily
    limits = [limit for limit, _, _ in rows] or list(EDGES)
    counts = [count for _, _, count in rows] or [0.0] * len(EDGES)
    means = [
        Mean(_nearest(measured, at, mean), min(most, max(FEW, count)), TOKENS_KEPT, 0.0)
        for at, count in enumerate(counts)
    ]
    return Bins(limits, means, Mean(mean, most if rows else FEW, TOKENS_KEPT, 0.0))


def _nearest(measured: Sequence[tuple[int, float]], place: int, mean: float) -> float:
    """The share at the place that is nearest to `place`, the lesser of two."""
    return min(measured, key=lambda one: (abs(one[0] - place), one[1]), default=(0, mean))[1]


def _rows(raw: Sequence[dict[str, float | None]]) -> Rows:
    """Raises ValueError, KeyError or TypeError for what is no table."""
    rows = []
    for one in raw:
        limit, share, count = one["entropy_below"], one["agreement"], one["tokens"]
        if share is None or count is None or not (0 <= share <= 1 and 0 <= count < math.inf):
            raise ValueError(f"agreement {share} of {count} tokens")
        rows.append((math.inf if limit is None else float(limit), float(share), float(count)))
    return sorted(rows)
