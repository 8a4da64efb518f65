"""The phone's token: private, renewed in time and written back; and the CA that a fingerprint names."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import ssl
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from cloud_server import keys
from cloud_server.config import ServerConfig
from cloud_server.server import CloudServer, running
from cloud_server.tokens import Verifier
from edge_agent import credentials
from edge_agent.credentials import Credentials, normal_fingerprint, pinned_ca, read_token, token_urls
from edge_agent.state import State
from protocol import private_files
from support.checkpoints import checkpoint

pytestmark = pytest.mark.anyio


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Keys that these tests may revoke devices in."""
    made = tmp_path_factory.mktemp("credentials") / "keys"
    keys.make(made, ["localhost", "127.0.0.1"])
    return made


@pytest.fixture
async def server(folder: Path) -> AsyncIterator[CloudServer]:
    config = ServerConfig(checkpoint(), port=0, http_port=0, keys=folder, threads=1, token_life_s=300)
    async with running(config) as server:
        yield server


def fingerprint(folder: Path) -> str:
    der = ssl.PEM_cert_to_DER_cert((folder / "ca.pem").read_text())
    return hashlib.sha256(der).hexdigest()


def unsigned(**claims: object) -> str:
    """The phone does not check signatures."""
    body = base64.urlsafe_b64encode(json.dumps(claims).encode()).rstrip(b"=").decode()
    return f"e30.{body}.AA"


