"""What is known about this phone, and the frozen record of everything a score depends on."""

from __future__ import annotations

import ipaddress
import logging
import math
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

import psutil

from edge_agent.power import Heat
from edge_agent.state import State

log = logging.getLogger(__name__)
LEAST_SHARE = 0.25  # of the processor, however loaded it is: other work gives way in part
LONG_S, RECENT_S = 30.0, 0.5  # seconds of work that the two averages of a pace span
FORGET_S = 300.0  # time in which the latest runs lose most of their say
LEAST_BATTERY = 0.3  # of a phone that is not plugged in, for work that nobody waits for
HIGH = 90.0  # °C: of a sensor that does not say what is high
MOST_FIRST = 0.75  # of a pass over many positions that its first one may be thought to have taken
KEPT = 0.7  # weight of the past in the other running averages


class Network(StrEnum):
    """Kinds of network, as far as the name of an interface tells them."""

    LOOPBACK = "loopback"
    WIRED = "wired"
    WIFI = "wifi"
    CELLULAR = "cellular"


@dataclass(frozen=True, slots=True)
class Rates:
    """FLOP/s: of the positions of a pass behind its first one, and of one position at a time."""

    prefill: float
    decode: float


@dataclass(frozen=True, slots=True)
class Power:
    """What the energy governor leaves of the local rate, and on what grounds; `level` is 1 at the limit."""

    share: float = 1.0
    level: float | None = None
    watts: float | None = None
    celsius: float | None = None
    source: str = "nothing to read: the governor is off"


NO_POWER = Power()


@dataclass(frozen=True, slots=True)
class Phone:
    """This machine now; loads and battery are fractions, `under_way` counts answers that share the compute thread."""

    tiny: Rates
    full: Rates
    under_way: int = 0
    cpu_load: float = 0.0  # by other programs
    memory_free: int = 0  # bytes
    battery: float | None = None
    plugged: bool | None = None
    power: Power = NO_POWER
    drafts: Rates | None = None  # of the tiny model while it drafts; its own where that was not measured
    front: Rates | None = None  # of the full model's layers in a split, likewise

    @property
    def share(self) -> float:
        """Of the rates, what one more answer gets."""
        return self.power.share / (1 + self.under_way)

    @property
    def drafting(self) -> Rates:
        """Of the tiny model while it drafts."""
        return self.drafts or self.tiny

    @property
    def in_front(self) -> Rates:
        """Of the full model's layers in a split."""
        return self.front or self.full

    @property
    def spare(self) -> bool:
        """Whether there is power for work that nobody waits for."""
        empty = self.plugged is False and self.battery is not None and self.battery < LEAST_BATTERY
        return self.power.share >= 1 and not empty


@dataclass(frozen=True, slots=True)
class Cloud:
    """The replica that would be used, and the path to it; rates of the path in bytes/s."""

    address: str
    rtt_s: float
    up: float
    down: float
    rates: Rates
    wait_s: float = 0.0
    handshake_trips: int = 0
    cold: bool = False  # a connection must be opened first, so its window starts small
    token_bytes: int = 0  # of the device token that every session shows
    price_s_per_mb: float = 0.0
    load_age_s: float | None = None
    draft_rate: float = 0.0  # FLOP/s of its own tiny model, drafting; 0 where it has none
    others: int = 0  # rows in its batch, beside ours
    unreachable: str | None = None
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class Missed:
    """Seconds by which answers of a route took longer than predicted: until the first token, and for each later one."""

    first_s: float = 0.0
    token_s: float = 0.0


@dataclass(frozen=True, slots=True)
class Misses:
    """By kind of plan; added to predictions. `tiny`: local by that model; `assisted`: cloud with its own drafts."""

    tiny: Missed = Missed()
    local: Missed = Missed()
    cloud: Missed = Missed()
    assisted: Missed = Missed()
    split: Missed = Missed()
    speculative: Missed = Missed()


NO_MISSES = Misses()


@dataclass(frozen=True, slots=True)
class Conditions:
    """Everything but the job that a score depends on.

    `held_…`: positions of the prompt in the KV of the tiny model, of the full one here, and of the cloud's, where they
    came as ids; `held_front`: positions whose hidden states behind layer `front` of the full one are here as well.
    """

    phone: Phone
    cloud: Cloud | None
    answer_tokens: float = 40.0
    agreement: float = 0.7  # of the tiny model's tokens with the full one's, and so of the drafts that are accepted
    held_tiny: int = 0
    alpha: float = 0.5
    held_full: int = 0
    held_cloud: int = 0
    held_front: int = 0
    front: int = 0
    places: tuple[float, ...] = ()  # of drafts at each place accepted, given that those before were; as far as known
    missed: Misses = NO_MISSES
    entropy: float | None = None  # nats, of the tiny model behind the prompt


def average(old: float | None, new: float) -> float:
    """The running average that every learned number uses."""
    return new if old is None else KEPT * old + (1 - KEPT) * new


@dataclass(slots=True)
class Pace:
    """Seconds per FLOP, averaged over much work and over the latest; `at`: when the latest was, by the clock."""

    long: float
    recent: float
    at: float = -math.inf


