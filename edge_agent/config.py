"""Everything that is decided before the agent starts."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from protocol.limits import HttpLimits
from protocol.transport.base import Address
from split_model.settings import Precision


def default_state() -> Path:
    """Where the agent remembers things when it is not told."""
    return Path.home() / ".local" / "state" / "tandem"


@dataclass(frozen=True, slots=True)
class AgentConfig:
    """`tiny` and `full` are checkpoint folders; `edge_layers` of the full one are held here (None: all of them)."""

    tiny: Path
    full: Path
    clouds: tuple[Address, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8080
    ca: bytes = b""  # PEM
    token: str = field(default="", repr=False)  # that the agent begins with
    token_file: Path | None = None  # where renewed ones are kept
    token_urls: tuple[str, ...] = ()  # where to renew; none: the token stays as it is
    edge_layers: int | None = None
    precision: Precision | None = None  # of the full one's layers here; None: as they are stored, or bf16
    tiny_precision: Precision | None = None
    context: int | None = None  # positions that a conversation may have; what the models have when None
    state: Path = field(default_factory=default_state)
    alpha: float = 0.5  # weight of network time against compute time in the cost
    hidden_bits: int = 16  # of a prompt's hidden states in splits, where a request does not say; 8 is not exact
    price_s_per_mb: float = 0.0  # what a megabyte is worth, in seconds
    power_limit_w: float | None = None  # of the phone; None: the governor's own
    temperature_limit: float | None = None  # °C; None: what the sensors call high
    sensors: Path = Path("/sys")  # where the system tells of power and heat
    slots: int = 4  # answers under way at once on each of the two models
    requests: int = 32  # under way or waiting, in all
    threads: int | None = None
    drain_s: float = 10.0
    unix: Path | None = None  # a socket to listen on instead of a port
    allow_hosts: tuple[str, ...] = ()  # NAME or NAME:PORT that clients may call the agent by, beside loopback
    api_key: str = field(default="", repr=False)  # that clients must show; none when empty
    http: HttpLimits = field(default_factory=partial(HttpLimits, connections=64))
