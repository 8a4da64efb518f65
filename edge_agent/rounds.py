"""Rounds of drafts, as a function of how many are accepted: seconds, trips and drafts for each token of the answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from split_model.drafting import tokens_per_round

AHEAD = 4  # drafts that may wait for their verification at once
LONGEST_DRAFT = 16  # tokens: at an acceptance of 0.9 a longer one gains less than 2 %


@dataclass(frozen=True, slots=True)
class Rounds:
    """Drafting `draft` tokens at a time: per token of the answer, docs/cost-model.md. Seconds that overlap count once.

    `network_s` is what the network adds to `compute_s`; `verified` and `sent` are drafts a token, `trips` round trips.
    """

    draft: int
    compute_s: float
    network_s: float
    trips: float
    verified: float  # drafts that the cloud looks at
    sent: float  # drafts that are made, those in vain included

    @property
    def token_s(self) -> float:
        return self.compute_s + self.network_s

    @property
    def frames(self) -> float:
        """Rounds that are verified, a token."""
        return self.verified / self.draft

    @property
    def computed(self) -> float:
        """Positions that the cloud computes a token: those of the drafts and one before them."""
        return self.frames * (self.draft + 1)


def ahead(accepted: Sequence[float], made_s: float, up_s: float, verify_s: float, rtt_s: float,
          window: float = AHEAD) -> Rounds:  # fmt: skip
    """Rounds of drafts that are made and sent while others are verified: only a rejection waits for the way back.

    `made_s`, `up_s` and `verify_s` are for one draft as a whole: on the phone, on the way up, in the cloud. At most
    `window` drafts are under way at once.
    """
    count, whole = len(accepted), math.prod(accepted)
    tokens = tokens_per_round(accepted) - whole  # of one draft, on average: a rejection brings the token that was right
    slowest = max(made_s, verify_s)
    compute_s = (1 - whole) * (made_s + verify_s) + whole * slowest
    around_s = made_s + up_s + rtt_s + verify_s
    full = whole**window  # the chance that as many as may be under way all pass, and the next must wait for an answer
    waits = (1 - whole) * full / (1 - full) if full < 1 else 1 / window
    network_s = (1 - whole) * (up_s + rtt_s) + whole * (max(slowest, up_s) - slowest)
    network_s += waits * max(0.0, around_s - window * max(slowest, up_s))
    in_vain = min(window - 1, (around_s - made_s) / max(made_s, up_s, 1e-9))
    sent = count * (1 + (1 - whole) * in_vain)
    return Rounds(count, compute_s / tokens, network_s / tokens, (1 - whole) / tokens, count / tokens, sent / tokens)


def in_turn(accepted: Sequence[float], made_s: float, verify_s: float, away_s: float = 0.0) -> Rounds:
    """Rounds whose draft is made only when the one before was verified; each brings one token beside its drafts."""
    count, tokens = len(accepted), tokens_per_round(accepted)
    trips = 1 / tokens if away_s else 0.0
    return Rounds(count, (made_s + verify_s) / tokens, away_s / tokens, trips, count / tokens, count / tokens)


def best(round_of: Callable[[int], Rounds]) -> Rounds:
    """The least time a token; given up where longer drafts have become worse three times."""
    least = round_of(1)
    for count in range(2, LONGEST_DRAFT + 1):
        found = round_of(count)
        if found.token_s < least.token_s:
            least = found
        elif count - least.draft >= 3:
            break
    return least
