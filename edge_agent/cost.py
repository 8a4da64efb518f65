"""Predicted seconds of a plan, as pure functions of the job and the conditions. docs/cost-model.md derives them."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from edge_agent.conditions import Cloud, Conditions, Missed, Rates
from edge_agent.job import Job, Route
from edge_agent.rounds import Rounds, ahead, best, in_turn
from edge_agent.traffic import (
    DRAFT_BYTES,
    TOKEN_BYTES,
    Traffic,
    cloud_opening,
    digits,
    down_traffic,
    hidden_traffic,
    on_the_wire,  # fmt: skip
    opening_trips,
    split_opening,
)
from split_model.config import ModelConfig
from split_model.flops import head_flops, layer_flops, layers_flops

AGREEMENT_8 = 0.99  # of a prompt in 8 bits with one in 16: at least, of the built-in pair (benchmarks/hidden_bits.py)


LEAST_LEFT = 0.5  # of a site's predicted seconds, whatever predictions missed before


@dataclass(frozen=True, slots=True)
class Pair:
    """The two models; layers `[0, edge_layers)` of the full one are held on the phone."""

    tiny: ModelConfig
    full: ModelConfig
    edge_layers: int


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of the prompt and of the answer's later tokens, on one site; `least`: of a pass over one position."""

    prefill: float = 0.0
    decode: float = 0.0
    least: float = 0.0

    def first_s(self, rates: Rates) -> float:
        """Seconds for the prompt: the first position reads the weights, the others come at the rate of prefill."""
        return self.least / rates.decode + max(0.0, self.prefill - self.least) / rates.prefill

    def later_s(self, rates: Rates) -> float:
        """Seconds for the later tokens, one at a time."""
        return self.decode / rates.decode

    @property
    def flops(self) -> float:
        return self.prefill + self.decode


@dataclass(frozen=True, slots=True)
class Sites:
    """What both sites compute: FLOPs, seconds for the prompt on each, and for what comes after the first token."""

    flops_edge: float
    flops_cloud: float = 0.0
    prompt_edge_s: float = 0.0
    prompt_cloud_s: float = 0.0
    later_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Choice:
    """A candidate, and by how much its kind was missed so far."""

    route: Route
    split: int
    model: str
    agreement: float
    missed: Missed
    draft: int = 0


@dataclass(frozen=True, slots=True)
class Each:
    """FLOPs of one token: of the tiny model, of the full one's layers on the phone, and of the rest in the cloud."""

    tiny: float
    edge: float
    rest: float


@dataclass(frozen=True, slots=True)
class Score:
    """One candidate's prediction; `bandwidth` (bytes/s) and `rate` (FLOP/s) are the effective B and R of the cost."""

    route: Route
    split: int
    model: str
    agreement: float
    bytes_up: float
    bytes_down: float
    flops_edge: float
    flops_cloud: float
    trips: float
    network_s: float
    compute_s: float
    bandwidth: float
    rate: float
    cost: float
    first_token_s: float
    draft: int = 0  # tokens proposed at a time

    @property
    def total_s(self) -> float:
        return self.network_s + self.compute_s


def work(config: ModelConfig, layers: int, head: bool, prompt: int, held: int, answer: int,
         sparse: bool = False) -> Work:  # fmt: skip
    """FLOPs in `layers` layers for a prompt of which `held` positions are in KV already, and an answer.

    With `head` they are the model's last layers, else its first.
    """
    later = answer - 1  # the prompt's last position gives the first token
    last = head_flops(config) if head else 0.0
    prefill = layers * layer_flops(config, held, prompt - held) + last
    which = range(config.layers - layers, config.layers) if head else range(layers)
    decode = layers_flops(config, which, prompt, later, sparse) + later * last
    return Work(prefill, decode, layers * layer_flops(config, prompt - 1, 1) + last if held < prompt else last)


def local(job: Job, config: ModelConfig, now: Conditions, *, tiny: bool) -> Score:
    """Everything on the phone, by either model."""
    answer = _answer(job, now)
    held = min(now.held_tiny if tiny else now.held_full, len(job.prompt))
    edge = work(config, config.layers, True, len(job.prompt), held, answer, job.wish.sparse)
    rates, share = now.phone.tiny if tiny else now.phone.full, now.phone.share
    sites = Sites(edge.flops, 0.0, edge.first_s(rates) / share, 0.0, edge.later_s(rates) / share)
    missed, agreement = (now.missed.tiny, now.agreement) if tiny else (now.missed.local, 1.0)
    return _score(job, Choice(Route.LOCAL, 0, config.name, agreement, missed), sites, Traffic(), None, now)


