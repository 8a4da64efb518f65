"""A few hundred schedules of all that goes wrong on a network at once, each drawn from a seed."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from protocol.errors import LinkLost
from split_model.sampling import Sampling
from support.schedules import Schedule, Start, play
from support.virtual_network import Weather

# Round trip and jitter in seconds, share lost, bytes/s down and up: the profiles of real networks.
PROFILES = {
    "wifi": (0.020, 0.003, 0.002, 3.75e6, 1.875e6),
    "5g": (0.035, 0.008, 0.001, 18.75e6, 3.75e6),
    "lte": (0.070, 0.010, 0.0, 1.5e6, 1.5e6),
    "lte_lossy": (0.070, 0.020, 0.01, 1.5e6, 0.75e6),
    "4g_slow": (0.150, 0.020, 0.0, 0.2e6, 0.094e6),
    "3g_lossy": (0.300, 0.050, 0.015, 0.2e6, 0.094e6),
    "edge_2g": (0.840, 0.100, 0.01, 0.03e6, 0.025e6),
    "leo": (0.050, 0.010, 0.025, 12.5e6, 1.25e6),
}
GROUP = 20
SURVIVED, HARSH = range(0, 180, GROUP), range(1000, 1080, GROUP)
NEVER = 1e9  # seconds


def drawn(seed: int, darkest_s: float) -> Schedule:
    """A schedule; no blackhole in it is longer than `darkest_s`, and none within 3 s of another."""
    draw = random.Random(f"schedule {seed}")
    rtt, jitter, lose, down, up = PROFILES[draw.choice(list(PROFILES))]
    span = 1.0 + 12 * rtt
    darkness: list[tuple[float, float]] = []
    for begin in sorted(draw.uniform(0.0, span) for _ in range(draw.choice((0, 1, 1, 2)))):
        if not darkness or begin > darkness[-1][1] + 3.0:
            darkness.append((begin, begin + draw.uniform(0.05, darkest_s)))
    both = Weather(
        delay_s=rtt / 2, jitter_s=jitter / 2, reorders=draw.random() < 0.5, lose=lose + draw.choice((0.0, 0.01)),
        twice=draw.choice((0.0, 0.02)), corrupt=draw.choice((0.0, 0.02)), late=draw.choice((0.0, 0.02)),
        queue=max(32, int(2 * rtt * down / 1200)), blackholes=tuple(darkness),
    )  # fmt: skip
    replicas = draw.choice((1, 1, 2))
    dies = replicas > 1 and draw.random() < 0.5
    return Schedule(
        up=replace(both, rate=up),
        down=replace(both, rate=down),
        start=draw.choice(list(Start)),
        split=draw.choice((0, 0, 1, 2, 3)),
        prompt=draw.choice((5, 17, 40, 120)),
        tokens=draw.choice((4, 8, 12)),
        sampling=Sampling(1.0, seed=seed) if draw.random() < 0.3 else Sampling(),
        rebinds=tuple(sorted(draw.uniform(0.0, span) for _ in range(draw.choice((0, 0, 1, 3))))),
        dead={"cloud-0": (draw.uniform(0.0, span), NEVER)} if dies else {},
        replicas=replicas,
        grpc=draw.random() < 0.4,
        draft=draw.choice((0, 0, 2, 4)),
        seed=seed,
    )


@pytest.mark.parametrize("first", SURVIVED)
def test_everything_at_once_changes_no_token_and_costs_what_it_explains(first: int) -> None:
    wrong, shares = [], {}
    for seed in range(first, first + GROUP):
        schedule = drawn(seed, 1.5)
        calm, played = play(schedule.calm), play(schedule)
        wrong += [f"{seed}: {fault}" for fault in (*calm.faults(), *played.faults())]
        wrong += [f"{seed}: {error}" for error in (calm.asked.error, played.asked.error) if error]
        extra, explained = played.asked.took_s - calm.asked.took_s, schedule.explained_s(played.harmed)
        wrong += [f"{seed}: {extra:.2f} s, {explained:.2f} explained"] if extra > explained + 0.1 else []
        shares[f"{extra:.2f} s of {explained:.2f} explained, seed {seed}"] = extra / (explained + 0.1)
    print("worst:", max(shares, key=shares.__getitem__))
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("first", HARSH)
def test_long_darkness_ends_an_answer_with_what_was_right_so_far(first: int) -> None:
    wrong, ended = [], 0
    for seed in range(first, first + GROUP):
        played = play(drawn(seed, 12.0))
        wrong += [f"{seed}: {fault}" for fault in played.faults()]
        error = played.asked.error
        wrong += [f"{seed}: {error!r}"] if error and type(error) is not LinkLost else []
        ended += error is not None
    print(f"{ended} of {GROUP} ended early")
    assert not wrong, "\n".join(wrong)
