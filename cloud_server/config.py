"""Everything that is decided before the server starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from protocol.transport.base import Address


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Counts are sessions, lengths are positions, times are seconds; port 0 lets the system choose."""

    model: Path
    host: str = "127.0.0.1"
    port: int = 4433  # UDP for QUIC, TCP for gRPC
    http_port: int = 8000
    keys: Path | None = None  # folder made by `cloud-server keys`; without one the HTTP port speaks plain HTTP
    slots: int = 32
    waiting: int = 64
    context: int | None = None  # the model's own when None
    step_tokens: int = 128
    threads: int | None = None
    advertise: Address | None = None
    peers: tuple[str, ...] = ()
    drain_s: float = 20.0
    open_s: float = 10.0  # how long a new channel may take to say Open
