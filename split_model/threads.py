"""How many threads compute on this machine, and on which of its processors."""

from __future__ import annotations

import logging
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

CPUS, CGROUP = Path("/sys/devices/system/cpu"), Path("/sys/fs/cgroup")
NEAR = 0.8  # of the fastest clock: a slower core is of another make and does less per tick, too
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Cores:
    """`threads` that do not get into each other's way; `pinned` to these processors, None where all are alike."""

    threads: int
    pinned: frozenset[int] | None = None


def settle(threads: int | None) -> None:
    """Has the calling thread compute with so many threads; None: what suits the machine, within torch's own number."""
    if threads is not None:
        torch.set_num_threads(threads)
        return
    own = cores(allowed())
    torch.set_num_threads(min(torch.get_num_threads(), own.threads))
    if own.pinned is not None:  # threads that torch starts later inherit it
        os.sched_setaffinity(0, own.pinned)
    where = "" if own.pinned is None else f" on processors {sorted(own.pinned)}"
    log.info("computing with %d threads%s", torch.get_num_threads(), where)


def allowed() -> set[int]:
    """Processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def cores(processors: Collection[int], cpus: Path = CPUS, cgroup: Path = CGROUP) -> Cores:
    """One thread for each physical core among these processors, without the slow ones of a big.LITTLE machine."""
    fast = _fast(processors, cpus)
    count = len({_siblings(cpus, processor) for processor in fast})
    quota = _quota(cgroup / "cpu.max")
    return Cores(count if quota is None else min(count, quota), None if len(fast) == len(processors) else fast)


def _fast(processors: Collection[int], cpus: Path) -> frozenset[int]:
    """Those worth computing on together: work is dealt out evenly, so the slowest one sets the pace of all."""
    capacity = {one: _number(cpus / f"cpu{one}/cpu_capacity") for one in processors}
    if all(capacity.values()):
        return max((_at_least(least, capacity) for least in set(capacity.values())),
                   key=lambda own: (len(own) * min(capacity[one] for one in own), len(own)))  # fmt: skip
    clock = {one: _number(cpus / f"cpu{one}/cpufreq/cpuinfo_max_freq") for one in processors}
    if all(clock.values()):
        return _at_least(NEAR * max(clock.values()), clock)
    return frozenset(processors)


def _at_least(least: float, speeds: Mapping[int, int]) -> frozenset[int]:
    return frozenset(one for one, speed in speeds.items() if speed >= least)


def _siblings(cpus: Path, processor: int) -> str:
    """What all hyperthreads of one core have in common."""
    return _text(cpus / f"cpu{processor}/topology/thread_siblings_list") or str(processor)


def _quota(path: Path) -> int | None:
    """Whole processors that a cgroup may use at a time; None without a limit."""
    limit, _, period = _text(path).partition(" ")
    return max(1, int(limit) // int(period)) if limit.isdigit() and period.isdigit() and int(period) else None


def _number(path: Path) -> int:
    """0 where there is none."""
    text = _text(path)
    return int(text) if text.isdigit() else 0


def _text(path: Path) -> str:
    """Empty where it is missing or not for us to read, as on some phones."""
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, ValueError):
        return ""
