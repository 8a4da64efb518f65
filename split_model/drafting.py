"""How many tokens to draft: acceptance as it is measured, and the draft that costs the least time a token.

Knows no network: a round trip is a number of seconds. docs/cost-model.md derives the two formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

PRIOR = 0.7  # of drafts accepted; the built-in pair agrees on 0.81 of greedy tokens, and on fewer that are sampled
WEIGHT = 4.0  # rounds that a prior counts for
DECAY = 0.98  # of what was seen, at each further round that sees the same: a memory of 50 rounds

LENGTHS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)  # of drafts that are weighed for a batch, in tokens
GAIN = 1.05  # drafts must bring a batch so many times the tokens a second: what is measured is never quite what comes


class Acceptance:
    """How often drafts are accepted, by their place in the draft; the recent counts more."""

    def __init__(self, prior: float = PRIOR, weight: float = WEIGHT, decay: float = DECAY):
        if not (0.0 <= prior <= 1.0 and weight > 0.0 and 0.0 < decay <= 1.0):
            raise ValueError(f"prior {prior}, weight {weight}, decay {decay}: must be 0 to 1, over 0, over 0 to 1")
        self._prior, self._weight, self._decay = prior, weight, decay
        self._all = [0.0, 0.0]  # drafts looked at, and those accepted
        self._places: list[list[float]] = []  # the same by place

    def seen(self, drafted: int, accepted: int) -> None:
        """Books a round; places behind the first rejection were not looked at. Raises ValueError."""
        if not 0 <= accepted <= drafted:
            raise ValueError(f"{accepted} accepted of {drafted} drafts")
        looked = min(drafted, accepted + 1)
        while len(self._places) < looked:
            self._places.append([0.0, 0.0])
        for place in range(looked):
            self._book(self._places[place], 1, place < accepted)
        if looked:
            self._book(self._all, looked, accepted)

    def share(self, place: int) -> float:
        """Of drafts at this place (from 0) accepted, given that those before were; the mean where little was seen."""
        return self._blend(self._places[place], self.mean) if place < len(self._places) else self.mean

    def shares(self, count: int) -> list[float]:
        """Those of the first `count` places."""
        return [self.share(place) for place in range(count)]

    @property
    def mean(self) -> float:
        """Of all drafts that were looked at."""
        return self._blend(self._all, self._prior)

    def _book(self, counts: list[float], looked: int, accepted: int) -> None:
        counts[0] = counts[0] * self._decay + looked
        counts[1] = counts[1] * self._decay + accepted

    def _blend(self, counts: list[float], prior: float) -> float:
        looked, accepted = counts
        return min(1.0, (self._weight * prior + accepted) / (self._weight + looked))


def tokens_by_length(shares: Sequence[float]) -> list[float]:
    """Expected tokens of a round with the first 0, 1, 2, … of these drafts, and the one that always comes after."""
    expected, reached = [1.0], 1.0
    for share in shares:
        reached *= share
        expected.append(expected[-1] + reached)
    return expected


def tokens_per_round(shares: Sequence[float]) -> float:
    """Expected tokens of a round with all of these drafts."""
    return tokens_by_length(shares)[-1]


def token_seconds(
    acceptance: Acceptance, draft: int, draft_s: float, verify_s: Callable[[int], float], away_s: float, ahead: bool
) -> float:
    """Expected seconds a token with drafts of `draft` > 0 tokens, each made in `draft_s`.

    `verify_s(n)` is one pass over n positions, `away_s` the way there and back. `ahead`: further drafts are made and
    sent while a verification is under way, so that only a rejection waits for the way back.
    """
    drafting, verifying = draft * draft_s, verify_s(draft + 1)
    if not ahead:
        return (drafting + away_s + verifying) / tokens_per_round(acceptance.shares(draft))
    mean, steady = acceptance.mean, max(drafting, verifying)
    if mean >= 1.0:
        return steady / draft
    whole = mean**draft  # the chance that none of a draft is rejected
    return (1 - mean) * (drafting + away_s + verifying + whole / (1 - whole) * steady)


def best_draft(
    acceptance: Acceptance, draft_s: float, verify_s: Callable[[int], float], away_s: float, alone_s: float,
    limit: int, ahead: bool,
) -> int:  # fmt: skip
    """Drafts of how many tokens, at most `limit`, cost the least time a token; 0 when none beats `alone_s`."""
    best, least = 0, alone_s
    for draft in range(1, limit + 1):
        seconds = token_seconds(acceptance, draft, draft_s, verify_s, away_s, ahead)
        if math.isfinite(seconds) and seconds < least:
            best, least = draft, seconds
    return best


@dataclass(frozen=True, slots=True)
class Wanting:
    """A row of a batch that wants drafts, of at most `limit` > 0 tokens.

    `read_s`: seconds a token of its answer for what the tiny model has yet to read of it.
    """

    limit: int
    acceptance: Acceptance
    read_s: float

    def gains(self) -> list[float]:
        """Expected drafts accepted, for each of LENGTHS."""
        most = min(self.limit, LENGTHS[-1])
        tokens = tokens_by_length(self.acceptance.shares(most))
        return [tokens[min(draft, most)] - 1 for draft in LENGTHS]


def best_together(
    likely: Sequence[Wanting], rows: int, budget: int, pass_s: Callable[[int], float], step_s: Callable[[int], float]
) -> tuple[int, int]:
    """How many of these rows, the likeliest first, are to get drafts, and of how many tokens: as many as bring all of
    them the most tokens a second; none where that is not GAIN times what they make without, or where that is unknown.

    A pass of the tiny model for n of them takes `pass_s(n)` and holds up every row; a step of the batch's `rows` with
    their drafts, at most `budget` positions, takes `step_s(positions)`.
    """
    alone_s = step_s(rows)
    if not likely or not alone_s:
        return 0, 0
    chosen, best = (0, 0), GAIN * len(likely) / alone_s
    gains = [one.gains() for one in likely]
    for many in {len(likely), -(-len(likely) // 2), -(-len(likely) // 4), 1}:
        draft_s = pass_s(many)
        for index, draft in enumerate(LENGTHS):
            positions = rows + many * draft
            if positions > budget:
                break
            tokens = len(likely) + sum(gain[index] for gain in gains[:many])
            read_s = sum(one.read_s * (1 + gain[index]) for one, gain in zip(likely[:many], gains, strict=False))
            rate = tokens / (draft * draft_s + step_s(positions) + read_s)
            if rate > best:
                chosen, best = (many, draft), rate
    return chosen
