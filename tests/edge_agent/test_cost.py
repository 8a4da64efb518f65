"""The cost model against numbers worked out by hand, and its laws."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from edge_agent import cost, traffic
from edge_agent.conditions import Missed, Misses, Rates
from edge_agent.cost import Pair, Score, local, shared, speculative
from edge_agent.job import Route
from edge_agent.traffic import on_the_wire, opening_trips
from protocol.frames import (
    Admitted,
    Digests,
    Done,
    Hidden,
    Load,
    Open,
    Reason,
    Tokens,
    WireSampling,
    encode,
    position_bytes,
)
from protocol.tensor import pack
from split_model.flops import SPARSE_AFTER, SPARSE_FROM, SPARSE_KEYS, head_flops, layer_flops, layers_flops
from split_model.sparse import BUDGET
from support.edge import cloud, conditions, job, pair, phone, shape

FULL = shape()


def test_flops_of_a_layer_by_hand() -> None:
    # 4 x 4 x (2 + 2) = 64 weights of attention, 3 x 4 x 8 = 96 of the MLP; positions 2, 3, 4 see 3, 4, 5 keys
    assert layer_flops(FULL, start=2, count=3) == 2 * 160 * 3 + 4 * 1 * 4 * (3 + 4 + 5)
    assert layer_flops(shape(window=4), start=2, count=3) == 2 * 160 * 3 + 4 * 1 * 4 * (3 + 4 + 4)
    assert head_flops(FULL) == 2 * 4 * 100


@given(st.integers(0, 100), st.integers(0, 100), st.integers(0, 100))
def test_flops_add_up_over_pieces(start: int, first: int, second: int) -> None:
    whole = layer_flops(FULL, start, first + second)
    assert layer_flops(FULL, start, first) + layer_flops(FULL, start + first, second) == whole


def test_flops_of_sparse_positions_by_hand() -> None:
    """Position 9,999 reads 10,000 keys in the first layer and 768 in each other one; before 3,072 all are read."""
    assert (BUDGET.least, BUDGET.read, BUDGET.whole) == (SPARSE_FROM, SPARSE_KEYS, SPARSE_AFTER)
    assert layers_flops(FULL, range(3), 9999, 1, sparse=True) == 3 * 2 * 160 + 4 * 1 * 4 * (10000 + 2 * 768)
    assert layers_flops(FULL, range(1, 3), 3070, 4, sparse=True) == 2 * (4 * 2 * 160 + 16 * (3071 + 3072 + 2 * 768))
    for layers, start, sparse, config in (
        (range(3), 9999, False, FULL), (range(1), 9999, True, FULL), (range(3), 3068, True, FULL),
        (range(3), 9999, True, shape(window=4)), (range(0), 9999, True, FULL),
    ):  # fmt: skip
        assert layers_flops(config, layers, start, 4, sparse) == len(layers) * layer_flops(config, start, 4)


@pytest.mark.parametrize("split", [0, 1, 2, 3])
def test_a_sparse_answer_takes_the_keys_that_it_reads(split: int) -> None:
    """All of its prompt, and less for each token after the first, wherever the model is cut."""
    now = conditions(answer_tokens=11.0)
    sparse, dense = (
        shared(job(prompt=20000, max_tokens=11, sparse=sparse), FULL, split, now, cloud()) for sparse in (True, False)
    )
    saved = dense.flops_edge + dense.flops_cloud - sparse.flops_edge - sparse.flops_cloud
    assert saved == 2 * 16 * sum(position + 1 - 768 for position in range(20000, 20010))
    assert sparse.compute_s < dense.compute_s


def test_a_split_by_hand() -> None:
    """20 prompt and 3 answer tokens, 2 of 3 layers on the phone."""
    now = conditions(answer_tokens=3.0)
    score = shared(job(prompt=20), FULL, 2, now, cloud(rates=Rates(5e5, 1e5)))
    prefill = layer_flops(FULL, 0, 20)  # of one layer
    decode = layer_flops(FULL, 20, 2)  # two tokens after the first
    assert score.flops_edge == 2 * (prefill + decode)
    assert score.flops_cloud == prefill + decode + 3 * 800
    one = layer_flops(FULL, 19, 1)  # of a pass over the last position alone, which reads the weights
    edge_s = 2 * (one / 1e3 + (prefill - one) / 1e4)
    cloud_s = (one + 800) / 1e5 + (prefill - one) / 5e5
    seconds = edge_s + 2 * decode / 1e3 + cloud_s + (decode + 2 * 800) / 1e5
    assert score.compute_s == pytest.approx(seconds)
    assert score.trips == 3
    up = on_the_wire(180 + 24 + 2 * 4 * 20) + 2 * on_the_wire(24 + 2 * 4)
    down = on_the_wire(75) + on_the_wire(60) + 3 * on_the_wire(14) + on_the_wire(30)
    assert (score.bytes_up, score.bytes_down) == (up, down)
    assert score.network_s == pytest.approx(up / 1e4 + down / 1e5 + 3 * 0.1)
    assert score.cost == pytest.approx(0.5 * score.network_s + 0.5 * score.compute_s)
    first = edge_s + cloud_s + 0.1
    assert score.first_token_s == pytest.approx(first + on_the_wire(180 + 24 + 160) / 1e4 + on_the_wire(14) / 1e5)


def test_a_split_in_8_bits_by_hand() -> None:
    """A byte a channel and a scale of four for each position of the prompt; the answer's are as they were."""
    split = {"route": Route.SPLIT, "split": 2}
    now = conditions(answer_tokens=3.0)
    score = shared(job(prompt=2000, hidden_bits=8, **split), FULL, 2, now, cloud())
    whole = shared(job(prompt=2000, **split), FULL, 2, now, cloud())
    assert score.bytes_up == on_the_wire(180 + 24 + (4 + 4) * 2000) + 2 * on_the_wire(24 + 2 * 4)
    assert whole.bytes_up == score.bytes_up  # of a width of 4, where a scale takes all that is saved
    wide = shape(width=8)
    one, other = (shared(job(prompt=2000, hidden_bits=bits, **split), wide, 2, now, cloud()) for bits in (8, 16))
    assert one.bytes_up == on_the_wire(180 + 24 + 12 * 2000) + 2 * on_the_wire(24 + 2 * 8) < other.bytes_up
    assert (one.compute_s, one.trips, one.bytes_down) == (other.compute_s, other.trips, other.bytes_down)