async def test_a_token_is_renewed_and_written_back_for_its_owner_alone(
    server: CloudServer, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    private_files.replace(file, keys.issue(folder, "phone", 60).encode())
    urls = ("https://127.0.0.1:9/v1/token", f"https://{server.http}/v1/token")  # nobody listens at the first
    mine = Credentials(read_token(file), file, urls, (folder / "ca.pem").read_bytes())
    before, now = mine.token(), time.time()
    await mine.renew()
    assert mine.token() != before
    assert file.stat().st_mode & 0o777 == 0o600
    assert read_token(file) == mine.token()
    assert os.listdir(tmp_path) == ["token"]
    assert mine.due == pytest.approx(now + 200, abs=10)
    caller = Verifier(keys.read(folder)).verify(mine.token())
    assert (caller.device, caller.scopes) == ("phone", {"generate"})
    assert caller.expires <= time.time() + 300


class Counted(Credentials):
    """Knows how often it tried, and puts a better token into the file before the third time."""

    tries = 0
    better: tuple[Path, str] | None = None

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.renewed = asyncio.Event()

    async def renew(self) -> None:
        self.tries += 1
        if self.better and self.tries == 3:
            private_files.replace(self.better[0], self.better[1].encode())
        await super().renew()
        self.renewed.set()


async def test_a_token_that_is_due_is_renewed_in_the_background_and_looked_up(
    server: CloudServer, folder: Path, tmp_path: Path
) -> None:
    file = tmp_path / "token"
    private_files.replace(file, keys.issue(folder, "phone", 60).encode())
    ca, url = (folder / "ca.pem").read_bytes(), f"https://{server.http}/v1/token"
    later = Counted(read_token(file), file, [url], ca, lambda: time.time() + 41)
    before = later.token()
    async with later.renewing():
        await later.renewed.wait()
    assert later.token() != before
    assert read_token(file) == later.token()


async def test_a_token_that_is_not_due_is_left_alone(server: CloudServer, folder: Path) -> None:
    mine = Credentials(keys.issue(folder, "phone", 60), None, [f"https://{server.http}/v1/token"],
                       (folder / "ca.pem").read_bytes())  # fmt: skip
    assert mine.due == pytest.approx(time.time() + 40, abs=3)


async def test_why_a_token_is_not_renewed_is_told_once_and_a_better_one_in_the_file_is_taken(
    server: CloudServer, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(credentials, "FIRST_RETRY_S", 0.01)
    file = tmp_path / "token"
    private_files.replace(file, b"not.a.token")
    ca, url = (folder / "ca.pem").read_bytes(), f"https://{server.http}/v1/token"
    mine = Counted(read_token(file), file, [url], ca)
    mine.better = (file, keys.issue(folder, "phone 2", 60))
    async with mine.renewing():
        await mine.renewed.wait()
    assert mine.tries == 4
    (told,) = [one.getMessage() for one in caplog.records if one.name == credentials.__name__]
    assert "401 device token refused" in told
    assert "not.a.token" not in told
    assert Verifier(keys.read(folder)).verify(mine.token()).device == "phone 2"


async def test_a_server_under_another_ca_never_sees_the_token(
    server: CloudServer, folder: Path, tmp_path: Path
) -> None:
    keys.make(tmp_path / "others", ["localhost"])
    token = keys.issue(folder, "phone", 60)
    mine = Credentials(token, None, [f"https://{server.http}/v1/token"], (tmp_path / "others" / "ca.pem").read_bytes())
    with pytest.raises(OSError, match="certificate verify failed"):
        await mine.renew()
    assert mine.token() == token


async def test_a_token_is_due_at_two_thirds_of_its_life() -> None:
    now = time.time()
    assert Credentials(unsigned(iat=now - 30, exp=now + 60)).due == pytest.approx(now + 30, abs=20)


@pytest.mark.parametrize(
    "token",
    [
        unsigned(iat=time.time() + 4000, exp=time.time() + 4900),  # one of the two clocks is wrong
        unsigned(iat=1, exp="x"),
        unsigned(iat=0, exp=1e400),
        "opaque",
        "",
    ],
    ids=["future", "words", "huge", "opaque", "none"],
)
async def test_a_token_that_says_no_time_is_due_at_once(token: str) -> None:
    assert Credentials(token).due == 0


@pytest.mark.parametrize(
    ("content", "mode", "words"),
    [
        (b"good", 0o644, "has mode 0644, and others may read the token: chmod 600"),
        (b"good", 0o660, "has mode 0660"),
        (b"", 0o600, "holds no token"),
        (b"two words", 0o600, "holds no token"),
        (b"x" * 4097, 0o600, "holds no token: must be 1 to 4096"),
        ("tökén".encode(), 0o600, "holds no token"),
    ],
)
async def test_a_token_file_that_cannot_be_used_is_named(tmp_path: Path, content: bytes, mode: int, words: str) -> None:
    file = tmp_path / "token"
    file.write_bytes(content)
    file.chmod(mode)
    with pytest.raises(ValueError, match=words):
        read_token(file)


async def test_a_ca_is_fetched_once_and_only_the_one_with_the_fingerprint(
    server: CloudServer, folder: Path, tmp_path: Path
) -> None:
    urls = ["https://127.0.0.1:9/v1/token", f"https://{server.http}/v1/token"]
    got = await pinned_ca(urls, fingerprint(folder), tmp_path)
    assert ssl.PEM_cert_to_DER_cert(got.decode()) == ssl.PEM_cert_to_DER_cert((folder / "ca.pem").read_text())
    assert await pinned_ca([], fingerprint(folder), tmp_path) == got
    with pytest.raises(OSError, match=r"does not have the fingerprint 0000"):
        await pinned_ca(urls, "0" * 64, tmp_path)
    with pytest.raises(OSError, match=r"127\.0\.0\.1:9"):
        await pinned_ca(urls[:1], "0" * 64, tmp_path)


async def test_what_comes_along_with_the_right_certificate_is_not_trusted(folder: Path, tmp_path: Path) -> None:
    keys.make(tmp_path / "evil", ["localhost"])
    both = (folder / "ca.pem").read_text() + (tmp_path / "evil" / "ca.pem").read_text()
    State(tmp_path / "state").write("ca", {"pem": both})
    try:
        got = await pinned_ca([], fingerprint(folder), tmp_path / "state")
    except OSError:
        return
    assert len(ssl.create_default_context(cadata=got.decode()).get_ca_certs()) == 1


async def test_fingerprints_and_addresses_are_read_as_people_write_them() -> None:
    digits = "ab" * 32
    for text in (digits, digits.upper(), ":".join(["AB"] * 32), f"SHA256:{digits}"):
        assert normal_fingerprint(text) == digits
    for text in ("", "abc", "zz" * 32, digits + "00"):
        with pytest.raises(ValueError, match="64 hex digits"):
            normal_fingerprint(text)
    assert token_urls([], ["a:8000", "[::1]:8000"]) == ("https://a:8000/v1/token", "https://[::1]:8000/v1/token")
    for url in ("http://a/v1/token", "a:8000", "https://"):
        with pytest.raises(ValueError, match="must be https"):
            token_urls([url], [])
