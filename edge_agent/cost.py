"""Predicted seconds of a plan, as pure functions of the job and the conditions. docs/cost-model.md derives them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from edge_agent.conditions import Cloud, Conditions, Rates
from edge_agent.job import Job, Route
from protocol.tensor import position_bytes
from split_model.config import ModelConfig
from split_model.flops import head_flops, layer_flops

PACKET = 1200  # bytes of payload a packet carries
PACKET_OVERHEAD = 65  # bytes of IP, UDP and QUIC headers and tag around it
FIRST_WINDOW = 12_000  # bytes that may be under way on a new connection (ten packets: RFC 9002, section 7.2)
OPEN_BYTES = 180  # of an Open frame without token ids, stop strings and device token
HIDDEN_BYTES = 24  # around the hidden states of a frame
TOKEN_BYTES = 14  # of a frame that carries one token
ADMITTED_BYTES = 75
DONE_BYTES = 30
AGREEMENT_8 = 0.99  # of a prompt in 8 bits with one in 16: at least, of the built-in pair (benchmarks/hidden_bits.py)


@dataclass(frozen=True, slots=True)
class Pair:
    """The two models; layers `[0, edge_layers)` of the full one are held on the phone."""

    tiny: ModelConfig
    full: ModelConfig
    edge_layers: int


@dataclass(frozen=True, slots=True)
class Work:
    """FLOPs of the prompt and of the answer's later tokens, on one site; `least`: of a prompt of one position."""

    prefill: float = 0.0
    decode: float = 0.0
    least: float = 0.0

    def first_s(self, rates: Rates) -> float:
        """Seconds for the prompt. Weights are read once whatever its length, so never less than for one position."""
        return max(self.prefill / rates.prefill, self.least / rates.decode)

    def seconds(self, rates: Rates) -> float:
        return self.first_s(rates) + self.decode / rates.decode


@dataclass(frozen=True, slots=True)
class Traffic:
    """Bytes up with the prompt, up with the answer, and down, with packet overhead; round trips after a handshake."""

    prompt: float = 0.0
    answer: float = 0.0
    down: float = 0.0
    trips: float = 0.0

    @property
    def up(self) -> float:
        return self.prompt + self.answer


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


def work(config: ModelConfig, layers: int, head: bool, prompt: int, held: int, answer: int) -> Work:
    """FLOPs in `layers` layers for a prompt of which `held` positions are in KV already, and an answer."""
    later = answer - 1  # the prompt's last position gives the first token
    last = head_flops(config) if head else 0.0
    prefill = layers * layer_flops(config, held, prompt - held) + last
    decode = layers * layer_flops(config, prompt, later) + later * last
    return Work(prefill, decode, layers * layer_flops(config, prompt - 1, 1) + last if held < prompt else last)


def on_the_wire(size: int) -> int:
    """Bytes with the overhead of the packets that carry them."""
    return size + PACKET_OVERHEAD * math.ceil(size / PACKET)


def cloud_traffic(job: Job, vocabulary: int, answer: int, token_bytes: int = 0) -> Traffic:
    """Token ids up once, tokens down as they are made."""
    digits = max(1, math.ceil(math.log(vocabulary, 128)))  # of a varint
    return Traffic(on_the_wire(_open_bytes(job, token_bytes) + digits * len(job.prompt)), 0.0, _down(answer), 1.0)


def split_traffic(job: Job, width: int, answer: int, token_bytes: int = 0) -> Traffic:
    """Hidden states up, those of the answer in bf16; a token down, one round trip for each token."""
    prompt = position_bytes(width, job.wish.hidden_bits) * len(job.prompt)
    states = on_the_wire(_open_bytes(job, token_bytes) + HIDDEN_BYTES + prompt)
    later = (answer - 1) * on_the_wire(HIDDEN_BYTES + 2 * width)
    return Traffic(states, later, _down(answer), float(answer))


def _open_bytes(job: Job, token_bytes: int) -> int:
    return OPEN_BYTES + token_bytes + sum(len(stop.encode()) + 2 for stop in job.stop)


