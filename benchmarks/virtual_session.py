"""One answer by one plan, in virtual time: what phone, link and batch do, event by event.

Follows the session protocol (docs/wire.md), with counts in the place of tensors: which drafts are right comes from a
recorded trace, what a pass takes from measured samples. Knows nothing of edge_agent/cost.py, which it is to test.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from speeds import Site
from traces import Trace
from virtual_batch import Row
from virtual_drafts import Drafts
from virtual_link import Clock, Profile, Way, Worker

from split_model.drafting import Acceptance

CHUNK = 128  # positions of a prompt that a phone computes at a time
TOKEN_BYTES = 265  # of a device token
OPEN_BYTES, HIDDEN_BYTES = 180, 24  # of frames, without tokens and hidden states
STATE_BYTES = 2 * 384  # of the hidden states of a position


@dataclass(frozen=True, slots=True)
class Known:
    """What both ends have learned before an answer: what a round takes, and how likely drafts are to be right."""

    parts: Parts
    acceptance: Acceptance
    chance: Callable[[float], float]  # by entropy


@dataclass(frozen=True, slots=True)
class Cell:
    """Where answers are made."""

    profile: str
    slower: float  # the phone, than the cloud
    others: int  # sessions in the cloud's batch
    pace_s: float  # of a pass of the full model; 0: as it is
    cold: bool = False  # a connection whose window must open

    def __str__(self) -> str:
        pace = f"{1e3 * self.pace_s:g} ms" if self.pace_s else "as it is"
        phone, cloud = "full" if self.slower == 1 else f"1/{self.slower:g}", "loaded" if self.others else "idle"
        return f"{self.profile}, phone {phone}, cloud {cloud}, model {pace}"


@dataclass(frozen=True, slots=True)
class Course:
    """A plan: layers [0, split) on the phone, drafts of `draft` tokens by the phone or the cloud; 0: as many as pay."""

    route: str
    split: int = 0
    draft: int | None = None

    def __str__(self) -> str:
        at = f" {self.split}" if self.split else ""
        drafts = "" if self.draft is None else " drafts" if not self.draft else f" drafts of {self.draft}"
        return f"{self.route}{at}{drafts}"


@dataclass(frozen=True, slots=True)
class Took:
    """Seconds to the first token and to the last; bytes on the wire; drafts looked at and accepted."""

    first_s: float
    total_s: float
    tokens: int = 0
    bytes: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class Parts:
    """Seconds of the parts of a round, as both ends have measured them."""

    draft_s: float
    away_s: float
    first_s: float
    further_s: float
    alone_s: float

    def verify_s(self, positions: int) -> float:
        return self.first_s + (positions - 1) * self.further_s


class Answer:
    """The phone's side and the cloud's of one answer; `run` it once."""

    def __init__(self, cell: Cell, profile: Profile, way: Course, trace: Trace, sites: tuple[Site, Site], known: Known,
                 order: random.Random):  # fmt: skip
        self.way, self.trace, self.order = way, trace, order
        self.phone_site, self.cloud_site = sites
        self.right, self.most = trace.right, len(trace.ids)
        self.clock = Clock()
        self.phone = Worker(self.clock)
        self.up, self.down = (Way(self.clock, profile, up, order, cell.cold) for up in (True, False))
        self.parts, self.acceptance, self.chance = known.parts, copy.deepcopy(known.acceptance), known.chance
        self.row = Row(self)
        self.known, self.first_s, self.total_s = 0, math.nan, math.nan  # answer tokens that the phone has

    def run(self) -> Took:
        prompt, split = len(self.trace.prompt), self.way.split
        self.row.begin()
        self.up.send(OPEN_BYTES + TOKEN_BYTES + (0 if split else 2 * prompt), self.row.opened)
        self.feed: Drafts | None = None
        if self.way.route == "speculative":
            self.feed = Drafts(self)
            self.feed.begin()
        elif split:
            self.front(prompt, lambda: None)
        self.clock.run(lambda: self.known >= self.most)
        moved = self.up.bytes + self.down.bytes
        return Took(self.first_s, self.total_s, self.most, moved, self.row.drafted, self.row.accepted)

    def front(self, positions: int, then: Callable[[], None], epoch: Callable[[], int] = lambda: 0) -> None:
        """Computes and sends hidden states, a chunk at a time; those of an epoch that is over are not sent."""
        now, piece = epoch(), min(CHUNK, positions)

        def made() -> None:
            if epoch() != now:
                then()
                return
            self.up.send(HIDDEN_BYTES + STATE_BYTES * piece, lambda: self.row.hidden_came(piece, now))
            if positions > piece:
                self.front(positions - piece, then, epoch)
            else:
                then()

        self.phone.do(self.phone_site.full_s(self.way.split, piece, 0, self.order), made)

    def heard(self, tokens: int, epoch: int) -> None:
        """The phone has a frame of tokens."""
        if not self.known:
            self.first_s = self.clock.now
        self.known += tokens
        self.total_s = self.clock.now
        if self.feed is not None:
            self.feed.heard(tokens, epoch)
        elif self.way.split and self.known < self.most:
            self.front(1, lambda: None)
