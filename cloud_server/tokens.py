"""Device tokens: signed with a key we hold, checked against those we trust, with no wait and no I/O."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import jwt
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from protocol.errors import FaultCode, SessionFault
from protocol.limits import MAX_TOKEN

ISSUER = AUDIENCE = "tandem"
GENERATE, ADMIN = "generate", "admin"  # all inference; draining
SCOPES = frozenset({GENERATE, ADMIN})
CLAIMS = ["iss", "aud", "sub", "exp", "iat", "scope"]
LEEWAY_S = 5.0  # by which the clocks of two servers may differ
LIFE_S = 900.0  # of a token, if nothing else is said
LONGEST_LIFE_S = 30 * 86_400.0
MAX_DEVICE = 128  # characters of a device's name
MAX_MISSED = 256  # unknown kids kept until the keys are read again


@dataclass(frozen=True, slots=True)
class Caller:
    """Whom a token speaks for; times are Unix times."""

    device: str
    scopes: frozenset[str]
    expires: float
    since: float = 0.0  # when the device was let in: renewals keep it, so a revocation also ends tokens renewed later

    def need(self, scope: str) -> None:
        """Raises SessionFault UNAUTHENTICATED that names the scope this caller lacks."""
        if scope not in self.scopes:
            raise SessionFault(FaultCode.UNAUTHENTICATED, f"device {self.device!r} lacks the scope {scope!r}")


ANYONE = Caller("anonymous", SCOPES, math.inf)  # on a server without keys


@dataclass(frozen=True, slots=True)
class Signer:
    """The key that new tokens are signed with."""

    kid: str
    key: Ed25519PrivateKey

    def token(self, device: str, scopes: Iterable[str], life_s: float, since: float | None = None) -> str:
        """Valid from now for `life_s` seconds; `since` when it renews another."""
        now = int(time.time())
        claims = {"iss": ISSUER, "aud": AUDIENCE, "sub": device, "iat": now, "exp": now + int(life_s),
                  "auth_time": now if since is None else int(since), "scope": " ".join(sorted(scopes))}  # fmt: skip
        return jwt.encode(claims, self.key, algorithm="EdDSA", headers={"kid": self.kid})


@dataclass(frozen=True, slots=True)
class Trusted:
    """Public keys by kid, when each revoked device was put out, and the key for renewals where it is ours."""

    keys: Mapping[str, Ed25519PublicKey]
    revoked: Mapping[str, float]
    signer: Signer | None


class Verifier:
    """Checks tokens. `trusted` is replaced beside the requests, see trusted.py; `changed` is called after that."""

    def __init__(self, trusted: Trusted, issuer: str = ISSUER, audience: str = AUDIENCE):
        self.trusted = trusted
        self.changed: Callable[[], None] = lambda: None
        self._issuer, self._audience = issuer, audience
        self._missed: set[str] = set()

    def verify(self, token: str) -> Caller:
        """Raises SessionFault UNAUTHENTICATED that says what is wrong with the token, and never repeats it."""
        if not token:
            raise _refused("no device token was given")
        if len(token) > MAX_TOKEN:
            raise _refused(f"a device token of {len(token)} bytes, limit {MAX_TOKEN}")
        try:
            kid = jwt.get_unverified_header(token).get("kid")
            key = self.trusted.keys.get(kid) if kid else None
            if key is None:
                self._miss(kid)
                raise _refused("the device token was signed with an unknown key")
            claims = jwt.decode(
                token, key, algorithms=["EdDSA"], audience=self._audience, issuer=self._issuer, leeway=LEEWAY_S,
                options={"require": CLAIMS},
            )  # fmt: skip
            caller = _caller(claims)
        except (jwt.PyJWTError, ValueError, OverflowError, RecursionError) as error:
            raise _refused(f"device token refused: {error}") from None
        if self.revoked(caller):
            raise _refused(f"device {caller.device!r} was revoked")
        return caller

    def revoked(self, caller: Caller) -> bool:
        return caller.since <= self.trusted.revoked.get(caller.device, -math.inf)

    def take(self, trusted: Trusted) -> None:
        """From here on these keys and revocations count."""
        self.trusted = trusted
        self.changed()

    def missed(self) -> frozenset[str]:
        """The unknown kids since the last call."""
        missed, self._missed = frozenset(self._missed), set()
        return missed

    def _miss(self, kid: str | None) -> None:
        if kid and len(self._missed) < MAX_MISSED:
            self._missed.add(kid)


def check_device(device: str) -> None:
    """Raises ValueError for a name that would not fit a log line."""
    if not 0 < len(device) <= MAX_DEVICE or not device.isprintable() or device != device.strip():
        raise ValueError(f"device {device[:MAX_DEVICE]!r}, must be 1 to {MAX_DEVICE} printable characters")


def _refused(message: str) -> SessionFault:
    return SessionFault(FaultCode.UNAUTHENTICATED, message)


def _caller(claims: Mapping[str, object]) -> Caller:
    """Of a token whose signature, times, issuer and audience are right. Raises ValueError."""
    device, scope = claims["sub"], claims["scope"]
    expires, issued, since = (_time(claims.get(name, claims["iat"])) for name in ("exp", "iat", "auth_time"))
    if not isinstance(device, str) or not isinstance(scope, str):
        raise ValueError("sub and scope must be strings")
    check_device(device)
    if expires - issued > LONGEST_LIFE_S:
        raise ValueError(f"valid for {expires - issued:.0f} s, limit {LONGEST_LIFE_S:.0f}")
    return Caller(device, frozenset(scope.split()), expires, min(since, issued))


def _time(value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("exp, iat and auth_time must be numbers")
    return float(value)
