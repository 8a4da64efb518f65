"""Links by name, and how netem is told of them."""

from __future__ import annotations

import math
import tomllib
from dataclasses import dataclass, fields
from pathlib import Path

PROFILES = Path(__file__).with_name("profiles.toml")
PACKET, LEAST_QUEUE = 1500, 32  # bytes; packets
BIN_MS = 100


@dataclass(frozen=True, slots=True)
class Profile:
    """`rtt_ms` and `jitter_ms` are of both ways together; `loss` is in percent each way, in runs of `burst` packets."""

    rtt_ms: float
    jitter_ms: float
    loss: float
    down_mbit: float
    up_mbit: float
    burst: float = 1
    limit: int = 0  # packets that a direction's queue holds; 0: max(32, 2 bandwidth-delay products)

    def __post_init__(self) -> None:
        for name, least, most in (("rtt_ms", 0, 60_000), ("jitter_ms", 0, 60_000), ("loss", 0, 100),
                                  ("down_mbit", 0.001, 10_000), ("up_mbit", 0.001, 10_000), ("burst", 1, 10_000),
                                  ("limit", 0, 1_000_000)):  # fmt: skip
            value = getattr(self, name)
            if not least <= value <= most:
                raise ValueError(f"{name} {value:g}, must be {least:g} to {most:g}")

    def shape(self) -> str:
        """Delay and loss of either direction, as netem's arguments."""
        words = ["delay", f"{self.rtt_ms / 2:g}ms", f"{self.jitter_ms / 2:g}ms"]
        if 0 < self.loss < 100 and self.burst > 1:
            leave = 100 / self.burst
            words += ["loss", "gemodel", f"{self.loss * leave / (100 - self.loss):.4f}%", f"{leave:.4f}%"]
        elif self.loss:
            words += ["loss", f"{self.loss:g}%"]
        return " ".join(words)

    def queue(self, mbit: float) -> int:
        """Packets."""
        return self.limit or max(LEAST_QUEUE, math.ceil(2 * mbit * self.rtt_ms * 1e3 / 8 / PACKET))

    def netem(self, mbit: float) -> str:
        """Of one direction. With a rate netem keeps the order of packets, whatever the jitter."""
        return f"{self.shape()} rate {1e3 * mbit:.0f}kbit limit {self.queue(mbit)}"

    def __str__(self) -> str:
        loss = f"{self.loss:g} % lost" + (f" in runs of {self.burst:g}" if self.burst > 1 else "")
        return f"RTT {self.rtt_ms:g} ms ±{self.jitter_ms:g}, {loss}, {self.down_mbit:g} down {self.up_mbit:g} up Mbit/s"


def load(path: Path = PROFILES) -> dict[str, Profile]:
    """Raises ValueError that names the profile."""
    known = {field.name for field in fields(Profile)}
    profiles = {}
    for name, values in tomllib.loads(path.read_text()).items():
        if unknown := values.keys() - known:
            raise ValueError(f"{path}: {name} has {', '.join(sorted(unknown))}")
        profiles[name] = Profile(**values)
    return profiles


def trace_rates(path: Path) -> list[int]:
    """kbit/s of each 100 ms of a mahimahi trace: a line is the time in ms at which 1,500 bytes can be delivered.

    No less than one packet a bin: netem would let a packet that meets a lower rate hold up all that follow.
    """
    try:
        times = [int(line) for line in path.read_text().split()]
    except ValueError as error:
        raise ValueError(f"{path} is not a trace of whole milliseconds: {error}") from None
    if not times or min(times) < 0 or times[-1] > 3_600_000:
        raise ValueError(f"{path}: a trace has 1 to 3,600,000 ms")
    counts = [0] * (times[-1] // BIN_MS + (times[-1] % BIN_MS > 0) or 1)
    for time in times:
        counts[min(time // BIN_MS, len(counts) - 1)] += 1
    return [max(1, count) * PACKET * 8 // BIN_MS for count in counts]