def _down(answer: int) -> float:
    return on_the_wire(ADMITTED_BYTES) + answer * on_the_wire(TOKEN_BYTES) + DONE_BYTES


def opening_trips(cloud: Cloud, first_flight: float) -> float:
    """Round trips before an answer can begin: the handshake, and what slow start adds for a large first flight."""
    if not cloud.cold:
        return float(cloud.handshake_trips)
    # n windows, each twice the one before, carry (2^n - 1) first windows; the first of them costs no extra trip.
    return cloud.handshake_trips + max(0, math.ceil(math.log2(1 + first_flight / FIRST_WINDOW)) - 1)


def local(job: Job, config: ModelConfig, now: Conditions, *, tiny: bool) -> Score:
    """Everything on the phone, by either model."""
    answer = _answer(job, now)
    held = min(now.held_tiny, len(job.prompt)) if tiny else 0
    edge = work(config, config.layers, True, len(job.prompt), held, answer)
    rates = now.phone.tiny if tiny else now.phone.full
    agreement = now.agreement if tiny else 1.0
    return _score(Route.LOCAL, 0, config.name, agreement, edge, rates, Work(), Traffic(), None, now)


def shared(job: Job, config: ModelConfig, split: int, now: Conditions, cloud: Cloud) -> Score:
    """Layers `[0, split)` of the full model on the phone, the rest in the cloud; 0 is the cloud alone."""
    answer, prompt = _answer(job, now), len(job.prompt)
    edge = work(config, split, False, prompt, 0, answer)
    rest = work(config, config.layers - split, True, prompt, 0, answer)
    if split:
        traffic = split_traffic(job, config.width, answer, cloud.token_bytes)
    else:
        traffic = cloud_traffic(job, config.vocabulary, answer, cloud.token_bytes)
    route = Route.SPLIT if split else Route.CLOUD
    agreement = AGREEMENT_8 if split and job.wish.hidden_bits == 8 else 1.0
    return _score(route, split, config.name, agreement, edge, now.phone.full, rest, traffic, cloud, now)


def _answer(job: Job, now: Conditions) -> int:
    return max(1, min(job.max_tokens, round(now.answer_tokens)))


def _score(route: Route, split: int, model: str, agreement: float, edge: Work, edge_rates: Rates, rest: Work,
           traffic: Traffic, cloud: Cloud | None, now: Conditions) -> Score:  # fmt: skip
    compute_s = edge.seconds(edge_rates) / now.phone.share
    first_s = edge.first_s(edge_rates) / now.phone.share
    network_s = trips = 0.0
    if cloud is not None:
        compute_s += rest.seconds(cloud.rates) + cloud.wait_s
        opening = opening_trips(cloud, traffic.prompt)
        trips = traffic.trips + opening
        price = cloud.price_s_per_mb * (traffic.up + traffic.down) / 1e6
        network_s = traffic.up / cloud.up + traffic.down / cloud.down + trips * cloud.rtt_s + price
        first_s += rest.first_s(cloud.rates) + cloud.wait_s
        first_s += (1 + opening) * cloud.rtt_s + traffic.prompt / cloud.up + on_the_wire(TOKEN_BYTES) / cloud.down
    size, flops = traffic.up + traffic.down, edge.prefill + edge.decode + rest.prefill + rest.decode
    bandwidth, rate = effective(size, network_s), effective(flops, compute_s)
    return Score(
        route, split, model, agreement, traffic.up, traffic.down, edge.prefill + edge.decode,
        rest.prefill + rest.decode, trips, network_s, compute_s, bandwidth, rate,
        cost(size, bandwidth, flops, rate, now.alpha), first_s,
    )  # fmt: skip


def effective(amount: float, seconds: float) -> float:
    """Amount a second; infinite where nothing takes no time."""
    return amount / seconds if seconds > 0 else math.inf


def cost(size: float, bandwidth: float, flops: float, rate: float, alpha: float) -> float:
    """α·D/B + (1−α)·C/R, in seconds; a term without an amount is 0."""
    network = size / bandwidth if size else 0.0
    compute = flops / rate if flops else 0.0
    return alpha * network + (1 - alpha) * compute
