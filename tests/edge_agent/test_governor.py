"""The energy governor: an hour in virtual time with a model of a phone, and what sensors there may be."""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import AsyncIterator
from contextlib import aclosing
from pathlib import Path

import pytest

from edge_agent.conditions import Meter, Phone, Power, Rates, hottest
from edge_agent.governor import EVERY_S, POWER_LIMIT_W, SMOOTH_S, Governor, governed
from edge_agent.job import Quality, Route
from edge_agent.plan import choose
from edge_agent.power import Heat, Reading, Sensors
from edge_agent.runs.local import PhoneModel, generate
from edge_agent.state import State
from split_model.compute import Compute
from split_model.model import Model
from split_model.sampling import Sampling
from support.edge import agent, checkpoints, cloud, conditions, job, pair, phone
from support.eventually import eventually
from support.heat import ModelPhone

HOUR = 3600.0


def watts(value: float) -> Reading:
    return Reading(value, "battery")


def simulate(body: ModelPhone, governor: Governor | None, seconds: float = HOUR) -> list[float]:
    """The shares that the governor gave, one for each reading."""
    shares, share, at = [], 1.0, 0.0
    while at < seconds:
        reading, at = body.run(EVERY_S, share), at + EVERY_S
        share = governor.seen(reading, at).share if governor else 1.0
        shares.append(share)
    return shares


def test_an_hour_of_work_stays_cool_and_within_its_power_with_the_governor_and_not_without() -> None:
    """A model: 7 W at full speed on a phone that gives off 5 at 45 °C."""
    free, held = ModelPhone(), ModelPhone()
    simulate(free, None)
    shares = simulate(held, Governor())
    assert free.celsius > 50
    assert held.celsius < 45
    assert held.drawn_j / HOUR <= POWER_LIMIT_W
    assert held.charge > free.charge + 0.1
    assert held.worked_s > 0.45 * HOUR  # and it still works
    changes = sum(a != b for a, b in itertools.pairwise(shares))
    assert changes <= HOUR / SMOOTH_S  # no flutter


def test_light_work_is_never_slowed() -> None:
    body = ModelPhone(work_w=2.0)
    assert set(simulate(body, Governor())) == {1.0}


def test_a_phone_that_cools_down_gets_its_speed_back() -> None:
    governor, body = Governor(), ModelPhone()
    assert simulate(body, governor, 600)[-1] < 1
    at, share = 600.0, 0.5
    while at < 3000:
        at += EVERY_S
        share = governor.seen(body.run(EVERY_S, 0.0), at).share
    assert share == 1


@pytest.mark.parametrize(("ratio", "share"), [(0.5, 1.0), (0.69, 1.0), (0.71, 0.8), (0.89, 0.8), (0.91, 0.5), (3, 0.5)])
def test_the_steps(ratio: float, share: float) -> None:
    assert Governor(limit_w=10.0).seen(watts(10 * ratio), 0.0).share == share


def test_a_step_is_left_only_clearly_below_it() -> None:
    governor, at, shares = Governor(limit_w=10.0), 0.0, []
    for level in (9.5, 8.5, 9.5, 8.5, 7.9, 7.5, 6.5, 7.5, 5.9):
        for _ in range(100):  # until the average is there
            at += EVERY_S
            governor.seen(watts(level), at)
        shares.append(governor.power.share)
    assert shares == [0.5, 0.5, 0.5, 0.5, 0.8, 0.8, 0.8, 0.8, 1.0]


def test_a_short_burst_slows_nothing() -> None:
    governor = Governor(limit_w=10.0)
    for second in range(60):
        governor.seen(watts(2.0), float(second))
    assert governor.seen(watts(20.0), 62.0).share == 1


def test_heat_counts_from_the_room_and_the_worst_of_all_decides() -> None:
    cool, warm = Heat(40.0, 100.0), Heat(44.5, 45.0)
    assert Governor().seen(Reading(heats=(cool,)), 0.0).share == 1
    power = Governor().seen(Reading(0.1, "battery", None, (cool, warm)), 0.0)
    assert (power.share, power.watts, power.celsius, power.source) == (0.5, 0.1, 44.5, "battery and heat")
    assert Governor(limit_celsius=60.0).seen(Reading(heats=(warm,)), 0.0).share == 1


