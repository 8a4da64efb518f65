"""One answer to be made, and what was asked of its plan."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from protocol.limits import MAX_DRAFT
from split_model.settings import Sampling


class Route(StrEnum):
    """The kind of a plan."""

    LOCAL = "local"
    CLOUD = "cloud"
    SPLIT = "split"
    SPECULATIVE = "speculative"


class Quality(StrEnum):
    """The least agreement with the full model that is accepted."""

    FAST = "fast"
    BALANCED = "balanced"
    BEST = "best"

    @property
    def floor(self) -> float:
        return {"fast": 0.0, "balanced": 0.8, "best": 1.0}[self.value]


class Privacy(StrEnum):
    """`device`: nothing leaves the phone."""

    ANY = "any"
    DEVICE = "device"


@dataclass(frozen=True, slots=True)
class Wish:
    """What the caller asked of the plan; None leaves it to the agent. Raises ValueError for a contradiction."""

    route: Route | None = None
    split: int | None = None
    quality: Quality = Quality.BALANCED
    privacy: Privacy = Privacy.ANY
    tiny: bool = False  # the tiny model was named
    hidden_bits: int = 16  # of a number of the prompt's hidden states where they are sent: 16, exact, or 8
    draft: int | None = None  # tokens at a time: by the phone on route speculative, by the cloud on route cloud
    deadline_s: float | None = None  # for the whole answer, predicted
    max_bytes: int | None = None  # up and down, predicted
    sparse: bool = False  # in a long context each token reads the most relevant keys only

    def __post_init__(self) -> None:
        given = self.route or "auto"
        if self.split is not None and self.route not in (Route.SPLIT, Route.SPECULATIVE):
            raise ValueError(f"split {self.split} goes with route 'split' or 'speculative', not '{given}'")
        if self.split == 0 and self.route is Route.SPLIT:
            raise ValueError("split 0 is route 'cloud', or 'speculative' with drafts")
        if self.draft is not None and self.route not in (Route.CLOUD, Route.SPECULATIVE):
            raise ValueError(f"draft {self.draft} goes with route 'speculative' or 'cloud', not '{given}'")
        least = 1 if self.route is Route.SPECULATIVE else 0
        if self.draft is not None and not least <= self.draft <= MAX_DRAFT:
            raise ValueError(f"draft {self.draft}, must be {least} to {MAX_DRAFT} tokens by route '{given}'")
        if self.deadline_s is not None and not self.deadline_s > 0:
            raise ValueError(f"a deadline of {1000 * self.deadline_s:g} ms, must be more than 0")
        if self.max_bytes is not None and self.max_bytes < 0:
            raise ValueError(f"max_bytes {self.max_bytes}, must be 0 or more")
        if self.route not in (None, Route.LOCAL):
            if self.privacy is Privacy.DEVICE:
                raise ValueError(f"privacy 'device' forbids route {self.route.value!r}")
            if self.tiny:
                raise ValueError(f"the tiny model runs on the phone only, not by route {self.route.value!r}")
        if self.tiny and self.quality is Quality.BEST:
            raise ValueError("quality 'best' is the full model's, the tiny one was named")
        if self.hidden_bits not in (8, 16):
            raise ValueError(f"hidden states in {self.hidden_bits} bits, must be 8 or 16")
        if self.hidden_bits == 8 and self.quality is Quality.BEST:
            raise ValueError("quality 'best' is exact, and hidden states in 8 bits are not")
        if self.sparse and self.quality is Quality.BEST:
            raise ValueError("quality 'best' is exact, and sparse attention is not")


@dataclass(frozen=True, slots=True)
class Job:
    """`max_tokens` counts answer tokens; prompt and answer fit the full model's context."""

    id: bytes
    prompt: tuple[int, ...]
    max_tokens: int
    sampling: Sampling
    stop: tuple[str, ...] = ()
    wish: Wish = Wish()
