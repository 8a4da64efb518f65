"""The virtual loop and its network do what the tests that stand on them take for granted."""

from __future__ import annotations

import asyncio
import time

import pytest

from protocol.transport.quic_door import Bounds, Door, Verdict
from support.virtual import Stuck, VirtualCompute, run
from support.virtual_network import Fate, Network, Passed, Weather
from support.virtual_world import world

ROUGH = Weather(jitter_s=0.02, reorders=True, lose=0.05, twice=0.05, corrupt=0.05, late=0.05, rate=50_000.0)


def test_an_hour_passes_at_once_and_in_order() -> None:
    async def after(seconds: float, name: str) -> tuple[float, str]:
        await asyncio.sleep(seconds)
        return time.monotonic(), name

    async def scene() -> tuple[float, str]:
        began = time.monotonic()
        (late, _), (early, _) = await asyncio.gather(after(3600.0, "late"), after(0.5, "early"))
        assert (early - began, late - began) == pytest.approx((0.5, 3600.0), abs=1e-3)
        return time.time(), str(time.time_ns())

    real = time.time()
    assert run(scene) == run(scene)
    assert time.time() - real < 600


def test_clocks_that_were_bound_before_follow_too() -> None:
    async def scene() -> None:
        door = Door(Bounds(per_prefix=0.1))
        assert door.judge("here", False, 0) is Verdict.TAKE
        assert door.judge("here", False, 0) is Verdict.PROVE
        await asyncio.sleep(10.0)
        assert door.judge("here", False, 0) is Verdict.TAKE

    run(scene)


def test_what_can_never_happen_is_an_error_and_so_is_a_loop_that_never_waits() -> None:
    async def forever() -> None:
        await asyncio.Event().wait()

    async def spin() -> None:
        while True:  # noqa: ASYNC110
            await asyncio.sleep(0)

    for scene, why in ((forever, "nothing will ever happen"), (spin, "turns of the loop")):
        with pytest.raises(Stuck, match=why):
            run(scene)


def test_work_on_the_compute_stand_in_takes_its_time_in_order() -> None:
    async def scene() -> None:
        compute, began, said = VirtualCompute(slow=2.0), time.monotonic(), list[tuple[float, str]]()

        def slow(name: str) -> None:
            compute.to_loop(lambda: said.append((time.monotonic() - began, name)))

        await asyncio.gather(compute.call(slow, "a"), compute.call(slow, "b"))
        assert [(round(at, 3), name) for at, name in said] == [(2.0, "a"), (4.0, "b")]
        await compute.aclose()

    run(scene)


def passed(seed: int, up: Weather = ROUGH, down: Weather = ROUGH) -> list[Passed]:
    async def scene() -> list[Passed]:
        network = Network(up, down, seed)
        async with world(network) as made:
            network.begin()
            asyncio.get_running_loop().call_later(0.3, network.rebind)
            await made.ask(tuple(range(3, 30)), 6, split=1)
        return network.passed

    return run(scene, seed)


def test_a_seed_is_a_schedule_to_the_last_datagram() -> None:
    first = passed(1)
    assert first == passed(1)
    assert first != passed(2)
    assert len({one.phone for one in first}) == 2


def test_fates_meet_the_datagram_they_are_meant_for() -> None:
    fates = {1: Fate.LOSE, 2: Fate.TWICE}
    ups = [one for one in passed(1, Weather(fates=fates), Weather()) if one.up]
    assert [len(one.arrived) for one in ups[:4]] == [0, 2, 1, 1]
    assert ups[2].arrived[0] - ups[2].at == pytest.approx(Weather().delay_s)
