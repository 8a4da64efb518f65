"""Rounds of drafts, as a function of how many are accepted: seconds, trips and drafts for each token of the answer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from protocol.limits import MAX_DRAFT
from split_model.drafting import tokens_per_round

LONGEST_DRAFT = 16  # tokens: at an acceptance of 0.9 a longer one gains less than 2 %
PENDING = 4 * MAX_DRAFT  # drafts that may be under way at once


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


def ahead(accepted: Sequence[float], made_s: float, up_s: float, verify_s: float, rtt_s: float) -> Rounds:
    """Rounds of drafts that are made and sent while others are verified: only a rejection waits for the way back.

    `made_s`, `up_s` and `verify_s` are for one draft as a whole: on the phone, on the way up, in the cloud.
    """
    count, whole = len(accepted), math.prod(accepted)
    tokens = tokens_per_round(accepted) - whole  # of one draft, on average: a rejection brings the token that was right
    slowest = max(made_s, verify_s)
    compute_s = (1 - whole) * (made_s + verify_s) + whole * slowest
    network_s = (1 - whole) * (up_s + rtt_s) + whole * (max(slowest, up_s) - slowest)
    in_vain = min(PENDING / count, (up_s + rtt_s + verify_s) / max(made_s, up_s, 1e-9))
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
