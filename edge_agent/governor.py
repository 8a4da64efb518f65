"""How much of its speed a hot or hungry phone gives to answers."""

from __future__ import annotations

import asyncio
import logging
import math
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from edge_agent.conditions import Power
from edge_agent.power import Heat, Reading, Sensors

log = logging.getLogger(__name__)
# Watts that a phone gives off for good: 0.026 m² of skin, 10 W/(m²·K) by still air and radiation, 20 K above the room.
POWER_LIMIT_W = 5.0
AMBIENT = 25.0  # °C: heat is counted from here
STEPS = ((0.9, 0.5), (0.7, 0.8))  # above this share of a limit, this share of the rate
SLACK = 0.1  # below a step by so much before it is left again
SMOOTH_S = 15.0  # time in which readings count; a phone warms up in minutes, an answer's bursts take seconds
EVERY_S = 2.0  # between two readings


class Governor:
    """The share of the local rate, from readings. Pure but for what it was told; off until the first reading."""

    def __init__(self, limit_w: float | None = None, limit_celsius: float | None = None):
        self._limit_w, self._limit_celsius = limit_w, limit_celsius
        self._level: float | None = None
        self._at = 0.0
        self.power = Power()

    def seen(self, reading: Reading, at: float) -> Power:
        """What the phone may do now; readings that say nothing leave it as it was, and fade to none at all."""
        found = [*self._of_power(reading), *(self._of_heat(heat) for heat in reading.heats)]
        ratio = max(found, default=None)
        if ratio is None and self._level is None:
            return self.power
        heat = max((one.celsius for one in reading.heats), default=None)
        keep = math.exp((self._at - at) / SMOOTH_S) if self._level is not None else 0.0
        self._level, self._at = keep * (self._level or 0.0) + (1 - keep) * (ratio or 0.0), at
        watts = None if reading.watts is None else round(reading.watts, 3)
        self.power = Power(self._share(self._level), round(self._level, 3), watts, heat, _sources(reading))
        return self.power

    def _share(self, level: float) -> float:
        """The step of the level; one that was reached is left only clearly below it."""
        now = self.power.share
        return min([share for above, share in STEPS if level > above - (SLACK if share >= now else 0.0)], default=1.0)

    def _of_power(self, reading: Reading) -> list[float]:
        limit = self._limit_w or reading.own_limit_w or (POWER_LIMIT_W if reading.source == "battery" else None)
        return [] if reading.watts is None or limit is None else [reading.watts / limit]

    def _of_heat(self, heat: Heat) -> float:
        high = heat.high if self._limit_celsius is None else self._limit_celsius
        return max(0.0, (heat.celsius - AMBIENT) / max(1.0, high - AMBIENT))


@asynccontextmanager
async def governed(governor: Governor, sensors: Sensors, every_s: float = EVERY_S,
                   clock: Callable[[], float] = time.monotonic) -> AsyncIterator[None]:  # fmt: skip
    """Reads the sensors until the block ends. Says once what they are; without any, the governor stays off."""
    found = await asyncio.to_thread(sensors.present)
    if not found:
        log.info("no sensor of power or heat can be read here: the energy governor is off")
        yield
        return
    log.info("the energy governor goes by %s", ", ".join(found))
    task = asyncio.create_task(_watch(governor, sensors, every_s, clock))
    try:
        yield
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


async def _watch(governor: Governor, sensors: Sensors, every_s: float, clock: Callable[[], float]) -> None:
    while True:
        before = governor.power.share
        power = governor.seen(await asyncio.to_thread(sensors.read), clock())
        if power.share != before:
            log.info("answers get %g of the phone's speed, at %.2f of its limit", power.share, power.level or 0.0)
        await asyncio.sleep(every_s)


def _sources(reading: Reading) -> str:
    return " and ".join([*([reading.source] if reading.source else []), *(["heat"] if reading.heats else [])])
