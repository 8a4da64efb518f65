"""Everything that is decided before the server starts."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from pathlib import Path

from cloud_server.quota import UNLIMITED, Quota
from cloud_server.tokens import AUDIENCE, ISSUER, LIFE_S, LONGEST_LIFE_S
from protocol.limits import HttpLimits
from protocol.transport.base import Address, ServerTls
from protocol.transport.quic_door import Bounds
from split_model.settings import Precision

LONGEST_KEEP_S = 86_400.0


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """Counts are sessions, lengths are positions, times are seconds; port 0 lets the system choose."""

    model: Path
    tiny: Path | None = None  # makes drafts here
    precision: Precision | None = None  # None: as it is stored, or bf16
    tiny_precision: Precision | None = None
    host: str = "127.0.0.1"
    port: int = 4433  # UDP for QUIC, TCP for gRPC
    http_port: int = 8000
    keys: Path | None = None  # folder made by `cloud-server keys`
    jwks: str | None = None  # file or URL of other keys that tokens may be signed with, instead of the folder's
    issuer: str = ISSUER
    audience: str = AUDIENCE
    certificate: Path | None = None  # instead of the folder's, with its key
    certificate_key: Path | None = None
    token_life_s: float = LIFE_S  # of a renewed token
    quota: Quota = UNLIMITED
    insecure: bool = False  # may listen beyond loopback without keys
    slots: int = 32
    waiting: int = 64
    context: int | None = None  # the model's own when None
    step_tokens: int = 128
    keep_s: float = 300.0  # that a device's KV is kept for its next session; 0: not at all
    shared_prefix: Path | None = None  # text of a system prompt, computed at the start for everybody
    threads: int | None = None
    advertise: Address | None = None
    peers: tuple[str, ...] = ()
    drain_s: float = 20.0
    open_s: float = 10.0  # how long a new channel may take to say Open
    http: HttpLimits = field(default_factory=HttpLimits)
    quic: Bounds = field(default_factory=Bounds)

    @property
    def guarded(self) -> bool:
        """Callers need a token."""
        return bool(self.keys or self.jwks)

    @property
    def tls(self) -> ServerTls | None:
        """Without it there is plain HTTP, and neither QUIC nor gRPC."""
        if self.certificate and self.certificate_key:
            return ServerTls(self.certificate, self.certificate_key)
        return ServerTls(self.keys / "server.pem", self.keys / "server.key") if self.keys else None

    def check(self) -> None:
        """Raises ValueError for a server that would be open to strangers, or whose keys do not fit together."""
        if bool(self.certificate) != bool(self.certificate_key):
            raise ValueError("--certificate and --certificate-key need each other")
        if not self.jwks and (self.issuer, self.audience) != (ISSUER, AUDIENCE):
            raise ValueError("--issuer and --audience are those of tokens that --jwks lets in")
        if self.jwks and self.tls is None:
            raise ValueError("--jwks needs a certificate: --certificate and --certificate-key, or --keys")
        if not 1 <= self.token_life_s <= LONGEST_LIFE_S:
            raise ValueError(f"--token-life {self.token_life_s:g}, must be 1 to {LONGEST_LIFE_S:.0f} s")
        if not 0 <= self.keep_s <= LONGEST_KEEP_S:
            raise ValueError(f"--keep {self.keep_s:g}, must be 0 to {LONGEST_KEEP_S:.0f} s")
        if not self.guarded and not self.insecure and not _is_loopback(self.host):
            raise ValueError(f"without --keys only loopback is listened on, not {self.host}; or say --insecure")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