class Meter:
    """This machine's speed with each model: the long average is kept on disk, every run moves both.

    The latest runs know how busy the machine is. They are believed less the older they are, and what other programs
    take of the processor is then put in their place.
    """

    def __init__(self, state: State, clock: Callable[[], float] = time.monotonic):
        self._state, self._clock = state, clock
        self._paces: dict[str, dict[str, Pace]] = {}
        for key, kept in state.read("rates").items():
            if isinstance(kept, dict) and all(_sound(value) for value in kept.values()):
                self._paces[key] = {kind: Pace(1 / value, 1 / value) for kind, value in kept.items()}

    def rates(self, key: str, cpu_load: float = 0.0, use: str = "decode") -> Rates | None:
        """None before both kinds of run were measured. `use`: "draft" or "front", what single positions are for."""
        known = self._paces.get(key, {})
        if not {"prefill", "decode"} <= known.keys():
            return None
        paces = known["prefill"], known.get(use, known["decode"])
        return Rates(*(1 / self._now(pace, cpu_load) for pace in paces))

    def further(self, key: str, flops: float, seconds: float, first: float) -> None:
        """A pass over many positions, the first of so many FLOPs: the others are a sample of "prefill"."""
        decode = self._paces.get(key, {}).get("decode")
        first_s = min(first * decode.recent, MOST_FIRST * seconds) if decode else 0.0
        self.sample(key, "prefill", flops - (first if decode else 0.0), seconds - first_s)

    def sample(self, key: str, kind: str, flops: float, seconds: float) -> None:
        """The longer the run, the more it counts. Called on the compute thread only."""
        seconds = max(seconds, 1e-6)
        pace, known = seconds / flops, self._paces.setdefault(key, {})
        kept = known.setdefault(kind, Pace(pace, pace))
        kept.long += (1 - math.exp(-seconds / LONG_S)) * (pace - kept.long)
        kept.recent += (1 - math.exp(-seconds / RECENT_S)) * (pace - kept.recent)
        kept.at = self._clock()

    def save(self) -> None:
        kept = {key: {kind: 1 / pace.long for kind, pace in known.items()} for key, known in self._paces.items()}
        self._state.write("rates", dict(kept))

    def _now(self, pace: Pace, cpu_load: float) -> float:
        fresh = math.exp((pace.at - self._clock()) / FORGET_S)
        return fresh * pace.recent + (1 - fresh) * pace.long / max(LEAST_SHARE, 1 - cpu_load)


def _sound(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0


def hottest() -> Heat | None:
    """The temperature that is nearest to where its sensor calls it high."""
    found = psutil.sensors_temperatures() if hasattr(psutil, "sensors_temperatures") else {}
    heats = [Heat(one.current, one.high or one.critical or HIGH) for some in found.values() for one in some]
    return max((one for one in heats if 0 < one.celsius < 150), key=lambda one: one.celsius / one.high, default=None)


class Machine:
    """Processor, memory and battery, read at most twice a second."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._process = psutil.Process()
        self._before = self._times()
        self._read_at = clock()
        self._load = 0.0

    @property
    def load(self) -> float:
        """The share of the processor that other programs took, since it was read before."""
        if self._clock() - self._read_at >= 0.5:
            self._read_at = self._clock()
            before, self._before = self._before, self._times()
            busy, own, total = (now - then for now, then in zip(self._before, before, strict=True))
            self._load = min(1.0, max(0.0, (busy - own) / total)) if total > 0 else self._load
        return self._load

    def phone(self, tiny: Rates, full: Rates, under_way: int, power: Power = NO_POWER,
              drafts: Rates | None = None, front: Rates | None = None) -> Phone:  # fmt: skip
        """This machine now."""
        battery = psutil.sensors_battery() if hasattr(psutil, "sensors_battery") else None
        return Phone(
            tiny, full, under_way, round(self.load, 3), psutil.virtual_memory().available,
            battery.percent / 100 if battery else None, battery.power_plugged if battery else None,
            power, drafts, front,
        )  # fmt: skip

    def _times(self) -> tuple[float, float, float]:
        """Seconds busy (but for niced work, which gives way), busy for this program, and in all."""
        times = psutil.cpu_times()._asdict()
        times = {name: value for name, value in times.items() if not name.startswith("guest")}  # counted in user
        total = sum(times.values())
        idle = sum(times.get(name, 0.0) for name in ("idle", "iowait", "nice"))
        mine = self._process.cpu_times()
        return total - idle, mine.user + mine.system, total


def network_kind(host: str) -> Network:
    """The kind of network that leads to `host`; asks the resolver, sends nothing. Unknown ones count as cellular."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            mine = probe.getsockname()[0]
    except OSError:
        return Network.CELLULAR
    if ipaddress.ip_address(mine.partition("%")[0]).is_loopback:
        return Network.LOOPBACK
    name = interface(mine)
    if name.startswith(("wl", "wifi", "ath")):
        return Network.WIFI
    return Network.WIRED if name.startswith(("e", "br", "veth")) else Network.CELLULAR


def interface(address: str) -> str:
    """The name of the one that has this address, empty where none has."""
    names = [name for name, held in psutil.net_if_addrs().items() if any(one.address == address for one in held)]
    return names[0] if names else ""
