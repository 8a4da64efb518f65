"""A clock that stands until it is moved."""

from __future__ import annotations


class Clock:
    """Seconds; to be called for the time, as `time.monotonic` is."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now
