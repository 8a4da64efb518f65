"""Whether the rest of an answer goes on by another plan: a pure choice, and the hysteresis around it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace

from edge_agent.conditions import Cloud, Conditions
from edge_agent.cost import Pair, Score, assisted, local, shared, speculative
from edge_agent.decisions import Leg
from edge_agent.job import Job, Route
from edge_agent.plan import Candidate, judged, scores
from edge_agent.rounds import LONGEST_DRAFT

EVERY_S, EVERY_TOKENS = 0.5, 8  # between two looks, both
FEW, MANY = 4, 1000  # plans scored between two tokens, and where tokens take longer than SLOW_S each
SLOW_S = 0.1
NOTABLE = 1.25  # times a number must have become more or less, since plans were last scored, to score them again
LEAST_RTT_S, LEAST_WAIT_S = 0.01, 0.05  # differences below are not notable
LESS, LEAST_S = 0.8, 0.1  # of the running plan's cost at most, and seconds saved at least
HOLD_S = 2.0  # after a move; twice as long after each
LONGEST_HOLD_S = 64.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an answer is: positions of its token log, seconds since it began, bytes it has moved."""

    length: int
    seconds: float
    moved: int = 0


@dataclass(frozen=True, slots=True)
class Room:
    """Whether a further place in the KV of each model is free here, and whether the text so far is the full model's."""

    full: bool = True
    tiny: bool = True
    exact: bool = True


@dataclass(frozen=True, slots=True)
class Move:
    """The leg that makes the rest, and why, in words."""

    leg: Leg
    words: str


class Lookout:
    """Scores the rest of one answer where conditions have changed, and says when it should move.

    Scoring takes milliseconds and a token should not wait for it: between two tokens a few plans are scored.
    """

    def __init__(self, pair: Pair, job: Job, began: Conditions):
        self._pair, self._job = pair, job
        self._scored = self._began = began  # conditions: of the latest scores, and of the decision
        self._looked = Progress(len(job.prompt), 0.0)
        self._weighing: Generator[None, None, Leg | None] | None = None
        self._was_better = False  # at the latest look
        self._hold_s, self._held_until = HOLD_S, 0.0

    def due(self, at: Progress) -> bool:
        """Whether it is time to look, or to go on with it."""
        looked = self._looked
        again = at.length >= looked.length + EVERY_TOKENS and at.seconds >= looked.seconds + EVERY_S
        return again or self._weighing is not None

    def better(self, running: Leg, at: Progress, look: Callable[[], Conditions], room: Room) -> Move | None:
        """Where the rest goes on, if it was better there at two looks in a row and no move was just before."""
        slow = at.seconds - self._looked.seconds > SLOW_S * (at.length - self._looked.length)
        if self._weighing is None:
            self._begin(running, at, look(), room)
        try:
            for _ in range(MANY if slow else FEW):
                next(self._weighing or iter(()))
        except StopIteration as end:
            self._weighing = None
            return self._found(end.value, at, room)
        return None

    def lost(self, at: Progress) -> None:
        """The cloud was lost, and the phone goes on: a move that counts."""
        self._hold(at)

    def _begin(self, running: Leg, at: Progress, now: Conditions, room: Room) -> None:
        self._looked = at
        if self._was_better or any(changes(self._scored, now)):
            self._scored = now
            self._weighing = weighed(self._job, running, at, self._pair, now, room)

    def _found(self, found: Leg | None, at: Progress, room: Room) -> Move | None:
        again, self._was_better = self._was_better, found is not None
        if found is None or not again or at.seconds < self._held_until or not _fits(found, room):
            return None
        why = ", ".join(changes(self._began, self._scored)) or "by what is known now"
        self._began = self._scored
        self._hold(at)
        return Move(found, f"{_place(found)} ({why})")

    def _hold(self, at: Progress) -> None:
        self._was_better, self._weighing = False, None
        self._held_until = at.seconds + self._hold_s
        self._hold_s = min(2 * self._hold_s, LONGEST_HOLD_S)


def weighed(job: Job, running: Leg, at: Progress, pair: Pair, now: Conditions,
            room: Room) -> Generator[None, None, Leg | None]:  # fmt: skip
    """The leg that makes the rest enough cheaper than the running one, what it must compute again included; a plan
    is scored at each step.

    None for an answer whose text is not exactly the full model's: another plan's rest could be another text.
    """
    if running.model != pair.full.name or not room.exact:
        return None
    rest, now = _rest(job, at, pair), _now(job, at, now)
    going, fresh = _held(running, rest, now)
    best: Score | None = None
    for score in scores(rest, pair, fresh):
        if _kind(score) != _kind(running):
            if _hands_on(running, score):
                score = _scored(score, rest, pair, going)
            if _may(judged(score, rest, pair, fresh), running, room) and (best is None or score.cost < best.cost):
                best = score
        yield
    if best is None:
        return None
    runs = _scored(running, rest, pair, going)
    streamed_s = now.cloud.rtt_s if runs.route is Route.CLOUD and now.cloud else 0.0  # its tokens are on their way
    less = best.cost < LESS * (runs.cost - now.alpha * streamed_s)
    if not less or best.total_s > runs.total_s - streamed_s - LEAST_S:
        return None
    return Leg(best.route, best.split, (job.wish.draft or LONGEST_DRAFT) if best.draft else 0, best.model)


