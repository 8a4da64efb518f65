"""Threads for the machine: physical cores, a cgroup's share, and the fast cores of a phone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from split_model.threads import Cores, allowed, cores, settle


@pytest.fixture
def machine(tmp_path: Path) -> Path:
    return tmp_path


def put(path: Path, text: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


@pytest.mark.parametrize(
    ("capacities", "fast"),
    [
        ([325] * 4 + [871] * 3 + [1024], {4, 5, 6, 7}),  # one prime, three big, four little
        ([250] * 4 + [620] * 2 + [1024] * 2, {4, 5, 6, 7}),  # four at the middle's pace do more than two at the top's
        ([160] * 6 + [1024] * 2, {6, 7}),
        ([1024] * 4, None),
        ([980, 1024], None),
    ],
)
def test_a_phone_computes_on_the_cores_that_do_most_together(
    machine: Path, capacities: list[int], fast: set[int] | None
) -> None:
    for number, capacity in enumerate(capacities):
        put(machine / f"cpu{number}/cpu_capacity", capacity)
    assert cores(range(len(capacities)), machine, machine) == Cores(len(fast or capacities), fast and frozenset(fast))


def test_clocks_tell_where_capacities_do_not(machine: Path) -> None:
    for number, clock in enumerate([1_800_000] * 4 + [2_420_000] * 3 + [2_840_000]):
        put(machine / f"cpu{number}/cpufreq/cpuinfo_max_freq", clock)
    assert cores(range(8), machine, machine) == Cores(4, frozenset({4, 5, 6, 7}))
    assert cores({0, 1, 5}, machine, machine) == Cores(1, frozenset({5})), "only those that the process may use"


def test_one_clock_that_cannot_be_read_pins_nothing(machine: Path) -> None:
    put(machine / "cpu0/cpufreq/cpuinfo_max_freq", 1_800_000)
    put(machine / "cpu1/cpufreq/cpuinfo_max_freq", "<unknown>")
    assert cores({0, 1}, machine, machine) == Cores(2)


def test_hyperthreads_of_one_core_count_once(machine: Path) -> None:
    for number in range(8):
        put(machine / f"cpu{number}/topology/thread_siblings_list", f"{number % 4},{number % 4 + 4}")
    assert cores(range(8), machine, machine) == Cores(4)
    assert cores({0, 4}, machine, machine) == Cores(1)


@pytest.mark.parametrize(("limit", "threads"), [("200000 100000", 2), ("50000 100000", 1), ("max 100000", 6)])
def test_a_cgroup_bounds_the_threads(machine: Path, limit: str, threads: int) -> None:
    put(machine / "cpu.max", limit)
    assert cores(range(6), machine, machine) == Cores(threads)


def test_a_number_that_was_given_is_taken_as_it_is() -> None:
    before, pinned = torch.get_num_threads(), allowed()
    try:
        settle(3)
        assert torch.get_num_threads() == 3
        settle(None)
        assert 1 <= torch.get_num_threads() <= min(3, os.cpu_count() or 1), "never more than torch was told before"
    finally:
        torch.set_num_threads(before)
        if hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(0, pinned)