def test_a_short_prompt_takes_no_less_than_one_position() -> None:
    """Five positions of one layer at 1e12 FLOP/s would take no time; one, at 1e3, takes as long as it does."""
    quick = conditions(phone=phone(full=Rates(1e12, 1e3)), answer_tokens=1.0)
    score = shared(job(prompt=5, max_tokens=1), FULL, 1, quick, cloud(rates=Rates(1e15, 1e15)))
    assert score.compute_s == pytest.approx((2 * 160 + 4 * 4 * 5) / 1e3)


def test_the_cloud_takes_one_trip_and_no_edge_work() -> None:
    score = shared(job(), FULL, 0, conditions(), cloud(wait_s=2.0))
    assert (score.route, score.trips, score.flops_edge) == (Route.CLOUD, 1, 0)
    assert score.compute_s == pytest.approx(2.0 + shared(job(), FULL, 0, conditions(), cloud()).compute_s)


def test_local_sends_nothing_and_counts_what_is_held() -> None:
    tiny = shape("tiny", layers=1)
    fresh = local(job(), tiny, conditions(), tiny=True)
    held = local(job(), tiny, conditions(held_tiny=5), tiny=True)
    assert (fresh.network_s, fresh.bytes_up + fresh.bytes_down) == (0, 0)
    assert fresh.cost == pytest.approx(0.5 * fresh.compute_s)
    assert fresh.flops_edge - held.flops_edge == layer_flops(tiny, 0, 5)


