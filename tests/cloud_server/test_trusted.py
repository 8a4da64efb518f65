"""Keys from elsewhere: read beside the requests, bounded in size and time, and kept when the source fails."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from cloud_server import keys, trusted
from cloud_server.config import ServerConfig
from cloud_server.keys import BadKeys
from cloud_server.tokens import Signer, Verifier
from cloud_server.trusted import JWKS_LIFE_S, MAX_JWKS, Jwks, verifying
from protocol.errors import SessionFault
from support.clock import Clock

pytestmark = pytest.mark.anyio
NOBODY: frozenset[str] = frozenset()


def signer(kid: str) -> Signer:
    return Signer(kid, Ed25519PrivateKey.generate())


def jwk(one: Signer) -> dict[str, object]:
    x = base64.urlsafe_b64encode(one.key.public_key().public_bytes_raw()).rstrip(b"=").decode()
    return {"kty": "OKP", "crv": "Ed25519", "kid": one.kid, "x": x, "alg": "EdDSA", "use": "sig"}


def jwks(*signers: Signer) -> bytes:
    return json.dumps({"keys": [jwk(one) for one in signers]}).encode()


class Site:
    """An HTTP server of one page; counts who asked."""

    def __init__(self, body: bytes):
        self.body, self.status, self.asked, self.stalls = body, "200 OK", 0, False
        self.url = ""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await reader.readuntil(b"\r\n\r\n")
            self.asked += 1
            writer.write(f"HTTP/1.1 {self.status}\r\nconnection: close\r\n\r\n".encode() + self.body)
            await writer.drain()
            if self.stalls:
                await reader.read()
        except (ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            writer.close()


@asynccontextmanager
async def site(body: bytes) -> AsyncIterator[Site]:
    made = Site(body)
    async with await asyncio.start_server(made.serve, "127.0.0.1", 0) as server:
        made.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/jwks.json"
        yield made


async def test_keys_of_a_file_and_of_a_url_sign_alike(tmp_path: Path) -> None:
    ours = signer("a")
    (tmp_path / "jwks.json").write_bytes(jwks(ours, signer("b")))
    async with site(jwks(ours)) as made:
        for place in (str(tmp_path / "jwks.json"), made.url):
            verifier = Verifier(await Jwks(place).read(NOBODY))
            assert verifier.verify(ours.token("phone", ["generate"], 60)).device == "phone"
            assert verifier.trusted.signer is None


async def test_a_flood_of_unknown_kids_makes_one_fetch_an_interval_and_none_when_known_to_be_absent() -> None:
    clock, first, second = Clock(0.0), signer("a"), signer("b")
    async with site(jwks(first)) as made:
        source = Jwks(made.url, clock=clock)
        verifier = Verifier(await source.read(NOBODY))
        for number in range(1000):
            with pytest.raises(SessionFault, match="unknown key"):
                verifier.verify(signer(f"kid-{number % 500}").token("phone", ["generate"], 60))
        assert made.asked == 1
        verifier.take(await source.read(verifier.missed()))
        assert made.asked == 2
        for _ in range(3):  # the same again: known to be absent
            with pytest.raises(SessionFault, match="unknown key"):
                verifier.verify(signer("kid-7").token("phone", ["generate"], 60))
            verifier.take(await source.read(verifier.missed()))
        assert made.asked == 2
        made.body = jwks(first, second)
        with pytest.raises(SessionFault, match="unknown key"):
            verifier.verify(second.token("phone", ["generate"], 60))
        verifier.take(await source.read(verifier.missed()))
        assert made.asked == 3
        assert verifier.verify(second.token("phone", ["generate"], 60)).device == "phone"
        clock.now += JWKS_LIFE_S
        await source.read(NOBODY)
        assert made.asked == 4


async def test_a_source_that_fails_later_keeps_its_keys_and_revocations_are_still_read(tmp_path: Path) -> None:
    clock, ours = Clock(0.0), signer("a")
    keys.make(tmp_path / "keys", ["localhost"])
    async with site(jwks(ours)) as made:
        source = Jwks(made.url, tmp_path / "keys", clock)
        verifier = Verifier(await source.read(NOBODY))
        token = ours.token("phone", ["generate"], 60)
        made.status = "500 Broken"
        keys.revoke(tmp_path / "keys", "phone")
        clock.now += JWKS_LIFE_S
        verifier.take(await source.read(NOBODY))
        with pytest.raises(SessionFault, match="revoked"):
            verifier.verify(token)
        assert verifier.verify(ours.token("other", ["generate"], 60)).device == "other"


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (b"{", "Expecting"),
        (b"[" * 50_000, "recursion"),
        (b"[]", "not a JWKS"),
        (b'{"keys": {}}', "not a JWKS"),
        (b'{"keys": [1, null, {"kty": "OKP"}, {"kty": "oct", "k": "AAAA", "kid": "x"}]}', "no Ed25519 key"),
        (b'{"keys": [{"kty": "OKP", "crv": "Ed25519", "x": "AAAA", "kid": "x"}]}', "no Ed25519 key"),
        (b" " * (MAX_JWKS + 1), f"over {MAX_JWKS} bytes"),
        (b"\xff\xfe\x00", "codec"),
    ],
    ids=lambda value: repr(value[:40]),
)
async def test_what_is_no_key_set_is_named_at_start(tmp_path: Path, body: bytes, words: str) -> None:
    (tmp_path / "jwks.json").write_bytes(body)
    async with site(body) as made:
        for place in (str(tmp_path / "jwks.json"), made.url):
            with pytest.raises(BadKeys, match="jwks") as bad:
                await Jwks(place).read(NOBODY)
            assert words in str(bad.value)


async def test_a_private_key_is_not_taken_for_a_public_one(tmp_path: Path) -> None:
    one, private = signer("a"), signer("b")
    d = base64.urlsafe_b64encode(private.key.private_bytes_raw()).rstrip(b"=").decode()
    (tmp_path / "jwks.json").write_text(json.dumps({"keys": [jwk(one), jwk(private) | {"d": d}]}))
    assert set((await Jwks(str(tmp_path / "jwks.json")).read(NOBODY)).keys) == {"a"}


async def test_a_source_that_stalls_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trusted, "JWKS_TIMEOUT_S", 0.2)
    async with site(jwks(signer("a"))[:20]) as made:
        made.stalls = True
        with pytest.raises(BadKeys, match="TimeoutError"):
            await Jwks(made.url).read(NOBODY)


@pytest.mark.parametrize("place", ["http://example.org/jwks.json", "https://[bad/jwks.json", "/nowhere/jwks.json"])
async def test_a_place_that_cannot_be_is_named(place: str) -> None:
    with pytest.raises((BadKeys, ValueError)):
        await Jwks(place).read(NOBODY)


async def test_a_server_reads_its_folder_again_while_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "keys"
    keys.make(folder, ["localhost"])
    token = keys.issue(folder, "phone")
    told = asyncio.Event()
    async with verifying(ServerConfig(tmp_path, keys=folder), every_s=0.01) as verifier:
        assert verifier is not None
        assert verifier.verify(token).device == "phone"
        verifier.changed = told.set
        keys.revoke(folder, "phone")
        while "phone" not in verifier.trusted.revoked:
            told.clear()
            await told.wait()
        with pytest.raises(SessionFault, match="revoked"):
            verifier.verify(token)
        unread = asyncio.Event()
        monkeypatch.setattr(trusted.log, "error", lambda *_: unread.set())
        (folder / "revoked").write_text("nonsense\n")
        await unread.wait()
        with pytest.raises(SessionFault, match="revoked"):
            verifier.verify(token)


async def test_a_server_without_keys_asks_nobody(tmp_path: Path) -> None:
    async with verifying(ServerConfig(tmp_path)) as verifier:
        assert verifier is None
