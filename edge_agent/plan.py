"""Which candidates there are, which may run, and which one does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from edge_agent.conditions import NO_MISSES, Conditions
from edge_agent.cost import Pair, Score, assisted, local, shared, speculative
from edge_agent.job import Job, Privacy, Quality, Route, Wish
from edge_agent.rounds import LONGEST_DRAFT

MARGIN = 0.05  # of the cost: what round trips lose on a link that loses packets is not predicted


@dataclass(frozen=True, slots=True)
class Candidate:
    """A scored plan; `refusal` says why it may not run, `doubt` why it runs only where nothing better may."""

    score: Score
    refusal: str | None = None
    doubt: str | None = None


@dataclass(frozen=True, slots=True)
class Plan:
    """Where one job runs: layers [0, split) on the phone, the rest in the cloud; `reason` in words.

    `degraded`: the tiny model answers that nobody named, below the agreement asked for or for want of the cloud.
    """

    route: Route
    split: int
    model: str
    score: Score
    candidates: tuple[Candidate, ...]
    degraded: bool
    reason: str
    hidden_bits: int | None = None  # of the prompt's hidden states, where they are sent
    draft: int = 0  # tokens proposed at a time at most: on the phone by route speculative, in the cloud by route cloud


class NoPlan(Exception):
    """No candidate may run; the message says why each of them may not."""


def choose(job: Job, pair: Pair, now: Conditions) -> Plan:
    """The cheapest candidate that may run. Raises NoPlan, or ValueError for a wish that can never be met."""
    if job.wish.split is not None and not 0 <= job.wish.split <= pair.edge_layers:
        raise ValueError(f"split {job.wish.split}, the phone holds layers for 1 to {pair.edge_layers}")
    found = tuple(judged(score, job, pair, now) for score in scores(job, pair, now))
    free = [one for one in found if not one.refusal and not one.doubt]
    # A doubtful answer from the phone comes before a doubtful cloud: it costs nothing to find out.
    spare = [one for one in found if not one.refusal and one.doubt]
    at_home = [one for one in spare if one.score.route is Route.LOCAL]
    allowed = free or at_home or spare
    if not allowed:
        _check_bytes(job, pair, now)
        raise NoPlan("; ".join(_refusals(found)))
    best = steadiest([one.score for one in allowed])
    worse = _below_floor(job, best) or (best.model == pair.tiny.name and _misses_cloud(job, now))
    bits = job.wish.hidden_bits if best.split else None
    draft = (job.wish.draft or LONGEST_DRAFT) if best.draft else 0
    return Plan(best.route, best.split, best.model, best, found, worse, _reason(job, allowed, best), bits, draft)


def steadiest(allowed: Sequence[Score]) -> Score:
    """The cheapest, or the cloud that costs hardly more with fewer round trips."""
    best = min(allowed, key=lambda one: (one.cost, one.bytes_up, one.split, one.draft))
    steady = (one for one in allowed if one.route is Route.CLOUD and not one.draft)
    return next((one for one in steady if one.trips < best.trips and one.cost <= (1 + MARGIN) * best.cost), best)


def scores(job: Job, pair: Pair, now: Conditions) -> Iterator[Score]:
    """Every candidate there is, refused or not."""
    yield local(job, pair.tiny, now, tiny=True)
    if pair.edge_layers == pair.full.layers:
        yield local(job, pair.full, now, tiny=False)
    if now.cloud is None:
        return
    draft = job.wish.draft or 0
    for split in range(pair.edge_layers + 1):
        yield shared(job, pair.full, split, now, now.cloud)
    if now.cloud.draft_rate:
        yield assisted(job, pair, draft, now, now.cloud)
    for split in range(pair.edge_layers + 1):
        yield speculative(job, pair, split, draft, now, now.cloud)


def hindsight(job: Job, pair: Pair, now: Conditions, plan: Plan, tokens: int, accepted: float | None) -> Score | None:
    """What would have been predicted of the plan, had the length of its answer and the share of drafts been known."""
    known = replace(now, answer_tokens=float(tokens), missed=NO_MISSES)
    if accepted is not None:
        known = replace(known, agreement=accepted, places=())
    best = plan.score
    if best.draft:
        job = replace(job, wish=replace(job.wish, route=best.route, split=None, draft=best.draft))
    same = (best.route, best.split, best.model, best.draft)
    return next((one for one in scores(job, pair, known) if (one.route, one.split, one.model, one.draft) == same), None)


def _below_floor(job: Job, score: Score) -> bool:
    """Whether the answer agrees less with the full model than was asked for."""
    return not job.wish.tiny and score.agreement < job.wish.quality.floor


def _misses_cloud(job: Job, now: Conditions) -> bool:
    """Whether the cloud would have been a choice, had it been there."""
    wish, cloud = job.wish, now.cloud
    wanted = not wish.tiny and wish.route is not Route.LOCAL and wish.privacy is Privacy.ANY
    return wanted and (cloud is None or bool(cloud.unreachable or cloud.refused))


def judged(score: Score, job: Job, pair: Pair, now: Conditions) -> Candidate:
    """A score with what speaks against its plan."""
    refusal = _refused(score, job, pair, now) or _over(score, job.wish)
    return Candidate(score, refusal, None if refusal else _doubted(score, job, now))


def _refused(score: Score, job: Job, pair: Pair, now: Conditions) -> str | None:
    wish, tiny = job.wish, score.model == pair.tiny.name
    if wish.tiny and not tiny:
        return f"{pair.tiny.name} was asked for by name"
    if wish.route not in (None, score.route):
        return f"route {wish.route.value} was asked for"
    if wish.split not in (None, score.split):
        return f"split {wish.split} was asked for"
    if wish.draft is not None and bool(wish.draft) != bool(score.draft):
        return f"draft {wish.draft} was asked for"
    if score.route is not Route.LOCAL and (wish.privacy is Privacy.DEVICE):
        return "privacy 'device' keeps everything on the phone"
    if tiny and wish.quality is Quality.BEST:
        return f"agrees with the full model on {score.agreement:.2f} of the tokens, quality 'best' needs 1"
    context = pair.tiny.context if tiny else pair.full.context
    if len(job.prompt) >= context:
        return f"a prompt of {len(job.prompt)} tokens, the context holds {context}"
    if score.route is Route.SPECULATIVE and len(job.prompt) >= pair.tiny.context:
        return f"a prompt of {len(job.prompt)} tokens, the context of what drafts holds {pair.tiny.context}"
    return now.cloud.refused if now.cloud and score.route is not Route.LOCAL else None


def _check_bytes(job: Job, pair: Pair, now: Conditions) -> None:
    """Raises ValueError where no plan that was asked for gets by with so few bytes, however short its answer."""
    short = scores(job, pair, replace(now, answer_tokens=1.0))
    sizes = [one.bytes_up + one.bytes_down for one in short if not _refused(one, job, pair, now)]
    if job.wish.max_bytes is not None and sizes and min(sizes) > job.wish.max_bytes:
        raise ValueError(f"max_bytes {job.wish.max_bytes}, an answer of one token takes {min(sizes):.0f} at least")


def _over(score: Score, wish: Wish) -> str | None:
    """What the prediction passes of what was asked for."""
    if wish.max_bytes is not None and score.bytes_up + score.bytes_down > wish.max_bytes:
        return f"{score.bytes_up + score.bytes_down:.0f} bytes predicted, at most {wish.max_bytes} were asked for"
    if wish.deadline_s is not None and score.total_s > wish.deadline_s:
        return f"{1000 * score.total_s:.0f} ms predicted, the deadline is {1000 * wish.deadline_s:g} ms"
    return None


def _doubted(score: Score, job: Job, now: Conditions) -> str | None:
    if _below_floor(job, score):
        floor = job.wish.quality.floor
        return f"agrees with the full model on {score.agreement:.2f} of the tokens, below {floor:g}"
    return now.cloud.unreachable if now.cloud and score.route is not Route.LOCAL else None


def _refusals(found: Sequence[Candidate]) -> list[str]:
    """Why none may run, each reason once."""
    reasons = dict.fromkeys(f"{one.score.route.value}: {one.refusal}" for one in found)
    clouds = any(one.score.route is not Route.LOCAL for one in found)
    return [*reasons, *([] if clouds else ["cloud: none is configured"])]


def _reason(job: Job, allowed: Sequence[Candidate], best: Score) -> str:
    doubt = next(one.doubt for one in allowed if one.score is best)
    if doubt and best.route is Route.LOCAL:
        return f"nothing better may run; {doubt}"
    if doubt:
        return f"nothing else may run; {doubt}"
    if len(allowed) == 1:
        return "the only one that may run"
    if best.cost > min(one.score.cost for one in allowed):
        return f"hardly dearer than the cheapest of {len(allowed)} that may run, with fewer round trips"
    return f"the cheapest of {len(allowed)} that may run"
