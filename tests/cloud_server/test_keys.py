"""The key folder: what is made, added, revoked and read again."""

from __future__ import annotations

import time
from pathlib import Path

import jwt
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes

from cloud_server import keys
from cloud_server.__main__ import main
from cloud_server.tokens import LONGEST_LIFE_S, Verifier
from protocol.errors import SessionFault


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    keys.make(tmp_path / "keys", ["localhost"])
    return tmp_path / "keys"


def kid_of(token: str) -> str:
    return str(jwt.get_unverified_header(token)["kid"])


def age(folder: Path, kid: str, seconds: float) -> str:
    """Makes a signing key older; returns its new kid."""
    created, rest = kid.split("-")
    older = f"{int(created) - int(seconds):010}-{rest}"
    (folder / "signing" / f"{kid}.pem").rename(folder / "signing" / f"{older}.pem")
    return older


def test_keys_are_private_and_never_overwritten(folder: Path) -> None:
    private = [folder / "ca.key", folder / "server.key", *(folder / "signing").iterdir()]
    assert len(private) == 3
    for path in (*private, folder, folder / "signing"):
        assert path.stat().st_mode & 0o077 == 0, path
    with pytest.raises(keys.BadKeys, match="is not empty"):
        keys.make(folder, ["localhost"])


def test_the_fingerprint_is_that_of_the_ca(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys", "fingerprint", "--keys", str(folder)]) == 0
    certificate = x509.load_pem_x509_certificate((folder / "ca.pem").read_bytes())
    assert capsys.readouterr().out.strip() == certificate.fingerprint(hashes.SHA256()).hex()


def test_a_new_key_signs_once_every_server_has_read_it(folder: Path) -> None:
    first = kid_of(keys.issue(folder, "phone"))
    first, second = age(folder, first, 100), keys.rotate(folder)
    assert set(keys.read(folder).keys) == {first, second}
    assert kid_of(keys.issue(folder, "phone")) == first
    second = age(folder, second, keys.SETTLE_S)
    assert kid_of(keys.issue(folder, "phone")) == second


def test_an_old_key_counts_for_the_longest_token_life_and_is_then_removed(folder: Path) -> None:
    token = keys.issue(folder, "phone", LONGEST_LIFE_S)
    first = kid_of(token)
    second = keys.rotate(folder)
    assert Verifier(keys.read(folder)).verify(token).device == "phone"
    first = age(folder, first, 3 * LONGEST_LIFE_S)
    second = age(folder, second, LONGEST_LIFE_S + keys.SETTLE_S + 10)
    assert set(keys.read(folder).keys) == {second}
    third = keys.rotate(folder)
    assert {path.stem for path in (folder / "signing").iterdir()} == {second, third}


def test_two_rotations_in_one_second_keep_their_order(folder: Path) -> None:
    made = [keys.rotate(folder) for _ in range(3)]
    assert sorted(made) == made


def test_a_revoked_device_is_out_with_the_tokens_it_has_and_in_with_a_later_one(folder: Path) -> None:
    token, other = keys.issue(folder, "phone 1"), keys.issue(folder, "phone 2")
    keys.revoke(folder, "phone 1")
    keys.revoke(folder, "phone 3")
    verifier = Verifier(keys.read(folder))
    with pytest.raises(SessionFault, match="'phone 1' was revoked"):
        verifier.verify(token)
    assert verifier.verify(other).device == "phone 2"
    (folder / "revoked").write_text(f"phone 1  {int(time.time()) - 100}\n")
    assert Verifier(keys.read(folder)).verify(token).device == "phone 1"


def test_revocations_that_no_token_can_outlive_are_forgotten(folder: Path) -> None:
    (folder / "revoked").write_text(f"old  {time.time() - LONGEST_LIFE_S - 10:.0f}\nnew  {time.time() - 10:.0f}\n")
    keys.revoke(folder, "phone")
    assert set(keys.read_revoked(folder)) == {"new", "phone"}


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("signing/key.pem", "", "<Unix time>-<16 hex digits>.pem"),
        ("signing/1700000000-0123456789abcdef.pem", "no key", "1700000000-0123456789abcdef.pem: "),
        ("revoked", "phone\n", "revoked: "),
        ("revoked", "phone yesterday\n", "revoked: "),
    ],
)
def test_a_folder_that_does_not_read_is_named(folder: Path, name: str, content: str, words: str) -> None:
    (folder / name).write_text(content)
    with pytest.raises(keys.BadKeys, match="keys") as bad:
        keys.read(folder)
    assert words in str(bad.value)


def test_a_folder_without_keys_is_named(tmp_path: Path) -> None:
    with pytest.raises(keys.BadKeys, match="`cloud-server keys rotate` makes one"):
        keys.read(tmp_path)
    with pytest.raises(keys.BadKeys, match="nowhere"):
        keys.revoke(tmp_path / "nowhere", "phone")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("keys",), "--name is missing"),
        (("keys", "--name", "here"), "is not empty"),
        (("token", "--device", "two\nlines"), "printable"),
        (("token", "--device", "x" * 129), "1 to 128"),
        (("token", "--device", "phone", "--ttl", "0"), "must be 1 to 2592000"),
        (("token", "--device", "phone", "--ttl", "1e9"), "must be 1 to 2592000"),
        (("token", "--device", "phone", "--ttl", "nan"), "must be 1 to 2592000"),
        (("revoke", "--device", ""), "1 to 128"),
        (("serve", "--requests-per-minute", "-1"), "--requests-per-minute -1, must be at least 0"),
        (("serve", "--sessions-per-device", "-1"), "--sessions-per-device -1, must be at least 0"),
        (("serve", "--token-life", "0"), "--token-life 0, must be 1 to 2592000 s"),
        (("serve", "--jwks", "/nowhere/jwks.json", "--host", "127.0.0.1", "--http-port", "0"), "/nowhere/jwks.json: "),
        (("serve", "--certificate", "x"), "need each other"),
    ],
)
def test_commands_that_cannot_be_say_why_in_one_line(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], words: str
) -> None:
    assert main([*arguments, "--keys", str(folder)]) == 2
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_without_keys_only_loopback_is_listened_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--model", "assistant-20m", "--host", "0.0.0.0"]) == 2
    assert "without --keys only loopback is listened on, not 0.0.0.0" in capsys.readouterr().err


def test_a_token_is_written_where_only_its_owner_reads_it(folder: Path, tmp_path: Path) -> None:
    given = ["token", "--keys", str(folder), "--device", "phone", "--scope", "admin", "--out", str(tmp_path / "token")]
    assert main(given) == 0
    assert (tmp_path / "token").stat().st_mode & 0o777 == 0o600
    caller = Verifier(keys.read(folder)).verify((tmp_path / "token").read_text().strip())
    assert caller.scopes == {"admin"}
    assert caller.expires <= time.time() + 900