def test_the_whole_model_on_one_site_is_the_same_work_as_on_two() -> None:
    now = conditions()
    scores = [shared(job(), FULL, split, now, cloud()) for split in range(4)]
    work = {round(score.flops_edge + score.flops_cloud) for score in scores}
    assert work == {round(local(job(), FULL, now, tiny=False).flops_edge)}


@pytest.mark.parametrize(("first_flight", "trips"), [(100, 0), (12_000, 0), (12_001, 1), (36_000, 1), (36_001, 2)])
def test_slow_start_doubles_its_window_each_trip(first_flight: float, trips: int) -> None:
    assert opening_trips(cloud(cold=True, handshake_trips=1), first_flight) == 1 + trips
    assert opening_trips(cloud(cold=False), first_flight) == 0


@given(
    rtt=st.floats(0, 1), up=st.floats(1e3, 1e9), wait=st.floats(0, 5), split=st.integers(0, 3),
    others=st.integers(0, 3), prompt=st.integers(1, 60), answer=st.floats(1, 100), price=st.floats(0, 2),
)  # fmt: skip
def test_half_of_alpha_is_half_of_the_latency(
    rtt: float, up: float, wait: float, split: int, others: int, prompt: int, answer: float, price: float
) -> None:
    there = cloud(rtt_s=rtt, up=up, wait_s=wait, cold=True, handshake_trips=1, price_s_per_mb=price)
    now = conditions(phone=phone(under_way=others), cloud=there, answer_tokens=answer)
    score = shared(job(prompt=prompt, max_tokens=200), FULL, split, now, there)
    assert score.cost == pytest.approx(score.total_s / 2)
    assert score.first_token_s <= score.total_s * (1 + 1e-9) + 1e-9


@given(st.floats(0, 1))
def test_alpha_weighs_network_against_compute(alpha: float) -> None:
    now = conditions(alpha=alpha)
    score = shared(job(), FULL, 1, now, cloud())
    assert score.cost == pytest.approx(alpha * score.network_s + (1 - alpha) * score.compute_s)


WORSE = [
    {"rtt_s": 0.2}, {"up": 5e3}, {"down": 5e4}, {"wait_s": 1.0}, {"rates": Rates(5e5, 1e5)}, {"cold": True},
    {"rates": Rates(1e6, 5e4)}, {"handshake_trips": 1}, {"price_s_per_mb": 1.0}, {"token_bytes": 300},
]  # fmt: skip


@pytest.mark.parametrize("split", [0, 2])
@pytest.mark.parametrize("worse", WORSE, ids=str)
def test_a_worse_cloud_never_costs_less(worse: dict[str, object], split: int) -> None:
    long = job(prompt=20_000, max_tokens=50)
    before, after = (shared(long, FULL, split, conditions(), there) for there in (cloud(), cloud(**worse)))
    assert after.cost > before.cost


@pytest.mark.parametrize("worse", [{"under_way": 1}, {"full": Rates(1e3, 1e3)}], ids=str)
def test_a_slower_phone_costs_more_where_it_works(worse: dict[str, object]) -> None:
    slow = conditions(phone=phone(**worse))
    for split in range(4):
        change = shared(job(), FULL, split, slow, cloud()).cost - shared(job(), FULL, split, conditions(), cloud()).cost
        assert (change > 0) == (split > 0)


def test_what_comes_to_a_cloud_with_other_rows_waits_for_half_a_step() -> None:
    busy, there = cloud(others=3), cloud()
    step = (FULL.layers * layer_flops(FULL, len(job().prompt), 1) + head_flops(FULL)) / there.rates.decode
    later = 9
    one = job(max_tokens=1 + later)
    for split, waits in ((0, 0.0), (2, later * step / 2)):
        beside, alone = (shared(one, FULL, split, conditions(), at).total_s for at in (busy, there))
        assert beside - alone == pytest.approx(waits)
    drafts = [speculative(one, Pair(FULL, FULL, 3), 0, 4, conditions(), at).total_s for at in (busy, there)]
    assert 0 < drafts[0] - drafts[1] < later * step / 2


