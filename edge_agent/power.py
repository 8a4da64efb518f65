"""What this phone's sensors say of its power and heat, whichever there are. Reads /sys alone."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

SYS = Path("/sys")
MOST_W = 1000.0  # a reading beyond is none: some drivers give other units or a constant


@dataclass(frozen=True, slots=True)
class Heat:
    """A temperature, and the one that its sensor calls too high; both in °C."""

    celsius: float
    high: float


@dataclass(frozen=True, slots=True)
class Reading:
    """What was read at one time: watts and what they are of, the sensor's own limit if it has one, and temperatures."""

    watts: float | None = None
    source: str = ""
    own_limit_w: float | None = None
    heats: tuple[Heat, ...] = ()


class Sensors:
    """A battery's discharge, else RAPL's packages; and the temperatures of batteries, of Linux and of Android.

    RAPL counts energy, so that its first reading gives no power. `hottest`: temperatures from elsewhere.
    """

    def __init__(self, sys: Path = SYS, hottest: Callable[[], Heat | None] = lambda: None,
                 clock: Callable[[], float] = time.monotonic):  # fmt: skip
        self._sys, self._hottest, self._clock = sys, hottest, clock
        self._energy: dict[Path, tuple[float, float]] = {}  # joules and when

    def read(self) -> Reading:
        """Takes a few milliseconds where a driver asks a chip."""
        heats = tuple(self._heats())
        batteries = [found for one in self._batteries() if (found := _discharge(one)) is not None]
        packages = self._packages()  # counted on in any case, so that there is no gap when the battery is done with
        if batteries:
            return Reading(sum(batteries), "battery", None, heats)
        if packages is not None:
            return Reading(*packages, heats)
        return Reading(heats=heats)

    def present(self) -> list[str]:
        """The kinds of sensor there are, whether or not they say anything now."""
        found = ["battery"] if any(_can_tell(one) for one in self._batteries()) else []
        found += ["RAPL"] if any(_number(zone / "energy_uj") is not None for zone in self._zones()) else []
        return found + (["temperature"] if any(True for _ in self._heats()) else [])

    def _batteries(self) -> list[Path]:
        supplies = sorted((self._sys / "class/power_supply").glob("*"))
        return [one for one in supplies if _text(one / "type") == "Battery" and _text(one / "scope") != "Device"]

    def _zones(self) -> list[Path]:
        """Whole packages, not the parts that are counted in them."""
        return [one for one in sorted((self._sys / "class/powercap").glob("intel-rapl:*")) if one.name.count(":") == 1]

    def _packages(self) -> tuple[float, str, float | None] | None:
        """Watts since the reading before, and the power that the packages may draw for long."""
        now, watts, limits = self._clock(), 0.0, 0.0
        told = False
        for zone in self._zones():
            energy = _number(zone / "energy_uj")
            if energy is None:
                continue
            before, at = self._energy.get(zone, (0.0, math.inf))
            self._energy[zone] = energy, now
            wrap = _number(zone / "max_energy_range_uj") or 0.0
            used = energy - before if energy >= before else energy - before + wrap
            if now > at and used >= 0:
                told, watts = True, watts + used / 1e6 / (now - at)
                limits += (_number(zone / "constraint_0_power_limit_uw") or 0.0) / 1e6
        return (watts, "RAPL", limits or None) if told and watts <= MOST_W else None

    def _heats(self) -> Iterator[Heat]:
        for one in self._batteries():
            tenths = _number(one / "temp")
            if tenths is not None and 0 < tenths < 1500:
                yield Heat(tenths / 10, BATTERY_HIGH)
        if (hottest := self._hottest()) is not None:
            yield hottest


BATTERY_HIGH = 45.0  # °C: where JEITA's guideline for lithium-ion cells ends normal charging


def _can_tell(battery: Path) -> bool:
    power, current = _number(battery / "power_now"), _number(battery / "current_now")
    return power is not None or (current is not None and _number(battery / "voltage_now") is not None)


def _discharge(battery: Path) -> float | None:
    """Watts out of it. Drivers differ in the sign of a current, so its direction is told by `status`."""
    if _text(battery / "status") != "Discharging":
        return None
    power = _number(battery / "power_now")
    if power is None:
        current, voltage = _number(battery / "current_now"), _number(battery / "voltage_now")
        if current is None or voltage is None:
            return None
        power = current * voltage / 1e6  # µA·µV to µW
    watts = abs(power) / 1e6
    return watts if 0 < watts <= MOST_W else None


def _text(path: Path) -> str:
    with contextlib.suppress(OSError, UnicodeDecodeError):
        return path.read_text(encoding="ascii").strip()
    return ""


def _number(path: Path) -> float | None:
    """What a file of /sys says; None where it is missing, may not be read, or is no number."""
    with contextlib.suppress(ValueError):
        value = float(_text(path))
        return value if math.isfinite(value) else None
    return None
