"""Certificates and tokens: what is made is accepted, what was not made here is not."""

from __future__ import annotations

import time
from pathlib import Path

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloud_server import keys
from protocol.errors import FaultCode, SessionFault


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keys.make(tmp_path / "keys", ["localhost"])
    return tmp_path / "keys"


def test_a_token_names_its_device(folder: Path) -> None:
    assert keys.Verifier(folder).device(keys.issue(folder, "phone-1", 60)) == "phone-1"


def test_keys_are_private_and_never_overwritten(folder: Path) -> None:
    for name in ("ca.key", "server.key", "signing.key"):
        assert (folder / name).stat().st_mode & 0o077 == 0
    with pytest.raises(keys.BadKeys, match="is not empty"):
        keys.make(folder, ["localhost"])


def test_tokens_that_are_not_ours_are_refused(folder: Path, tmp_path: Path) -> None:
    keys.make(tmp_path / "others", ["localhost"])
    good = keys.issue(folder, "phone", 60)
    kid = jwt.get_unverified_header(good)["kid"]
    claims = {"iss": "tandem", "aud": "tandem", "sub": "phone", "iat": int(time.time()), "exp": int(time.time()) + 60}
    forged = Ed25519PrivateKey.generate()

    def signed(**change: object) -> str:
        return jwt.encode(claims | change, keys._signing_key(folder), "EdDSA", {"kid": kid})

    bad = {
        "no token": "",
        "expired": keys.issue(folder, "phone", -60),
        "another server's": keys.issue(tmp_path / "others", "phone", 60),
        "forged": jwt.encode(claims, forged, "EdDSA", {"kid": kid}),
        "alg none": jwt.encode(claims, None, "none", {"kid": kid}),
        "HS256": jwt.encode(claims, "x" * 32, "HS256", {"kid": kid}),
        "wrong audience": signed(aud="else"),
        "wrong issuer": signed(iss="else"),
        "from the future": signed(iat=int(time.time()) + 600),
        "garbage": "a.b.c",
    }
    verifier = keys.Verifier(folder)
    assert verifier.device(good) == "phone"
    for name, token in bad.items():
        with pytest.raises(SessionFault) as refused:
            verifier.device(token)
        assert refused.value.code is FaultCode.UNAUTHENTICATED, name


def test_a_folder_without_keys_is_named(tmp_path: Path) -> None:
    with pytest.raises(keys.BadKeys, match=r"signing\.key"):
        keys.Verifier(tmp_path)