def test_power_on_mains_is_held_against_what_was_asked_for_or_the_machine_states() -> None:
    rapl = Reading(14.0, "RAPL", 15.0)
    assert Governor().seen(rapl, 0.0).share == 0.5
    assert Governor(limit_w=100.0).seen(rapl, 0.0).share == 1
    assert Governor().seen(Reading(14.0, "RAPL"), 0.0) == Power()  # nobody says what would be much


def test_a_plugged_phone_whose_readings_end_comes_back_to_full_speed() -> None:
    governor = Governor()
    assert governor.seen(watts(10.0), 0.0).share == 0.5
    assert governor.seen(Reading(), 100.0).share == 1


def test_a_hot_phone_hands_its_work_to_the_cloud() -> None:
    """A full model on the phone that is a little quicker than the way to the cloud."""

    def chosen(share: float) -> Route:
        here = phone(full=Rates(2e6, 2e5), power=Power(share))
        there = cloud(rtt_s=0.02, up=1e9, down=1e9, rates=Rates(1e6, 1.5e5))
        return choose(job(quality=Quality.BEST), pair(), conditions(phone=here, cloud=there)).route

    assert (chosen(1.0), chosen(0.5)) == (Route.LOCAL, Route.CLOUD)


def test_a_governed_or_empty_phone_has_nothing_to_spare() -> None:
    rates = Rates(1.0, 1.0)
    assert Phone(rates, rates, battery=0.9, plugged=False).spare
    assert not Phone(rates, rates, battery=0.2, plugged=False).spare
    assert Phone(rates, rates, battery=0.2, plugged=True).spare
    assert not Phone(rates, rates, battery=0.9, plugged=True, power=Power(0.8)).spare


# sensors


def write(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name).write_text(f"{text}\n")


def battery(sys: Path, name: str = "BAT0", **files: object) -> None:
    write(sys / "class/power_supply" / name, **{"type": "Battery", "status": "Discharging", **files})


def test_a_battery_tells_its_power(tmp_path: Path) -> None:
    battery(tmp_path, power_now=4_250_000)
    write(tmp_path / "class/power_supply/AC", type="Mains", online=0)
    assert Sensors(tmp_path).read() == Reading(4.25, "battery")
    assert Sensors(tmp_path).present() == ["battery"]


@pytest.mark.parametrize("current", [800_000, -800_000])
def test_android_tells_current_of_either_sign_voltage_and_heat(tmp_path: Path, current: int) -> None:
    battery(tmp_path, "battery", current_now=current, voltage_now=4_000_000, temp=384)
    write(tmp_path / "class/power_supply/usb", type="USB", current_now=0, voltage_now=0)
    assert Sensors(tmp_path).read() == Reading(3.2, "battery", None, (Heat(38.4, 45.0),))
    assert Sensors(tmp_path).present() == ["battery", "temperature"]


def test_a_battery_that_is_charged_tells_no_power(tmp_path: Path) -> None:
    battery(tmp_path, status="Charging", power_now=20_000_000)
    assert Sensors(tmp_path).read() == Reading()


def test_the_battery_of_a_mouse_does_not_count(tmp_path: Path) -> None:
    battery(tmp_path, "mouse", scope="Device", power_now=100_000)
    assert Sensors(tmp_path).present() == []


def test_rapl_tells_power_from_two_readings_and_through_a_wrap(tmp_path: Path) -> None:
    now, zone = [0.0], tmp_path / "class/powercap/intel-rapl:0"
    write(zone, energy_uj=9_000_000, max_energy_range_uj=10_000_000, constraint_0_power_limit_uw=15_000_000)
    write(tmp_path / "class/powercap/intel-rapl:0:0", energy_uj=5)  # a part of the package
    sensors = Sensors(tmp_path, clock=lambda: now[0])
    assert sensors.read() == Reading()
    now[0] = 1.0
    write(zone, energy_uj=3_000_000)
    assert sensors.read() == Reading(4.0, "RAPL", 15.0)
    assert sensors.present() == ["RAPL"]