def shared(job: Job, config: ModelConfig, split: int, now: Conditions, cloud: Cloud) -> Score:
    """Layers `[0, split)` of the full model on the phone, the rest in the cloud; 0 is the cloud alone."""
    answer = _answer(job, now)
    edge, rest = _both(job, config, split, now, answer)
    later = edge.later_s(now.phone.in_front) / now.phone.share + rest.later_s(cloud.rates)
    later += (answer - 1) * _joining_s(job, config, cloud) if split else 0.0
    opening = _opening(job, config, split, now, cloud)
    states = (answer - 1) * hidden_traffic(1, config.width) if split else 0
    trips = float(answer) if split else float(opening > 0)
    traffic = Traffic(opening, states, down_traffic(answer, answer, config.vocabulary), trips)
    sites = _sites(edge, rest, now, cloud, later)
    route, missed = (Route.SPLIT, now.missed.split) if split else (Route.CLOUD, now.missed.cloud)
    choice = Choice(route, split, config.name, _agreement(job, split), missed)
    return _score(job, choice, sites, traffic, cloud, now)


def speculative(job: Job, pair: Pair, split: int, draft: int, now: Conditions, cloud: Cloud) -> Score:
    """The tiny model on the phone drafts `draft` tokens at a time, ahead; 0: as many as cost the least time a token.

    The phone reads the prompt with the tiny model while the cloud does so with the full one.
    """
    answer, full = _answer(job, now), pair.full
    edge, rest = _both(job, full, split, now, answer)
    tiny = work(pair.tiny, pair.tiny.layers, True, len(job.prompt), min(now.held_tiny, len(job.prompt)), answer)
    later = answer - 1
    each = Each(tiny.decode / max(1, later), edge.decode / max(1, later), rest.decode / max(1, later))
    rounds = _rounds_ahead(full, split, draft, each, now, cloud)
    sites, opening = _sites(edge, rest, now, cloud, 0.0), _opening(job, full, split, now, cloud)
    way = Traffic(opening, trips=1.0)
    choice = Choice(Route.SPECULATIVE, split, full.name, _agreement(job, split), Missed(), rounds.draft)
    first = _score(job, choice, sites, way, cloud, now)
    ready_s = sites.prompt_edge_s + tiny.first_s(now.phone.tiny) / now.phone.share
    waits_s = max(0.0, ready_s - first.first_token_s) if later else 0.0
    sites = Sites(
        edge.prefill + tiny.prefill + later * rounds.sent * (each.tiny + each.edge),
        rest.prefill + later * rounds.computed * each.rest,
        sites.prompt_edge_s, sites.prompt_cloud_s,
        waits_s + later * (rounds.compute_s + rounds.trips * _joining_s(job, full, cloud)),
    )  # fmt: skip
    up = later * rounds.sent / rounds.draft * _up(rounds.draft, split, full)
    covered = up - later * (rounds.network_s - rounds.trips * cloud.rtt_s) * cloud.up
    down = down_traffic(1 + later * rounds.frames, answer, full.vocabulary)
    traffic = Traffic(opening, up, down, 1.0 + later * rounds.trips, covered)
    return _score(job, replace(choice, missed=now.missed.speculative), sites, traffic, cloud, now)


def _rounds_ahead(full: ModelConfig, split: int, draft: int, each: Each, now: Conditions, cloud: Cloud) -> Rounds:
    drafts, front = now.phone.drafting, now.phone.in_front

    def of(count: int) -> Rounds:
        made_s = (count * each.tiny / drafts.decode + _pass_s(each.edge, count, front)) / now.phone.share
        verify_s = _pass_s(each.rest, count + 1, cloud.rates)
        return ahead(shares(now, count), made_s, _up(count, split, full) / cloud.up, verify_s, cloud.rtt_s)

    return of(draft) if draft else best(of)


def assisted(job: Job, pair: Pair, draft: int, now: Conditions, cloud: Cloud) -> Score:
    """The cloud alone, where its own tiny model drafts `draft` tokens at a time; 0: as many as cost the least."""
    answer = _answer(job, now)
    _, rest = _both(job, pair.full, 0, now, answer)
    tiny = work(pair.tiny, pair.tiny.layers, True, len(job.prompt), 0, answer, job.wish.sparse)
    later = answer - 1
    each = Each(tiny.decode / max(1, later), 0.0, rest.decode / max(1, later))
    # Its rate with many positions is not told; it is taken to be as much greater as the full model's.
    drafts = Rates(cloud.draft_rate * cloud.rates.prefill / cloud.rates.decode, cloud.draft_rate)

    def of(count: int) -> Rounds:
        verify_s = _pass_s(each.rest, count + 1, cloud.rates)
        return in_turn(shares(now, count), count * each.tiny / drafts.decode, verify_s)

    rounds = of(draft) if draft else best(of)
    flops = rest.prefill + tiny.prefill + later * (rounds.sent * each.tiny + rounds.computed * each.rest)
    reads_s = tiny.first_s(drafts) if later else 0.0
    sites = Sites(0.0, flops, 0.0, rest.first_s(cloud.rates), reads_s + later * rounds.compute_s)
    opening = _opening(job, pair.full, 0, now, cloud)
    down = down_traffic(1 + later * rounds.frames, answer, pair.full.vocabulary)
    traffic = Traffic(opening, 0.0, down, float(opening > 0))
    choice = Choice(Route.CLOUD, 0, pair.full.name, 1.0, now.missed.assisted, rounds.draft)
    return _score(job, choice, sites, traffic, cloud, now)


