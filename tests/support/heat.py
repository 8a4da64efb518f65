"""A phone's heat and battery as a model, in virtual time. Not a measurement: its constants are round numbers."""

from __future__ import annotations

from dataclasses import dataclass

from edge_agent.power import Heat, Reading

AMBIENT = 25.0  # °C


@dataclass
class ModelPhone:
    """One mass that warms up by what it draws and cools towards the room; `work_w` is drawn at full speed."""

    idle_w: float = 1.0
    work_w: float = 6.0
    kelvin_per_watt: float = 4.0
    joules_per_kelvin: float = 160.0  # 640 s until it has warmed up by two thirds
    battery_j: float = 54_000.0  # 15 Wh
    celsius: float = AMBIENT
    worked_s: float = 0.0  # at full speed
    drawn_j: float = 0.0

    def run(self, seconds: float, share: float) -> Reading:
        """Works for that share of the time. Returns what sensors would read at the end."""
        watts = self.idle_w + share * self.work_w
        lost = (self.celsius - AMBIENT) / self.kelvin_per_watt
        self.celsius += (watts - lost) * seconds / self.joules_per_kelvin
        self.worked_s += share * seconds
        self.drawn_j += watts * seconds
        return Reading(watts, "battery", None, (Heat(self.celsius, 45.0),))

    @property
    def charge(self) -> float:
        return max(0.0, 1 - self.drawn_j / self.battery_j)
