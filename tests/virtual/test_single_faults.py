"""One fault in one answer: every datagram lost, doubled, late or damaged, darkness and rebinding at every stage."""

from __future__ import annotations

from dataclasses import replace

import pytest

from protocol.limits import PING_AFTER
from support.schedules import Played, Schedule, Start, play
from support.virtual_network import Fate, Weather

RTT = 2 * Weather().delay_s
KINDS = {
    "cloud": Schedule(),
    "ticket": Schedule(start=Start.TICKET),
    "warm": Schedule(start=Start.WARM),
    "split": Schedule(split=2, tokens=6),
    "drafts": Schedule(draft=3),
    "drafts over a split": Schedule(split=2, draft=3, tokens=8),
}
# Two timeouts of a probe, and the round trip that each leads to: what is lost last of a flight is only missed then.
RECOVERY_S = 2 * (0.2 + RTT) + 0.1
STAGES = 10
DARK_S = 2.0
NEVER = 1e9


@pytest.fixture(params=KINDS)
def quiet(request: pytest.FixtureRequest) -> tuple[Schedule, Played]:
    """A schedule without a fault, and its play."""
    schedule = KINDS[request.param]
    played = play(schedule)
    assert not played.faults()
    return schedule, played


def worst(quiet: tuple[Schedule, Played], schedules: dict[str, Schedule]) -> float:
    """Seconds that the slowest of these schedules cost; everything else is checked of each."""
    costs, wrong = {}, []
    for name, schedule in schedules.items():
        played = play(schedule)
        wrong += [f"{name}: {fault}" for fault in played.faults()]
        wrong += [f"{name}: {played.asked.error}"] if played.asked.error else []
        costs[name] = played.asked.took_s - quiet[1].asked.took_s
    assert not wrong, "\n".join(wrong)
    name = max(costs, key=costs.__getitem__)
    print(f"worst of {len(costs)}: {costs[name]:.3f} s, {name}")
    return costs[name]


def stages(played: Played) -> list[float]:
    """Moments all through an answer."""
    return [0.001 + played.asked.took_s * stage / STAGES for stage in range(STAGES)]


@pytest.mark.parametrize("fate", Fate)
def test_one_bad_datagram_costs_a_probe_and_no_token(quiet: tuple[Schedule, Played], fate: Fate) -> None:
    schedule, played = quiet
    schedules = {}
    for number in range(1, played.ups + 1):
        schedules[f"up {number}"] = replace(schedule, up=Weather(fates={number: fate}), seed=number)
    for number in range(1, played.downs + 1):
        schedules[f"down {number}"] = replace(schedule, down=Weather(fates={number: fate}), seed=number)
    assert worst(quiet, schedules) < (0.01 if fate is Fate.TWICE else RECOVERY_S)


@pytest.mark.parametrize("way", ["both", "up", "down"])
def test_two_dark_seconds_are_survived_at_every_stage(quiet: tuple[Schedule, Played], way: str) -> None:
    schedule, played = quiet
    schedules = {}
    for at in stages(played):
        dark = Weather(blackholes=((at, at + DARK_S),))
        one = replace(schedule, up=Weather() if way == "down" else dark, down=Weather() if way == "up" else dark)
        schedules[f"at {at:.3f} s"] = one
    assert worst(quiet, schedules) < DARK_S + 2 * RECOVERY_S


def test_a_silent_rebinding_costs_no_more_than_a_ping_and_two_round_trips(quiet: tuple[Schedule, Played]) -> None:
    """While a session is open. A handshake from another address has to be shown to be the phone's, as at its start."""
    schedule, played = quiet
    schedules = {f"at {at:.3f} s": replace(schedule, rebinds=(at,)) for at in stages(played)}
    assert worst(quiet, schedules) < PING_AFTER + 2 * RTT + 0.05


@pytest.mark.parametrize("split", [0, 2])
def test_an_answer_goes_on_at_the_other_replica_over_whichever_transport_daylight_finds_first(split: int) -> None:
    """Early data to the other replica leaves in the dark; when it ends, gRPC is there before QUIC's next probe."""
    dark = Weather(blackholes=((0.14, 2.08),))
    schedule = Schedule(up=dark, down=dark, start=Start.TICKET, split=split, replicas=2, grpc=True)
    played = play(replace(schedule, dead={"cloud-0": (1.2, NEVER)}))
    assert (played.faults(), played.asked.error) == ([], None)


@pytest.mark.parametrize("late_s", [0.8, 1.0, 1.2])
def test_a_session_that_lost_a_race_at_its_own_replica_may_win_it_first(late_s: float) -> None:
    """The old session says something when a rival has already taken its place: the answer goes on all the same."""
    dark = Weather(delay_s=0.01, blackholes=((0.42, 0.42 + late_s),))
    played = play(Schedule(up=dark, down=dark, split=3, prompt=5, tokens=12, grpc=True))
    assert (played.faults(), played.asked.error) == ([], None)