def _scored(one: Leg | Score, rest: Job, pair: Pair, now: Conditions) -> Score:
    """The score of the plan of this kind."""
    cloud, draft = now.cloud, rest.wish.draft or 0
    if cloud is None or one.route is Route.LOCAL:
        return local(rest, pair.full, now, tiny=False)
    if one.route is Route.SPECULATIVE:
        return speculative(rest, pair, one.split, draft, now, cloud)
    if one.draft and cloud.draft_rate:
        return assisted(rest, pair, draft, now, cloud)
    return shared(rest, pair.full, one.split, now, cloud)


def changes(before: Conditions, now: Conditions) -> Iterator[str]:
    """What is notably other than before, in words."""
    share = now.phone.share / before.phone.share
    for was, rates, name in ((before.phone.full, now.phone.full, "the phone"),
                             (before.phone.tiny, now.phone.tiny, "its tiny model")):  # fmt: skip
        if _notable(was.decode, rates.decode * share):
            yield f"{name} at {rates.decode * share / was.decode:.2f} of its rate"
    if before.cloud is None or now.cloud is None:
        return
    yield from _cloud_changes(before.cloud, now.cloud)


def _cloud_changes(was: Cloud, now: Cloud) -> Iterator[str]:
    if (was.unreachable or was.refused) != (now.unreachable or now.refused):
        yield now.unreachable or now.refused or "the cloud is there again"
    if _notable(was.rtt_s, now.rtt_s, LEAST_RTT_S):
        yield f"round trip {was.rtt_s * 1000:.0f} → {now.rtt_s * 1000:.0f} ms"
    for before, rate, name in ((was.up, now.up, "up"), (was.down, now.down, "down")):
        if _notable(before, rate):
            yield f"{name} {before / 125e3:.3g} → {rate / 125e3:.3g} Mbit/s"
    if _notable(was.rates.decode, now.rates.decode) or _notable(was.rates.prefill, now.rates.prefill):
        yield f"the cloud at {now.rates.decode / was.rates.decode:.2f} of its rate"
    if _notable(was.wait_s, now.wait_s, LEAST_WAIT_S):
        yield f"the cloud's queue {was.wait_s * 1000:.0f} → {now.wait_s * 1000:.0f} ms"
    if was.address != now.address:
        yield f"{now.address} instead of {was.address}"


def _notable(before: float, now: float, least: float = 0.0) -> bool:
    return abs(now - before) > least and max(before, now) >= NOTABLE * min(before, now)


def _rest(job: Job, at: Progress, pair: Pair) -> Job:
    """What is left, as a job: the token log is its prompt. Only its length counts for scores."""
    left = min(len(job.prompt) + job.max_tokens, pair.full.context) - at.length
    wish = job.wish
    spared = None if wish.max_bytes is None else max(0, wish.max_bytes - at.moved)
    wish = replace(wish, max_bytes=spared, deadline_s=None)  # a move saves time in any case
    return replace(job, prompt=(0,) * at.length, max_tokens=max(1, left), wish=wish)


def _now(job: Job, at: Progress, now: Conditions) -> Conditions:
    """With the length that is to be expected yet: at least half of what was at first."""
    expected = now.answer_tokens
    return replace(now, answer_tokens=max(expected - (at.length - len(job.prompt)), expected / 2))


def _held(running: Leg, rest: Job, now: Conditions) -> tuple[Conditions, Conditions]:
    """Conditions of the plan that runs, whose sites hold all, and of one that begins anew."""
    length = len(rest.prompt)
    fresh = now
    if running.route is Route.LOCAL:
        return replace(fresh, held_full=length), fresh
    if now.cloud is not None:  # whichever session takes this one over gets its place at once
        fresh = replace(fresh, cloud=replace(now.cloud, wait_s=0.0))
    tiny = length if running.route is Route.SPECULATIVE else now.held_tiny
    held = replace(fresh, held_tiny=tiny, held_cloud=length, held_front=length, front=running.split)
    return held, fresh


def _may(one: Candidate, running: Leg, room: Room) -> bool:
    """Whether a plan may run, gives the same text, and finds a place on the phone."""
    score = one.score
    if one.refusal or one.doubt or score.model != running.model or score.agreement < 1:
        return False
    return _fits(score, room)


def _fits(one: Score | Leg, room: Room) -> bool:
    if not room.full and (one.split or one.route is Route.LOCAL):
        return False
    return room.tiny or one.route is not Route.SPECULATIVE


def _kind(one: Score | Leg) -> tuple[Route, int, str, bool]:
    """Plans of one kind differ in the length of their drafts, which each round chooses anew."""
    return one.route, one.split, one.model, one.draft > 0


def _hands_on(running: Leg, score: Score) -> bool:
    """Whether what the running plan's session has in the cloud is of use: token ids prove it, hidden states do not."""
    return not any(one.route is Route.LOCAL or one.split for one in (running, score))


def _place(leg: Leg) -> str:
    at = f" at layer {leg.split}" if leg.split else ""
    return f"{leg.route.value}{at}"