@pytest.mark.parametrize("text", ["", "abc", "nan", "inf", "1e30", "\x00"])
def test_what_a_driver_makes_up_is_no_reading(tmp_path: Path, text: str) -> None:
    battery(tmp_path, power_now=text, temp=text)
    write(tmp_path / "class/powercap/intel-rapl:0", energy_uj=text)
    assert Sensors(tmp_path).read() == Reading()


def test_this_machine_s_temperatures_make_sense_if_there_are_any() -> None:
    found = hottest()
    assert found is None or (0 < found.celsius < 150 and found.high > 0)


@pytest.mark.anyio
async def test_without_a_sensor_it_is_off_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    governor = Governor()
    with caplog.at_level(logging.INFO):
        async with governed(governor, Sensors(tmp_path)):
            pass
    assert "no sensor of power or heat can be read here: the energy governor is off" in caplog.messages
    assert governor.power == Power(1.0, None, None, None, "nothing to read: the governor is off")


@pytest.mark.anyio
async def test_sensors_are_read_again_and_again_until_the_end(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    battery(tmp_path, power_now=1_000_000)
    governor, before = Governor(limit_w=4.0), asyncio.all_tasks()
    with caplog.at_level(logging.INFO):
        async with governed(governor, Sensors(tmp_path), every_s=0.001, clock=lambda: time.monotonic() * 1e4):
            await eventually(lambda: governor.power.watts == 1)
            battery(tmp_path, power_now=40_000_000)
            await eventually(lambda: governor.power.share == 0.5)
    assert asyncio.all_tasks() == before
    assert "the energy governor goes by battery" in caplog.messages


@pytest.mark.anyio
async def test_an_agent_s_conditions_say_what_the_governor_does(tmp_path: Path) -> None:
    battery(tmp_path / "sys", power_now=9_500_000)
    async with agent(tmp_path, sensors=tmp_path / "sys", power_limit_w=10.0) as made:
        await eventually(lambda: made.conditions().phone.power.level)
        power = made.conditions().phone.power
        assert (power.share, power.level, power.watts) == (0.5, 0.95, 9.5)
        assert made.means.tiny.share() == made.means.full.share() == 0.5


# pacing


@pytest.fixture
async def model(tmp_path: Path) -> AsyncIterator[PhoneModel]:
    compute = Compute(1)
    try:
        loaded = await compute.call(Model.load, checkpoints()[0])
        yield PhoneModel(compute, loaded, 1, Meter(State(tmp_path)))
    finally:
        await compute.aclose()


@pytest.mark.anyio
async def test_a_governed_phone_rests_between_its_tokens(model: PhoneModel) -> None:
    model.share = lambda: 0.2
    seat = await model.seat(model.config.layers)
    busy, began = await model.compute.call(time.thread_time), time.monotonic()
    made = [token async for token in generate(seat, [5, 6, 7], Sampling(), (), 20)]
    busy = await model.compute.call(time.thread_time) - busy
    assert len(made) == 20
    assert time.monotonic() - began > 0.9 * 0.95 * busy / 0.2  # nobody rests behind the last one
    seat.close()


@pytest.mark.anyio
async def test_a_rest_can_be_broken_off_and_leaves_nothing_behind(model: PhoneModel) -> None:
    model.share = lambda: 1e-6  # hours
    seat = await model.seat(model.config.layers)
    async with aclosing(generate(seat, [5, 6, 7], Sampling(), (), 20)) as tokens:
        await anext(tokens)  # at once: a rest comes before the next piece, not behind this one
        waiting = asyncio.ensure_future(anext(tokens))
        await model.compute.call(lambda: None)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
    seat.close()
    await model.compute.call(lambda: None)
    assert model.prefixes.free_slots == 1
