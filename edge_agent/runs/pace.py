"""What drafts cost and bring on the way to one replica, measured as they are made; docs/cost-model.md."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge_agent.conditions import KEPT, average
from edge_agent.link import Link
from edge_agent.rounds import AHEAD
from edge_agent.runs.local import PhoneModel
from protocol.limits import MAX_DRAFT
from split_model.drafting import Acceptance, best_draft, token_seconds
from split_model.flops import head_flops, layer_flops, layers_flops

ENOUGH = 16  # tokens that may in any case, where drafts are chosen by what they bring
STICK = 1.1  # times as good another way must be to leave the present one for it
SLOWEST = 10.0  # times its prediction, or a tenth of it: the bounds of what one verification teaches


@dataclass(frozen=True, slots=True)
class Length:
    """Of the next draft: tokens to propose at a time, 0 for none, and how many may be on their way unconfirmed.

    `token_s` is what a token of the answer then takes, `draft_s` what one more drafted token does.
    """

    tokens: int
    window: int
    token_s: float
    draft_s: float


class Pace:
    """Seconds of the parts of a round, in a plan that runs layers [0, split) of the full model on the phone."""

    def __init__(self, tiny: PhoneModel, full: PhoneModel, split: int, sparse: bool = False):
        self._tiny, self._full, self._split, self._sparse = tiny, full, split, sparse
        self._drafted, self._drafting_s = 0.0, 0.0  # tokens of late, and what they took
        self._verified = 1.0  # measured over predicted

    def drafted(self, tokens: int, seconds: float) -> None:
        """The tiny model made so many."""
        self._drafted, self._drafting_s = KEPT * self._drafted + tokens, KEPT * self._drafting_s + seconds

    def verified(self, link: Link, position: int, drafts: int, seconds: float) -> None:
        """An answer to so many drafts came after so long, nothing else being under way."""
        parts = self._parts(link, position)
        found = (seconds - parts.away_s) / (parts.verify_s(drafts + 1) / self._verified)
        self._verified = average(self._verified, min(max(found, 1 / SLOWEST), SLOWEST))

    def best(self, acceptance: Acceptance, link: Link, position: int, most: int, drafting: bool) -> Length:
        """The draft that costs the least time a token; another kind of decoding than now must be notably better."""
        parts = self._parts(link, position)
        alone_s = parts.alone_s * (STICK if drafting else 1 / STICK)
        tokens = best_draft(acceptance, parts.draft_s, parts.verify_s, parts.away_s, alone_s, most, ahead=True)
        if not tokens:
            return Length(0, 0, parts.alone_s, parts.draft_s)
        token_s = token_seconds(acceptance, tokens, parts.draft_s, parts.verify_s, parts.away_s, ahead=True)
        return Length(tokens, _window(parts, tokens, max(AHEAD * tokens, ENOUGH)), token_s, parts.draft_s)

    def fixed(self, link: Link, position: int, tokens: int) -> Length:
        """Drafts of this length, whatever they bring."""
        return Length(tokens, _window(self._parts(link, position), tokens, AHEAD * tokens), math.inf, 0.0)

    def _parts(self, link: Link, position: int) -> Parts:
        tiny, full, cloud = self._tiny, self._full.config, link.cloud().rates
        if self._drafted:
            draft_s = self._drafting_s / self._drafted
        else:
            flops = tiny.config.layers * layer_flops(tiny.config, position, 1) + head_flops(tiny.config)
            draft_s = flops / tiny.rates(use="draft").decode
        here = layers_flops(full, range(self._split), position, 1, self._sparse)
        there = layers_flops(full, range(self._split, full.layers), position, 1, self._sparse) + head_flops(full)
        rates = self._full.rates(use="front")
        first, further = there / cloud.decode * self._verified, there / cloud.prefill * self._verified
        away_s = link.rtt_s + here / rates.decode
        return Parts(draft_s + here / rates.prefill, away_s, first, further, first + (away_s if self._split else 0.0))


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds: of a drafted token, of the way there and back, of a pass over one position and over each further one,
    and of a token without drafts."""

    draft_s: float
    away_s: float
    first_s: float
    further_s: float
    alone_s: float

    def verify_s(self, positions: int) -> float:
        return self.first_s + (positions - 1) * self.further_s


def _window(parts: Parts, tokens: int, most: int) -> int:
    """What is drafted until the answer to a draft is there, and that draft."""
    meanwhile = math.ceil((parts.away_s + parts.verify_s(tokens + 1)) / max(parts.draft_s, 1e-6))
    return min(meanwhile + tokens, most, MAX_DRAFT)