def shares(now: Conditions, count: int) -> list[float]:
    """Of drafts at each place, how many are accepted given that those before were; the mean beyond what is known."""
    return [*now.places[:count], *([now.agreement] * (count - len(now.places)))]


def _joining_s(job: Job, config: ModelConfig, cloud: Cloud) -> float:
    """Mean wait of what comes to a cloud with other rows: half of the step that is under way."""
    if not cloud.others:
        return 0.0
    return 0.5 * (config.layers * layer_flops(config, len(job.prompt), 1) + head_flops(config)) / cloud.rates.decode


def _pass_s(flops: float, count: int, rates: Rates) -> float:
    """Seconds of one pass over `count` positions of so many FLOPs each: the first reads the weights."""
    return flops / rates.decode + (count - 1) * flops / rates.prefill


def _up(count: int, split: int, config: ModelConfig) -> int:
    """Bytes of one draft, and of its hidden states in a split."""
    return on_the_wire(DRAFT_BYTES + digits(config.vocabulary) * count) + (
        hidden_traffic(count, config.width) if split else 0
    )


def _both(job: Job, config: ModelConfig, split: int, now: Conditions, answer: int) -> tuple[Work, Work]:
    """The full model's work on the phone and in the cloud."""
    prompt = len(job.prompt)
    front = min(now.held_front, prompt) if split == now.front else 0
    behind = min(now.held_cloud, prompt)
    if split and behind < prompt:  # only of the session that runs: hidden states leave nothing for another
        behind = 0
    edge = work(config, split, False, prompt, front, answer, job.wish.sparse)
    return edge, work(config, config.layers - split, True, prompt, behind, answer, job.wish.sparse)


def _sites(edge: Work, rest: Work, now: Conditions, cloud: Cloud, later_s: float) -> Sites:
    prompt_s = edge.first_s(now.phone.in_front) / now.phone.share
    return Sites(edge.flops, rest.flops, prompt_s, rest.first_s(cloud.rates), later_s)


def _opening(job: Job, config: ModelConfig, split: int, now: Conditions, cloud: Cloud) -> int:
    """Bytes up before the first token; none where the cloud has the whole prompt, by the session that runs."""
    if now.held_cloud >= len(job.prompt):
        return 0
    if split:
        return split_opening(job, config.width, cloud.token_bytes)
    return cloud_opening(job, config.vocabulary, cloud.token_bytes)


def _agreement(job: Job, split: int) -> float:
    return AGREEMENT_8 if split and job.wish.hidden_bits == 8 else 1.0


def _answer(job: Job, now: Conditions) -> int:
    return max(1, min(job.max_tokens, round(now.answer_tokens)))


def _score(job: Job, choice: Choice, sites: Sites, traffic: Traffic, cloud: Cloud | None, now: Conditions) -> Score:
    missed = choice.missed
    answer = _answer(job, now)
    runs = (now.held_full if cloud is None else now.held_cloud) >= len(job.prompt)  # and its beginning is behind it
    first_s = _corrected(sites.prompt_edge_s + sites.prompt_cloud_s, 0.0 if runs else missed.first_s)
    compute_s = first_s + _corrected(sites.later_s, (answer - 1) * missed.token_s)
    network_s = trips = 0.0
    if cloud is not None:
        opening = opening_trips(cloud, traffic.prompt)
        trips = traffic.trips + opening
        wait_s = 0.0 if runs else cloud.wait_s
        compute_s += wait_s
        price = cloud.price_s_per_mb * (traffic.up + traffic.down) / 1e6
        up_s = (traffic.up - traffic.covered) / cloud.up
        network_s = up_s + traffic.down / cloud.down + trips * cloud.rtt_s + price
        first_s += wait_s + (min(1.0, traffic.trips) + opening) * cloud.rtt_s
        first_s += traffic.prompt / cloud.up + on_the_wire(TOKEN_BYTES) / cloud.down
    size, flops = traffic.up + traffic.down, sites.flops_edge + sites.flops_cloud
    bandwidth, rate = effective(size, network_s), effective(flops, compute_s)
    return Score(
        choice.route, choice.split, choice.model, choice.agreement, traffic.up, traffic.down, sites.flops_edge,
        sites.flops_cloud, trips, network_s, compute_s, bandwidth, rate,
        cost(size, bandwidth, flops, rate, now.alpha), first_s, choice.draft,
    )  # fmt: skip


def _corrected(seconds: float, missed_s: float) -> float:
    return max(LEAST_LEFT * seconds, seconds + missed_s)


def effective(amount: float, seconds: float) -> float:
    """Amount a second; infinite where nothing takes no time."""
    return amount / seconds if seconds > 0 else math.inf


def cost(size: float, bandwidth: float, flops: float, rate: float, alpha: float) -> float:
    """α·D/B + (1−α)·C/R, in seconds; a term without an amount is 0."""
    network = size / bandwidth if size else 0.0
    compute = flops / rate if flops else 0.0
    return alpha * network + (1 - alpha) * compute
