"""A running average with a prior and a memory."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(slots=True)
class Mean:
    """A decaying average that begins with a prior worth `weight`."""

    prior: float
    weight: float
    memory: float
    least: float = -math.inf  # that a value on disk may be
    count: float = 0.0
    total: float = 0.0

    @property
    def value(self) -> float:
        if not self.count:
            return self.prior
        return (self.prior * self.weight + self.total) / (self.weight + self.count)

    def book(self, total: float, count: float) -> None:
        """`count` more that came to `total`; what was seen before weighs at most `memory`."""
        keep = math.exp(-count / self.memory)
        self.total, self.count = keep * self.total + total, keep * self.count + count

    def kept(self) -> list[float]:
        return [self.count, self.total]

    def restore(self, kept: object) -> None:
        """Takes over what `kept` gave; anything else is passed over."""
        match kept:
            case [int() | float() as count, int() | float() as total]:
                if 0 < count < math.inf and self.least * count <= total < math.inf:
                    self.count = min(float(count), 2 * self.memory)
                    self.total = total * self.count / count