def test_effective_bandwidth_and_rate_are_those_of_the_formula() -> None:
    score = shared(job(), FULL, 1, conditions(), cloud())
    size, flops = score.bytes_up + score.bytes_down, score.flops_edge + score.flops_cloud
    assert score.cost == pytest.approx(0.5 * size / score.bandwidth + 0.5 * flops / score.rate)
    alone = local(job(), FULL, conditions(), tiny=False)
    assert alone.bandwidth == math.inf
    assert cost.cost(0, alone.bandwidth, 10, 5, 0.5) == 1


def test_a_longer_answer_is_not_expected_than_may_be_given() -> None:
    now = conditions(answer_tokens=40.0)
    short = replace(job(), max_tokens=3)
    assert shared(short, FULL, 0, now, cloud()) == shared(short, FULL, 0, replace(now, answer_tokens=3.0), cloud())


def test_frames_are_as_large_as_the_model_believes() -> None:
    """The constants are sizes of frames as they are encoded, within a few bytes."""
    digests = Digests(bytes(16), bytes(16), bytes(16))
    how = WireSampling(0.7, 0.9, 50, 1 << 62)
    opened = Open(bytes(16), 1, "assistant-20m", digests, 0, how, 256, 50, 50, tuple(range(200, 250)), ("stop",))
    predicted = traffic.OPEN_BYTES + 2 * 50 + 6
    assert abs(len(encode(opened)) + 4 - predicted) < 50
    hidden = Hidden(300, 2, 384, bytes(2 * 384 * 2))
    assert abs(len(encode(hidden)) + 4 - (traffic.HIDDEN_BYTES + 2 * 384 * 2)) < 8
    (rounded,) = pack(torch.ones(100, 384, dtype=torch.bfloat16), 300, 8)
    assert abs(len(encode(rounded)) + 4 - (traffic.HIDDEN_BYTES + 100 * position_bytes(384, 8))) < 16
    assert abs(len(encode(Tokens(300, (4000,)))) + 4 - traffic.TOKEN_BYTES) < 4
    assert abs(len(encode(Admitted(digests, True, 0, 4 << 20, True))) + 4 - traffic.ADMITTED_BYTES) < 8
    load = Load(3, 1, 10_000, 0.1, 2e11, 9e9, 1e7, 4 << 20, False)
    assert abs(len(encode(load)) + 4 - traffic.LOAD_BYTES) < 16
    assert abs(len(encode(Done(Reason.STOP, 40, 0.1, 0.2))) + 4 - traffic.DONE_BYTES) < 8


def test_every_score_says_what_it_is_made_of() -> None:
    everything = [*(shared(job(), FULL, k, conditions(), cloud()) for k in range(pair().edge_layers + 1))]
    assert all(isinstance(one, Score) and one.total_s == one.network_s + one.compute_s for one in everything)


@pytest.mark.parametrize("split", [0, 2])
def test_the_rest_of_an_answer_that_runs_neither_opens_nor_waits_nor_reads(split: int) -> None:
    there = cloud(wait_s=3.0)
    fresh = conditions(cloud=there, missed=Misses(*[Missed(0.5, 0.0)] * 6))
    runs = replace(fresh, held_cloud=20, held_full=20, held_front=20, front=split)
    before, after = (shared(job(prompt=20), FULL, split, now, there) for now in (fresh, runs))
    assert before.compute_s - after.compute_s > 3.0 + 0.5
    assert after.bytes_up == (9 * on_the_wire(24 + 2 * 4) if split else 0)
    assert after.trips == (10 if split else 0)
    assert after.first_token_s < 0.1 * split + 0.02 * (split == 0) + there.rtt_s


def test_what_the_full_model_holds_here_is_not_read_again() -> None:
    here = local(job(prompt=20), FULL, conditions(), tiny=False)
    held = local(job(prompt=20), FULL, conditions(held_full=20), tiny=False)
    assert here.flops_edge - held.flops_edge == 3 * layer_flops(FULL, 0, 20)
