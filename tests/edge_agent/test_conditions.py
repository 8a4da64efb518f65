"""What the phone knows of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from edge_agent.conditions import FORGET_S, Machine, Meter, Network, Rates, network_kind
from edge_agent.state import State
from support.clock import Clock


def test_a_meter_knows_a_model_when_both_kinds_of_run_were_measured(tmp_path: Path) -> None:
    meter = Meter(State(tmp_path))
    assert meter.rates("m") is None
    meter.sample("m", "prefill", flops=8e9, seconds=2.0)
    assert meter.rates("m") is None
    meter.sample("m", "decode", flops=1e9, seconds=1.0)
    assert meter.rates("m") == Rates(pytest.approx(4e9), pytest.approx(1e9))


def test_a_meter_follows_the_latest_work_and_keeps_the_long_view(tmp_path: Path) -> None:
    clock = Clock(0.0)
    meter = Meter(State(tmp_path), clock)
    for kind in ("prefill", "decode"):
        meter.sample("m", kind, 1e9, 1.0)
    for _ in range(10):  # something else keeps the machine busy for five seconds
        meter.sample("m", "decode", 0.25e9, 0.5)
    slow = meter.rates("m")
    assert slow is not None
    assert slow.decode < 0.6e9
    clock.now += 20 * FORGET_S
    later, loaded = meter.rates("m"), meter.rates("m", cpu_load=0.5)
    assert later is not None
    assert loaded is not None
    assert later.decode > 0.8e9
    assert loaded.decode == pytest.approx(later.decode / 2)


def test_a_long_run_counts_more_than_a_short_one(tmp_path: Path) -> None:
    rates = []
    for seconds in (0.01, 1.0):
        meter = Meter(State(tmp_path))
        for kind in ("prefill", "decode"):
            meter.sample("m", kind, 1e9, 1.0)
        meter.sample("m", "decode", 1e8 * seconds, seconds)
        found = meter.rates("m")
        assert found is not None
        rates.append(found.decode)
    assert rates[1] < rates[0] < 1e9


def test_rates_are_kept_on_disk_for_their_model_only(tmp_path: Path) -> None:
    meter = Meter(State(tmp_path))
    for kind in ("prefill", "decode"):
        meter.sample("m", kind, 2e9, 1.0)
    meter.save()
    again = Meter(State(tmp_path))
    assert again.rates("m") == Rates(pytest.approx(2e9), pytest.approx(2e9))
    assert again.rates("other") is None


@pytest.mark.parametrize("text", ["{", "[]", '{"m": {"prefill": -1, "decode": 1}}', '{"m": {"prefill": "x"}}'])
def test_rates_that_make_no_sense_are_measured_again(tmp_path: Path, text: str) -> None:
    (tmp_path / "rates.json").write_text(text)
    assert Meter(State(tmp_path)).rates("m") is None


def test_state_is_private_and_survives_a_disk_that_fails(tmp_path: Path) -> None:
    state = State(tmp_path / "new" / "folder")
    state.write("thing", {"a": 1})
    assert state.read("thing") == {"a": 1}
    assert (tmp_path / "new" / "folder").stat().st_mode & 0o777 == 0o700
    assert (tmp_path / "new" / "folder" / "thing.json").stat().st_mode & 0o777 == 0o600
    (tmp_path / "file").write_text("")
    broken = State(tmp_path / "file" / "folder")
    broken.write("thing", {"a": 1})
    assert broken.read("thing") == {}


def test_the_machine_says_its_load_memory_and_battery() -> None:
    clock = Clock(0.0)
    machine = Machine(clock)
    rates = Rates(1.0, 1.0)
    clock.now += 1
    phone = machine.phone(rates, rates, 2)
    assert 0 <= phone.cpu_load <= 1
    assert phone.memory_free > 0
    assert phone.battery is None or 0 <= phone.battery <= 1
    assert phone.share == pytest.approx(1 / 3)


def test_the_kind_of_network_is_told_by_the_way_to_the_host() -> None:
    assert network_kind("127.0.0.1") is Network.LOOPBACK
    assert network_kind("no-such-host.invalid") is Network.CELLULAR


def test_a_pass_over_many_positions_tells_the_rate_of_those_behind_the_first(tmp_path: Path) -> None:
    meter = Meter(State(tmp_path))
    meter.sample("m", "decode", flops=1e6, seconds=0.004)
    meter.further("m", flops=101e6, seconds=0.014, first=1e6)
    rates = meter.rates("m")
    assert rates == Rates(pytest.approx(100e6 / 0.010), pytest.approx(1e6 / 0.004))
    unknown = Meter(State(tmp_path))
    unknown.further("m", flops=101e6, seconds=0.014, first=1e6)
    unknown.sample("m", "decode", flops=1e6, seconds=0.004)
    found = unknown.rates("m")
    assert found is not None
    assert found.prefill == pytest.approx(101e6 / 0.014)


def test_a_first_position_that_was_slow_of_late_does_not_make_the_others_free(tmp_path: Path) -> None:
    meter = Meter(State(tmp_path))
    meter.sample("m", "decode", flops=1e6, seconds=1.0)
    meter.further("m", flops=101e6, seconds=0.02, first=1e6)
    rates = meter.rates("m")
    assert rates is not None
    assert rates.prefill == pytest.approx(100e6 / 0.005)


def test_rates_are_apart_by_what_they_are_for(tmp_path: Path) -> None:
    meter = Meter(State(tmp_path))
    for use, seconds in (("prefill", 1.0), ("decode", 1.0), ("draft", 2.0)):
        meter.sample("m", use, 1e9, seconds)
    own, drafts, front = (meter.rates("m", use=use) for use in ("decode", "draft", "front"))
    assert drafts == Rates(pytest.approx(1e9), pytest.approx(0.5e9))
    assert own == front == Rates(pytest.approx(1e9), pytest.approx(1e9))
    meter.save()
    assert Meter(State(tmp_path)).rates("m", use="draft") == drafts
