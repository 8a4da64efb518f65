"""Tokens: what was signed here is taken, whatever else is refused in words and at no cost."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import jwt
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloud_server.tokens import MAX_MISSED, Signer, Trusted, Verifier
from protocol.errors import FaultCode, SessionFault
from support.forgery import FORGERIES, Forger

SIGNER = Signer("key-1", Ed25519PrivateKey.generate())
TRUSTED = Trusted({SIGNER.kid: SIGNER.key.public_key()}, {}, SIGNER)


def refusal(token: str, trusted: Trusted = TRUSTED) -> str:
    with pytest.raises(SessionFault) as refused:
        Verifier(trusted).verify(token)
    assert refused.value.code is FaultCode.UNAUTHENTICATED
    return refused.value.message


def test_a_token_names_its_device_scopes_and_times() -> None:
    now = time.time()
    caller = Verifier(TRUSTED).verify(SIGNER.token("phone-1", ["generate", "admin"], 60))
    assert (caller.device, caller.scopes) == ("phone-1", {"generate", "admin"})
    assert now - 1 <= caller.since <= now
    assert caller.expires - caller.since == 60


@pytest.mark.parametrize("name", FORGERIES)
def test_what_was_not_signed_here_for_us_and_now_is_refused(name: str) -> None:
    token, words = Forger(SIGNER).make(name)
    said = refusal(token)
    assert words in said
    assert len(said) < 300
    assert not token or token not in said


@pytest.mark.parametrize("claim", ["iss", "aud", "sub", "exp", "iat", "scope"])
def test_every_claim_is_required(claim: str) -> None:
    assert claim in refusal(Forger(SIGNER).signed(**{claim: None}))


@pytest.mark.parametrize(
    "change",
    [
        {"exp": "1e999"}, {"exp": float("inf")}, {"exp": 10**400}, {"exp": True}, {"iat": float("nan")},
        {"iat": []}, {"sub": 7}, {"sub": ""}, {"sub": "two\nlines"}, {"sub": "x" * 129}, {"scope": ["generate"]},
        {"auth_time": "yesterday"}, {"auth_time": None}, {"nbf": {}}, {"exp": 4_102_444_800},  # in the year 2100
    ],
    ids=str,
)  # fmt: skip
def test_a_well_signed_token_may_not_say_anything(change: dict[str, Any]) -> None:
    assert refusal(Forger(SIGNER).signed(**change))


def test_a_clock_a_little_ahead_is_no_reason() -> None:
    now = int(time.time())
    assert Verifier(TRUSTED).verify(Forger(SIGNER).signed(iat=now + 3, nbf=now + 3)).device == "phone"


def test_a_revocation_ends_renewed_tokens_too() -> None:
    then = time.time() - 100
    renewed = SIGNER.token("phone", ["generate"], 60, since=then)
    assert Verifier(TRUSTED).verify(renewed).since == int(then)
    revoked = dataclasses.replace(TRUSTED, revoked={"phone": then + 50})
    assert "'phone' was revoked" in refusal(renewed, revoked)
    assert Verifier(revoked).verify(SIGNER.token("phone", ["generate"], 60)).device == "phone"


def test_a_scope_that_lacks_is_named() -> None:
    caller = Verifier(TRUSTED).verify(SIGNER.token("phone", ["generate"], 60))
    caller.need("generate")
    with pytest.raises(SessionFault, match="'phone' lacks the scope 'admin'"):
        caller.need("admin")


def test_a_flood_of_unknown_keys_is_looked_up_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a signature was checked")

    verifier, forger = Verifier(TRUSTED), Forger(SIGNER)
    flood = [forger.unknown_kid(f"kid-{n}") for n in range(2 * MAX_MISSED)]
    monkeypatch.setattr(jwt, "decode", never)
    for token in flood:
        with pytest.raises(SessionFault, match="unknown key"):
            verifier.verify(token)
    assert len(verifier.missed()) == MAX_MISSED
    assert not verifier.missed()


def test_new_keys_count_from_the_moment_they_are_taken() -> None:
    other = Signer("key-2", Ed25519PrivateKey.generate())
    verifier, told = Verifier(TRUSTED), []
    verifier.changed = lambda: told.append(True)
    verifier.take(Trusted({other.kid: other.key.public_key()}, {}, other))
    assert verifier.verify(other.token("phone", ["generate"], 60)).device == "phone"
    assert told == [True]
    with pytest.raises(SessionFault, match="unknown key"):
        verifier.verify(SIGNER.token("phone", ["generate"], 60))
