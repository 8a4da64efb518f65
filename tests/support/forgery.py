"""Tokens that must not be taken."""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import time
from typing import Any

import jwt
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloud_server.tokens import Signer
from protocol.limits import MAX_TOKEN

FORGERIES = (
    "missing", "expired", "forged", "wrong audience", "wrong issuer", "future", "not before", "8 KB", "alg none",
    "HS256 with the public key", "unknown kid", "no kid", "kid of another type", "nested header", "header is a list",
    "garbage", "not ASCII", "cut",
)  # fmt: skip


class Forger:
    """Knows a server's key id and public key, and for `signed` its private one too."""

    def __init__(self, signer: Signer):
        self._signer = signer

    def signed(self, **change: Any) -> str:
        """Signed well; what it says is changed, and left out where the change is None (`auth_time` is then null)."""
        now = int(time.time())
        claims = {"iss": "tandem", "aud": "tandem", "sub": "phone", "iat": now, "exp": now + 60, "scope": "generate"}
        claims |= change
        left = {name: value for name, value in claims.items() if value is not None or name == "auth_time"}
        body = f"{_part({'alg': 'EdDSA', 'kid': self._signer.kid})}.{_part(left)}"
        return f"{body}.{_coded(self._signer.key.sign(body.encode()))}"

    def unknown_kid(self, kid: str) -> str:
        return jwt.encode({"sub": "phone"}, Ed25519PrivateKey.generate(), "EdDSA", {"kid": kid})

    def make(self, name: str) -> tuple[str, str]:
        """The token, and a word of the refusal."""
        now, good = int(time.time()), self.signed()
        _, claims, signature = good.split(".")
        kid = self._signer.kid
        public = self._signer.key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
        made = {
            "missing": ("", "no device token"),
            "expired": (self.signed(iat=now - 120, exp=now - 60), "expired"),
            "forged": (f"{good[:-20]}{'A' * 20}", "ignature"),
            "wrong audience": (self.signed(aud="else"), "udience"),
            "wrong issuer": (self.signed(iss="else"), "ssuer"),
            "future": (self.signed(iat=now + 600, exp=now + 900), "not yet valid"),
            "not before": (self.signed(nbf=now + 600), "not yet valid"),
            "8 KB": (good + "A" * (8192 - len(good)), f"limit {MAX_TOKEN}"),
            "alg none": (f"{_part({'alg': 'none', 'kid': kid})}.{claims}.", "refused"),
            "HS256 with the public key": (_hs256(kid, claims, public), "refused"),
            "unknown kid": (self.unknown_kid("nobody"), "unknown key"),
            "no kid": (f"{_part({'alg': 'EdDSA'})}.{claims}.{signature}", "unknown key"),
            "kid of another type": (f"{_part({'alg': 'EdDSA', 'kid': [kid]})}.{claims}.{signature}", "refused"),
            "nested header": (f"{_coded(b'[' * 2500)}.{claims}.{signature}", "refused"),
            "header is a list": (f"{_part([kid])}.{claims}.{signature}", "refused"),
            "garbage": ("a.b.c", "refused"),
            "not ASCII": ("tökén.ß.✓", "refused"),
            "cut": (good[: len(good) // 2], "refused"),
        }
        return made[name]


def _hs256(kid: str, claims: str, secret: bytes) -> str:
    """By hand, since the library will not sign with a public key."""
    body = f"{_part({'alg': 'HS256', 'kid': kid})}.{claims}"
    return f"{body}.{_coded(hmac.digest(secret, body.encode(), hashlib.sha256))}"


def _part(value: object) -> str:
    return _coded(json.dumps(value).encode())


def _coded(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
